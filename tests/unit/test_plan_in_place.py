# SPDX-License-Identifier: Apache-2.0
"""What a restore in place writes, and which chunks it compares before it believes the bitmaps."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pullback.model.extents import Span, merged
from pullback.model.facts import Bitmap
from pullback.model.snapshots import UnfinishedMark, is_mark, unfinished_marks
from pullback.plan.in_place import SAMPLE, pick_unchanged, pieces
from pullback.plan.restore import Place

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9))).map(lambda some: merged(sorted(some)))


@given(SPANS, st.integers(0, 60), st.integers(0, 12))
def test_pieces_are_the_bytes_that_both_have(spans: Sequence[Span], offset: int, length: int) -> None:
    found = list(pieces(Place("vda", offset, length), spans))
    covered = {at for span in spans for at in range(span.offset, span.end)}
    assert [at for piece in found for at in range(piece.offset, piece.end)] == sorted(
        covered & set(range(offset, offset + length))
    )
    assert all(piece.length for piece in found)


@given(SPANS, st.integers(0, 200), st.randoms(use_true_random=False))
def test_a_sample_is_of_unchanged_places_and_has_the_last(
    spans: Sequence[Span], count: int, chance: random.Random
) -> None:
    # Blobs are the digests of what lies there: in no order.
    data = [(bytes([255 - number]), Place("vda", number, 1)) for number in range(count)]
    found = pick_unchanged(data, spans, chance.randrange)
    clean = [one for one in data if not any(span.offset <= one[1].offset < span.end for span in spans)]
    assert set(found) <= set(clean)
    assert found == sorted(found, key=lambda one: one[1].offset)
    assert found[-1:] == clean[-1:]
    assert min(SAMPLE, len(clean)) <= len(found) <= SAMPLE + 1


def test_every_place_is_as_likely_to_be_in_the_sample() -> None:
    """The n-th one is taken in count of n cases: the number that is drawn below n says so, and whose place it takes."""
    data = [(bytes([number]), Place("vda", number, 1)) for number in range(8)]
    asked: list[int] = []

    def draw(below: int) -> int:
        asked.append(below)
        return 1 if below == 6 else below - 1

    found = pick_unchanged(data, [Span(2, 1)], draw, 4)
    assert asked == [5, 6, 7], "the changed one is not counted"
    assert [place.offset for _, place in found] == [0, 3, 4, 6, 7]


def test_a_mark_is_read_back_whatever_became_of_it() -> None:
    mark = UnfinishedMark("a" * 64, "b" * 64)
    name = mark.bitmap_name()
    assert is_mark(name)
    for inconsistent in (False, True):
        stored = Bitmap(name, 1 << 30, 0, recording=False, persistent=True, inconsistent=inconsistent)
        assert unfinished_marks([stored]) == (mark,)
    for other in ("pullback-restoring:", "pullback-restoring:[1,2]", 'pullback-restoring:["a",null]', "pullback-x"):
        assert unfinished_marks([Bitmap(other, 1 << 16, 0, recording=False, persistent=True)]) == ()
