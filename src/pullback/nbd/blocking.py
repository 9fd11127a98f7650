# SPDX-License-Identifier: Apache-2.0
"""The data path: one connection, one blocking socket, one thread.

Several requests may be under way (``submit_*`` and ``wait``); while a large write waits for room in the socket,
replies are taken in, so two full socket buffers never block each other.  More throughput is more connections on
more threads: nothing here holds the interpreter's lock while bytes move.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Final, Self

from pullback.errors import NbdDisconnected, NbdProtocolError, NbdRefused
from pullback.nbd import protocol as p
from pullback.nbd.address import Address, TcpAddress
from pullback.nbd.client_codec import ClientCodec, Completed
from pullback.nbd.client_handshake import ClientHandshake
from pullback.nbd.extents import Extents, cut_extents, marked_extents, merge_extents
from pullback.nbd.framing import pieces
from pullback.nbd.stream import PlainStream, Stream, TlsStream, connect_socket

# Requests without payload go in steps of almost 4 GiB that keep every alignment a server may ask for.
STEP: Final = (1 << 32) - p.MAX_MIN_BLOCK

Buffer = bytes | bytearray | memoryview


class NbdConnection:
    """One connection to one export; make it with ``connect``.

    Not for several threads, except ``abort``.  NbdRefused leaves it usable.  After NbdProtocolError or
    NbdDisconnected it is closed, every call repeats the error, and what buffers of unfinished reads hold is
    undefined.
    """

    def __init__(self, sock: socket.socket, stream: Stream, info: p.ExportInfo, where: str) -> None:
        self.info = info
        self._sock = sock
        self._stream = stream
        self._codec = ClientCodec(info)
        self._where = where
        self._finished: deque[Completed] = deque()
        self._failure: NbdProtocolError | NbdDisconnected | None = None
        self._closed = False
        self._sending = False

    @classmethod
    def connect(
        cls,
        address: Address,
        export: str,
        *,
        contexts: Sequence[str] = (),
        timeout: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> Self:
        """Connect to ``export`` and negotiate the metadata ``contexts`` that it has (see ``info.contexts``).

        ``timeout`` is seconds, for all of this and later for any silence while a reply is awaited.  With ``tls``
        the connection is encrypted or not made; on a Unix socket the certificate is checked for ``localhost``.
        Raises NbdDisconnected when nobody is there, NbdRefused when the server says no (ENOENT: no such export).
        """
        handshake = ClientHandshake(export, contexts, tls=tls is not None)
        sock, stream = _negotiate(address, handshake, timeout, tls)
        return cls(sock, stream, handshake.info, f"{export!r} at {address}")

    # Pipelined: submit several, then wait for them one by one

    @property
    def pending(self) -> int:
        """Number of submitted requests that ``wait`` has not returned."""
        return self._codec.pending + len(self._finished)

    def submit_read(self, offset: int, buffer: memoryview) -> int:
        """Ask for ``len(buffer)`` bytes (at most ``info.max_payload``); they are there when ``wait`` says so."""
        return self._submit(self._codec.read(offset, buffer))

    def submit_reads(self, reads: Sequence[tuple[int, memoryview]]) -> list[int]:
        """Ask for several at once, ``(offset, buffer)`` each: as ``submit_read``, with one system call for all.

        After NbdRefused those before the refused one may be under way.
        """
        asked = list[tuple[int, bytes]]()
        try:
            for offset, buffer in reads:
                asked.append(self._codec.read(offset, buffer))
        finally:
            if asked:
                self._send(b"".join(header for _, header in asked))
        return [cookie for cookie, _ in asked]

    def submit_write(self, offset: int, data: Buffer) -> int:
        """Send a write of at most ``info.max_payload`` bytes; ``data`` may be reused on return."""
        view = memoryview(data).cast("B")
        return self._submit(self._codec.write(offset, len(view)), view)

    def submit_write_zeroes(self, offset: int, length: int, no_hole: bool = False) -> int:
        """Ask for zeroes, less than 4 GiB; ``no_hole`` keeps the range allocated."""
        return self._submit(self._codec.write_zeroes(offset, length, no_hole=no_hole))

    def submit_trim(self, offset: int, length: int) -> int:
        """Tell the server that a range of less than 4 GiB is not needed any more."""
        return self._submit(self._codec.trim(offset, length))

    def submit_flush(self) -> int:
        """Ask for all writes that are finished by now to be durable."""
        return self._submit(self._codec.flush())

    def wait(self) -> int:
        """Return the cookie of the next request that succeeded or raise NbdRefused for the next that did not."""
        cookie, error = self.wait_outcome()
        if error is not None:
            raise error
        return cookie

    def wait_outcome(self) -> tuple[int, NbdRefused | None]:
        """Return the next finished request's cookie, and the error if the server refused it."""
        if not self._finished:
            self._check_open()
            if not self._codec.pending:
                raise NbdRefused("No request is under way on this NBD connection", p.NbdErrno.EINVAL)
            self._finished.append(self._next_completed())
        done = self._finished.popleft()
        return done.cookie, done.error

    # One at a time, of any length

    def read_into(self, offset: int, buffer: memoryview | bytearray) -> None:
        """Fill ``buffer`` from ``offset`` on."""
        view = memoryview(buffer)
        for start, length in pieces(len(view), self.info.max_payload):
            self._complete(self.submit_read(offset + start, view[start : start + length]))

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes."""
        data = bytearray(length)
        self.read_into(offset, data)
        return bytes(data)

    def write(self, offset: int, data: Buffer) -> None:
        """Write ``data``; after a failure any part of it may have been written."""
        view = memoryview(data).cast("B")
        for start, length in pieces(len(view), self.info.max_payload):
            self._complete(self.submit_write(offset + start, view[start : start + length]))

    def write_zeroes(self, offset: int, length: int, no_hole: bool = False) -> None:
        """Make a range of any length read as zeroes, as holes where the server can unless ``no_hole``."""
        for start, size in pieces(length, STEP):
            self._complete(self.submit_write_zeroes(offset + start, size, no_hole))

    def trim(self, offset: int, length: int) -> None:
        """Tell the server that a range of any length is not needed any more."""
        for start, size in pieces(length, STEP):
            self._complete(self.submit_trim(offset + start, size))

    def flush(self) -> None:
        """Make everything written so far durable."""
        self._complete(self.submit_flush())

    # Maps

    def block_status(self, offset: int, length: int, context: str) -> list[tuple[int, int]]:
        """Return ``(length, flags)`` from ``offset`` on, for less than 4 GiB; the answer may end early."""
        self._check_context(context)
        return list(zip(*self._block_status(offset, length)[context], strict=True))

    def extents(self, context: str, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Return the whole map of a range as ``(offset, length, flags)``, equal neighbours merged."""
        self._check_context(context)
        return merge_extents(offset, self._walk(context, offset, length))

    def marked(self, context: str, offset: int, length: int, mask: int) -> Iterator[tuple[int, int]]:
        """Yield what of a range has any flag of ``mask``, as ``(offset, length)``; neighbours may follow each other."""
        self._check_context(context)
        return marked_extents(offset, self._walk(context, offset, length), mask)

    def extents_all(self, offset: int, length: int) -> dict[str, list[tuple[int, int, int]]]:
        """Return the map of a range in every negotiated context."""
        self._check_open()
        parts: dict[str, list[Extents]] = {context: [] for context in self.info.contexts}
        end, at = offset + length, offset
        while at < end and parts:
            found = self._block_status(at, min(STEP, end - at))
            covered = min(sum(lengths) for lengths, _ in found.values())
            for context, extents in found.items():
                parts[context].append(cut_extents(extents, covered))
            at += covered
        return {context: merge_extents(offset, part) for context, part in parts.items()}

    def _walk(self, context: str, offset: int, length: int) -> Iterator[Extents]:
        end = offset + length
        while offset < end:
            found = self._block_status(offset, min(STEP, end - offset))[context]
            yield found
            offset += sum(found[0])  # at least one byte: no extent is empty

    def _block_status(self, offset: int, length: int) -> dict[str, Extents]:
        return self._complete(self._submit(self._codec.block_status(offset, length))).extents

    def _check_context(self, context: str) -> None:
        if context not in self.info.contexts:
            raise NbdRefused(f"Export {self._where} has no metadata context {context!r}", p.NbdErrno.EINVAL)

    # Ending

    def close(self) -> None:
        """Say goodbye and close; may be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._failure is None and not self._sending:  # a goodbye inside of a payload would be written to disk
                self._stream.try_send([memoryview(self._codec.disconnect())])
        except OSError:
            pass  # the peer was faster
        finally:
            self._sock.close()

    def abort(self) -> None:
        """Cut the connection, from any thread; whoever waits on it gets NbdDisconnected."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is cut already

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The engine room

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise NbdDisconnected(f"The connection to export {self._where} was closed")

    def _submit(self, request: tuple[int, bytes], payload: memoryview | None = None) -> int:
        cookie, header = request
        self._send(header, payload)
        return cookie

    def _send(self, header: bytes, payload: memoryview | None = None) -> None:
        self._check_open()
        self._sending = True  # and it stays so if an interrupt gets us in the middle
        views = [memoryview(header)] if payload is None else [memoryview(header), payload]
        try:
            while views:
                sent = self._stream.try_send(views)
                views = _after(views, sent)
                if not sent:
                    self._make_room()
        except (OSError, NbdProtocolError) as error:
            raise self._fail(error) from error
        self._sending = False

    def _make_room(self) -> None:
        """Take in replies that keep the server from reading; wait only when there are none."""
        count = self._stream.try_recv_into(self._codec.buffer())
        if count is None:
            self._stream.wait()
        else:
            self._received(count)

    def _next_completed(self) -> Completed:
        codec, stream = self._codec, self._stream
        try:
            while (done := codec.next_event()) is None:
                self._received(stream.recv_into(codec.buffer(), whole=codec.in_payload))
        except (OSError, NbdProtocolError) as error:
            raise self._fail(error) from error
        return done

    def _received(self, count: int) -> None:
        if not count:
            raise ConnectionResetError("it closed the connection")
        self._codec.received(count)

    def _complete(self, cookie: int) -> Completed:
        """Wait for one request; others that finish meanwhile are kept for ``wait``."""
        while (done := self._next_completed()).cookie != cookie:
            self._finished.append(done)
        if done.error is not None:
            raise done.error
        return done

    def _fail(self, error: OSError | NbdProtocolError) -> NbdProtocolError | NbdDisconnected:
        if isinstance(error, NbdProtocolError):
            self._failure = error
        else:
            self._failure = NbdDisconnected(f"The NBD server of export {self._where} went away: {_reason(error)}")
        self.close()
        return self._failure


def list_exports(
    address: Address, *, timeout: float = 30.0, tls: ssl.SSLContext | None = None
) -> list[tuple[str, str]]:
    """Return the names and descriptions of the exports at ``address``."""
    handshake = ClientHandshake(listing=True, tls=tls is not None)
    sock, _ = _negotiate(address, handshake, timeout, tls)
    sock.close()
    return handshake.exports


def _negotiate(
    address: Address, handshake: ClientHandshake, timeout: float, tls: ssl.SSLContext | None
) -> tuple[socket.socket, Stream]:
    deadline = time.monotonic() + timeout
    try:
        sock = connect_socket(address, timeout)
    except OSError as error:
        raise NbdDisconnected(f"Nothing answers for NBD at {address}: {_reason(error)}") from error
    try:
        stream: Stream = PlainStream(sock, timeout)
        while not handshake.done:
            _exchange(handshake, stream, deadline)
            if handshake.starttls and tls is not None:
                sock.settimeout(_left(deadline))
                sock = tls.wrap_socket(sock, server_hostname=_tls_name(address))
                stream = TlsStream(sock, timeout)
                handshake.tls_started()
        _send_all(stream, handshake.data_to_send(), deadline)
        stream.set_timeout(timeout)
    except NbdRefused:
        _part(sock, handshake.abort())
        raise
    except OSError as error:
        sock.close()
        raise NbdDisconnected(f"The NBD handshake with {address} failed: {_reason(error)}") from error
    except BaseException:
        sock.close()
        raise
    return sock, stream


def _exchange(handshake: ClientHandshake, stream: Stream, deadline: float) -> None:
    _send_all(stream, handshake.data_to_send(), deadline)
    stream.set_timeout(_left(deadline))
    buffer = bytearray(p.MAX_OPTION_DATA)
    count = stream.recv_into(memoryview(buffer), whole=False)
    if not count:
        raise ConnectionResetError("it closed the connection (a server does so when it has no such export)")
    handshake.receive(bytes(buffer[:count]))


def _send_all(stream: Stream, data: bytes, deadline: float) -> None:
    views = [memoryview(data)] if data else []
    while views:
        stream.set_timeout(_left(deadline))
        sent = stream.try_send(views)
        views = _after(views, sent)
        if not sent:
            stream.wait()


def _part(sock: socket.socket, goodbye: bytes) -> None:
    with sock:
        try:
            sock.settimeout(0)
            sock.send(goodbye)
        except OSError:
            pass  # politeness only


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _tls_name(address: Address) -> str:
    return address.host if isinstance(address, TcpAddress) else "localhost"


def _after(views: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of ``views`` after ``sent`` bytes."""
    while views and sent >= len(views[0]):
        sent -= len(views[0])
        views = views[1:]
    return [views[0][sent:], *views[1:]] if views and sent else views


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return error.strerror or str(error) or type(error).__name__
