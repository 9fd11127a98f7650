# SPDX-License-Identifier: Apache-2.0
"""How a disk is cut into chunks: the rules one by one; tests/property holds them against a model."""

from __future__ import annotations

import pytest

from pullback.model.extents import Span
from pullback.model.units import CHUNK, HOT_CHUNK, SEGMENT
from pullback.plan.grid import DiskGrid, Grid, Places, Slot, cold_grid, newly_hot, next_grid, read_grid

COLD, HOT, EMPTY = Slot.COLD, Slot.HOT, Slot.EMPTY
SLOTS = SEGMENT // CHUNK


def slots(*kinds: Slot, size: int | None = None) -> Grid:
    return Grid(size if size is not None else len(kinds) * CHUNK, bytes(kinds))


@pytest.mark.parametrize(
    ("lengths", "size", "expected"),
    [
        ([CHUNK, 512], CHUNK + 512, [COLD, COLD]),
        ([HOT_CHUNK] * 4 + [CHUNK], 2 * CHUNK, [HOT, COLD]),
        ([CHUNK, HOT_CHUNK, 512], CHUNK + HOT_CHUNK + 512, [COLD, HOT]),
        ([HOT_CHUNK], HOT_CHUNK, [COLD]),
        ([], 0, []),
    ],
)
def test_a_stored_segment_is_recognised(lengths: list[int], size: int, expected: list[Slot]):
    assert read_grid(lengths, size) == Grid(size, bytes(expected))


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ([512, CHUNK], CHUNK + 512),
        ([CHUNK + 512], CHUNK + 512),
        ([CHUNK], CHUNK + 512),
        ([CHUNK, 512, 512], CHUNK + 512),
        ([CHUNK // 2, CHUNK // 2], CHUNK),
        ([HOT_CHUNK] * 3, CHUNK),
        ([HOT_CHUNK // 2, CHUNK], CHUNK + HOT_CHUNK // 2),
    ],
)
def test_one_that_another_program_cut_is_noticed(lengths: list[int], size: int):
    assert read_grid(lengths, size) is None


def test_places_and_chunks():
    grid = slots(COLD, HOT, EMPTY, HOT, size=3 * CHUNK + HOT_CHUNK + 512)
    chunks = list(grid.chunks(0, grid.size))
    assert [length for _, length in chunks] == [CHUNK, *[HOT_CHUNK] * 4, CHUNK, HOT_CHUNK, 512]
    places = Places(grid)
    assert [places.number(offset) for offset, _ in chunks] == list(range(8))
    assert places.number(grid.size) == places.count == 8
    assert [chunks[places.number(offset)][0] for offset, _ in chunks] == [offset for offset, _ in chunks]
    assert list(grid.chunks(CHUNK + HOT_CHUNK, 2 * CHUNK)) == [(CHUNK + at * HOT_CHUNK, HOT_CHUNK) for at in (1, 2, 3)]


def test_a_change_in_part_cuts_its_slot_once():
    once = next_grid(slots(COLD, COLD, COLD), [Span(CHUNK + 512, 512)])
    assert once == slots(COLD, HOT, COLD)
    assert next_grid(once, [Span(CHUNK, CHUNK)]) == once


def test_a_slot_that_is_written_whole_stays_whole():
    assert next_grid(slots(COLD, COLD, COLD), [Span(0, 2 * CHUNK)]) == slots(COLD, COLD, COLD)
    tail = slots(COLD, COLD, size=CHUNK + 512)
    assert next_grid(tail, [Span(CHUNK, 512)]) == tail


def test_the_ends_of_a_long_change_are_cut():
    assert next_grid(slots(COLD, COLD, COLD), [Span(512, 2 * CHUNK)]) == slots(HOT, COLD, HOT)


def test_what_is_written_into_zeroes_stays_whole():
    assert next_grid(slots(EMPTY, COLD), [Span(512, 512)]) == slots(EMPTY, COLD)


def scattered(count: int, start: int = 0) -> list[Span]:
    return [Span((start + slot) * CHUNK, HOT_CHUNK) for slot in range(count)]


def test_what_happens_widely_and_again_cuts_the_segment():
    share = SLOTS // 16
    once = next_grid(cold_grid(SEGMENT), scattered(share))
    assert once.slots.count(HOT) == share, "once may be an update that never comes again"
    again = next_grid(once, scattered(share, start=share))
    assert again.slots.count(HOT) == SLOTS
    few = next_grid(once, scattered(share - 1, start=share))
    assert few.slots.count(HOT) == 2 * share - 1


def test_slots_of_zeroes_stay_whole_when_the_segment_is_cut():
    base = Grid(SEGMENT, bytes([HOT] * 64 + [EMPTY] * 100 + [COLD] * (SLOTS - 164)))
    after = next_grid(base, scattered(64, start=200))
    assert (after.slots.count(HOT), after.slots.count(EMPTY)) == (SLOTS - 100, 100)
    assert list(newly_hot(base, after)) == [Span(slot * CHUNK, CHUNK) for slot in range(164, SLOTS)]


@pytest.mark.parametrize(
    ("tail", "length"), [(512, None), (HOT_CHUNK, None), (HOT_CHUNK + 512, HOT_CHUNK + 512), (CHUNK, CHUNK)]
)
def test_the_last_slot_is_new_as_far_as_it_goes_if_it_is_cut_at_all(tail: int, length: int | None):
    size = CHUNK + tail
    before, after = slots(COLD, COLD, size=size), slots(COLD, HOT, size=size)
    assert newly_hot(before, after) == ([] if length is None else [(CHUNK, length)])
    at = 3 * SEGMENT
    assert newly_hot(before, after, at) == ([] if length is None else [(at + CHUNK, length)])


def test_spans_grow_to_chunks():
    disk = DiskGrid(SEGMENT + 3 * CHUNK + 512, {1: slots(HOT, COLD, HOT, COLD, size=3 * CHUNK + 512)})
    assert disk.widened([Span(1, 1)]) == [Span(0, CHUNK)]
    assert disk.widened([Span(SEGMENT + 1, 1)]) == [Span(SEGMENT, HOT_CHUNK)]
    assert disk.widened([Span(SEGMENT - 1, 2)]) == [Span(SEGMENT - CHUNK, CHUNK + HOT_CHUNK)]
    assert disk.widened([Span(SEGMENT + 3 * CHUNK + 5, 1)]) == [Span(SEGMENT + 3 * CHUNK, 512)]
    assert disk.widened([Span(SEGMENT + CHUNK + 1, CHUNK)]) == [Span(SEGMENT + CHUNK, CHUNK + HOT_CHUNK)]


@pytest.mark.parametrize(("last", "length"), [(HOT, HOT_CHUNK), (COLD, CHUNK)])
def test_spans_grow_to_the_end_of_the_disk_and_no_further(last: Slot, length: int):
    disk = DiskGrid(SEGMENT + 2 * CHUNK, {1: slots(COLD, last)})
    assert disk.widened([Span(disk.size - 512, 512)]) == [Span(disk.size - length, length)]


def test_a_disk_gives_its_segments_grids_and_cold_ones_for_the_others():
    hot = slots(HOT, size=SEGMENT)
    disk = DiskGrid(2 * SEGMENT + 512, {1: hot})
    assert disk.segment(1) is hot
    assert (disk.segment(0), disk.segment(2)) == (cold_grid(SEGMENT), cold_grid(512))
