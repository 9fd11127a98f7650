# SPDX-License-Identifier: Apache-2.0
"""Freezing and exporting: what happens in which order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pullback.model.chain import read_chain
from pullback.model.facts import SERVER_MARK
from pullback.plan.checkpoint import NodeChain
from pullback.plan.command import JobConcluded, Paused, Plan
from pullback.plan.snapshot import (
    DiskSnapshot,
    ExportPart,
    disown_server,
    freeze,
    open_access,
    prepare_snapshot,
    start_export,
)
from tests.support.values import SIZE, disk, part


def of(parts: Sequence[DiskSnapshot]) -> list[NodeChain]:
    return [NodeChain(one.disk.node, read_chain(one.disk.bitmaps)) for one in parts]


def brief(plan: Plan) -> list[str]:
    """What each command does, in one word."""
    words = []
    for step in plan.commands():
        if step.execute == "transaction":
            kinds = {action["type"].removeprefix("block-dirty-bitmap-") for action in step.arguments["actions"]}
            words.append("/".join(sorted(kinds)))
        else:
            words.append(step.arguments.get("driver", step.execute))
    return words


ONE = [part(0, of=disk("vda", ["A"]))]
TWO = [part(0, of=disk("vda", ["A"])), part(1, of=disk("vdb", ["A"]))]
PAUSE = ["human-monitor-command", "human-monitor-command", "stop", "qom-set", "qom-set", "cont"]


def test_the_new_bitmap_records_before_the_freeze_and_the_old_one_until_after_it():
    assert brief(freeze(ONE, of(ONE), "B", running=True)) == ["add", "copy-before-write", "qom-set", "disable"]


def test_several_disks_of_a_running_domain_are_swapped_in_a_pause():
    plan = freeze(TWO, of(TWO), "B", running=True)
    assert brief(plan) == ["add", "copy-before-write", "copy-before-write", *PAUSE, "disable"]
    (pause,) = [action for action in plan.actions if isinstance(action, Paused)]
    assert [step.execute for step in pause.steps] == ["qom-set", "qom-set"], "nothing else while it stands still"
    flushes = [step.arguments["command-line"] for step in pause.before]
    assert flushes == ['qemu-io node-vda "flush"', 'qemu-io node-vdb "flush"']


def test_a_domain_that_stands_still_is_not_paused():
    plan = freeze(TWO, of(TWO), "B", running=False)
    assert brief(plan) == ["add", "copy-before-write", "copy-before-write", "qom-set", "qom-set", "disable"]


def test_a_single_disk_needs_no_pause():
    assert not any(isinstance(action, Paused) for action in freeze(ONE, of(ONE), "B", running=True).actions)


def test_only_the_tracked_disks_get_a_checkpoint():
    plan = freeze(TWO, of(TWO)[:1], "B", running=False)
    steps = [step for step in plan.commands() if step.execute == "transaction"]
    assert [{action["data"]["node"] for action in step.arguments["actions"]} for step in steps] == [
        {"node-vda"},
        {"node-vda"},
    ]
    assert len([step for step in plan.commands() if step.execute == "qom-set"]) == 2


@pytest.mark.parametrize(("tracked", "checkpoint"), [([], "B"), ([], None), (of(ONE), None)])
def test_without_a_checkpoint_the_chain_is_left_alone(tracked: list[NodeChain], checkpoint: str | None):
    assert brief(freeze(ONE, tracked, checkpoint, running=True)) == ["copy-before-write", "qom-set"]


def test_the_first_checkpoint_stops_none():
    first = [part(0)]
    assert brief(freeze(first, of(first), "A", running=True)) == ["add", "copy-before-write", "qom-set"]


def test_a_failing_scratch_breaks_the_snapshot_not_the_domain():
    (step,) = [one for one in freeze(ONE, [], None, True).commands() if one.execute == "blockdev-add"]
    assert step.arguments["on-cbw-error"] == "break-snapshot"
    assert step.arguments["cbw-timeout"] > 0


def test_a_second_snapshot_goes_on_top_of_the_first():
    upper = [part(0, of=disk("vda", root="pb-b00000009-0-filter"))]
    add, swap = freeze(upper, [], None, True).commands()
    assert add.arguments["file"] == "pb-b00000009-0-filter"
    assert swap.arguments["value"] == upper[0].filter


def test_the_scratch_is_made_by_qemu_before_anything_else():
    create, add = prepare_snapshot(ONE).commands()
    assert create.execute == "blockdev-create"
    assert create.arguments["options"] == {"driver": "file", "filename": "/var/tmp/scratch-0", "size": SIZE}
    assert create.wait == JobConcluded(create.arguments["job-id"])
    assert (add.arguments["node-name"], add.arguments["filename"]) == (ONE[0].scratch, "/var/tmp/scratch-0")
    assert len(list(prepare_snapshot(TWO).commands())) == 4


def test_the_frozen_view_lets_ranges_go():
    (step,) = open_access(ONE).commands()
    assert step.arguments["driver"] == "snapshot-access"
    assert (step.arguments["file"], step.arguments["discard"]) == (ONE[0].filter, "unmap")


@pytest.mark.parametrize("number", [0, 9, 99_999_999])
def test_names_fit_into_qemus(number: int):
    made = part(number, of=disk())
    for name in (made.scratch, made.filter, made.access):
        assert name.startswith("pb-")
        assert len(name) <= 31
    assert made.export.startswith("pullback-")


def test_changes_are_gathered_on_the_view_from_the_disks_own_edges():
    since = read_chain(disk("vda", ["A", "B"]).bitmaps)
    edges = since.edges
    plan = start_export([ExportPart(ONE[0], (("A", edges), ("B", edges[1:])))], "/run/nbd", writable=False)
    steps = list(plan.commands())
    assert [step.execute.removeprefix("block-") for step in steps] == [
        *["dirty-bitmap-add", "dirty-bitmap-merge"] * 2,
        "dirty-bitmap-add",
        "nbd-server-start",
        "export-add",
    ]
    assert steps[0].arguments == {"node": ONE[0].access, "name": "A", "disabled": True, "persistent": False}
    assert steps[1].arguments == {
        "node": ONE[0].access,
        "target": "A",
        "bitmaps": [{"node": "node-vda", "name": "pullback-A"}, {"node": "node-vda", "name": "pullback-B^A"}],
    }
    assert steps[3].arguments["bitmaps"] == [{"node": "node-vda", "name": "pullback-B^A"}]
    assert steps[4].arguments["name"] == SERVER_MARK
    assert steps[5].arguments == {"addr": {"type": "unix", "data": {"path": "/run/nbd"}}}
    assert steps[6].arguments == {
        "id": ONE[0].export,
        "type": "nbd",
        "node-name": ONE[0].access,
        "name": "vda",
        "writable": False,
        "bitmaps": ["A", "B"],
    }


def test_one_server_for_all_disks_and_the_mark_before_it():
    steps = list(start_export([ExportPart(one) for one in TWO], "/run/nbd", writable=True).commands())
    assert [step.execute for step in steps] == [
        "block-dirty-bitmap-add",
        "nbd-server-start",
        "block-export-add",
        "block-export-add",
    ]
    assert all(step.arguments["writable"] for step in steps[2:])


def test_the_mark_goes_when_the_server_is_not_ours():
    (step,) = disown_server(TWO[0]).commands()
    assert step.arguments == {"node": TWO[0].access, "name": SERVER_MARK}


def test_every_command_says_why():
    plans = prepare_snapshot(TWO) + freeze(TWO, of(TWO), "B", True) + open_access(TWO)
    assert all(step.why for step in plans.commands())
    assert bool(plans)
    assert not Plan()
