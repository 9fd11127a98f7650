# SPDX-License-Identifier: Apache-2.0
"""How what is to be read is dealt out to threads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pullback.engine.pull import BATCH, _gathered
from pullback.model.extents import Span
from pullback.model.units import KIB, MIB


def test_scattered_chunks_are_read_together() -> None:
    spans = [Span(number * MIB, 256 * KIB) for number in range(40)]
    assert [len(batch) for batch in _gathered(spans)] == [16, 16, 8]


def test_what_lies_in_a_row_is_a_batch_of_its_own() -> None:
    spans = [Span(0, 64 * KIB), Span(BATCH, BATCH), Span(2 * BATCH, BATCH), Span(4 * BATCH, 64 * KIB)]
    assert list(_gathered(spans)) == [(span,) for span in spans]


@given(st.lists(st.integers(1, 2 * BATCH), max_size=50))
def test_every_span_is_in_one_batch_in_order(lengths: list[int]) -> None:
    spans = [Span(number * 4 * BATCH, length) for number, length in enumerate(lengths)]
    batches = list(_gathered(spans))
    assert [span for batch in batches for span in batch] == spans
    assert all(batches)
