# SPDX-License-Identifier: Apache-2.0
"""What may be asked of an export: said before a byte is sent, in words."""

from __future__ import annotations

from dataclasses import dataclass

from pullback.errors import NbdRefused
from pullback.nbd import protocol as p
from pullback.nbd.protocol import Command, CommandFlag, NbdErrno, TransmissionFlag

_NO_FLAGS = CommandFlag(0)
_OFFERED_BY = {
    Command.FLUSH: TransmissionFlag.SEND_FLUSH,
    Command.TRIM: TransmissionFlag.SEND_TRIM,
    Command.WRITE_ZEROES: TransmissionFlag.SEND_WRITE_ZEROES,
}
_FLAG_OFFERED_BY = {
    CommandFlag.FUA: TransmissionFlag.SEND_FUA,
    CommandFlag.FAST_ZERO: TransmissionFlag.SEND_FAST_ZERO,
}
WRITING = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})
WITH_PAYLOAD = frozenset({Command.READ, Command.WRITE})


@dataclass(frozen=True, slots=True)
class Request:
    """One request; ``offset`` and ``length`` are bytes, both 0 for a flush."""

    command: Command
    offset: int
    length: int
    flags: CommandFlag = _NO_FLAGS

    def __str__(self) -> str:
        name = p.COMMAND_NAMES[self.command]
        return name if self.command is Command.FLUSH else f"{name} {self.length} bytes at {self.offset}"


def check(info: p.ExportInfo, request: Request) -> None:
    """Raise NbdRefused, with the errno a server would answer, when ``request`` cannot be asked of this export."""
    wrong = _not_offered(info, request)
    if wrong is None and request.command is not Command.FLUSH:
        wrong = _out_of_place(info, request)
    if wrong is not None:
        errno, why = wrong
        raise NbdRefused(f"Cannot {request} of export {info.name!r}: {why}", errno)


def _not_offered(info: p.ExportInfo, request: Request) -> tuple[NbdErrno, str] | None:
    command = request.command
    if command in WRITING and info.read_only:
        return NbdErrno.EPERM, "it is read-only"
    if command is Command.BLOCK_STATUS and not info.contexts:
        return NbdErrno.EINVAL, "no metadata context was negotiated"
    offer = _OFFERED_BY.get(command)
    if offer is not None and offer not in info.flags:
        return NbdErrno.ENOTSUP, f"the server does not offer {p.COMMAND_NAMES[command]}"
    if request.flags:
        for flag, offer in _FLAG_OFFERED_BY.items():
            if flag in request.flags and offer not in info.flags:
                return NbdErrno.ENOTSUP, f"the server does not offer {flag.name}"
    return None


def _out_of_place(info: p.ExportInfo, request: Request) -> tuple[NbdErrno, str] | None:
    offset, length, block = request.offset, request.length, info.min_block
    end = offset + length
    if offset < 0 or length < 1 or end > info.size:
        return NbdErrno.EINVAL, f"it is {info.size} bytes long"
    # The last block of an export may be a short one.
    if block > 1 and (offset % block or (end % block and end != info.size)):
        return NbdErrno.EINVAL, f"the server wants multiples of {block} bytes"
    limit = info.max_payload if request.command in WITH_PAYLOAD else p.MAX_LENGTH
    if length > limit:
        return NbdErrno.EOVERFLOW, f"one request takes {limit} bytes at most"
    return None
