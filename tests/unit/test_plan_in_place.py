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
    data = [(bytes([number]), Place("vda", number, 1)) for number in range(count)]
    found = pick_unchanged(data, spans, chance.randrange)
    clean = [one for one in data if not any(span.offset <= one[1].offset < span.end for span in spans)]
    assert set(found) <= set(clean)
    assert found == sorted(found, key=lambda one: one[1].offset)
    assert found[-1:] == clean[-1:]
    assert min(SAMPLE, len(clean)) <= len(found) <= SAMPLE + 1


def test_a_mark_is_read_back_whatever_became_of_it() -> None:
    mark = UnfinishedMark("a" * 64, "b" * 64)
    name = mark.bitmap_name()
    assert is_mark(name)
    for inconsistent in (False, True):
        stored = Bitmap(name, 1 << 30, 0, recording=False, persistent=True, inconsistent=inconsistent)
        assert unfinished_marks([stored]) == (mark,)
    for other in ("pullback-restoring:", "pullback-restoring:[1,2]", 'pullback-restoring:["a",null]', "pullback-x"):
        assert unfinished_marks([Bitmap(other, 1 << 16, 0, recording=False, persistent=True)]) == ()
