# SPDX-License-Identifier: Apache-2.0
"""What the NBD server serves: a range of bytes that can be read, and perhaps written.

The server calls these from its worker threads, several at a time.  An OSError becomes the protocol's error of
the same meaning (ENOSPC stays ENOSPC), a PullbackError an input/output error with its sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from pullback.nbd.protocol import AllocationFlag

Buffer = bytes | bytearray | memoryview


class Backend(Protocol):
    """An export that can be read; ``size`` is bytes and does not change."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    def read(self, offset: int, length: int) -> Buffer:
        """Return exactly ``length`` bytes."""

    def extents(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """Return ``(length, AllocationFlag)`` from ``offset`` on, at least one, none empty, none beyond the range."""


@runtime_checkable
class WritableBackend(Backend, Protocol):
    """An export that can be written too."""

    def write(self, offset: int, data: memoryview) -> None:
        """Store ``data``, which belongs to the backend from here on."""

    def write_zeroes(self, offset: int, length: int, no_hole: bool) -> None:
        """Make the range read as zeroes, allocated if ``no_hole``."""

    def trim(self, offset: int, length: int) -> None:
        """Forget the range, or do nothing."""

    def flush(self) -> None:
        """Make everything written so far durable."""


class MemoryBackend:
    """A writable export in memory; it knows where it was never written to, by pages of ``page`` bytes."""

    def __init__(self, data: bytes | bytearray, *, page: int = 65536) -> None:
        self._data = bytearray(data)
        self._page = page
        self._zeroes = bytes(page)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        """Return a copy, so that a write at the same time cannot tear a reply that is being sent."""
        return bytes(memoryview(self._data)[offset : offset + length])

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Report pages that hold nothing but zeroes as holes."""
        found: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            size = min(self._page - offset % self._page, end - offset)
            hole = self._data[offset : offset + size] == self._zeroes[:size]
            flags = int(AllocationFlag.HOLE | AllocationFlag.ZERO) if hole else 0
            if found and found[-1][1] == flags:
                found[-1] = (found[-1][0] + size, flags)
            else:
                found.append((size, flags))
            offset += size
        return found

    def write(self, offset: int, data: memoryview) -> None:
        """Store ``data``."""
        self._data[offset : offset + len(data)] = data

    def write_zeroes(self, offset: int, length: int, no_hole: bool) -> None:
        """Zero the range."""
        self._data[offset : offset + length] = bytes(length)

    def trim(self, offset: int, length: int) -> None:
        """Zero the range."""
        self._data[offset : offset + length] = bytes(length)

    def flush(self) -> None:
        """Memory is as durable as it gets."""
