# SPDX-License-Identifier: Apache-2.0
"""Units, extents, facts, and what an unfinished image says of itself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pullback.model.extents import (
    Cover,
    Extent,
    Kind,
    Span,
    allocation,
    complement,
    merged,
)
from pullback.model.unfinished import Unfinished, parse_unfinished
from pullback.model.units import GIB, KIB, MIB, TIB, align_down, align_up, human_bytes, human_seconds
from tests.support.values import SIZE, device, facts, node


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1023.4, "1023 B"),
        (1023.6, "1.00 KiB"),
        (KIB, "1.00 KiB"),
        (1536 * MIB, "1.50 GiB"),
        (9.995 * KIB, "10.0 KiB"),
        (9.996 * KIB, "10.0 KiB"),
        (99.95 * KIB, "100 KiB"),
        (99.96 * MIB, "100 MiB"),
        (999.4 * KIB, "999 KiB"),
        (999.5 * KIB, "0.98 MiB"),
        (999.6 * KIB, "0.98 MiB"),
        (1000 * GIB, "0.98 TiB"),
        (3 * TIB, "3.00 TiB"),
        (5000 * 1024 * TIB, "5000 PiB"),
    ],
)
def test_bytes_for_people(count: float, text: str):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.24, "4.2 s"),
        (59.94, "59.9 s"),
        (59.95, "1 min 0 s"),
        (59.96, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.6, "1 h 0 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_seconds_for_people(seconds: float, text: str):
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(("offset", "down", "up"), [(0, 0, 0), (1, 0, 8), (7, 0, 8), (8, 8, 8), (9, 8, 16)])
def test_alignment(offset: int, down: int, up: int):
    assert (align_down(offset, 8), align_up(offset, 8)) == (down, up)


def test_spans_that_touch_or_overlap_become_one():
    assert merged([(0, 4), (4, 4), (6, 1), (9, 1), (9, 0)]) == [Span(0, 8), Span(9, 1)]
    assert merged([(3, 0)]) == []
    assert merged([(2, 1), (5, 1), (9, 1)], gap=2) == [Span(2, 4), Span(9, 1)]


def test_only_what_reads_as_zero_is_zero():
    """base:allocation has two flags: 1 hole, 2 zero.  A hole that may read as anything is data."""
    assert allocation([(0, 1, 0), (1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 1, 0)]) == [
        Extent(0, 2, Kind.DATA),
        Extent(2, 2, Kind.ZERO),
        Extent(4, 1, Kind.DATA),
    ]


def test_allocation_does_not_join_over_a_gap():
    assert allocation([(0, 4, 0), (8, 4, 0)]) == [Extent(0, 4, Kind.DATA), Extent(8, 4, Kind.DATA)]


def test_the_complement_of_nothing_is_everything():
    assert [*complement([], 10)] == [Span(0, 10)]
    assert [*complement([Span(0, 10)], 10)] == []
    assert [*complement([Span(2, 3), Span(7, 1)], 10)] == [Span(0, 2), Span(5, 2), Span(8, 2)]
    assert [*complement([], 0)] == []


def test_a_cover_answers_ascending_questions():
    cover = Cover([Span(2, 2), Span(8, 1)])
    assert [cover.meets(n, n + 1) for n in range(10)] == [n in (2, 3, 8) for n in range(10)]
    assert not Cover([]).meets(0, 100)


FILTER, UPPER = "pb-b00000001-0-filter", "pb-b00000002-0-filter"


def test_the_disk_is_below_all_our_filters():
    stacked = facts(
        [device(root=UPPER)],
        [
            node("node-vda", filename="/a.qcow2"),
            node(FILTER, "copy-before-write", children={"file": "node-vda", "target": "x"}),
            node(UPPER, "copy-before-write", children={"file": FILTER}),
        ],
    )
    disk = stacked.disk(stacked.devices[0])
    assert (disk.node, disk.root, disk.driver, disk.filename) == ("node-vda", UPPER, "qcow2", "/a.qcow2")
    assert disk.virtual_size == SIZE


@pytest.mark.parametrize("read_only", [True, False])
def test_a_disk_is_read_only_as_its_node_is(read_only: bool):
    seen = facts([device(root="n")], [node("n", read_only=read_only)])
    assert seen.disk(seen.devices[0]).read_only is read_only


def test_a_filter_of_others_is_where_we_stop():
    throttled = facts([device(root="limit")], [node("limit", "throttle", children={"file": "n"}), node("n")])
    disk = throttled.disk(throttled.devices[0])
    assert disk.node == "limit"
    assert "a throttle image cannot store dirty bitmaps" in disk.untracked


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (node("n"), ""),
        (node("n", "raw"), "a raw image cannot store dirty bitmaps (only qcow2 can)"),
        (node("n", compat="0.10"), "qemu-img amend"),
    ],
)
def test_what_can_be_tracked(made: object, reason: str):
    seen = facts([device(root="n")], [made])
    said = seen.disk(seen.devices[0]).untracked
    assert reason in said
    assert bool(reason) == bool(said)


IMAGE = Unfinished("repository", "backup", "vda", "qcow2", 100, 7, 8, (Span(0, 5), Span(10, 90)))


def test_before_anything_was_done_an_image_is_not_made_and_nothing_is_durable():
    """It is written down before the image is made, and has to be readable then."""
    begun = IMAGE.started()
    assert begun == Unfinished("repository", "backup", "vda", "qcow2", 100, inode=0, modified=0, done=())
    assert parse_unfinished(begun.to_bytes()) == begun


def test_images_of_one_disk_of_one_backup_are_the_same_work():
    assert IMAGE.same_work(replace(IMAGE, inode=9, modified=0, done=()))
    assert not IMAGE.same_work(replace(IMAGE, backup="another"))
    assert not IMAGE.same_work(replace(IMAGE, disk="vdb"))


@pytest.mark.parametrize(
    "done",
    [
        *([5], ["ab"], [None], [{}], [{"0": 1, "1": 2}]),
        *([[]], [[1]], [[1, 2, 3]], [[1, 2], [3]]),
        *([["0", 1]], [[0, True]], [[0, 1.5]], [[-1, 5]], [[0, None]]),
        *([[0, 0]], [[0, 1], [1, 1]], [[5, 1], [1, 1]], [[0, 101]], [[0, 1], [99, 2]]),
    ],
    ids=str,
)
def test_ranges_that_no_pullback_wrote_are_none(done: list[object]):
    document = json.loads(IMAGE.to_bytes())
    assert parse_unfinished(json.dumps({**document, "done": [[0, 5], [10, 90]]}).encode()) == IMAGE
    assert parse_unfinished(json.dumps({**document, "done": done}).encode()) is None
