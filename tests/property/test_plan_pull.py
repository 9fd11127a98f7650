# SPDX-License-Identifier: Apache-2.0
"""What a backup reads, held against a disk of a few hundred bytes that is looked at byte by byte."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pullback.model.extents import FLAG_DIRTY, FLAG_ZERO, Cover, Span, allocation, complement, dirty_spans, merged
from pullback.plan import pull
from pullback.plan.pull import Act, SegmentPull

# The machine may be busy: how long an example takes says nothing.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CHUNK, SEGMENT = 4, 16


@contextmanager
def small() -> Iterator[None]:
    """Chunks of 4 bytes, segments of 16."""
    with mock.patch.object(pull, "CHUNK", CHUNK), mock.patch.object(pull, "SEGMENT", SEGMENT):
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


def chunk_of(byte: int, size: int) -> range:
    start = byte - byte % CHUNK
    return range(start, min(start + CHUNK, size))


# Each byte of the disk: dirty or not, data or zero.
disks = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=90)
# Mostly long runs of the same kind, as disks are.
runs = st.lists(st.tuples(st.tuples(st.booleans(), st.booleans()), st.integers(1, 30)), max_size=8).map(
    lambda parts: [kind for kind, length in parts for _ in range(length)]
)
breaks = st.sets(st.integers(0, 240), max_size=20)


@unhurried
@given(disk=disks | runs, cuts=breaks, whole=st.sets(st.integers(0, 20), max_size=3))
def test_every_changed_byte_is_read_or_zero_and_nothing_else_is_touched(
    disk: list[tuple[bool, bool]], cuts: set[int], whole: set[int]
) -> None:
    size = len(disk)
    with small():
        whole = {number for number in whole if number < pull.segment_count(size)}
        dirty = dirty_spans(status([FLAG_DIRTY * changed for changed, _ in disk], cuts))
        fetch = pull.fetch_spans(dirty, size, whole)
        extents = allocation(
            item for span in fetch for item in _cut(status([0 if data else FLAG_ZERO for _, data in disk], cuts), span)
        )
        reads = pull.read_spans(fetch, extents, size)
        segments = list(pull.plan_segments(fetch, reads, size))
        touched = pull.touched_segments(dirty)

    changed = {byte for byte, (is_dirty, _) in enumerate(disk) if is_dirty}
    wanted = {n for byte in changed for n in chunk_of(byte, size)}
    wanted |= {byte for byte in range(size) if byte // SEGMENT in whole}
    assert bytes_of(fetch) == wanted
    data = {byte for byte in wanted if disk[byte][1]}
    assert bytes_of(reads) == {n for byte in data for n in chunk_of(byte, size)}
    assert touched == sorted({byte // SEGMENT for byte in changed})

    acts = _acts(segments, size)
    assert {segment.number for segment in segments} == {byte // SEGMENT for byte in wanted}
    assert {byte for byte, act in acts.items() if act is Act.READ} == bytes_of(reads)
    assert {byte for byte, act in acts.items() if act is Act.ZERO} == wanted - bytes_of(reads)
    assert not bytes_of(pull.clean_spans(reads, size)) & bytes_of(reads)
    assert bytes_of(pull.clean_spans(reads, size)) | bytes_of(reads) == set(range(size))


def _cut(items: list[tuple[int, int, int]], span: Span) -> Iterator[tuple[int, int, int]]:
    """The part of a block status that lies in a span."""
    for offset, length, flags in items:
        start, end = max(offset, span.offset), min(offset + length, span.end)
        if start < end:
            yield start, end - start, flags


def _acts(segments: list[SegmentPull], size: int) -> dict[int, Act]:
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
            assert run.offset % CHUNK == 0
            position = run.end
            acts.update(dict.fromkeys(range(run.offset, run.end), run.act))
        assert position == segment.offset + segment.size
    return acts


@unhurried
@given(size=st.integers(0, 200))
def test_the_grid_is_its_own(size: int) -> None:
    with small():
        lengths = list(pull.chunk_lengths(size))
        assert sum(lengths) == size
        assert pull.on_grid(lengths, size)
        assert not pull.on_grid([*lengths, 1], size)
        assert [pull.segment_size(n, size) for n in range(pull.segment_count(size))] == [
            min(SEGMENT, size - start) for start in range(0, size, SEGMENT)
        ]


ascending = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=12).map(sorted)


@unhurried
@given(spans=ascending)
def test_merged_spans_hold_the_same_bytes(spans: list[tuple[int, int]]) -> None:
    assert bytes_of(merged(spans)) == {byte for offset, length in spans for byte in range(offset, offset + length)}


@unhurried
@given(spans=ascending, size=st.integers(70, 90))
def test_the_complement_is_the_rest(spans: list[tuple[int, int]], size: int) -> None:
    inside = bytes_of(merged(spans))
    assert bytes_of(complement(merged(spans), size)) == set(range(size)) - inside


@unhurried
@given(spans=ascending, questions=ascending)
def test_a_cover_says_what_looking_at_every_byte_says(
    spans: list[tuple[int, int]], questions: list[tuple[int, int]]
) -> None:
    inside = bytes_of(merged(spans))
    cover = Cover(merged(spans))
    for offset, length in questions:
        if length:
            assert cover.meets(offset, offset + length) == bool(inside & set(range(offset, offset + length)))
