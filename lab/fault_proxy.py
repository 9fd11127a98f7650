# SPDX-License-Identifier: Apache-2.0
"""An HTTP/1.1 proxy on loopback in front of one server, which does wrong what it is told to.

    client ─► FaultProxy ─► server           every request is passed on as it came, Host and signature included
                 │
                 └ faults: the first that matches a request and has not happened often enough happens to it

Requests and answers are held whole in memory.  A request is known here by its method and its path with the query.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

_LIMIT = 64 << 10
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Message:
    """A request or an answer: its first line, its header lines as they came, its body."""

    first: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    def head(self) -> bytes:
        lines = [self.first, *(f"{key}: {value}" for key, value in self.headers)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def with_body(self, body: bytes) -> Message:
        """The same with another body, and a length that says so."""
        kept = tuple(one for one in self.headers if one[0].lower() not in ("content-length", "transfer-encoding"))
        return replace(self, headers=(*kept, ("Content-Length", str(len(body)))), body=body)

    def without(self, name: str) -> Message:
        return replace(self, headers=tuple(one for one in self.headers if one[0].lower() != name))


class Exchange:
    """One request on its way: ``forward`` has the server answer it, ``reply`` sends an answer to the client."""

    def __init__(
        self, request: Message, forward: Callable[[], Awaitable[Message]], reply: Callable[[bytes], Awaitable[None]]
    ) -> None:
        self.request = request
        self.forward = forward
        self._reply = reply

    async def reply(self, answer: Message, cut: int = 0) -> None:
        """Send an answer, without its last ``cut`` bytes."""
        whole = answer.head() + answer.body
        await self._reply(whole[: len(whole) - cut])


class Dropped(Exception):
    """The connection is to be closed here."""


Deed = Callable[[Exchange], Awaitable[None]]


async def passed_on(exchange: Exchange) -> None:
    """No fault: the server's answer as it is."""
    await exchange.reply(await exchange.forward())


async def drop(exchange: Exchange) -> None:
    """The server never hears of the request; the connection is closed."""
    raise Dropped


async def drop_answer(exchange: Exchange) -> None:
    """The server does what it was asked to, but its answer is lost with the connection."""
    await exchange.forward()
    raise Dropped


def delay(seconds: float) -> Deed:
    """The request arrives later."""

    async def deed(exchange: Exchange) -> None:
        await asyncio.sleep(seconds)
        await passed_on(exchange)

    return deed


def answer(status: str, code: str = "", message: str = "by the fault proxy") -> Deed:
    """The server never hears of it; the answer is this status, for instance ``503 Slow Down``, and S3's error code."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>" if code else ""

    async def deed(exchange: Exchange) -> None:
        content = b"" if exchange.request.first.startswith("HEAD ") else body.encode()
        headers = (("Content-Type", "application/xml"), ("Content-Length", str(len(body))))
        await exchange.reply(Message(f"HTTP/1.1 {status}", headers, content))

    return deed


def away(seconds: float) -> Deed:
    """For so long from the first such request on every connection is closed; then all is well."""
    until: list[float] = []

    async def deed(exchange: Exchange) -> None:
        now = asyncio.get_running_loop().time()
        if not until:
            until.append(now + seconds)
        await (drop if now < until[0] else passed_on)(exchange)

    return deed


class Hold:
    """The request arrives when ``release`` was called; ``reached`` is set as soon as one waits."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._go: Future[None] = Future()

    async def __call__(self, exchange: Exchange) -> None:
        self.reached.set()
        await asyncio.shield(asyncio.wrap_future(self._go))
        await passed_on(exchange)

    def release(self) -> None:
        self._go.set_result(None)


async def truncate(exchange: Exchange) -> None:
    """The second half of the answer's body is missing, and the connection ends there."""
    real = await exchange.forward()
    await exchange.reply(real, cut=(len(real.body) + 1) // 2)
    raise Dropped


async def shorten(exchange: Exchange) -> None:
    """The second half of the answer's body is missing, and the headers say that this is all of it."""
    real = await exchange.forward()
    short = real.with_body(real.body[: len(real.body) // 2])
    await exchange.reply(short)


async def flip(exchange: Exchange) -> None:
    """One bit in the middle of the answer's body is another."""
    real = await exchange.forward()
    body = bytearray(real.body)
    if body:
        body[len(body) // 2] ^= 1
    await exchange.reply(replace(real, body=bytes(body)))


@dataclass
class Fault:
    """What happens to the next ``times`` requests of this method whose path holds ``path`` (a regular expression).

    The first ``after`` of them are spared.  ``happened`` counts.
    """

    deed: Deed
    method: str = ""
    path: str = ""
    times: float = 1
    after: int = 0
    happened: int = 0

    def takes(self, method: str, path: str) -> bool:
        if self.method not in ("", method) or not re.search(self.path, path) or self.happened >= self.times:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.happened += 1
        return True


@dataclass
class FaultProxy:
    """A context manager: a proxy for the server on port ``upstream`` of loopback, in a thread of its own.

    ``faults`` may be changed at any time.  ``seen`` holds every request as ``METHOD PATH``.  With ``tls`` its clients
    have to speak TLS; the server never does.
    """

    upstream: int
    faults: list[Fault] = field(default_factory=list)
    latency: float = 0.0
    seen: list[str] = field(default_factory=list)
    port: int = 0
    tls: ssl.SSLContext | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy")
        self._thread.start()
        listening = asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=_LIMIT, ssl=self.tls)
        self._server: asyncio.Server = self._do(listening)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def endpoint(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"

    def fault(self, deed: Deed, method: str = "", path: str = "", times: float = 1, after: int = 0) -> Fault:
        """Have a fault happen from now on."""
        made = Fault(deed, method, path, times, after)
        self.faults.append(made)
        return made

    def count(self, pattern: str) -> int:
        """How many requests were seen whose ``METHOD PATH`` holds a regular expression."""
        return sum(bool(re.search(pattern, one)) for one in list(self.seen))

    def _do(self, what: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(60)

    async def _close(self) -> None:
        self._server.close()
        current = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not current]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server = _Upstream(self.upstream)
        try:
            while (request := await _read_request(reader, writer)) is not None:
                await self._one(request, server, writer)
        except (Dropped, ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            # Only ever by _close; a task of a stream that ends cancelled is reported as a failure.
            pass
        finally:
            server.close()
            writer.close()

    async def _one(self, request: Message, server: _Upstream, writer: asyncio.StreamWriter) -> None:
        method, path, _ = request.first.split(" ", 2)
        self.seen.append(f"{method} {path}")
        if self.latency:
            await asyncio.sleep(self.latency)

        async def reply(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        deed = next((fault.deed for fault in self.faults if fault.takes(method, path)), passed_on)
        await deed(Exchange(request, lambda: server.ask(request, method), reply))


class _Upstream:
    """The server's end of one client's connection; connected anew where the server closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: Message, method: str) -> Message:
        try:
            return await self._ask(request, method)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.close()
            return await self._ask(request, method)

    async def _ask(self, request: Message, method: str) -> Message:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=_LIMIT)
        reader, writer = self._streams
        writer.write(request.head() + request.body)
        await writer.drain()
        while True:
            real = await _read_message(reader, bodyless=method == "HEAD")
            if real is None:
                raise ConnectionResetError
            if not real.first.split(" ", 2)[1].startswith("1"):
                break
        if (real.header("connection") or "").lower() == "close":
            self.close()
        return real

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Message | None:
    """The next request; one that waits for leave to send its body is given it."""

    async def leave(head: Message) -> None:
        if (head.header("expect") or "").lower() == "100-continue":
            writer.write(_CONTINUE)
            await writer.drain()

    request = await _read_message(reader, before_body=leave)
    return request.without("expect") if request is not None else None


async def _read_message(
    reader: asyncio.StreamReader,
    bodyless: bool = False,
    before_body: Callable[[Message], Awaitable[None]] | None = None,
) -> Message | None:
    """A whole message, a chunked body as one with a length; None where the other end closed before it began one."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    headers = tuple((key, value.strip()) for key, _, value in (line.partition(":") for line in lines))
    message = Message(first, headers, b"")
    status = first.split(" ", 2)[1]
    if bodyless or (first.startswith("HTTP/") and (status.startswith("1") or status in ("204", "304"))):
        return message
    if before_body is not None:
        await before_body(message)
    if (message.header("transfer-encoding") or "").lower() == "chunked":
        return message.with_body(await _read_chunks(reader))
    length = int(message.header("content-length") or 0)
    return replace(message, body=await reader.readexactly(length))


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    found = bytearray()
    while True:
        size = int((await reader.readline()).split(b";")[0], 16)
        found += await reader.readexactly(size)
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readline()
        if size == 0:
            return bytes(found)
