# SPDX-License-Identifier: Apache-2.0
"""The two kinds of socket the blocking client reads and writes: plain, and encrypted.

Both answer the same three calls.  A plain socket stays in blocking mode with SO_RCVTIMEO, so that one system call
fetches a whole payload (MSG_WAITALL) and another one is not needed to wait for it; an encrypted one polls.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from pullback.nbd.address import Address, UnixAddress

_TIMEVAL = struct.Struct("ll")
#: SO_SNDBUFFORCE (socket(7)): beyond what the system gives everybody; Python has no name for it.
_FORCE = 32
#: Bytes that are sent without waiting for the peer: some chunks of a restore (measured: 6 % of its time).
_SEND_BUFFER = 1 << 20
_MIB = 1 << 20


class Stream(Protocol):
    """What a connection needs of its socket."""

    def recv_into(self, view: memoryview, *, whole: bool) -> int:
        """Wait for bytes, for all of ``view`` if ``whole``; 0 at the end of the stream, TimeoutError on silence."""

    def try_recv_into(self, view: memoryview) -> int | None:
        """Take bytes that are there already; None when there are none."""

    def try_send(self, views: Sequence[memoryview]) -> int:
        """Send as much as goes without waiting; 0 when nothing goes."""

    def wait(self) -> None:
        """Wait until something can be sent or received; TimeoutError on silence."""

    def set_timeout(self, seconds: float) -> None:
        """Set how long a silence may last."""


class PlainStream:
    """A socket without encryption."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        sock.settimeout(None)
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN | select.POLLOUT)
        self.set_timeout(timeout)

    def set_timeout(self, seconds: float) -> None:
        """Set how long a silence may last."""
        self._timeout = seconds
        _set_kernel_timeout(self._sock, socket.SO_RCVTIMEO, seconds)

    def recv_into(self, view: memoryview, *, whole: bool) -> int:
        """Wait for bytes."""
        try:
            return self._sock.recv_into(view, 0, socket.MSG_WAITALL if whole else 0)
        except BlockingIOError:
            raise TimeoutError from None

    def try_recv_into(self, view: memoryview) -> int | None:
        """Take what is there."""
        try:
            return self._sock.recv_into(view, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def try_send(self, views: Sequence[memoryview]) -> int:
        """Send what goes."""
        try:
            return self._sock.sendmsg(views, [], socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def wait(self) -> None:
        """Wait for either direction."""
        if not self._poll.poll(self._timeout * 1000):
            raise TimeoutError


class TlsStream:
    """A socket under TLS, which may have to read in order to write and the other way round."""

    def __init__(self, sock: ssl.SSLSocket, timeout: float) -> None:
        sock.settimeout(0)
        self._sock = sock
        self._timeout = timeout

    def set_timeout(self, seconds: float) -> None:
        """Set how long a silence may last."""
        self._timeout = seconds

    def recv_into(self, view: memoryview, *, whole: bool) -> int:
        """Wait for bytes; TLS hands out a record (16 KiB) at a time, whatever ``whole`` says."""
        while True:
            try:
                return self._sock.recv_into(view)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)

    def try_recv_into(self, view: memoryview) -> int | None:
        """Take what is there."""
        try:
            return self._sock.recv_into(view)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None

    def try_send(self, views: Sequence[memoryview]) -> int:
        """Send what goes of the first buffer."""
        try:
            return self._sock.send(views[0][:_MIB])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def wait(self) -> None:
        """Wait for either direction."""
        self._wait(select.POLLIN | select.POLLOUT)

    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(self._sock, events)
        if not poll.poll(self._timeout * 1000):
            raise TimeoutError


def connect_socket(address: Address, timeout: float) -> socket.socket:
    """Connect within ``timeout`` seconds, or raise OSError."""
    if not isinstance(address, UnixAddress):
        sock = socket.create_connection((address.host, address.port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX)
    try:
        # Python's own time limit makes the socket non-blocking, and such a connect() fails at once when the
        # server's queue is full, instead of waiting for its turn.
        _set_kernel_timeout(sock, socket.SO_SNDTIMEO, timeout)
        with suppress(OSError):  # only root may
            sock.setsockopt(socket.SOL_SOCKET, _FORCE, _SEND_BUFFER)
        sock.connect(address.path)
    except BlockingIOError:
        sock.close()
        raise TimeoutError("timed out") from None
    except OSError:
        sock.close()
        raise
    return sock


def _set_kernel_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    micros = max(1000, int(seconds * 1_000_000))  # 0 would mean «for ever»
    sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(micros, 1_000_000)))
