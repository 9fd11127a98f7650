# SPDX-License-Identifier: Apache-2.0
"""What is read of a frozen disk: the sizes that matter; that nothing is missed is tests/property's matter."""

from __future__ import annotations

import pytest

from pullback.model.extents import Extent, Kind, Span
from pullback.model.units import CHUNK, GIB, HOT_CHUNK, KIB, MIB, SEGMENT
from pullback.plan.grid import DiskGrid, Grid, Slot, cold_grid
from pullback.plan.pull import (
    Act,
    Run,
    clean_spans,
    fetch_spans,
    next_grids,
    plan_segments,
    read_spans,
    segment_count,
    segment_size,
    status_spans,
    touched_segments,
)

ODD = SEGMENT + CHUNK + 512
"""A disk of one whole segment and one of a chunk and a sector."""


@pytest.mark.parametrize(("size", "sizes"), [(0, []), (1, [1]), (SEGMENT, [SEGMENT]), (ODD, [SEGMENT, CHUNK + 512])])
def test_segments_of_a_disk(size: int, sizes: list[int]):
    assert [segment_size(number, size) for number in range(segment_count(size))] == sizes


def test_touched_segments():
    spans = [Span(0, 1), Span(SEGMENT - 1, 2), Span(3 * SEGMENT, 2 * SEGMENT)]
    assert touched_segments(spans) == [0, 1, 3, 4]
    assert touched_segments([]) == []


def test_neighbours_are_asked_about_together():
    near, far = 16 * MIB, 16 * MIB + CHUNK
    spans = [Span(0, CHUNK), Span(CHUNK + near, CHUNK), Span(2 * CHUNK + near + far, CHUNK)]
    assert status_spans(spans) == [Span(0, 2 * CHUNK + near), spans[2]]
    assert status_spans([]) == []


def grid(*slots: Slot, size: int = SEGMENT) -> Grid:
    """A segment whose first slots are these, and the others cold."""
    count = -(-size // CHUNK)
    return Grid(size, bytes(slots) + bytes([Slot.COLD]) * (count - len(slots)))


def fetch(dirty: list[Span], size: int, base: dict[int, Grid], whole: tuple[int, ...] = ()) -> list[Span]:
    return fetch_spans(dirty, size, base, next_grids(dirty, base), whole)


def test_a_dirty_cluster_of_a_cold_slot_fetches_all_of_it():
    assert fetch([Span(CHUNK + 64 * KIB, 64 * KIB)], GIB, {0: cold_grid(SEGMENT)}) == [Span(CHUNK, CHUNK)]
    base = {1: cold_grid(ODD - SEGMENT)}
    assert fetch([Span(SEGMENT + CHUNK, 512)], ODD, base) == [Span(SEGMENT + CHUNK, 512)]


def test_a_dirty_cluster_of_a_hot_slot_fetches_itself():
    base = {2: grid(Slot.COLD, Slot.HOT)}
    dirty = [Span(2 * SEGMENT + CHUNK + HOT_CHUNK + 512, 512)]
    assert fetch(dirty, GIB, base) == [Span(2 * SEGMENT + CHUNK + HOT_CHUNK, HOT_CHUNK)]


def test_what_is_cut_anew_is_fetched_though_it_is_clean():
    base = {0: grid(*[Slot.HOT] * 64)}
    dirty = [Span(slot * CHUNK, 512) for slot in range(100, 164)]
    assert fetch(dirty, GIB, base) == [Span(64 * CHUNK, SEGMENT - 64 * CHUNK)]


def test_what_is_cut_anew_is_fetched_in_every_segment():
    size = 3 * SEGMENT + CHUNK
    base = {number: grid(*[Slot.HOT] * 64) for number in (1, 2)}
    dirty = [Span(number * SEGMENT + slot * CHUNK, 512) for number in (1, 2) for slot in range(100, 164)]
    assert fetch([*dirty, Span(3 * SEGMENT, 1)], size, base, whole=(3,)) == [
        Span(SEGMENT + 64 * CHUNK, SEGMENT - 64 * CHUNK),
        Span(2 * SEGMENT + 64 * CHUNK, SEGMENT - 64 * CHUNK + CHUNK),
    ]


def test_a_segment_that_is_to_be_read_whole_is():
    base = {0: cold_grid(SEGMENT)}
    assert fetch([Span(5, 1)], ODD, base, whole=(1,)) == [Span(0, CHUNK), Span(SEGMENT, CHUNK + 512)]
    assert fetch([Span(SEGMENT - 1, 1)], ODD, base, whole=(1,)) == [Span(SEGMENT - CHUNK, 2 * CHUNK + 512)]


def test_data_in_a_hot_slot_is_read_by_itself():
    disk = DiskGrid(GIB, {0: grid(Slot.HOT)})
    status = [Extent(HOT_CHUNK, 512, Kind.DATA), Extent(CHUNK + HOT_CHUNK, 512, Kind.DATA)]
    assert read_spans([Span(0, 2 * CHUNK)], status, disk) == [Span(HOT_CHUNK, HOT_CHUNK), Span(CHUNK, CHUNK)]


def test_data_beyond_what_is_fetched_is_not_read():
    """Neighbours are asked about together, so the answer tells of what lies between them too."""
    data = [Extent(0, 3 * CHUNK, Kind.DATA), Extent(7 * CHUNK, 3 * CHUNK, Kind.DATA)]
    assert read_spans([Span(3 * CHUNK, 4 * CHUNK)], data, DiskGrid(GIB)) == []
    assert read_spans([Span(0, CHUNK), Span(3 * CHUNK, CHUNK)], data, DiskGrid(GIB)) == [Span(0, CHUNK)]
    spans = [Span(slot * CHUNK, CHUNK) for slot in (0, 2, 5, 8)]
    assert read_spans(spans, data, DiskGrid(GIB)) == [spans[0], spans[1], spans[3]]


def test_zeroes_are_not_read_but_kept_as_zeroes():
    """A discard marks its range dirty and reads as zero; forgetting it would restore the old data."""
    spans = fetch([Span(0, 2 * CHUNK)], GIB, {0: cold_grid(SEGMENT)})
    reads = read_spans(spans, [Extent(0, CHUNK, Kind.ZERO), Extent(CHUNK, CHUNK, Kind.DATA)], DiskGrid(GIB))
    assert reads == [Span(CHUNK, CHUNK)]
    (segment,) = plan_segments(spans, reads, DiskGrid(GIB))
    assert segment.runs == (
        Run(0, CHUNK, Act.ZERO),
        Run(CHUNK, CHUNK, Act.READ),
        Run(2 * CHUNK, SEGMENT - 2 * CHUNK, Act.KEEP),
    )


def test_an_untouched_segment_is_not_planned():
    spans = [Span(2 * SEGMENT + CHUNK, CHUNK)]
    (segment,) = plan_segments(spans, spans, DiskGrid(4 * SEGMENT))
    assert (segment.number, segment.offset, segment.size) == (2, 2 * SEGMENT, SEGMENT)
    assert segment.runs == (
        Run(2 * SEGMENT, CHUNK, Act.KEEP),
        Run(2 * SEGMENT + CHUNK, CHUNK, Act.READ),
        Run(2 * SEGMENT + 2 * CHUNK, SEGMENT - 2 * CHUNK, Act.KEEP),
    )
    assert list(plan_segments([], [], DiskGrid(GIB))) == []


def test_each_segment_says_how_it_is_cut():
    cut = {1: grid(Slot.COLD, Slot.HOT)}
    spans = [Span(CHUNK, CHUNK), Span(SEGMENT + CHUNK, CHUNK)]
    segments = plan_segments(spans, spans, DiskGrid(2 * SEGMENT, cut))
    assert [segment.grid for segment in segments] == [cold_grid(SEGMENT), cut[1]]


def test_every_span_without_data_is_zero():
    spans = [Span(0, CHUNK), Span(2 * CHUNK, CHUNK), Span(4 * CHUNK, 2 * CHUNK)]
    (segment,) = plan_segments(spans, [Span(2 * CHUNK, CHUNK)], DiskGrid(SEGMENT))
    acts = [(run.offset // CHUNK, run.act) for run in segment.runs if run.act is not Act.KEEP]
    assert acts == [(0, Act.ZERO), (2, Act.READ), (4, Act.ZERO)]
    (segment,) = plan_segments(spans, [], DiskGrid(SEGMENT))
    assert [run.offset // CHUNK for run in segment.runs if run.act is Act.ZERO] == [0, 2, 4]


def test_a_run_is_cut_at_the_segments():
    spans = [Span(SEGMENT - CHUNK, 2 * CHUNK)]
    first, second = plan_segments(spans, spans, DiskGrid(2 * SEGMENT))
    assert first.runs[-1] == Run(SEGMENT - CHUNK, CHUNK, Act.READ)
    assert second.runs[0] == Run(SEGMENT, CHUNK, Act.READ)


def test_what_is_not_read_may_go():
    assert [*clean_spans([Span(CHUNK, CHUNK)], 3 * CHUNK)] == [Span(0, CHUNK), Span(2 * CHUNK, CHUNK)]
