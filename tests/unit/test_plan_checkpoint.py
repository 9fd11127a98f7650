# SPDX-License-Identifier: Apache-2.0
"""Transactions that create and remove checkpoints; that they keep what is known is tests/property's matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pullback.model.chain import read_chain
from pullback.model.facts import Bitmap
from pullback.plan.checkpoint import (
    NodeChain,
    recording_actions,
    remove_broken,
    remove_checkpoints,
    start_recording,
    stop_actions,
    stop_recording,
)
from pullback.plan.command import Plan
from tests.support.values import bitmap, chain


def actions(plan: Plan) -> list[Mapping[str, Any]]:
    """The actions of a plan that is one transaction."""
    (step,) = plan.commands()
    assert step.execute == "transaction"
    return list(step.arguments["actions"])


def brief(plan: Plan) -> list[str]:
    """``add NAME``, ``merge SOURCE… > TARGET``, ``remove NAME`` ...; ``add+`` records.  All of it is on the node n."""
    lines = []
    assert {action["data"]["node"] for action in actions(plan)} == {"n"}
    for action in actions(plan):
        verb, data = action["type"].removeprefix("block-dirty-bitmap-"), action["data"]
        short = {key: str(value).replace("pullback-", "") for key, value in data.items()}
        if verb == "merge":
            sources = " ".join(name.removeprefix("pullback-") for name in data["bitmaps"])
            lines.append(f"merge {sources} > {short['target']}")
        else:
            plus = "+" if verb == "add" and not data["disabled"] else ""
            lines.append(f"{verb}{plus} {short['name']}")
    return lines


def removed(*points: str, remove: set[str]) -> list[str]:
    return brief(remove_checkpoints([(NodeChain("n", chain(*points)), remove)]))


def test_a_new_checkpoint_is_one_transaction_over_all_disks():
    step = start_recording([NodeChain("n1", chain("A", "B")), NodeChain("n2", chain())], "C")
    assert step.execute == "transaction"
    assert [(one["data"]["node"], one["data"]["name"]) for one in step.arguments["actions"]] == [
        ("n1", "pullback-C^B"),
        ("n2", "pullback-C"),
    ]
    for one in step.arguments["actions"]:
        assert one["data"] == {**one["data"], "persistent": True, "disabled": False, "granularity": 65536}


def test_one_that_is_made_within_the_freeze_is_the_same():
    disks = [NodeChain("n1", chain("A", "B")), NodeChain("n2", chain())]
    assert recording_actions(disks, "C") == start_recording(disks, "C").arguments["actions"]
    (stop,) = stop_recording(disks).commands()
    assert stop_actions(disks) == stop.arguments["actions"]


def test_the_one_before_stops_afterwards():
    assert brief(stop_recording([NodeChain("n", chain("A", "B"))])) == ["disable B^A"]
    assert not stop_recording([NodeChain("n", chain())])


def test_a_creation_that_was_not_finished_is():
    half = read_chain([bitmap("pullback-A", True), bitmap("pullback-B^A", True)])
    assert brief(stop_recording([NodeChain("n", half)])) == ["disable A", "disable B^A"]


def test_a_fork_stops_recording_with_the_next_checkpoint():
    fork = read_chain([bitmap("pullback-A"), bitmap("pullback-B^A", True), bitmap("pullback-C^A", True)])
    assert brief(stop_recording([NodeChain("n", fork)])) == ["disable B^A", "disable C^A"]
    after = [bitmap("pullback-A"), bitmap("pullback-B^A"), bitmap("pullback-C^A"), bitmap("pullback-D", True)]
    assert read_chain(after).points == ("D",)


def test_inconsistent_bitmaps_are_not_stopped():
    """QEMU refuses anything but their removal."""
    dead = read_chain([bitmap("pullback-A", True, inconsistent=True)])
    assert not stop_recording([NodeChain("n", dead)])


@pytest.mark.parametrize(
    ("points", "remove", "expected"),
    [
        ("ABC", "A", ["add B", "merge B^A > B", "remove B^A", "remove A"]),
        ("ABC", "B", ["merge B^A > A", "remove B^A", "add+ C^A", "merge C^B > C^A", "remove C^B"]),
        ("ABC", "C", ["enable B^A", "merge C^B > B^A", "remove C^B"]),
        ("ABC", "AB", ["add+ C", "merge C^B > C", "remove C^B", "remove A", "remove B^A"]),
        ("ABC", "BC", ["enable A", "merge B^A C^B > A", "remove B^A", "remove C^B"]),
        ("ABC", "AC", ["add+ B", "merge B^A C^B > B", "remove B^A", "remove C^B", "remove A"]),
        ("ABC", "ABC", ["remove A", "remove B^A", "remove C^B"]),
        ("A", "A", ["remove A"]),
    ],
)
def test_removing(points: str, remove: str, expected: list[str]):
    assert removed(*points, remove=set(remove)) == expected


def test_removing_nothing_is_no_plan():
    assert not remove_checkpoints([(NodeChain("n", chain("A", "B")), set())])
    assert not remove_checkpoints([(NodeChain("n", chain("A", "B")), {"Z"})])
    assert not remove_checkpoints([])


def test_several_disks_are_one_transaction():
    disks = [NodeChain("n1", chain("A", "B")), NodeChain("n2", chain("B"))]
    made = actions(remove_checkpoints([(disks[0], {"A"}), (disks[1], {"B"})]))
    assert {one["data"]["node"] for one in made} == {"n1", "n2"}


def test_the_reason_names_what_goes():
    (step,) = remove_checkpoints([(NodeChain("n", chain("A", "B", "C")), {"B", "A", "Z"})]).commands()
    assert step.why == "merge checkpoint A, B away on all disks at once"


def test_a_chain_after_a_gap_loses_the_parent_it_lacks():
    gap = read_chain([bitmap("pullback-C^B", True)])
    plan = remove_checkpoints([(NodeChain("n", gap), set())])
    assert brief(plan) == ["add+ C", "merge C^B > C", "remove C^B"]
    assert "merge checkpoint" not in next(plan.commands()).why


def test_granularity_of_the_old_bitmap_is_kept():
    coarse = read_chain([bitmap("pullback-A"), Bitmap("pullback-B^A", 1 << 20, 0, True, True)])
    (add, *_) = actions(remove_checkpoints([(NodeChain("n", coarse), {"A"})]))
    assert add["data"]["granularity"] == 1 << 20


def test_only_inconsistent_bitmaps_are_removed_as_broken():
    mixed = read_chain([bitmap("pullback-A"), bitmap("pullback-B^A", inconsistent=True), bitmap("pullback-C^B", True)])
    assert brief(remove_broken([NodeChain("n", mixed)])) == ["remove B^A"]
    assert not remove_broken([NodeChain("n", chain("A"))])
