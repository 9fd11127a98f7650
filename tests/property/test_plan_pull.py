# SPDX-License-Identifier: Apache-2.0
"""What a backup reads, held against a disk of a few hundred bytes that is looked at byte by byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

from hypothesis import example, given
from hypothesis import strategies as st

from pullback.model.extents import FLAG_DIRTY, FLAG_ZERO, Cover, Span, allocation, complement, merged
from pullback.plan import grid, pull
from pullback.plan.grid import Grid, Slot
from pullback.plan.pull import Act, SegmentPull

HOT, CHUNK, SEGMENT = 2, 6, 36
SLOTS = SEGMENT // CHUNK


@contextmanager
def small() -> Iterator[None]:
    """Hot chunks of 2 bytes, cold ones of 6, segments of 36."""
    with (
        mock.patch.object(pull, "SEGMENT", SEGMENT),
        mock.patch.multiple(grid, CHUNK=CHUNK, HOT_CHUNK=HOT, SEGMENT=SEGMENT, WIDELY=3, FEWEST=1),
    ):
        yield


def status(flags: list[int], breaks: set[int]) -> list[tuple[int, int, int]]:
    """Block status as a server may say it: ``(offset, length, flags)``, also cut where nothing changes."""
    found: list[tuple[int, int, int]] = []
    for offset, flag in enumerate(flags):
        if found and found[-1][2] == flag and offset not in breaks:
            start, length, _ = found[-1]
            found[-1] = (start, length + 1, flag)
        else:
            found.append((offset, 1, flag))
    return found


def bytes_of(spans: list[Span]) -> set[int]:
    """The bytes in spans, which do not overlap, do not touch and ascend."""
    for span, following in pairwise(spans):
        assert span.end < following.offset, spans
    assert all(span.length > 0 for span in spans), spans
    return {byte for span in spans for byte in range(span.offset, span.end)}


def segment_of(number: int, size: int) -> range:
    return range(number * SEGMENT, min(number * SEGMENT + SEGMENT, size))


def chunk_of(byte: int, size: int, grids: Mapping[int, Grid]) -> range:
    """The chunk around a byte; it is cold where no grid says otherwise."""
    segment = segment_of(byte // SEGMENT, size)
    slot, inside = divmod(byte - segment.start, CHUNK)
    known = grids.get(byte // SEGMENT)
    unit = HOT if known is not None and known.slots[slot] == Slot.HOT else CHUNK
    start = segment.start + slot * CHUNK + inside // unit * unit
    return range(start, min(start + unit, segment.start + (slot + 1) * CHUNK, segment.stop))


# Each byte of the disk: dirty or not, data or zero.
disks = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=90)
# Mostly long runs of the same kind, as disks are.
runs = st.lists(st.tuples(st.tuples(st.booleans(), st.booleans()), st.integers(1, 30)), max_size=8).map(
    lambda parts: [kind for kind, length in parts for _ in range(length)]
)
breaks = st.sets(st.integers(0, 240), max_size=20)


# What a base may know of each segment's slots: none of it when another program cut it.
known = st.dictionaries(st.integers(0, 6), st.lists(st.sampled_from(Slot), min_size=SLOTS, max_size=SLOTS))


# A segment that is cut as a whole: two slots were hot, two become so, and with them the two that nothing touched.
CUT_WHOLE = [(byte in (12, 18), True) for byte in range(SEGMENT)]
UNTOUCHED = [(False, True)] * SEGMENT
# And one whose last slot is no longer than a hot chunk: it stays the chunk that it was.
SHORT_END = [(byte == 0, False) for byte in range(13)]


@given(disk=disks | runs, cuts=breaks, known=known, together=st.integers(0, 12))
@example(disk=SHORT_END, cuts=set(), known={0: [Slot.COLD, Slot.HOT, Slot.COLD] + [Slot.EMPTY] * 3}, together=0)
@example(disk=UNTOUCHED + CUT_WHOLE, cuts=set(), known={1: [Slot.HOT] * 2 + [Slot.COLD] * 4}, together=0)
@example(disk=CUT_WHOLE, cuts=set(), known={0: [Slot.HOT] * 2 + [Slot.COLD] * 4}, together=0)
def test_every_changed_byte_is_read_or_zero_and_nothing_else_is_touched(
    disk: list[tuple[bool, bool]], cuts: set[int], known: dict[int, list[Slot]], together: int
) -> None:
    size = len(disk)
    with small(), mock.patch.object(pull, "_TOGETHER", together):
        base = {
            number: Grid(len(segment), bytes(slots[: -(-len(segment) // CHUNK)]))
            for number, slots in known.items()
            if (segment := segment_of(number, size))
        }
        dirty = dirty_spans(status([FLAG_DIRTY * changed for changed, _ in disk], cuts))
        touched = pull.touched_segments(dirty)
        whole = [number for number in touched if number not in base]
        grids = pull.next_grids(dirty, base)
        fetch = pull.fetch_spans(dirty, size, base, grids, whole)
        extents = allocation(
            item
            for span in pull.status_spans(fetch)
            for item in _cut(status([0 if data else FLAG_ZERO for _, data in disk], cuts), span)
        )
        cut = grid.DiskGrid(size, grids)
        reads = pull.read_spans(fetch, extents, cut)
        segments = list(pull.plan_segments(fetch, reads, cut))

    changed = {byte for byte, (is_dirty, _) in enumerate(disk) if is_dirty}
    assert touched == sorted({byte // SEGMENT for byte in changed})
    assert set(grids) == set(touched) - set(whole)
    # Chunks of the base that changed, chunks that the base does not have, and segments that it does not know.
    wanted = {n for byte in changed for n in chunk_of(byte, size, base)}
    wanted |= {
        byte
        for number in grids
        for byte in segment_of(number, size)
        if chunk_of(byte, size, base) != chunk_of(byte, size, grids)
    }
    wanted |= {byte for number in whole for byte in segment_of(number, size)}
    assert bytes_of(fetch) == wanted
    data = {byte for byte in wanted if disk[byte][1]}
    assert bytes_of(reads) == {n for byte in data for n in chunk_of(byte, size, grids)}

    acts = _acts(segments, size, grids)
    assert {segment.number for segment in segments} == set(touched)
    assert all(segment.grid == grids[segment.number] for segment in segments if segment.number in grids)
    assert {byte for byte, act in acts.items() if act is Act.READ} == bytes_of(reads)
    assert {byte for byte, act in acts.items() if act is Act.ZERO} == wanted - bytes_of(reads)
    assert not bytes_of([*pull.clean_spans(reads, size)]) & bytes_of(reads)
    assert bytes_of([*pull.clean_spans(reads, size)]) | bytes_of(reads) == set(range(size))


def dirty_spans(extents: Iterable[tuple[int, int, int]]) -> list[Span]:
    return merged((offset, length) for offset, length, flags in extents if flags & FLAG_DIRTY)


@given(disk=disks | runs, slots=st.lists(st.sampled_from(Slot), min_size=SLOTS, max_size=SLOTS))
def test_a_slot_becomes_hot_where_it_changed_in_part_and_never_cold_again(
    disk: list[tuple[bool, bool]], slots: list[Slot]
) -> None:
    size = min(len(disk), SEGMENT)
    with small():
        base = Grid(size, bytes(slots[: -(-size // CHUNK)]))
        after = grid.next_grid(base, dirty_spans(status([FLAG_DIRTY * changed for changed, _ in disk[:size]], set())))
    due = set()
    for slot, kind in enumerate(base.slots):
        marks = {changed for changed, _ in disk[slot * CHUNK : min((slot + 1) * CHUNK, size)]}
        if kind == Slot.COLD and marks == {True, False}:
            due.add(slot)
    hot = {slot for slot, kind in enumerate(base.slots) if kind == Slot.HOT}
    widely = bool(base.slots) and 3 * len(hot) >= len(base.slots) <= 3 * len(due)
    cold = {slot for slot, kind in enumerate(base.slots) if kind == Slot.COLD}
    assert {slot for slot, kind in enumerate(after.slots) if kind == Slot.HOT} == hot | (cold if widely else due)
    assert [kind == Slot.EMPTY for kind in after.slots] == [kind == Slot.EMPTY for kind in base.slots]


def _cut(items: list[tuple[int, int, int]], span: Span) -> Iterator[tuple[int, int, int]]:
    """The part of a block status that lies in a span."""
    for offset, length, flags in items:
        start, end = max(offset, span.offset), min(offset + length, span.end)
        if start < end:
            yield start, end - start, flags


def _acts(segments: list[SegmentPull], size: int, grids: Mapping[int, Grid]) -> dict[int, Act]:
    """What is done with each byte of the planned segments, whose runs cover them once and in order."""
    acts: dict[int, Act] = {}
    assert [segment.number for segment in segments] == sorted({segment.number for segment in segments})
    for segment in segments:
        assert segment.offset == segment.number * SEGMENT
        assert segment.size == min(SEGMENT, size - segment.offset)
        position = segment.offset
        for run in segment.runs:
            assert run.offset == position, "a hole or an overlap"
            assert run.length > 0
            assert run.offset == chunk_of(run.offset, size, grids).start
            assert run.end == chunk_of(run.end - 1, size, grids).stop
            position = run.end
            acts.update(dict.fromkeys(range(run.offset, run.end), run.act))
        assert position == segment.offset + segment.size
    return acts


@given(size=st.integers(0, SEGMENT), slots=st.lists(st.sampled_from(Slot), min_size=SLOTS, max_size=SLOTS))
def test_the_grid_is_its_own(size: int, slots: list[Slot]) -> None:
    with small():
        own = Grid(size, bytes(slots[: -(-size // CHUNK)]))
        chunks = list(own.chunks(0, size))
        lengths = [length for _, length in chunks]
        assert sum(lengths) == size
        places = grid.Places(own)
        assert [places.number(offset) for offset, _ in chunks] == list(range(places.count))
        read = grid.read_grid(lengths, size)
        assert read is not None
        assert list(read.chunks(0, size)) == chunks
        assert grid.read_grid([*lengths, 1], size) is None


ascending = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=12).map(sorted)


@given(spans=ascending)
def test_merged_spans_hold_the_same_bytes(spans: list[tuple[int, int]]) -> None:
    assert bytes_of(merged(spans)) == {byte for offset, length in spans for byte in range(offset, offset + length)}


@given(spans=ascending, size=st.integers(70, 90))
def test_the_complement_is_the_rest(spans: list[tuple[int, int]], size: int) -> None:
    inside = bytes_of(merged(spans))
    assert bytes_of([*complement(merged(spans), size)]) == set(range(size)) - inside


@given(spans=ascending, questions=ascending)
def test_a_cover_says_what_looking_at_every_byte_says(
    spans: list[tuple[int, int]], questions: list[tuple[int, int]]
) -> None:
    inside = bytes_of(merged(spans))
    cover = Cover(merged(spans))
    for offset, length in questions:
        if length:
            assert cover.meets(offset, offset + length) == bool(inside & set(range(offset, offset + length)))
