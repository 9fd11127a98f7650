# SPDX-License-Identifier: Apache-2.0
"""An NBD client for asyncio; calls made at the same time share one connection.

For control and for moderate amounts of data; ``blocking`` is the data path.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from pullback.errors import NbdDisconnected, NbdProtocolError, NbdRefused
from pullback.nbd import protocol as p
from pullback.nbd.address import Address
from pullback.nbd.blocking import STEP, Buffer
from pullback.nbd.client_codec import ClientCodec, Completed
from pullback.nbd.client_handshake import ClientHandshake
from pullback.nbd.extents import Extents, merge_extents
from pullback.nbd.framing import pieces
from pullback.nbd.link import ClientLink, negotiate

_IN_FLIGHT: Final = 64  # requests; more callers wait for their turn


class AsyncNbdClient:
    """One connection to one export; make it with ``connect``.

    A call that is cancelled does not disturb the others (its write may still happen).  NbdRefused concerns one
    call; NbdProtocolError or NbdDisconnected ends the connection and every call under way, and is what every
    later call raises.
    """

    def __init__(self, link: ClientLink, info: p.ExportInfo, where: str, timeout: float) -> None:
        self.info = info
        self._link = link
        self._codec = ClientCodec(info)
        self._where = where
        self._timeout = timeout
        self._waiters: dict[int, asyncio.Future[Completed]] = {}
        self._room = asyncio.Event()
        self._failure: NbdProtocolError | NbdDisconnected | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._heard = 0.0
        link.attach(self._codec.buffer, self._received, self._lost, self._room.set)

    @classmethod
    async def connect(
        cls,
        address: Address,
        export: str,
        *,
        contexts: Sequence[str] = (),
        timeout: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> Self:
        """Connect; the parameters and what is raised are those of ``NbdConnection.connect``."""
        handshake = ClientHandshake(export, contexts, tls=tls is not None)
        link = await negotiate(address, handshake, timeout, tls)
        return cls(link, handshake.info, f"{export!r} at {address}", timeout)

    async def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes."""
        data = bytearray(length)
        view = memoryview(data)
        for start, size in pieces(length, self.info.max_payload):
            await self._turn()
            await self._done(self._codec.read(offset + start, view[start : start + size]))
        return bytes(data)

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write ``data``; after a failure any part of it may have been written."""
        view = memoryview(data).cast("B")
        for start, size in pieces(len(view), self.info.max_payload):
            await self._turn()
            await self._done(self._codec.write(offset + start, size, fua=fua), view[start : start + size])

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool = False) -> None:
        """Make a range of any length read as zeroes, as holes where the server can unless ``no_hole``."""
        for start, size in pieces(length, STEP):
            await self._turn()
            await self._done(self._codec.write_zeroes(offset + start, size, no_hole=no_hole))

    async def trim(self, offset: int, length: int) -> None:
        """Tell the server that a range of any length is not needed any more."""
        for start, size in pieces(length, STEP):
            await self._turn()
            await self._done(self._codec.trim(offset + start, size))

    async def flush(self) -> None:
        """Make everything written so far durable."""
        await self._turn()
        await self._done(self._codec.flush())

    async def block_status(self, offset: int, length: int, context: str) -> list[tuple[int, int]]:
        """Return ``(length, flags)`` from ``offset`` on, for less than 4 GiB; the answer may end early."""
        return list(zip(*await self._block_status(offset, length, context), strict=True))

    async def extents(self, context: str, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Return the whole map of a range as ``(offset, length, flags)``, equal neighbours merged."""
        parts: list[Extents] = []
        at, end = offset, offset + length
        while at < end:
            parts.append(await self._block_status(at, min(STEP, end - at), context))
            at += sum(parts[-1][0])
        return merge_extents(offset, parts)

    async def close(self) -> None:
        """Say goodbye and close; may be called again.  Calls under way get NbdDisconnected."""
        if self._failure is None:
            self._link.write(self._codec.disconnect())
            self._end(NbdDisconnected(f"The connection to export {self._where} was closed"))
            self._link.close(self._timeout)
        await self._link.closed.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _block_status(self, offset: int, length: int, context: str) -> Extents:
        if context not in self.info.contexts:
            raise NbdRefused(f"Export {self._where} has no metadata context {context!r}", p.NbdErrno.EINVAL)
        await self._turn()
        return (await self._done(self._codec.block_status(offset, length))).extents[context]

    async def _turn(self) -> None:
        """Wait until a request may be sent; no other call gets in before the caller's next ``await``."""
        while self._failure is None and (self._link.full or self._codec.pending >= _IN_FLIGHT):
            self._room.clear()
            await self._room.wait()
        if self._failure is not None:
            raise self._failure

    async def _done(self, request: tuple[int, bytes], payload: memoryview | None = None) -> Completed:
        cookie, header = request
        loop = asyncio.get_running_loop()
        if not self._waiters:
            self._heard = loop.time()  # silence counts from the moment an answer is due
        if self._watch is None:
            self._watch = loop.call_later(self._timeout, self._look)
        waiter: asyncio.Future[Completed] = loop.create_future()
        self._waiters[cookie] = waiter
        self._link.write(header)
        if payload is not None:
            self._link.write(payload)
        done = await waiter
        if done.error is not None:
            raise done.error
        return done

    def _received(self, count: int) -> None:
        self._heard = asyncio.get_running_loop().time()
        try:
            self._codec.received(count)
        except NbdProtocolError as error:
            self._end(error)
            self._link.abort()
            return
        while (done := self._codec.next_event()) is not None:
            waiter = self._waiters.pop(done.cookie)
            if not waiter.done():  # a cancelled call's answer is of no interest
                waiter.set_result(done)
            self._room.set()

    def _look(self) -> None:
        """Has the server been silent for too long while an answer is due?"""
        self._watch = None
        if not self._waiters:
            return
        loop = asyncio.get_running_loop()
        left = self._heard + self._timeout - loop.time()
        if left > 0:
            self._watch = loop.call_later(left, self._look)
        else:
            self._lost("it did not answer in time")
            self._link.abort()

    def _lost(self, reason: str) -> None:
        self._end(NbdDisconnected(f"The NBD server of export {self._where} went away: {reason}"))

    def _end(self, failure: NbdProtocolError | NbdDisconnected) -> None:
        if self._failure is None:
            self._failure = failure
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(self._failure)
        self._waiters.clear()
        self._room.set()


async def list_exports(
    address: Address, *, timeout: float = 30.0, tls: ssl.SSLContext | None = None
) -> list[tuple[str, str]]:
    """Return the names and descriptions of the exports at ``address``."""
    handshake = ClientHandshake(listing=True, tls=tls is not None)
    link = await negotiate(address, handshake, timeout, tls)
    link.close(timeout)
    await link.closed.wait()
    return handshake.exports
