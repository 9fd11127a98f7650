# SPDX-License-Identifier: Apache-2.0
"""Cut a stream of bytes into messages, without I/O and without copying payload.

A codec says what it waits for: a header of so many bytes (``expect``), or a payload that belongs into a given
buffer (``expect_payload``).  The driver asks where the next bytes go, puts them there (``recv_into``), and says
how many came.  Reading a little ahead of a header saves a system call per message; what was read ahead of a
payload is copied over.

    staging   [ header | read ahead ............ ]      small, fixed, ours
    payload   [ ................................ ]      the caller's, filled by the driver itself
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pullback.errors import NbdProtocolError


class Receiver:
    """The receiving end of a codec; ``limit`` is the longest header that will ever be expected, in bytes."""

    def __init__(self, limit: int, *, read_ahead: int) -> None:
        self._staging = bytearray(limit + read_ahead)
        self._view = memoryview(self._staging)
        self._start = 0
        self._end = 0
        self._read_ahead = read_ahead
        self._need = 0
        self._header: Callable[[bytes], None] = _nothing_expected
        self._payload: memoryview | None = None
        self._payload_done: Callable[[], None] = _no_payload_expected
        self._failure: NbdProtocolError | None = None

    @property
    def in_payload(self) -> bool:
        """Whether ``buffer()`` will be filled to its end by bytes that are on their way."""
        return self._payload is not None

    def expect(self, need: int, then: Callable[[bytes], None]) -> None:
        """Wait for ``need`` bytes and hand them to ``then``."""
        self._need, self._header = need, then

    def expect_payload(self, target: memoryview, then: Callable[[], None]) -> None:
        """Wait until ``target`` (not empty) is full, then call ``then``."""
        self._payload, self._payload_done = target, then

    def buffer(self) -> memoryview:
        """Say where the next bytes from the peer belong; never empty."""
        if self._failure is not None:
            raise self._failure
        if self._payload is not None:
            return self._payload
        if self._start:
            rest = self._end - self._start
            self._staging[:rest] = self._staging[self._start : self._end]
            self._start, self._end = 0, rest
        return self._view[self._end : self._need + self._read_ahead]

    def received(self, count: int) -> None:
        """Note that the first ``count`` bytes of ``buffer()`` have come."""
        try:
            if self._payload is None:
                self._end += count
                self._drain()
            elif self._filled(count):
                self._drain()
        except NbdProtocolError as error:
            self._failure = error
            raise

    def _filled(self, count: int) -> bool:
        assert self._payload is not None
        if count < len(self._payload):
            self._payload = self._payload[count:]
            return False
        self._payload = None
        self._payload_done()
        return True

    def _drain(self) -> None:
        """Use up what is staged."""
        while True:
            have = self._end - self._start
            if self._payload is not None:
                ahead = min(have, len(self._payload))
                if not ahead:
                    return
                self._payload[:ahead] = self._view[self._start : self._start + ahead]
                self._start += ahead
                self._filled(ahead)
            elif have >= self._need:
                data = bytes(self._view[self._start : self._start + self._need])
                self._start += self._need
                self._header(data)
            else:
                return


def pieces(length: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut ``length`` bytes into ``(start, length)`` of at most ``limit`` bytes each."""
    for start in range(0, length, limit):
        yield start, min(limit, length - start)


def _nothing_expected(data: bytes) -> None:
    raise AssertionError("bytes came before anything was expected")


def _no_payload_expected() -> None:
    raise AssertionError("payload came before any was expected")
