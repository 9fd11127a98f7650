# SPDX-License-Identifier: Apache-2.0
"""Freezing, by filters and by jobs: what happens in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pullback.model.chain import bitmap_name, read_chain
from pullback.model.facts import Disk
from pullback.model.snapshots import SAVED_MAP, snapshot_mark
from pullback.plan.checkpoint import NodeChain
from pullback.plan.command import JobConcluded, Paused, Plan
from pullback.plan.freeze import MARK_GRANULARITY, FreezePart, freeze, open_access, prepare_snapshot
from pullback.plan.method import SAVED_UNIT, Method
from tests.support.values import SIZE, bitmap, disk, node, part


def of(parts: Sequence[FreezePart]) -> list[NodeChain]:
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
    assert brief(freeze(ONE, of(ONE), "B", "filter", running=True)) == [
        "add",
        "copy-before-write",
        "qom-set",
        "disable",
    ]


def test_several_disks_of_a_running_domain_are_swapped_in_a_pause():
    plan = freeze(TWO, of(TWO), "B", "filter", running=True)
    assert brief(plan) == ["add", "copy-before-write", "copy-before-write", *PAUSE, "disable"]
    (pause,) = [action for action in plan.actions if isinstance(action, Paused)]
    assert [step.execute for step in pause.steps] == ["qom-set", "qom-set"], "nothing else while it stands still"
    flushes = [step.arguments["command-line"] for step in pause.before]
    assert flushes == ['qemu-io node-vda "flush"', 'qemu-io node-vdb "flush"']


def test_a_domain_that_stands_still_is_not_paused():
    plan = freeze(TWO, of(TWO), "B", "filter", running=False)
    assert brief(plan) == ["add", "copy-before-write", "copy-before-write", "qom-set", "qom-set", "disable"]


def test_a_single_disk_needs_no_pause():
    assert not any(isinstance(action, Paused) for action in freeze(ONE, of(ONE), "B", "filter", running=True).actions)


def test_only_the_tracked_disks_get_a_checkpoint():
    plan = freeze(TWO, of(TWO)[:1], "B", "filter", running=False)
    steps = [step for step in plan.commands() if step.execute == "transaction"]
    assert [{action["data"]["node"] for action in step.arguments["actions"]} for step in steps] == [
        {"node-vda"},
        {"node-vda"},
    ]
    assert len([step for step in plan.commands() if step.execute == "qom-set"]) == 2


@pytest.mark.parametrize(("tracked", "checkpoint"), [([], "B"), ([], None), (of(ONE), None)])
def test_without_a_checkpoint_the_chain_is_left_alone(tracked: list[NodeChain], checkpoint: str | None):
    assert brief(freeze(ONE, tracked, checkpoint, "filter", running=True)) == ["copy-before-write", "qom-set"]


def test_the_first_checkpoint_stops_none():
    first = [part(0)]
    assert brief(freeze(first, of(first), "A", "filter", running=True)) == ["add", "copy-before-write", "qom-set"]


def test_a_failing_scratch_breaks_the_snapshot_not_the_domain():
    (step,) = [one for one in freeze(ONE, [], None, "filter", running=True).commands() if one.execute == "blockdev-add"]
    assert step.arguments["on-cbw-error"] == "break-snapshot"
    assert step.arguments["cbw-timeout"] > 0


def test_the_domains_discards_go_through_the_filter():
    """They would end in it, and not give space back (seen on 7.2)."""
    add, _ = freeze(ONE, [], None, "filter", running=True).commands()
    assert add.arguments["discard"] == "unmap"


def test_a_second_snapshot_goes_on_top_of_the_first():
    upper = [part(0, of=disk("vda", root="pb-b00000009-0-filter"))]
    add, swap = freeze(upper, [], None, "filter", running=True).commands()
    assert add.arguments["file"] == "pb-b00000009-0-filter"
    assert swap.arguments == {"path": upper[0].disk.qdev, "property": "drive", "value": upper[0].filter}


def test_the_scratch_is_made_by_qemu_before_anything_else():
    create, add, mark = prepare_snapshot(ONE, map_saved=False).commands()
    assert (create.execute, create.arguments["job-id"]) == ("blockdev-create", "pullback-b00000001-0-create")
    assert create.arguments["options"] == {"driver": "file", "filename": "/var/tmp/scratch-0", "size": SIZE}
    assert create.wait == JobConcluded(create.arguments["job-id"])
    assert add.arguments == {
        "driver": "file",
        "node-name": "pb-b00000001-0-scratch",
        "filename": "/var/tmp/scratch-0",
        "discard": "unmap",
    }
    assert mark.arguments["node"] == ONE[0].scratch
    assert len(list(prepare_snapshot(TWO, map_saved=False).commands())) == 6


def test_where_views_are_not_exact_a_bitmap_records_what_is_saved():
    *first, one, other = prepare_snapshot(TWO, map_saved=True).commands()
    assert first == list(prepare_snapshot(TWO, map_saved=False).commands())
    assert [step.execute for step in (one, other)] == ["block-dirty-bitmap-add"] * 2
    assert one.arguments == {
        "node": TWO[0].scratch,
        "name": SAVED_MAP,
        "persistent": False,
        "granularity": SAVED_UNIT,
    }
    assert other.arguments["node"] == TWO[1].scratch


def test_the_mark_says_whose_the_scratch_is_and_records_nothing():
    *_, mark = prepare_snapshot(ONE, map_saved=False).commands()
    assert mark.arguments == {
        "node": ONE[0].scratch,
        "name": ONE[0].mark.bitmap_name(),
        "disabled": True,
        "persistent": False,
        "granularity": MARK_GRANULARITY,
    }
    written = node(ONE[0].scratch, "file", bitmaps=(bitmap(mark.arguments["name"], persistent=False),))
    assert snapshot_mark(written) == ONE[0].mark


def test_the_frozen_view_lets_ranges_go():
    (step,) = open_access(ONE).commands()
    assert step.arguments["driver"] == "snapshot-access"
    assert (step.arguments["file"], step.arguments["discard"]) == (ONE[0].filter, "unmap")


# Jobs


def jobs(parts: Sequence[FreezePart], tracked: Sequence[NodeChain], checkpoint: str | None, **more: bool) -> list[Any]:
    """The actions of the one transaction that freezes with jobs."""
    (step,) = freeze(parts, tracked, checkpoint, "job", running=True, **more).commands()
    assert step.execute == "transaction"
    return list(step.arguments["actions"])


def verbs(actions: Sequence[Any]) -> list[str]:
    return [f"{one['type'].removeprefix('block-dirty-bitmap-')} {_of(one['data'])}" for one in actions]


def _of(data: Mapping[str, Any]) -> str:
    return str(data.get("node", data.get("device", "")))


def test_jobs_freeze_all_disks_and_turn_the_chains_in_one_transaction():
    assert verbs(jobs(TWO, of(TWO), "B")) == [
        *["add node-vda", "add node-vdb"],
        *["blockdev-backup node-vda", "blockdev-backup node-vdb"],
        *["disable node-vda", "disable node-vdb"],
    ]


def test_the_bitmaps_that_jobs_begin_lead_to_the_checkpoint():
    new, _, old = jobs(ONE, of(ONE), "B")
    assert (new["data"]["name"], old["data"]["name"]) == (bitmap_name("B", "A"), bitmap_name("A", None))


@pytest.mark.parametrize("running", [True, False])
def test_jobs_pause_nothing(running: bool):
    plan = freeze(TWO, of(TWO), "B", "job", running=running)
    assert not any(isinstance(action, Paused) for action in plan.actions)
    assert len(plan.actions) == 1


def test_a_job_copies_nothing_of_itself_and_its_filter_has_our_name():
    (action,) = jobs(ONE, [], None)
    assert action == {
        "type": "blockdev-backup",
        "data": {
            "job-id": "pullback-b00000001-0",
            "device": "node-vda",
            "target": "pb-b00000001-0-scratch",
            "sync": "none",
            "filter-node-name": "pb-b00000001-0-filter",
        },
    }


def test_a_job_goes_right_above_the_disks_own_node_whatever_stands_there():
    upper = [part(0, of=disk("vda", root="pb-b00000009-0-filter"))]
    (action,) = jobs(upper, [], None)
    assert action["data"]["device"] == "node-vda"


@pytest.mark.parametrize("known", [True, False])
def test_jobs_break_the_snapshot_only_where_qemu_takes_the_argument(known: bool):
    for action in jobs(TWO, [], None, break_snapshot=known):
        assert action["data"].get("on-cbw-error") == ("break-snapshot" if known else None)


@pytest.mark.parametrize(("tracked", "checkpoint"), [([], "B"), ([], None), (of(ONE), None)])
def test_jobs_without_a_checkpoint_leave_the_chain_alone(tracked: list[NodeChain], checkpoint: str | None):
    assert verbs(jobs(ONE, tracked, checkpoint)) == ["blockdev-backup node-vda"]


def test_jobs_give_only_the_tracked_disks_a_checkpoint():
    assert verbs(jobs(TWO, of(TWO)[:1], "B")) == [
        "add node-vda",
        "blockdev-backup node-vda",
        "blockdev-backup node-vdb",
        "disable node-vda",
    ]


def _raw() -> Disk:
    return disk("vdc", root="pb-b00000009-0-filter", node="node-vdc", driver="raw")


def test_a_raw_disk_is_frozen_all_the_same():
    assert verbs(jobs([part(0, of=_raw())], [], "B")) == ["blockdev-backup node-vdc"]


@pytest.mark.parametrize("number", [0, 9, 99_999_999])
def test_names_fit_into_qemus(number: int):
    made = part(number, of=disk())
    for role in ("scratch", "filter", "access", "target", "probe", "view", "align", "deny", "void"):
        assert made.names.node(role).startswith("pb-")
        assert len(made.names.node(role)) <= 31
    assert (made.scratch, made.filter, made.access) == tuple(
        made.names.node(role) for role in ("scratch", "filter", "access")
    )
    assert made.names.id().startswith("pullback-")


@pytest.mark.parametrize("method", ["filter", "job"])
def test_every_command_says_why(method: Method):
    plans = prepare_snapshot(TWO, map_saved=True) + freeze(TWO, of(TWO), "B", method, running=True) + open_access(TWO)
    assert all(step.why for step in plans.commands())
    assert bool(plans)
    assert not Plan()
