# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from pullback.errors import NbdProtocolError
from pullback.nbd.coverage import Coverage


def test_pieces_in_any_order_make_a_whole() -> None:
    coverage = Coverage(30)
    for start, length in ((20, 10), (0, 5), (10, 10), (5, 5)):
        assert not coverage.complete
        coverage.add(start, length)
    assert coverage.complete


@pytest.mark.parametrize("piece", [(10, 10), (5, 6), (19, 1), (12, 2), (0, 30), (30, 1), (29, 2), (-1, 1), (0, 0)])
def test_an_overlap_is_seen_when_it_comes(piece: tuple[int, int]) -> None:
    coverage = Coverage(30)
    coverage.add(10, 10)
    with pytest.raises(NbdProtocolError):
        coverage.add(*piece)
