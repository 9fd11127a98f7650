# SPDX-License-Identifier: Apache-2.0
"""The server's half of the NBD transmission phase, without I/O.

    driver                              ServerCodec
      │  view = buffer() ◄────────────────┤        where the next bytes belong
      ├── received(n) ───────────────────►│        so many of them came
      │  next_event() ◄───────────────────┤        ClientRequest, checked; or None
      │  data_to_send() ◄─────────────────┤        error replies to requests that failed the check
      │  reply_…(request) ◄───────────────┤        bytes of a reply

The payload of a write goes straight into a buffer that the driver allocates.  Which error answers what is in the
protocol's section «Error values».
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pullback.errors import NbdProtocolError, NbdRefused
from pullback.nbd import protocol as p
from pullback.nbd.extents import pack_extents
from pullback.nbd.framing import Receiver
from pullback.nbd.protocol import Command, CommandFlag
from pullback.nbd.requests import Request, check

_NO_DATA: Final = memoryview(b"")
_VALID_FLAGS: Final = {
    Command.READ: CommandFlag.FUA | CommandFlag.DF,
    Command.WRITE: CommandFlag.FUA,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlag.FUA | CommandFlag.REQ_ONE,
}


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """A request that the export can take; ``data`` is the payload of a write."""

    cookie: int
    request: Request
    data: memoryview


def _allocate(length: int) -> memoryview:
    return memoryview(bytearray(length))


class ServerCodec:
    """Take requests apart, and build replies, on the connection whose handshake gave ``info``.

    ``allocate`` makes the buffer for the payload of a write (bytes).  NbdProtocolError means that the client is
    to be cut off.
    """

    def __init__(
        self, info: p.ExportInfo, *, allocate: Callable[[int], memoryview] = _allocate, read_ahead: int = 0
    ) -> None:
        self._info = info
        self._allocate = allocate
        self._receiver = Receiver(p.REQUEST.size, read_ahead=read_ahead)
        self.buffer = self._receiver.buffer
        self.received = self._receiver.received
        self._events: deque[ClientRequest] = deque()
        self._outgoing = bytearray()
        self.disconnected = False
        self._next_request()

    def next_event(self) -> ClientRequest | None:
        """Take the oldest request; None when there is none."""
        return self._events.popleft() if self._events else None

    def data_to_send(self) -> bytes:
        """Take the error replies that the codec made itself; may be empty."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def _next_request(self) -> None:
        self._receiver.expect(p.REQUEST.size, self._request)

    def _request(self, header: bytes) -> None:
        if self.disconnected:
            raise NbdProtocolError("The NBD client sent something after its goodbye")
        magic, bits, kind, cookie, offset, length = p.REQUEST.unpack(header)
        if magic != p.REQUEST_MAGIC:
            raise NbdProtocolError("The NBD client's request does not start with the right number")
        if kind == Command.DISC:
            self.disconnected = True
        elif kind not in _VALID_FLAGS:
            self._outgoing += self._error(cookie, p.NbdErrno.EINVAL, f"unknown command {kind}")
        elif kind == Command.WRITE and length > p.DEFAULT_MAX_PAYLOAD:
            raise NbdProtocolError(f"The NBD client sent a write of {length} bytes")
        else:
            self._check(cookie, Request(Command(kind), offset, length, CommandFlag(bits)))

    def _check(self, cookie: int, request: Request) -> None:
        has_payload = request.command is Command.WRITE and request.length > 0
        data = _NO_DATA
        try:
            self._valid(request)
        except NbdRefused as error:
            if has_payload:  # it is on its way all the same
                self._receiver.expect_payload(_allocate(request.length), lambda: None)
            self._outgoing += self._error(cookie, _server_errno(request, error.errno, self._info.size), error.what)
            return
        if has_payload:
            data = self._allocate(request.length)
            self._receiver.expect_payload(data, lambda: self._events.append(ClientRequest(cookie, request, data)))
        else:
            self._events.append(ClientRequest(cookie, request, data))

    def _valid(self, request: Request) -> None:
        # int: the complement of an IntFlag knows only the flags that have names
        if int(request.flags) & ~int(_VALID_FLAGS[request.command]):
            raise NbdRefused(f"Flags {request.flags:#x} do not go with {request.command.name}", p.NbdErrno.EINVAL)
        if request.command is Command.FLUSH and (request.offset or request.length):
            raise NbdRefused("A flush has neither offset nor length", p.NbdErrno.EINVAL)
        check(self._info, request)

    # Replies

    def reply_done(self, request: ClientRequest) -> bytes:
        """Success without payload."""
        return p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def reply_error(self, request: ClientRequest, errno: p.NbdErrno, message: str = "") -> bytes:
        """Failure; ``message`` reaches clients with structured replies."""
        return self._error(request.cookie, errno, message)

    def reply_data(self, request: ClientRequest) -> bytes:
        """Success of a read: what comes before its payload, which the driver sends right after."""
        if not self._info.structured_replies:
            return self.reply_done(request)
        length = p.U64.size + request.request.length
        head = _chunk(p.Chunk.OFFSET_DATA, request.cookie, length, p.CHUNK_DONE)
        return head + p.U64.pack(request.request.offset)

    def reply_data_piece(self, request: ClientRequest, offset: int, length: int, *, done: bool) -> bytes:
        """Part of a structured reply to a read: what comes before ``length`` bytes of payload at ``offset``."""
        flags = p.CHUNK_DONE if done else 0
        return _chunk(p.Chunk.OFFSET_DATA, request.cookie, p.U64.size + length, flags) + p.U64.pack(offset)

    def reply_hole(self, request: ClientRequest, offset: int, length: int, *, done: bool) -> bytes:
        """Part of a structured reply to a read: ``length`` zeroes at ``offset``."""
        flags = p.CHUNK_DONE if done else 0
        return _chunk(p.Chunk.OFFSET_HOLE, request.cookie, p.CHUNK_HOLE.size, flags) + p.CHUNK_HOLE.pack(offset, length)

    def reply_extents(self, request: ClientRequest, found: Mapping[str, Sequence[tuple[int, int]]]) -> bytes:
        """Success of a block status: ``(length, flags)`` per negotiated context, from the request's offset on."""
        parts = []
        one = CommandFlag.REQ_ONE in request.request.flags
        for name, number in self._info.contexts.items():
            extents = found[name][: 1 if one else p.MAX_STATUS_EXTENTS]
            body = p.U32.pack(number) + pack_extents(extents)
            parts.append(_chunk(p.Chunk.BLOCK_STATUS, request.cookie, len(body), 0) + body)
        return b"".join(parts) + _chunk(p.Chunk.NONE, request.cookie, 0, p.CHUNK_DONE)

    def _error(self, cookie: int, errno: p.NbdErrno, message: str) -> bytes:
        if not self._info.structured_replies:
            return p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, errno, cookie)
        text = message.encode()[: p.MAX_STRING]
        body = p.CHUNK_ERROR.pack(errno, len(text)) + text
        return _chunk(p.Chunk.ERROR, cookie, len(body), p.CHUNK_DONE) + body


def _chunk(kind: p.Chunk, cookie: int, length: int, flags: int) -> bytes:
    return p.STRUCTURED_REPLY.pack(p.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)


def _server_errno(request: Request, errno: int, size: int) -> p.NbdErrno:
    """What a server answers where a client's own check says ``errno``."""
    if errno == p.NbdErrno.EPERM:
        return p.NbdErrno.EPERM
    grows = request.command in (Command.WRITE, Command.WRITE_ZEROES) and request.offset + request.length > size
    return p.NbdErrno.ENOSPC if grows else p.NbdErrno.EINVAL
