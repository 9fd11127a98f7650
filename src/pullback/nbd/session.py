# SPDX-License-Identifier: Apache-2.0
"""One client of the NBD server."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import Final

from pullback.errors import NbdProtocolError, PullbackError
from pullback.nbd import protocol as p
from pullback.nbd.backend import Backend, Buffer, WritableBackend
from pullback.nbd.protocol import Command, CommandFlag
from pullback.nbd.requests import WITH_PAYLOAD
from pullback.nbd.server_codec import ClientRequest, ServerCodec
from pullback.nbd.server_handshake import ServerHandshake

_MAX_REQUESTS: Final = 16
_MAX_BYTES: Final = 64 * p.MIB
_HANDSHAKE_SECONDS: Final = 30.0  # then a client that says nothing is let go


class Session(asyncio.BufferedProtocol):
    """A connection from its greeting to its end."""

    def __init__(
        self,
        exports: Mapping[str, Backend],
        infos: Mapping[str, p.ExportInfo],
        pool: Executor,
        tls: ssl.SSLContext | None,
        gone: Callable[[Session], object],
    ) -> None:
        self._exports = exports
        self._pool = pool
        self._tls = tls
        self._gone = gone
        self._handshake = ServerHandshake(infos, tls=tls is not None)
        self._scratch = memoryview(bytearray(4096))
        self._codec: ServerCodec | None = None
        self._backend: Backend | None = None
        self._transport: asyncio.Transport | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._bytes = 0
        self._early = bytearray()
        self._room = asyncio.Event()
        self._room.set()
        self._timer: asyncio.TimerHandle | None = None
        self.closed = asyncio.Event()

    def cut(self) -> None:
        """Let go of the client now."""
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._timer = asyncio.get_running_loop().call_later(_HANDSHAKE_SECONDS, self.cut)
        transport.write(self._handshake.data_to_send())

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes belong."""
        return self._scratch if self._codec is None else self._codec.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """So many have come."""
        try:
            if self._codec is None:
                self._negotiate(nbytes)
            else:
                self._serve(self._codec, nbytes)
        except NbdProtocolError:
            self.cut()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, from either side; work under way is finished or dropped, its replies go nowhere."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        self._room.set()
        self._gone(self)
        self.closed.set()

    def pause_writing(self) -> None:
        """The client does not take its replies fast enough."""
        self._room.clear()
        self._throttle()

    def resume_writing(self) -> None:
        """It does again."""
        self._room.set()
        self._throttle()

    # Handshake

    def _negotiate(self, count: int) -> None:
        assert self._transport is not None
        handshake = self._handshake
        if handshake.starttls:
            # asyncio hands over what came with the end of the TLS handshake before start_tls() returns.  Nothing
            # unencrypted gets here: reading was paused before the client was told to begin.
            self._early += self._scratch[:count]
            if len(self._early) > p.MAX_OPTION_DATA:
                raise NbdProtocolError("The NBD client does not wait for replies")
            return
        self._listen(bytes(self._scratch[:count]))

    def _listen(self, data: bytes) -> None:
        assert self._transport is not None
        handshake = self._handshake
        handshake.receive(data)
        if handshake.starttls:
            self._transport.pause_reading()  # what comes next belongs to TLS
            self._start(self._encrypt(self._transport))
        self._transport.write(handshake.data_to_send())
        if not handshake.done:
            return
        if self._timer is not None:
            self._timer.cancel()
        if handshake.info is None:
            self._transport.close()
        else:
            self._backend = self._exports[handshake.info.name]
            self._codec = ServerCodec(handshake.info)

    async def _encrypt(self, transport: asyncio.Transport) -> None:
        assert self._tls is not None
        try:
            encrypted = await asyncio.get_running_loop().start_tls(transport, self, self._tls, server_side=True)
        except OSError:  # ssl.SSLError is one: a client that does not trust us, or nonsense
            self.cut()
            return
        if encrypted is not None:
            self._transport = encrypted
            self._handshake.tls_started()
            try:
                self._listen(bytes(self._early))
            except NbdProtocolError:
                self.cut()

    # Transmission

    def _serve(self, codec: ServerCodec, count: int) -> None:
        assert self._transport is not None
        codec.received(count)
        while (request := codec.next_event()) is not None:
            self._bytes += _payload_size(request)
            self._start(self._answer(codec, request))
        if refusals := codec.data_to_send():
            self._transport.write(refusals)
        if codec.disconnected:
            self._finish()
        self._throttle()

    def _start(self, work: Coroutine[object, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A defect of a backend.  The client must not wait for ever, and the defect must be seen.
            context = {"message": "An NBD backend failed", "exception": error, "task": task}
            asyncio.get_running_loop().call_exception_handler(context)
            self.cut()
        if self._codec is not None and self._codec.disconnected:
            self._finish()
        self._throttle()

    def _finish(self) -> None:
        """After the client's goodbye: close when everything it asked for is answered."""
        if not self._tasks and self._transport is not None:
            self._transport.close()

    def _throttle(self) -> None:
        if self._transport is None or self._transport.is_closing() or self._codec is None:
            return
        if len(self._tasks) >= _MAX_REQUESTS or self._bytes >= _MAX_BYTES or not self._room.is_set():
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    async def _answer(self, codec: ServerCodec, client: ClientRequest) -> None:
        assert self._backend is not None and self._transport is not None
        payload: Buffer = b""
        loop = asyncio.get_running_loop()
        try:
            head, payload = await loop.run_in_executor(self._pool, _perform, self._backend, codec, client)
        except OSError as error:
            head = codec.reply_error(client, p.to_nbd_errno(error.errno), error.strerror or str(error))
        except PullbackError as error:
            head = codec.reply_error(client, p.NbdErrno.EIO, error.what)
        while not self._room.is_set():  # again: all who waited wake up, and the first of them may use up the room
            await self._room.wait()
        if not self._transport.is_closing():
            self._transport.write(head)
            if len(payload):
                self._transport.write(payload)
        self._bytes -= _payload_size(client)


def _payload_size(client: ClientRequest) -> int:
    return client.request.length if client.request.command in WITH_PAYLOAD else 0


def _perform(backend: Backend, codec: ServerCodec, client: ClientRequest) -> tuple[bytes, Buffer]:
    """Do what is asked, in a worker thread; return a reply's head and payload."""
    request = client.request
    offset, length = request.offset, request.length
    if request.command is Command.READ:
        data = backend.read(offset, length)
        if len(data) != length:
            raise AssertionError(f"the backend returned {len(data)} bytes for a read of {length}")
        return codec.reply_data(client), data
    if request.command is Command.BLOCK_STATUS:
        return codec.reply_extents(client, {p.BASE_ALLOCATION: backend.extents(offset, length)}), b""
    assert isinstance(backend, WritableBackend)  # the codec refuses writes to a read-only export
    match request.command:
        case Command.WRITE:
            backend.write(offset, client.data)
        case Command.WRITE_ZEROES:
            backend.write_zeroes(offset, length, CommandFlag.NO_HOLE in request.flags)
        case Command.TRIM:
            backend.trim(offset, length)
        case Command.FLUSH:
            backend.flush()
    if CommandFlag.FUA in request.flags and request.command is not Command.FLUSH:
        backend.flush()
    return codec.reply_done(client), b""
