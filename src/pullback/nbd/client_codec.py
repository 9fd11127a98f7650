# SPDX-License-Identifier: Apache-2.0
"""The client's half of the NBD transmission phase, without I/O.

    driver                               ClientCodec
      │  cookie, header = read(0, buf) ◄───┤        send the header (after a write's header, its data)
      │  view = buffer() ◄─────────────────┤        where the next bytes belong
      ├── received(n) ────────────────────►│        so many of them came
      │  next_event() ◄────────────────────┤        Completed, or None

The payload of a read goes straight into the caller's buffer, that of a block status into one of its own.
Nothing else is stored, and all of it has a limit (``protocol``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pullback.errors import NbdProtocolError, NbdRefused
from pullback.nbd import protocol as p
from pullback.nbd.coverage import Coverage
from pullback.nbd.extents import Extents, parse_extents
from pullback.nbd.framing import Receiver
from pullback.nbd.requests import Request, check

_ZEROES: Final = bytes(p.MIB)
_NO_BUFFER: Final = memoryview(b"")
_MAX_ERROR_CHUNK: Final = 2 * p.MAX_STRING  # kinds of error chunks we do not know may hold more than a message
_READ_AHEAD: Final = 12  # a simple reply's 16 bytes and these are the header of a data chunk

_Then = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Completed:
    """One request is over; ``error`` is None when it succeeded, ``extents`` is per context of a block status."""

    cookie: int
    error: NbdRefused | None
    extents: dict[str, Extents]


@dataclass(slots=True)
class _Pending:
    request: Request
    buffer: memoryview
    coverage: Coverage | None = None
    error: NbdRefused | None = None
    error_chunks: int = 0
    extents: dict[str, Extents] = field(default_factory=dict)


class ClientCodec:
    """Build requests, and take replies apart, on the connection whose handshake gave ``info``.

    A request that the export cannot take (outside of it, not aligned, not offered) raises NbdRefused and leaves
    no trace.  After an NbdProtocolError the codec only repeats it.
    """

    def __init__(self, info: p.ExportInfo, *, read_ahead: int = _READ_AHEAD) -> None:
        self._info = info
        self._context_names = {number: name for name, number in info.contexts.items()}
        self._pending: dict[int, _Pending] = {}
        self._last_cookie = 0
        self._events: deque[Completed] = deque()
        self._receiver = Receiver(_MAX_ERROR_CHUNK, read_ahead=read_ahead)
        self.buffer = self._receiver.buffer
        self.received = self._receiver.received
        self._cookie = 0
        self._chunk_flags = 0
        self._chunk_length = 0
        self._next_reply()

    @property
    def pending(self) -> int:
        """Number of requests that ``next_event`` has not reported."""
        return len(self._pending) + len(self._events)

    @property
    def in_payload(self) -> bool:
        """Whether ``buffer()`` will be filled to its end by bytes that are on their way."""
        return self._receiver.in_payload

    def next_event(self) -> Completed | None:
        """Take the oldest request that is over; None when there is none."""
        return self._events.popleft() if self._events else None

    # Requests: each returns its cookie and the header to send

    def read(self, offset: int, buffer: memoryview) -> tuple[int, bytes]:
        """Ask for ``len(buffer)`` bytes at ``offset``; they land in ``buffer``, whatever it held before."""
        if buffer.readonly or not buffer.c_contiguous or buffer.itemsize != 1 or buffer.ndim != 1:
            raise NbdRefused("A read needs a writable buffer of bytes", p.NbdErrno.EINVAL)
        return self._submit(Request(p.Command.READ, offset, len(buffer)), buffer)

    def write(self, offset: int, length: int, *, fua: bool = False) -> tuple[int, bytes]:
        """Announce a write of ``length`` bytes, which the driver sends right after the header."""
        return self._submit(Request(p.Command.WRITE, offset, length, _flags(fua=fua)))

    def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool = False, fast: bool = False, fua: bool = False
    ) -> tuple[int, bytes]:
        """Ask for zeroes; ``no_hole`` keeps the range allocated, ``fast`` lets a slow server refuse (ENOTSUP)."""
        flags = _flags(fua=fua, no_hole=no_hole, fast=fast)
        return self._submit(Request(p.Command.WRITE_ZEROES, offset, length, flags))

    def trim(self, offset: int, length: int, *, fua: bool = False) -> tuple[int, bytes]:
        """Tell the server that a range is not needed any more; what it reads as afterwards is undefined."""
        return self._submit(Request(p.Command.TRIM, offset, length, _flags(fua=fua)))

    def flush(self) -> tuple[int, bytes]:
        """Ask for all writes that are over to be durable."""
        return self._submit(Request(p.Command.FLUSH, 0, 0))

    def block_status(self, offset: int, length: int, *, one: bool = False) -> tuple[int, bytes]:
        """Ask for the extents of a range, in every negotiated context; the answer may be shorter than the range."""
        flags = p.CommandFlag.REQ_ONE if one else p.CommandFlag(0)
        return self._submit(Request(p.Command.BLOCK_STATUS, offset, length, flags))

    @staticmethod
    def disconnect() -> bytes:
        """Say goodbye; the server answers by closing."""
        return p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.Command.DISC, 0, 0, 0)

    def _submit(self, request: Request, buffer: memoryview = _NO_BUFFER) -> tuple[int, bytes]:
        check(self._info, request)
        if len(self._pending) >= p.MAX_PENDING:
            raise NbdRefused(f"More than {p.MAX_PENDING} requests on one NBD connection", p.NbdErrno.EINVAL)
        self._last_cookie = cookie = self._last_cookie + 1
        self._pending[cookie] = _Pending(request, buffer)
        return cookie, p.REQUEST.pack(
            p.REQUEST_MAGIC, request.flags, request.command, cookie, request.offset, request.length
        )

    # Replies

    def _next_reply(self) -> None:
        self._receiver.expect(p.SIMPLE_REPLY.size, self._reply)

    def _reply(self, data: bytes) -> None:
        magic = p.U32.unpack_from(data)[0]
        if magic == p.STRUCTURED_REPLY_MAGIC and self._info.structured_replies:
            rest = p.STRUCTURED_REPLY.size - p.SIMPLE_REPLY.size
            self._receiver.expect(rest, lambda tail: self._chunk(data + tail))
        elif magic == p.SIMPLE_REPLY_MAGIC:
            self._simple(data)
        else:
            raise NbdProtocolError("The NBD server's reply does not start with the right number")

    def _find(self, cookie: int) -> _Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise NbdProtocolError(f"The NBD server answered request {cookie}, which nobody sent")
        return pending

    def _simple(self, data: bytes) -> None:
        _, errno, self._cookie = p.SIMPLE_REPLY.unpack(data)
        pending = self._find(self._cookie)
        command = pending.request.command
        if self._info.structured_replies and (command is p.Command.READ or _wants_extents(command, errno)):
            raise NbdProtocolError(f"The NBD server sent a simple reply to a {p.COMMAND_NAMES[command]}")
        if errno:
            self._refuse(pending, errno)
        elif command is p.Command.READ:
            self._receiver.expect_payload(pending.buffer, self._simple_payload)
            return
        self._finish(pending)

    def _simple_payload(self) -> None:
        pending = self._find(self._cookie)
        pending.coverage = Coverage(pending.request.length)
        pending.coverage.add(0, pending.request.length)
        self._finish(pending)

    def _chunk(self, data: bytes) -> None:
        _, self._chunk_flags, kind, self._cookie, length = p.STRUCTURED_REPLY.unpack(data)
        self._chunk_length = length
        pending = self._find(self._cookie)
        command = pending.request.command
        if kind & p.CHUNK_ERROR_BIT:
            limits = (p.CHUNK_ERROR.size, _MAX_ERROR_CHUNK)
            self._expect_chunk(kind, limits, length, lambda body: self._error_chunk(kind, body))
        elif kind == p.Chunk.NONE and length == 0 and self._chunk_flags & p.CHUNK_DONE:
            self._finish(pending)
        elif kind == p.Chunk.OFFSET_DATA and command is p.Command.READ:
            limits = (p.U64.size + 1, p.U64.size + pending.request.length)
            self._expect_chunk(kind, limits, p.U64.size, self._data_chunk)
        elif kind == p.Chunk.OFFSET_HOLE and command is p.Command.READ:
            self._expect_chunk(kind, (p.CHUNK_HOLE.size, p.CHUNK_HOLE.size), length, self._hole_chunk)
        elif kind == p.Chunk.BLOCK_STATUS and command is p.Command.BLOCK_STATUS:
            self._expect_chunk(kind, (12, 4 + 8 * p.MAX_STATUS_EXTENTS), p.U32.size, self._status_chunk)
        else:
            name = p.COMMAND_NAMES[command]
            raise NbdProtocolError(f"The NBD server answered a {name} with a chunk of type {kind}, {length} bytes")

    def _expect_chunk(self, kind: int, limits: tuple[int, int], need: int, then: _Then) -> None:
        if not limits[0] <= self._chunk_length <= limits[1]:
            raise NbdProtocolError(f"The NBD server sent a chunk of type {kind} with {self._chunk_length} bytes")
        self._receiver.expect(need, then)

    def _cover(self, offset: int, length: int) -> memoryview:
        """Note a piece of the current read; return the part of its buffer."""
        pending = self._find(self._cookie)
        if pending.coverage is None:
            pending.coverage = Coverage(pending.request.length)
        start = offset - pending.request.offset
        pending.coverage.add(start, length)
        return pending.buffer[start : start + length]

    def _data_chunk(self, body: bytes) -> None:
        (offset,) = p.U64.unpack(body)
        target = self._cover(offset, self._chunk_length - p.U64.size)
        self._receiver.expect_payload(target, self._end_chunk)

    def _hole_chunk(self, body: bytes) -> None:
        target = self._cover(*p.CHUNK_HOLE.unpack(body))
        for start in range(0, len(target), len(_ZEROES)):
            part = target[start : start + len(_ZEROES)]
            part[:] = _ZEROES[: len(part)]
        self._end_chunk()

    def _status_chunk(self, body: bytes) -> None:
        (number,) = p.U32.unpack(body)
        name = self._context_names.get(number)
        if name is None:
            raise NbdProtocolError(f"The NBD server answered in metadata context {number}, which was never negotiated")
        pending = self._find(self._cookie)
        if name in pending.extents:
            raise NbdProtocolError(f"The NBD server answered in metadata context {name!r} twice")
        data = bytearray(self._chunk_length - p.U32.size)

        def parse() -> None:
            request = pending.request
            one = p.CommandFlag.REQ_ONE in request.flags
            pending.extents[name] = parse_extents(data, request.length, one=one)
            self._end_chunk()

        self._receiver.expect_payload(memoryview(data), parse)

    def _error_chunk(self, kind: int, body: bytes) -> None:
        errno, length = p.CHUNK_ERROR.unpack_from(body)
        rest = body[p.CHUNK_ERROR.size :]
        if not errno or length > min(len(rest), p.MAX_STRING):
            raise NbdProtocolError("The NBD server sent an error without a number, or with a broken message")
        pending = self._find(self._cookie)
        pending.error_chunks += 1
        if pending.error_chunks > p.MAX_ERROR_CHUNKS:
            raise NbdProtocolError(f"The NBD server sent more than {p.MAX_ERROR_CHUNKS} errors for one request")
        where = None
        if kind == p.Chunk.ERROR_OFFSET:
            request = pending.request
            if len(rest) != length + p.U64.size:
                raise NbdProtocolError("The NBD server sent an error whose offset is missing")
            (where,) = p.U64.unpack_from(rest, length)
            if not request.offset <= where < request.offset + request.length:
                raise NbdProtocolError(f"The NBD server reported an error at {where}, outside of the request")
        self._refuse(pending, errno, rest[:length].decode(errors="replace"), where)
        self._end_chunk()

    def _refuse(self, pending: _Pending, errno: int, message: str = "", where: int | None = None) -> None:
        if pending.error is not None:
            return  # the first error is the one to tell
        request = pending.request
        what = f"The NBD server refused to {request} of export {self._info.name!r}"
        at = "" if where is None else f" at {where}"
        pending.error = NbdRefused(f"{what}: {p.errno_name(errno)}{at}{': ' + message if message else ''}", errno)

    def _end_chunk(self) -> None:
        if self._chunk_flags & p.CHUNK_DONE:
            self._finish(self._find(self._cookie))
        else:
            self._next_reply()

    def _finish(self, pending: _Pending) -> None:
        if pending.error is None:
            command = pending.request.command
            if command is p.Command.READ and (pending.coverage is None or not pending.coverage.complete):
                raise NbdProtocolError("The NBD server ended a read before all of it had come")
            if command is p.Command.BLOCK_STATUS and len(pending.extents) != len(self._context_names):
                raise NbdProtocolError("The NBD server ended a block status before every context was answered")
        del self._pending[self._cookie]
        self._events.append(Completed(self._cookie, pending.error, pending.extents))
        self._next_reply()


def _flags(*, fua: bool = False, no_hole: bool = False, fast: bool = False) -> p.CommandFlag:
    flags = p.CommandFlag.FUA if fua else p.CommandFlag(0)
    if no_hole:
        flags |= p.CommandFlag.NO_HOLE
    return flags | p.CommandFlag.FAST_ZERO if fast else flags


def _wants_extents(command: p.Command, errno: int) -> bool:
    return command is p.Command.BLOCK_STATUS and not errno
