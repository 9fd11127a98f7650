# SPDX-License-Identifier: Apache-2.0
"""Numbers and names of the NBD protocol (the protocol document's section «Values»).

Everything on the wire is big-endian.  Only what pullback speaks is here: fixed newstyle negotiation, simple and
structured replies with 32-bit lengths, and block status.
"""

from __future__ import annotations

import errno as _errno
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20

MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OLDSTYLE_MAGIC: Final = 0x00420281861253
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

GREETING: Final = Struct(">QQH")  # magic, option magic, handshake flags
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">QII")  # magic, option, length of data
OPTION_REPLY: Final = Struct(">QIII")  # magic, option, reply type, length of data
EXPORT_NAME_REPLY: Final = Struct(">QH")  # size, transmission flags; 124 zero bytes may follow
EXPORT_NAME_PADDING: Final = 124
INFO_EXPORT: Final = Struct(">HQH")  # info type, size, transmission flags
INFO_BLOCK_SIZE: Final = Struct(">HIII")  # info type, minimum, preferred, maximum payload
REQUEST: Final = Struct(">IHHQQI")  # magic, command flags, type, cookie, offset, length
SIMPLE_REPLY: Final = Struct(">IIQ")  # magic, error, cookie
STRUCTURED_REPLY: Final = Struct(">IHHQI")  # magic, flags, type, cookie, length of payload
U16: Final = Struct(">H")
U32: Final = Struct(">I")
U64: Final = Struct(">Q")
CHUNK_HOLE: Final = Struct(">QI")  # offset, size
CHUNK_ERROR: Final = Struct(">IH")  # error, length of message

# Limits.  The first four are the protocol's; the others are ours, so that no peer decides how much memory we use.
MAX_STRING: Final = 4096
MAX_SIZE: Final = (1 << 63) - 1
MAX_LENGTH: Final = (1 << 32) - 1  # of one request without payload (trim, write zeroes, block status)
DEFAULT_MAX_PAYLOAD: Final = 32 * MIB
DEFAULT_PREFERRED_BLOCK: Final = 4096
MAX_MIN_BLOCK: Final = 64 * KIB
MAX_OPTION_DATA: Final = 64 * KIB  # of one option, or of one reply to an option
MAX_OPTION_REPLIES: Final = 10_000  # to one option, so also exports in a list
MAX_OPTIONS: Final = 1_000  # that one client may send
MAX_CONTEXTS: Final = 256
MAX_STATUS_EXTENTS: Final = 2 * MIB  # per chunk; QEMU sends at most 128 Ki, nbdkit 1 Mi
MAX_ERROR_CHUNKS: Final = 1024  # per reply
MAX_READ_SPANS: Final = 64 * KIB  # disjoint pieces of one read that have come so far
MAX_PENDING: Final = 1024  # requests under way on one connection


class HandshakeFlag(IntFlag):
    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(IntEnum):
    """Type of a reply to an option; errors have bit 31 set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009
    ERR_EXT_HEADER_REQD = 0x8000000A


REPLY_ERROR_BIT: Final = 1 << 31


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


COMMAND_NAMES: Final = {command: command.name.lower().replace("_", " ") for command in Command}


class CommandFlag(IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class Chunk(IntEnum):
    """Type of a structured reply chunk; errors have bit 15 set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


CHUNK_ERROR_BIT: Final = 1 << 15
CHUNK_DONE: Final = 1 << 0

BASE_ALLOCATION: Final = "base:allocation"


class AllocationFlag(IntFlag):
    """What ``base:allocation`` says of an extent."""

    HOLE = 1 << 0
    ZERO = 1 << 1


class NbdErrno(IntEnum):
    """The protocol's error numbers; they are Linux's, whatever the machine."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


# Not an error number of the protocol, but what «no such export» is to everyone who reads one.
ENOENT: Final = 2

ERRNO_MEANINGS: Final[dict[int, str]] = {
    NbdErrno.EPERM: "operation not permitted",
    ENOENT: "no such export",
    NbdErrno.EIO: "input/output error",
    NbdErrno.ENOMEM: "cannot allocate memory",
    13: "permission denied",  # EACCES: QEMU says so of a broken snapshot, outside the protocol's list
    NbdErrno.EINVAL: "invalid argument",
    NbdErrno.ENOSPC: "no space left",
    NbdErrno.EOVERFLOW: "value too large",
    NbdErrno.ENOTSUP: "operation not supported",
    NbdErrno.ESHUTDOWN: "server is shutting down",
}

REPLY_ERRNO: Final[dict[int, int]] = {
    Reply.ERR_UNSUP: NbdErrno.ENOTSUP,
    Reply.ERR_POLICY: NbdErrno.EPERM,
    Reply.ERR_INVALID: NbdErrno.EINVAL,
    Reply.ERR_PLATFORM: NbdErrno.ENOTSUP,
    Reply.ERR_TLS_REQD: NbdErrno.EPERM,
    Reply.ERR_UNKNOWN: ENOENT,
    Reply.ERR_SHUTDOWN: NbdErrno.ESHUTDOWN,
    Reply.ERR_BLOCK_SIZE_REQD: NbdErrno.EINVAL,
    Reply.ERR_TOO_BIG: NbdErrno.EOVERFLOW,
    Reply.ERR_EXT_HEADER_REQD: NbdErrno.ENOTSUP,
}


def errno_name(number: int) -> str:
    """Name an error number for people, such as ``ENOSPC (no space left)``."""
    try:
        name = NbdErrno(number).name
    except ValueError:
        name = _errno.errorcode.get(number, f"error {number}")
    meaning = ERRNO_MEANINGS.get(number)
    return f"{name} ({meaning})" if meaning else name


def to_nbd_errno(number: int | None) -> NbdErrno:
    """Map an errno of this machine to the nearest one the protocol knows, EIO when there is none."""
    match number:
        case _errno.EPERM | _errno.EACCES | _errno.EROFS:
            return NbdErrno.EPERM
        case _errno.ENOMEM:
            return NbdErrno.ENOMEM
        case _errno.EINVAL:
            return NbdErrno.EINVAL
        case _errno.ENOSPC | _errno.EDQUOT | _errno.EFBIG:
            return NbdErrno.ENOSPC
        case _errno.EOVERFLOW:
            return NbdErrno.EOVERFLOW
        case _errno.ENOTSUP | _errno.ENOSYS:
            return NbdErrno.ENOTSUP
        case _errno.ESHUTDOWN:
            return NbdErrno.ESHUTDOWN
        case _:
            return NbdErrno.EIO


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a handshake found out about one export.

    ``size``, the block sizes and ``max_payload`` are bytes; a server that names no block sizes gets the
    protocol's defaults (1, 4096, 32 MiB).  ``contexts`` maps the metadata contexts that were asked for *and*
    are there to the ids that this connection uses for them.
    """

    name: str
    size: int
    flags: TransmissionFlag
    min_block: int = 1
    preferred_block: int = DEFAULT_PREFERRED_BLOCK
    max_payload: int = DEFAULT_MAX_PAYLOAD
    contexts: dict[str, int] = field(default_factory=dict)
    description: str = ""
    structured_replies: bool = True

    @property
    def read_only(self) -> bool:
        """Whether the server refuses every write."""
        return TransmissionFlag.READ_ONLY in self.flags
