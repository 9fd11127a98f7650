# SPDX-License-Identifier: Apache-2.0
"""Hold the pieces of one read together: every byte exactly once, in any order."""

from __future__ import annotations

from bisect import bisect_right

from pullback.errors import NbdProtocolError
from pullback.nbd.protocol import MAX_READ_SPANS


class Coverage:
    """Which bytes of ``[0, length)`` have come; touching pieces are kept as one, so pieces in order cost nothing."""

    __slots__ = ("_ends", "_length", "_starts")

    def __init__(self, length: int) -> None:
        self._length = length
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, length: int) -> None:
        """Note a piece; NbdProtocolError if it is empty, outside, or overlaps an earlier one."""
        end = start + length
        if length < 1 or start < 0 or end > self._length:
            raise NbdProtocolError(
                f"The NBD server answered a read of {self._length} bytes with {length} bytes at {start}"
            )
        starts, ends = self._starts, self._ends
        at = bisect_right(starts, start)  # the piece belongs before index ``at``
        if (at and ends[at - 1] > start) or (at < len(starts) and starts[at] < end):
            raise NbdProtocolError("The NBD server sent the same bytes of a read twice")
        joins_left = at > 0 and ends[at - 1] == start
        joins_right = at < len(starts) and starts[at] == end
        if joins_left and joins_right:
            ends[at - 1] = ends.pop(at)
            del starts[at]
        elif joins_left:
            ends[at - 1] = end
        elif joins_right:
            starts[at] = start
        elif len(starts) >= MAX_READ_SPANS:
            raise NbdProtocolError(f"The NBD server cut a read into more than {MAX_READ_SPANS} pieces")
        else:
            starts.insert(at, start)
            ends.insert(at, end)

    @property
    def complete(self) -> bool:
        """Whether not a byte is missing."""
        return self._ends[:1] == [self._length] and self._starts == [0]
