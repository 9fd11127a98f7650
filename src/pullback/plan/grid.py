# SPDX-License-Identifier: Apache-2.0
"""How a disk is cut into chunks: large ones where it is cold, small ones where it is hot.

    slot       0           1           2           3            256 KiB each
             ┌───────────┬──┬──┬──┬──┬───────────┬───────────┐
    chunks   │   cold    │  │hot  │  │   cold    │   empty   │
             └───────────┴──┴──┴──┴──┴───────────┴───────────┘

Every disk begins cold.  A slot that changes in part is cut into chunks of 64 KiB, once: the next change there stores
only these.  What is written into a slot of zeroes costs the same either way, and leaves it cold.  A segment on which
that happens widely and again (a database) is cut as a whole: its remaining slots would follow one by one, each at the
price of four.  The measurements behind the numbers stand in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate, compress

from pullback.model.extents import Span, merged
from pullback.model.units import CHUNK, HOT_CHUNK, SEGMENT

#: A segment is cut as a whole when one in so many of its slots was hot before and as many become so now; not below
#: this many slots.
WIDELY = 16
FEWEST = 16


class Slot(IntEnum):
    """What is known of a slot; an empty one is cut like a cold one."""

    EMPTY = 0
    COLD = 1
    HOT = 2


_COLD, _HOT = bytes([Slot.COLD]), bytes([Slot.HOT])
_COLD_SLOT, _HOT_SLOT = int(Slot.COLD), int(Slot.HOT)


@dataclass(frozen=True, slots=True)
class Grid:
    """How a segment of ``size`` bytes is cut: a :class:`Slot` for each 256 KiB.  Offsets are the segment's."""

    size: int
    slots: bytes

    @property
    def all_cold(self) -> bool:
        """Whether no slot is hot."""
        return _HOT not in self.slots

    @property
    def all_hot(self) -> bool:
        """Whether no slot is cold; empty ones may be among them."""
        return _COLD not in self.slots

    def numbers(self) -> Sequence[int]:
        """For each slot, and for the end, how many chunks come before it."""
        if self.all_cold:
            return range(len(self.slots) + 1)
        pieces = -(-CHUNK // HOT_CHUNK)
        counts = [pieces if slot == Slot.HOT else 1 for slot in self.slots]
        if self.slots[-1] == Slot.HOT:
            counts[-1] = -(-(self.size - (len(counts) - 1) * CHUNK) // HOT_CHUNK)
        return list(accumulate(counts, initial=0))

    def unit(self, offset: int) -> int:
        """The length of the chunk around ``offset``, unless the segment ends in it."""
        return HOT_CHUNK if self.slots[offset // CHUNK] == Slot.HOT else CHUNK

    def chunks(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Offset and length of the chunks of a range that begins and ends with chunks."""
        while start < end:
            unit = self.unit(start)
            length = min(unit, self.size - start)
            yield start, length
            start += length


class Places:
    """Finds the number of the chunk at an offset of a segment; made once for many questions."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._numbers = grid.numbers()

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return self._numbers[-1]

    def number(self, offset: int) -> int:
        """The number of the chunk that begins at ``offset``; of the segment's end, how many there are."""
        if offset >= self._grid.size:
            return self.count
        slot, rest = divmod(offset, CHUNK)
        return self._numbers[slot] + rest // HOT_CHUNK


def cold_grid(size: int) -> Grid:
    """A segment of which nothing is known yet."""
    return Grid(size, _COLD * -(-size // CHUNK))


def read_grid(lengths: Sequence[int], size: int) -> Grid | None:
    """The grid of a stored segment whose chunks have these ``lengths``; None when another program cut it.

    restic cuts by content, for instance; such a segment is read whole once.
    """
    slots = bytearray()
    position = at = 0
    while position < size and at < len(lengths):
        whole = min(CHUNK, size - position)
        if lengths[at] == whole:
            slots += _COLD
            at += 1
        else:
            pieces = [min(HOT_CHUNK, whole - start) for start in range(0, whole, HOT_CHUNK)]
            if lengths[at : at + len(pieces)] != pieces:
                return None
            slots += _HOT
            at += len(pieces)
        position += whole
    return Grid(size, bytes(slots)) if position == size and at == len(lengths) else None


def next_grid(base: Grid, dirty: Iterable[Span]) -> Grid:
    """The grid of a segment after it changed: ``dirty`` are the sorted, merged spans of it, in its own offsets."""
    slots = bytearray(base.slots)
    split = 0
    for span in dirty:
        # Slots between the first and the last are dirty as a whole.
        begin, last = span.offset, span.end
        for slot in {begin // CHUNK, (last - 1) // CHUNK}:
            start = slot * CHUNK
            if slots[slot] == _COLD_SLOT and (begin > start or last < min(start + CHUNK, base.size)):
                slots[slot] = _HOT_SLOT
                split += 1
    least = max(-(-len(slots) // WIDELY), FEWEST)
    if base.slots.count(_HOT) >= least and split >= least:
        slots = slots.replace(_COLD, _HOT)
    return Grid(base.size, bytes(slots))


def newly_hot(before: Grid, after: Grid, at: int = 0) -> list[tuple[int, int]]:
    """The slots that were cut only now, as (offset, length), of a segment that begins ``at``: their chunks are new."""
    if before.slots == after.slots:
        return []
    count, end = len(before.slots), at + before.size
    # All slots at once, as one number: one by one they took a third of all planning of a large disk.
    differ = (int.from_bytes(before.slots) ^ int.from_bytes(after.slots)).to_bytes(count)
    # A slot at the end that is no longer than a hot chunk is the same chunk either way.
    offsets = [at + slot * CHUNK for slot in compress(range(count), differ) if before.size - slot * CHUNK > HOT_CHUNK]
    return [(offset, min(CHUNK, end - offset)) for offset in offsets]


class DiskGrid:
    """How a disk of ``size`` bytes is cut: ``segments`` by number, cold ones where nothing is said."""

    def __init__(self, size: int, segments: Mapping[int, Grid] | None = None) -> None:
        self.size = size
        self._segments = segments or {}

    def segment(self, number: int) -> Grid:
        """The grid of one segment."""
        found = self._segments.get(number)
        return found if found is not None else cold_grid(min(SEGMENT, self.size - number * SEGMENT))

    def widened(self, spans: Iterable[Span]) -> list[Span]:
        """``spans`` grown outwards to whole chunks."""
        return merged(self._widened(spans))

    def _widened(self, spans: Iterable[Span]) -> Iterator[tuple[int, int]]:
        hot, size = self._hot, self.size
        for offset, length in spans:
            end = offset + length
            start = offset - offset % (HOT_CHUNK if hot(offset) else CHUNK)
            yield start, min(end + -end % (HOT_CHUNK if hot(end - 1) else CHUNK), size) - start

    def _hot(self, offset: int) -> bool:
        # Not Grid.unit: a large disk has hundreds of thousands of spans, and this is asked twice for each.
        grid = self._segments.get(offset // SEGMENT)
        return grid is not None and grid.slots[offset % SEGMENT // CHUNK] == _HOT_SLOT
