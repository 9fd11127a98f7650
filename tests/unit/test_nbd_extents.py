# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from array import array
from struct import pack
from time import process_time

import pytest

from pullback.errors import NbdProtocolError
from pullback.nbd.extents import Extents, cut_extents, marked_extents, merge_extents, pack_extents, parse_extents


def extents(*pairs: tuple[int, int]) -> Extents:
    return array("I", [length for length, _ in pairs]), array("I", [flags for _, flags in pairs])


def test_parse_cuts_only_the_last() -> None:
    payload = pack(">6I", 10, 1, 20, 0, 100, 3)
    assert parse_extents(payload, 40) == extents((10, 1), (20, 0), (10, 3))
    assert parse_extents(payload, 1000) == extents((10, 1), (20, 0), (100, 3))
    with pytest.raises(NbdProtocolError):
        parse_extents(payload, 30)


def test_one_means_one() -> None:
    assert parse_extents(pack(">2I", 10, 1), 10, one=True) == extents((10, 1))
    for payload in (pack(">4I", 5, 1, 5, 0), pack(">2I", 11, 1)):
        with pytest.raises(NbdProtocolError):
            parse_extents(payload, 10, one=True)


def test_merge_joins_equal_neighbours_across_replies() -> None:
    parts = [extents((10, 0), (5, 1)), extents((7, 1), (1, 1), (2, 0))]
    assert merge_extents(100, parts) == [(100, 10, 0), (110, 13, 1), (123, 2, 0)]
    assert merge_extents(100, [extents((10, 0), (5, 1))]) == [(100, 10, 0), (110, 5, 1)]
    assert merge_extents(0, []) == []


def test_only_what_has_the_flag_is_told() -> None:
    parts = [extents((10, 0), (5, 1), (2, 3)), extents((4, 2), (8, 1))]
    assert list(marked_extents(100, parts, 1)) == [(110, 5), (115, 2), (121, 8)]
    assert list(marked_extents(100, parts, 2)) == [(115, 2), (117, 4)]
    assert list(marked_extents(0, [], 1)) == []


def test_merged_extents_may_be_longer_than_32_bits() -> None:
    part = extents((0xFFFF0000, 3))
    assert merge_extents(0, [part] * 300) == [(0, 300 * 0xFFFF0000, 3)]


def test_cut() -> None:
    whole = extents((10, 0), (5, 1), (7, 0))
    assert cut_extents(whole, 12) == extents((10, 0), (2, 1))
    assert cut_extents(whole, 15) == extents((10, 0), (5, 1))
    assert cut_extents(whole, 22) == whole
    assert whole == extents((10, 0), (5, 1), (7, 0))


def test_pack_is_what_parse_reads() -> None:
    assert parse_extents(pack_extents([(1, 2), (3, 4)]), 100) == extents((1, 2), (3, 4))


def test_a_third_of_a_million_extents_is_no_work() -> None:
    payload = pack_extents([(65536, number & 1) for number in range(330_000)])
    start = process_time()
    merged = merge_extents(0, [parse_extents(payload, 330_000 * 65536)])
    # Measured 0.03 s; the limit is for a machine ten times slower, and still catches a loop in Python over objects.
    assert process_time() - start < 0.5
    assert len(merged) == 330_000
