# SPDX-License-Identifier: Apache-2.0
"""What is read of a frozen disk: the sizes that matter; that nothing is missed is tests/property's matter."""

from __future__ import annotations

import pytest

from pullback.model.extents import Extent, Kind, Span
from pullback.model.units import CHUNK, GIB, KIB, SEGMENT
from pullback.plan.pull import (
    Act,
    Run,
    chunk_lengths,
    clean_spans,
    fetch_spans,
    on_grid,
    plan_segments,
    read_spans,
    segment_count,
    segment_size,
    touched_segments,
)

ODD = SEGMENT + CHUNK + 512
"""A disk of one whole segment and one of a chunk and a sector."""


@pytest.mark.parametrize(("size", "sizes"), [(0, []), (1, [1]), (SEGMENT, [SEGMENT]), (ODD, [SEGMENT, CHUNK + 512])])
def test_segments_of_a_disk(size: int, sizes: list[int]):
    assert [segment_size(number, size) for number in range(segment_count(size))] == sizes


def test_chunks_of_a_segment():
    assert list(chunk_lengths(2 * CHUNK + 512)) == [CHUNK, CHUNK, 512]
    assert list(chunk_lengths(CHUNK)) == [CHUNK]


@pytest.mark.parametrize(
    ("lengths", "size", "expected"),
    [
        ([CHUNK, 512], CHUNK + 512, True),
        ([512, CHUNK], CHUNK + 512, False),
        ([CHUNK + 512], CHUNK + 512, False),
        ([CHUNK], CHUNK + 512, False),
        ([CHUNK, 512, 512], CHUNK + 512, False),
        ([CHUNK // 2, CHUNK // 2], CHUNK, False),
        ([], 0, True),
    ],
)
def test_a_base_cut_by_another_program_is_noticed(lengths: list[int], size: int, expected: bool):
    assert on_grid(lengths, size) is expected


def test_touched_segments():
    spans = [Span(0, 1), Span(SEGMENT - 1, 2), Span(3 * SEGMENT, 2 * SEGMENT)]
    assert touched_segments(spans) == [0, 1, 3, 4]
    assert touched_segments([]) == []


def test_a_dirty_cluster_fetches_its_chunk():
    assert fetch_spans([Span(CHUNK + 64 * KIB, 64 * KIB)], GIB) == [Span(CHUNK, CHUNK)]
    assert fetch_spans([Span(SEGMENT + CHUNK, 512)], ODD) == [Span(SEGMENT + CHUNK, 512)]


def test_a_segment_that_is_to_be_read_whole_is():
    assert fetch_spans([Span(5, 1)], ODD, whole=[1]) == [Span(0, CHUNK), Span(SEGMENT, CHUNK + 512)]
    assert fetch_spans([Span(SEGMENT - 1, 1)], ODD, whole=[1]) == [Span(SEGMENT - CHUNK, 2 * CHUNK + 512)]


def test_zeroes_are_not_read_but_kept_as_zeroes():
    """A discard marks its range dirty and reads as zero; forgetting it would restore the old data."""
    fetch = fetch_spans([Span(0, 2 * CHUNK)], GIB)
    reads = read_spans(fetch, [Extent(0, CHUNK, Kind.ZERO), Extent(CHUNK, CHUNK, Kind.DATA)], GIB)
    assert reads == [Span(CHUNK, CHUNK)]
    (segment,) = plan_segments(fetch, reads, GIB)
    assert segment.runs == (
        Run(0, CHUNK, Act.ZERO),
        Run(CHUNK, CHUNK, Act.READ),
        Run(2 * CHUNK, SEGMENT - 2 * CHUNK, Act.KEEP),
    )


def test_an_untouched_segment_is_not_planned():
    spans = [Span(2 * SEGMENT + CHUNK, CHUNK)]
    (segment,) = plan_segments(spans, spans, 4 * SEGMENT)
    assert (segment.number, segment.offset, segment.size) == (2, 2 * SEGMENT, SEGMENT)
    assert [run.act for run in segment.runs] == [Act.KEEP, Act.READ, Act.KEEP]
    assert list(plan_segments([], [], GIB)) == []


def test_a_run_is_cut_at_the_segments():
    spans = [Span(SEGMENT - CHUNK, 2 * CHUNK)]
    first, second = plan_segments(spans, spans, 2 * SEGMENT)
    assert first.runs[-1] == Run(SEGMENT - CHUNK, CHUNK, Act.READ)
    assert second.runs[0] == Run(SEGMENT, CHUNK, Act.READ)


def test_what_is_not_read_may_go():
    assert clean_spans([Span(CHUNK, CHUNK)], 3 * CHUNK) == [Span(0, CHUNK), Span(2 * CHUNK, CHUNK)]
