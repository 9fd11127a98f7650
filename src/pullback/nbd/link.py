# SPDX-License-Identifier: Apache-2.0
"""The asyncio client's socket: bytes from it go where the handshake, then the codec, wants them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from pullback.errors import NbdDisconnected, NbdProtocolError, NbdRefused
from pullback.nbd import protocol as p
from pullback.nbd.address import Address, TcpAddress, UnixAddress
from pullback.nbd.client_handshake import ClientHandshake


class ClientLink(asyncio.BufferedProtocol):
    """One connection; first it carries a handshake, then whatever ``attach`` says."""

    def __init__(self, handshake: ClientHandshake) -> None:
        self._handshake = handshake
        self._transport: asyncio.Transport | None = None
        self._scratch = memoryview(bytearray(p.MAX_OPTION_DATA))
        self._buffer: Callable[[], memoryview] = lambda: self._scratch
        self._received: Callable[[int], None] = self._negotiate
        self._lost: Callable[[str], None] = self._give_up
        self._writable: Callable[[], object] = lambda: None
        self._failure: NbdProtocolError | NbdRefused | ConnectionResetError | None = None
        self._progress = asyncio.Event()
        self.full = False
        self.closed = asyncio.Event()

    def attach(
        self,
        buffer: Callable[[], memoryview],
        received: Callable[[int], None],
        lost: Callable[[str], None],
        writable: Callable[[], object],
    ) -> None:
        """Hand over after the handshake."""
        self._buffer, self._received, self._lost, self._writable = buffer, received, lost, writable
        if self.closed.is_set():
            lost("it closed the connection")

    def write(self, data: bytes | memoryview) -> None:
        """Send ``data``, or queue it; a connection that is gone swallows it."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self, grace: float) -> None:
        """Close once everything queued is sent, or after ``grace`` seconds."""
        if self._transport is not None and not self.closed.is_set():
            self._transport.close()
            timer = asyncio.get_running_loop().call_later(grace, self.abort)
            self._lost = lambda _: timer.cancel()

    def abort(self) -> None:
        """Close now."""
        if self._transport is not None:
            self._transport.abort()

    async def settle(self, transport: asyncio.Transport, address: Address, tls: ssl.SSLContext | None) -> None:
        """Carry the handshake to its end; raise what went wrong."""
        self._transport = transport
        while not self._handshake.done:
            await self._progress.wait()
            self._progress.clear()
            if self._failure is not None:
                raise self._failure
            if self._handshake.starttls and tls is not None:
                await self._encrypt(transport, address, tls)
        self.write(self._handshake.data_to_send())

    async def _encrypt(self, transport: asyncio.Transport, address: Address, tls: ssl.SSLContext) -> None:
        name = address.host if isinstance(address, TcpAddress) else "localhost"
        loop = asyncio.get_running_loop()
        encrypted = await loop.start_tls(transport, self, tls, server_hostname=name)
        if encrypted is None:
            raise ConnectionResetError("it closed the connection")
        self._transport = encrypted
        self._handshake.tls_started()
        self.write(self._handshake.data_to_send())

    def _negotiate(self, count: int) -> None:
        try:
            self._handshake.receive(bytes(self._scratch[:count]))
        except (NbdProtocolError, NbdRefused) as error:
            self._failure = error
        else:
            if not self._handshake.starttls:
                self.write(self._handshake.data_to_send())
        self._progress.set()

    def _give_up(self, reason: str) -> None:
        if self._failure is None:
            self._failure = ConnectionResetError(reason)
        self._progress.set()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Nothing to do: the server speaks first, and ``settle`` knows the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes belong."""
        return self._buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """So many have come."""
        self._received(nbytes)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, from either side."""
        self.closed.set()
        reason = getattr(exc, "strerror", None) or (str(exc) if exc else "") or "it closed the connection"
        self._lost(reason)

    def pause_writing(self) -> None:
        """Enough is queued."""
        self.full = True

    def resume_writing(self) -> None:
        """There is room again."""
        self.full = False
        self._writable()


async def negotiate(
    address: Address, handshake: ClientHandshake, timeout: float, tls: ssl.SSLContext | None
) -> ClientLink:
    """Connect and shake hands within ``timeout`` seconds; the errors are those of ``NbdConnection.connect``."""
    loop = asyncio.get_running_loop()
    link = ClientLink(handshake)
    stage = f"Nothing answers for NBD at {address}"
    try:
        async with asyncio.timeout(timeout):
            if isinstance(address, UnixAddress):
                transport, _ = await loop.create_unix_connection(lambda: link, address.path)
            else:
                transport, _ = await loop.create_connection(lambda: link, address.host, address.port)
            stage = f"The NBD handshake with {address} failed"
            await link.settle(transport, address, tls)
    except NbdRefused:
        link.write(handshake.abort())
        link.close(timeout)
        raise
    except OSError as error:  # TimeoutError and ssl.SSLError are among its kinds
        link.abort()
        reason = "it did not answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise NbdDisconnected(f"{stage}: {reason}") from error
    except BaseException:
        link.abort()
        raise
    return link
