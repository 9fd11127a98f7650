# SPDX-License-Identifier: Apache-2.0
"""Which bytes lost blobs touch, against a model that looks at every byte."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pullback.model.extents import Span
from pullback.plan.damage import joined, on_disk, segment_span, touched_spans

blobs = st.sampled_from([bytes([letter]) for letter in b"abcdef"])
lengths = st.fixed_dictionaries({bytes([letter]): st.integers(1, 9) for letter in b"abcdef"})


def bytes_of(spans: tuple[Span, ...]) -> set[int]:
    return {byte for span in spans for byte in range(span.offset, span.end)}


@given(st.lists(blobs, max_size=12), lengths, st.sets(blobs))
def test_every_byte_of_a_touched_blob_and_no_other(
    names: list[bytes], sizes: dict[bytes, int], bad: set[bytes]
) -> None:
    content = [(name, sizes[name]) for name in names]
    model = [name for name in names for _ in range(sizes[name])]
    spans = touched_spans(content, len(model), bad.__contains__)
    assert bytes_of(spans) == {place for place, name in enumerate(model) if name in bad}
    assert all(left.end < right.offset for left, right in pairwise(spans))


@given(st.lists(blobs, max_size=12), lengths, st.sets(blobs), st.sets(blobs, min_size=1))
def test_blobs_of_unknown_length_are_covered(
    names: list[bytes], sizes: dict[bytes, int], bad: set[bytes], unknown: set[bytes]
) -> None:
    """From the first to the last of them, exactly; before and after that as if all were known."""
    bad |= unknown
    content = [(name, None if name in unknown else sizes[name]) for name in names]
    model = [name for name in names for _ in range(sizes[name])]
    found = bytes_of(touched_spans(content, len(model), bad.__contains__))
    places = [place for place, name in enumerate(model) if name in unknown]
    covered = set(range(places[0], places[-1] + 1)) if places else set()
    assert found == covered | {place for place, name in enumerate(model) if name in bad}


def test_damage_before_and_behind_blobs_of_unknown_length_counts_too() -> None:
    content = [(b"a", 3), (b"b", 5), (b"?", None), (b"b", 4), (b"c", 2)]
    assert touched_spans(content, 20, {b"a", b"?", b"c"}.__contains__) == (Span(0, 3), Span(8, 6), Span(18, 2))


def test_an_empty_blob_fills_nothing() -> None:
    content = [(b"e", 0), (b"a", 3), (b"e", 0), (b"b", 5)]
    assert touched_spans(content, 8, {b"e", b"b"}.__contains__) == (Span(3, 5),)
    unknown = [(b"e", 0), (b"a", 3), (b"?", None), (b"e", 0), (b"b", 5)]
    assert touched_spans(unknown, 10, {b"?"}.__contains__) == (Span(3, 2),)


def test_segments_and_the_disk() -> None:
    assert segment_span(0, 100, 250) == (0, 100)
    assert segment_span(2, 100, 250) == (200, 50)
    assert segment_span(7, 100, 250) == (250, 0)
    assert on_disk((Span(5, 10),), 2, 100) == [(205, 10)]
    assert joined([Span(100, 5), Span(0, 100), Span(200, 1)]) == ((0, 105), (200, 1))
