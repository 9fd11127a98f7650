# SPDX-License-Identifier: Apache-2.0
"""What to read of a frozen disk, what to take from the base, and what is zero.

    dirty spans ──► widened to chunks ──► fetch spans ──► block status of these ──► runs per segment
                                              │
                                              └── everything else is clean: let go at once

All spans are bytes of the disk, sorted; a fetch span begins and ends on the bounds of chunks (``plan.grid``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from pullback.model.extents import Extent, Kind, Span, complement, merged
from pullback.model.units import MIB, SEGMENT
from pullback.plan.grid import DiskGrid, Grid, newly_hot, next_grid

#: Bytes between two spans below which one request for both costs QEMU less than two.
_TOGETHER = 16 * MIB


class Act(IntEnum):
    """Where the chunks of a run come from."""

    KEEP = 0
    READ = 1
    ZERO = 2


class Run(NamedTuple):
    """Neighbouring chunks of one segment that come from the same place; ``offset`` is the disk's."""

    offset: int
    length: int
    act: Act

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class SegmentPull:
    """One segment that is built anew: ``runs`` cover it exactly, in order, and are whole chunks of its ``grid``."""

    number: int
    offset: int
    size: int
    runs: tuple[Run, ...]
    grid: Grid


def segment_count(size: int) -> int:
    """How many segments a disk of ``size`` bytes has."""
    return -(-size // SEGMENT)


def segment_size(number: int, size: int) -> int:
    """The bytes of segment ``number`` of a disk of ``size`` bytes."""
    return min(SEGMENT, size - number * SEGMENT)


def touched_segments(spans: Iterable[Span]) -> list[int]:
    """The numbers of the segments that the sorted ``spans`` share a byte with."""
    touched: list[int] = []
    for span in spans:
        first, last = span.offset // SEGMENT, (span.end - 1) // SEGMENT
        touched.extend(range(max(first, touched[-1] + 1) if touched else first, last + 1))
    return touched


def _by_segment(spans: Iterable[Span]) -> Iterator[tuple[int, list[Span]]]:
    """Spans cut at the segments' bounds: the segment's number, and those in it by its own offsets."""
    number, inside = -1, list[Span]()
    for span in spans:
        offset, last = span.offset, span.end
        while offset < last:
            if offset // SEGMENT != number:
                if inside:
                    yield number, inside
                number, inside = offset // SEGMENT, []
            end = min(last, (number + 1) * SEGMENT)
            inside.append(Span(offset - number * SEGMENT, end - offset))
            offset = end
    if inside:
        yield number, inside


def next_grids(dirty: Sequence[Span], base: Mapping[int, Grid]) -> dict[int, Grid]:
    """How the segments of ``base`` that ``dirty`` touches are cut from now on."""
    return {number: next_grid(base[number], inside) for number, inside in _by_segment(dirty) if number in base}


def fetch_spans(
    dirty: Sequence[Span],
    size: int,
    base: Mapping[int, Grid],
    grids: Mapping[int, Grid],
    whole: Collection[int] = (),
) -> list[Span]:
    """What must be fetched for these ``dirty`` spans: every chunk of the new ``grids`` that the base does not have.

    ``base`` and ``grids`` say how the segments were and will be cut; of those in ``whole`` the base has nothing.
    """
    spans = DiskGrid(size, base).widened(dirty)
    more: list[tuple[int, int]] = [(number * SEGMENT, segment_size(number, size)) for number in whole]
    for number, grid in grids.items():
        # A slot that a change cut is widened to already; only of a segment cut as a whole there are others.
        if number in base and grid.all_hot:
            more += newly_hot(base[number], grid, number * SEGMENT)
    return merged(sorted([*spans, *more])) if more else spans


def status_spans(fetch: Sequence[Span]) -> list[Span]:
    """The ranges to ask for block status: spans with little between them together, not one by one."""
    return merged(fetch, _TOGETHER)


def read_spans(fetch: Sequence[Span], allocation: Iterable[Extent], grid: DiskGrid) -> list[Span]:
    """The chunks among ``fetch`` that hold any data by the block status; the others are zero and need no reading.

    ``allocation`` may be in any order and overlap: what is data anywhere in it is data.
    """
    data = sorted(Span(extent.offset, extent.length) for extent in allocation if extent.kind is Kind.DATA)
    return _intersection(grid.widened(data), fetch)


def _intersection(left: Sequence[Span], right: Sequence[Span]) -> list[Span]:
    result: list[Span] = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, end = max(left[i].offset, right[j].offset), min(left[i].end, right[j].end)
        if start < end:
            result.append(Span(start, end - start))
        if left[i].end < right[j].end:
            i += 1
        else:
            j += 1
    return result


def clean_spans(read: Sequence[Span], size: int) -> Iterator[Span]:
    """What nobody will read: the domain may overwrite it without its old content being saved."""
    return complement(read, size)


def _labelled(fetch: Sequence[Span], read: Sequence[Span]) -> Iterator[Run]:
    """READ and ZERO runs over ``fetch``, in order."""
    position = iter(read)
    current = next(position, None)
    for span in fetch:
        offset = span.offset
        while offset < span.end:
            if current is None or current.offset >= span.end:
                yield Run(offset, span.end - offset, Act.ZERO)
                break
            if current.offset > offset:
                yield Run(offset, current.offset - offset, Act.ZERO)
            yield Run(current.offset, current.length, Act.READ)
            offset = current.end
            current = next(position, None)


def _cut_at_segments(runs: Iterable[Run]) -> Iterator[Run]:
    for run in runs:
        offset, last = run.offset, run.end
        if last <= (offset // SEGMENT + 1) * SEGMENT:
            yield run
            continue
        while offset < last:
            end = min(last, (offset // SEGMENT + 1) * SEGMENT)
            yield Run(offset, end - offset, run.act)
            offset = end


def plan_segments(fetch: Sequence[Span], read: Sequence[Span], grid: DiskGrid) -> Iterator[SegmentPull]:
    """The segments to build anew, in order, each made of runs to read, to fill with zeroes and to keep.

    ``read`` lies inside ``fetch``.  Segments that ``fetch`` does not touch are not yielded: they stay as they are.
    """
    number = -1
    runs: list[Run] = []
    for run in _cut_at_segments(_labelled(fetch, read)):
        if run.offset // SEGMENT != number:
            if runs:
                yield _segment(number, runs, grid)
            number, runs = run.offset // SEGMENT, []
        runs.append(run)
    if runs:
        yield _segment(number, runs, grid)


def _segment(number: int, runs: Sequence[Run], grid: DiskGrid) -> SegmentPull:
    offset, length = number * SEGMENT, segment_size(number, grid.size)
    filled: list[Run] = []
    position = offset
    for run in runs:
        if run.offset > position:
            filled.append(Run(position, run.offset - position, Act.KEEP))
        filled.append(run)
        position = run.end
    if position < offset + length:
        filled.append(Run(position, offset + length - position, Act.KEEP))
    return SegmentPull(number, offset, length, tuple(filled), grid.segment(number))
