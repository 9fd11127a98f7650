# SPDX-License-Identifier: Apache-2.0
"""The checkpoint chain, read from names."""

from __future__ import annotations

import pytest

from pullback.model.chain import NAME_MAX, Unknown, bitmap_name, is_checkpoint_name, read_chain
from tests.support.values import bitmap, bitmaps, chain


def names(edges: object) -> list[str]:
    assert isinstance(edges, tuple), edges
    return [edge.name for edge in edges]


def reason(answer: object) -> str:
    assert isinstance(answer, Unknown), answer
    return answer.reason


def test_a_disk_without_bitmaps_has_no_chain():
    empty = read_chain([])
    assert (empty.points, empty.last, empty.broken) == ((), None, ())
    assert reason(empty.since("A")) == "checkpoint A is not in this disk's chain"


def test_the_order_comes_from_the_names():
    shuffled = read_chain([bitmap("pullback-C^B", True), bitmap("pullback-A"), bitmap("pullback-B^A")])
    assert shuffled.points == ("A", "B", "C")
    assert shuffled.last == "C"
    assert shuffled == chain("A", "B", "C")


def test_changes_since_a_point_are_its_own_bitmap_and_all_later_ones():
    one = chain("A", "B", "C")
    assert names(one.since("A")) == ["pullback-A", "pullback-B^A", "pullback-C^B"]
    assert names(one.since("C")) == ["pullback-C^B"]
    assert reason(one.since("D")) == "checkpoint D is not in this disk's chain"


def test_two_recording_at_the_end_is_a_creation_that_was_not_finished():
    half = read_chain([bitmap("pullback-A"), bitmap("pullback-B^A", True), bitmap("pullback-C^B", True)])
    assert half.points == ("A", "B", "C")
    assert not half.broken
    assert names(half.since("B")) == ["pullback-B^A", "pullback-C^B"]


def test_a_gap_ends_the_chain():
    gap = read_chain([bitmap("pullback-A"), bitmap("pullback-C^B"), bitmap("pullback-D^C", True)])
    assert gap.points == ("C", "D")
    assert [one.name for one, _ in gap.broken] == ["pullback-A"]
    assert "missing or inconsistent" in reason(gap.since("A"))
    assert reason(gap.since("B")) == "checkpoint B is not in this disk's chain"


def test_an_inconsistent_bitmap_ends_the_chain():
    crashed = read_chain(
        [bitmap("pullback-A"), bitmap("pullback-B^A", inconsistent=True), bitmap("pullback-C^B", True)]
    )
    assert crashed.points == ("C",)
    assert "QEMU ended without storing it" in reason(crashed.since("B"))
    assert "missing or inconsistent" in reason(crashed.since("A"))


def test_a_killed_qemu_leaves_nothing_to_build_on():
    killed = read_chain([bitmap("pullback-A"), bitmap("pullback-B^A", inconsistent=True)])
    assert killed.points == ()
    assert "QEMU ended without storing it" in reason(killed.since("B"))


def test_an_inconsistent_recording_end_is_not_used():
    """QEMU says recording: false of an inconsistent one; should another version not, nothing may rest on it."""
    odd = read_chain([bitmap("pullback-A"), bitmap("pullback-B^A", True, inconsistent=True)])
    assert odd.points == ()
    assert isinstance(odd.since("A"), Unknown)


def test_a_fork_is_not_guessed_at():
    fork = read_chain([bitmap("pullback-A"), bitmap("pullback-B^A", True), bitmap("pullback-C^A", True)])
    assert fork.points == ()
    for point in "ABC":
        assert reason(fork.since(point)) == "two chains record on one disk"


def test_a_side_branch_that_stopped_is_left_aside():
    side = read_chain([bitmap("pullback-A"), bitmap("pullback-B^A", True), bitmap("pullback-C^A")])
    assert side.points == ("A", "B")
    assert isinstance(side.since("C"), Unknown)


def test_a_chain_that_does_not_record_knows_nothing():
    stopped = read_chain([bitmap("pullback-A"), bitmap("pullback-B^A")])
    assert stopped.points == ()
    assert reason(stopped.since("A")) == "no bitmap of the chain is recording"


def test_recording_in_the_middle_does_not_help_when_the_end_does_not():
    odd = read_chain([bitmap("pullback-A", True), bitmap("pullback-B^A")])
    assert odd.points == ()


def test_a_point_that_two_bitmaps_claim_ends_the_chain():
    twice = read_chain(
        [bitmap("pullback-A"), bitmap("pullback-B^A"), bitmap("pullback-B"), bitmap("pullback-C^B", True)]
    )
    assert twice.points == ("C",)
    assert {one.name for one, _ in twice.broken} == {"pullback-A", "pullback-B^A", "pullback-B"}


def test_the_last_point_claimed_twice_leaves_nothing():
    twice = read_chain([bitmap("pullback-A"), bitmap("pullback-B^A", True), bitmap("pullback-B")])
    assert twice.points == ()


def test_a_circle_of_names_comes_to_an_end():
    circle = read_chain([bitmap("pullback-A^B"), bitmap("pullback-B^A"), bitmap("pullback-C^B", True)])
    assert circle.points == ("A", "B", "C")
    assert read_chain([bitmap("pullback-A^A", True)]).points == ()


@pytest.mark.parametrize(
    "foreign",
    [
        "bitmap0",
        "libvirt-1",
        "",
        "pullback-",
        "pullback-A^",
        "pullback-^A",
        "pullback-A^B^C",
        "pullback-A/B",
        "pullback",
    ],
)
def test_bitmaps_of_others_are_not_ours(foreign: str):
    mixed = read_chain([*bitmaps("A", "B"), bitmap(foreign, True)])
    assert mixed == chain("A", "B")


@pytest.mark.parametrize("name", ["A", "0", "nightly-2026", "a.b_c:d+e@f", "x" * 400])
def test_names_that_a_checkpoint_can_have(name: str):
    assert is_checkpoint_name(name)
    assert read_chain([bitmap(bitmap_name(name, None), True)]).points == (name,)


@pytest.mark.parametrize("name", ["", "a^b", "-a", ".a", "a b", "a\n", "ä", "x" * 401, "a/b", "a,b"])
def test_names_that_a_checkpoint_cannot_have(name: str):
    assert not is_checkpoint_name(name)


def test_the_longest_names_fit_into_a_bitmaps_name():
    assert len(bitmap_name("x" * 400, "y" * 400).encode()) <= NAME_MAX
