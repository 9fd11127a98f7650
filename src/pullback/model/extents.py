# SPDX-License-Identifier: Apache-2.0
"""Extents of a disk: what NBD's block status says of it, as values.

An *extent* is ``(offset, length, kind)``, a *span* is ``(offset, length)``; all in bytes.  Lists of either are sorted,
do not overlap, and hold no two neighbours that could be one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    """What a range of a disk holds: bytes worth reading, or zeroes."""

    ZERO = 0
    DATA = 1


class Span(NamedTuple):
    """``length`` bytes from ``offset``."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class Extent(NamedTuple):
    """``length`` bytes from ``offset``, all of one kind."""

    offset: int
    length: int
    kind: Kind

    @property
    def end(self) -> int:
        return self.offset + self.length


#: Flag bits of NBD's ``base:allocation`` and of QEMU's ``qemu:dirty-bitmap`` contexts.
FLAG_ZERO = 2
FLAG_DIRTY = 1


def merged(spans: Iterable[tuple[int, int]], gap: int = 0) -> list[Span]:
    """Sorted spans, with those that touch or overlap, or have ``gap`` bytes or less between them, made one."""
    result: list[Span] = []
    begin, end = -1, -1 - gap
    # Plain numbers, and a Span only when it is whole: a large disk has hundreds of thousands of them, and most are
    # equally long.
    lengths: dict[int, int] = {}
    for offset, length in spans:
        if offset <= end + gap:
            if offset + length > end:
                end = offset + length
        elif length:
            if begin >= 0:
                result.append(Span(begin, lengths.setdefault(end - begin, end - begin)))
            begin, end = offset, offset + length
    if begin >= 0:
        result.append(Span(begin, end - begin))
    return result


def allocation(status: Iterable[tuple[int, int, int]]) -> list[Extent]:
    """The extents of a ``base:allocation`` context's ``(offset, length, flags)``.

    What is not known to be zero is data: a hole without the zero flag may read as anything.
    """
    result: list[Extent] = []
    for offset, length, flags in status:
        kind = Kind.ZERO if flags & FLAG_ZERO else Kind.DATA
        if result and result[-1].kind is kind and result[-1].end == offset:
            last = result[-1]
            result[-1] = Extent(last.offset, last.length + length, kind)
        else:
            result.append(Extent(offset, length, kind))
    return result


def complement(spans: Iterable[Span], size: int) -> Iterator[Span]:
    """What of the disk's ``size`` bytes the sorted ``spans`` leave out."""
    position = 0
    for offset, length in spans:
        if offset > position:
            yield Span(position, offset - position)
        if offset + length > position:
            position = offset + length
    if position < size:
        yield Span(position, size - position)


class Cover:
    """Answers, for ascending ranges, whether sorted spans meet them.  One pass over the spans altogether."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans: Iterator[Span] = iter(spans)
        self._current: Span | None = next(self._spans, None)

    def meets(self, offset: int, end: int) -> bool:
        """Whether any span shares a byte with ``[offset, end)``; ``offset`` must not go down between calls."""
        while self._current is not None and self._current.end <= offset:
            self._current = next(self._spans, None)
        return self._current is not None and self._current.offset < end
