# SPDX-License-Identifier: Apache-2.0
"""Between pullback's NBD connections and the server: breaks one off after a byte, or answers one request wrongly."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from struct import Struct
from unittest import mock

from pullback.nbd.address import Address
from pullback.nbd.stream import connect_socket

# The protocol's numbers and layouts, written down a second time: a proxy with the codec's own would share its mistakes.
GREETING, CLIENT_FLAGS = Struct(">QQH"), Struct(">I")
OPTION, OPTION_REPLY = Struct(">QII"), Struct(">QIII")
REQUEST, SIMPLE, STRUCTURED = Struct(">IHHQQI"), Struct(">IIQ"), Struct(">IHHQI")
SIMPLE_MAGIC, STRUCTURED_MAGIC = 0x67446698, 0x668E33EF
GO, ACK, DONE = 7, 1, 1
READ, WRITE, FLUSH, TRIM, WRITE_ZEROES, BLOCK_STATUS = 0, 1, 3, 4, 6, 7
NONE_CHUNK, DATA_CHUNK, HOLE_CHUNK, ERROR_CHUNK = 0, 1, 2, 0x8001


@dataclass(frozen=True, slots=True)
class Request:
    """What pullback asked for."""

    command: int
    cookie: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Reply:
    """One structured chunk, the last of its reply unless ``more``; ``length`` and ``magic`` may be made to lie."""

    request: Request
    kind: int = NONE_CHUNK
    payload: bytes = b""
    more: bool = False
    cookie: int | None = None
    length: int | None = None
    magic: int = STRUCTURED_MAGIC

    def __bytes__(self) -> bytes:
        cookie = self.request.cookie if self.cookie is None else self.cookie
        length = len(self.payload) if self.length is None else self.length
        return STRUCTURED.pack(self.magic, 0 if self.more else DONE, self.kind, cookie, length) + self.payload


#: What the client gets instead of a chunk.
Deed = Callable[[Reply], bytes]


def error(number: int) -> Deed:
    """An error of this number."""
    return lambda reply: bytes(Reply(reply.request, ERROR_CHUNK, number.to_bytes(4, "big") + bytes(2)))


def altered(**changes: object) -> Deed:
    """The true chunk with other fields."""
    return lambda reply: bytes(replace(reply, **changes))  # type: ignore[arg-type]


@dataclass
class NbdProxy:
    """Hands everything on but what it is told to spoil, once.

    With ``reset_after`` the connection that carries the so manieth byte to the client ends there.  With ``deed`` the
    ``nth`` request of ``command`` is answered by it; the server never hears of it if ``instead``, and what follows is
    ``cut`` off if wanted.  ``carried`` counts bytes to the client, ``asked`` the requests of each command.
    """

    reset_after: int | None = None
    deed: Deed | None = None
    command: int = READ
    nth: int = 1
    instead: bool = False
    cut: bool = False
    times: int = 1

    def __post_init__(self) -> None:
        self.carried = 0
        self.happened = 0
        self.asked: dict[int, int] = {}
        self.lock = threading.Lock()
        self._links: list[_Link] = []

    @contextlib.contextmanager
    def between(self) -> Iterator[NbdProxy]:
        """While the block runs, every new connection goes through here."""
        with mock.patch("pullback.nbd.blocking.connect_socket", self._connect):
            try:
                yield self
            finally:
                for link in self._links:
                    link.end()

    def _connect(self, address: Address, timeout: float) -> socket.socket:
        server = connect_socket(address, timeout)
        server.settimeout(None)
        ours, theirs = socket.socketpair()
        with self.lock:
            self._links.append(_Link(self, theirs, server))
        return ours

    def wanted(self, request: Request) -> bool:
        """Whether this is the request to answer wrongly."""
        with self.lock:
            count = self.asked[request.command] = self.asked.get(request.command, 0) + 1
            hit = self.deed is not None and request.command == self.command and count >= self.nth
            hit = hit and self.happened < self.times
            self.happened += hit
            return hit

    def may_carry(self, data: bytes) -> tuple[bytes, bool]:
        """The part of ``data`` that reaches the client, and whether the connection ends after it."""
        with self.lock:
            left = None if self.reset_after is None or self.happened else self.reset_after - self.carried
            if left is None or len(data) < left:
                self.carried += len(data)
                return data, False
            self.happened += 1
            self.carried += left
            return data[:left], True


class _Over(Exception):
    """The connection has ended, or is to end here."""


class _Link:
    """One connection of the client's, and the one to the server that belongs to it; a thread for each direction."""

    def __init__(self, proxy: NbdProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._sending = threading.Lock()
        self._requests: dict[int, Request] = {}
        self._spoiled: set[int] = set()
        self._transmitting = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(work,)) for work in (self._upwards, self._downwards)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._shut()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._client.close()
        self._server.close()

    def _shut(self) -> None:
        for link in (self._client, self._server):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
                # As if it were closed.  With something left in it QEMU's end is not told that it may write, and QEMU
                # waits for that with all else that it does.
                while link.recv(1 << 20):
                    pass

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, _Over):
            pass
        finally:
            self._shut()

    @staticmethod
    def _take(link: socket.socket, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = link.recv(min(count - len(data), 1 << 20))
            if not piece:
                raise _Over
            data += piece
        return bytes(data)

    def _to_client(self, data: bytes, cut: bool = False) -> None:
        with self._sending:
            part, over = self._proxy.may_carry(data)
            self._client.sendall(part)
        if over or cut:
            raise _Over

    def _upwards(self) -> None:
        self._server.sendall(self._take(self._client, CLIENT_FLAGS.size))
        number = 0
        while number != GO:
            head = self._take(self._client, OPTION.size)
            number, length = OPTION.unpack(head)[1:]
            self._server.sendall(head + self._take(self._client, length))
        while True:
            head = self._take(self._client, REQUEST.size)
            _, _, command, cookie, offset, length = REQUEST.unpack(head)
            payload = self._take(self._client, length) if command == WRITE else b""
            request = self._requests[cookie] = Request(command, cookie, offset, length)
            if not self._proxy.wanted(request):
                self._server.sendall(head + payload)
            elif self._proxy.instead:
                self._spoil(Reply(request))
            else:
                self._spoiled.add(cookie)
                self._server.sendall(head + payload)

    def _spoil(self, reply: Reply) -> None:
        assert self._proxy.deed is not None
        self._to_client(self._proxy.deed(reply), self._proxy.cut)

    def _downwards(self) -> None:
        self._to_client(self._take(self._server, GREETING.size))
        option, kind = 0, 0
        while (option, kind) != (GO, ACK):
            head = self._take(self._server, OPTION_REPLY.size)
            _, option, kind, length = OPTION_REPLY.unpack(head)
            self._to_client(head + self._take(self._server, length))
        while True:
            head = self._take(self._server, SIMPLE.size)
            magic, _, cookie = SIMPLE.unpack(head)
            if magic == SIMPLE_MAGIC:
                # To nothing but requests without an answer in bytes, once structured replies are agreed on.
                self._hand_on(cookie, head, Reply(self._requests[cookie]))
                continue
            head += self._take(self._server, STRUCTURED.size - SIMPLE.size)
            _, flags, kind, cookie, length = STRUCTURED.unpack(head)
            payload = self._take(self._server, length)
            reply = Reply(self._requests[cookie], kind, payload, not flags & DONE)
            self._hand_on(cookie, head + payload, reply)

    def _hand_on(self, cookie: int, data: bytes, reply: Reply) -> None:
        if cookie not in self._spoiled:
            self._to_client(data)
            return
        self._spoiled.discard(cookie)
        self._spoil(reply)
