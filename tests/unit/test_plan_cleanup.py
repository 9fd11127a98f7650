# SPDX-License-Identifier: Apache-2.0
"""The way back: from whatever is there to nothing of ours, in an order that QEMU takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pullback.model.chain import read_chain
from pullback.model.facts import SERVER_MARK, Export, Job
from pullback.plan.checkpoint import NodeChain
from pullback.plan.cleanup import remove_snapshots, snapshots_in, stale_snapshots
from pullback.plan.command import ExportDeleted, Plan
from pullback.plan.snapshot import (
    DiskSnapshot,
    ExportPart,
    disown_server,
    freeze,
    open_access,
    prepare_snapshot,
    start_export,
)
from tests.support.fake_qemu import FakeQemu, QemuError
from tests.support.values import bitmap, device, facts, node

FIRST, SECOND, THIRD = "b00000001", "b00000002", "s00000003"


def parts_of(qemu: FakeQemu, snapshot: str) -> list[DiskSnapshot]:
    seen = qemu.facts()
    return [DiskSnapshot(seen.disk(one), snapshot, n, f"/s{n}") for n, one in enumerate(seen.devices)]


def whole(qemu: FakeQemu, snapshot: str, *, exported: bool = True) -> Plan:
    """Everything that a backup does to QEMU until it reads."""
    parts = parts_of(qemu, snapshot)
    tracked = [NodeChain(part.disk.node, read_chain(part.disk.bitmaps)) for part in parts]
    plan = prepare_snapshot(parts) + freeze(parts, tracked, f"of-{snapshot}", True) + open_access(parts)
    return plan + start_export([ExportPart(part) for part in parts], "/nbd", True) if exported else plan


def commands(plan: Plan) -> list[str]:
    return [f"{step.execute} {next(iter(step.arguments.values()), '')}".strip() for step in plan.commands()]


def test_a_whole_snapshot_goes_in_this_order():
    qemu = FakeQemu("vda", "vdb")
    qemu.run(whole(qemu, FIRST))
    plan = remove_snapshots(qemu.facts(), {FIRST})
    path = "/machine/peripheral/{}/virtio-backend"
    assert commands(plan) == [
        f"block-export-del pullback-{FIRST}-0",
        f"block-export-del pullback-{FIRST}-1",
        "nbd-server-stop",
        f"blockdev-del pb-{FIRST}-0-access",
        f"blockdev-del pb-{FIRST}-1-access",
        f"qom-set {path.format('vda')}",
        f"blockdev-del pb-{FIRST}-0-filter",
        f"qom-set {path.format('vdb')}",
        f"blockdev-del pb-{FIRST}-1-filter",
        f"blockdev-del pb-{FIRST}-0-scratch",
        f"blockdev-del pb-{FIRST}-1-scratch",
    ]
    first = next(plan.commands())
    assert first.wait == ExportDeleted(f"pullback-{FIRST}-0")
    assert first.arguments["mode"] == "hard"


def test_nothing_there_is_no_plan():
    assert not remove_snapshots(facts(), {FIRST})
    assert not remove_snapshots(facts(), set())
    assert stale_snapshots(facts()) == set()


@pytest.mark.parametrize("targets", [("vda",), ("vda", "vdb")])
@pytest.mark.parametrize("wait", [True, False], ids=["", "killed before the reply"])
def test_from_every_step_there_is_a_way_back(targets: tuple[str, ...], wait: bool):
    steps = len(list(whole(FakeQemu(*targets), FIRST).commands()))
    for upto in range(steps + 1):
        qemu = FakeQemu(*targets)
        before = qemu.graph()
        qemu.run(whole(qemu, FIRST), upto=upto, wait=wait)
        if upto and not (upto == 1 and wait):  # a finished job that was waited for leaves nothing to find
            assert stale_snapshots(qemu.facts()) == {FIRST}, upto
        qemu.run(remove_snapshots(qemu.facts(), {FIRST}))
        for node_of in qemu.nodes.values():
            node_of.bitmaps.clear()  # checkpoints are not the snapshot's
        assert qemu.graph() == before, upto


def test_the_way_back_may_itself_be_interrupted():
    qemu = FakeQemu("vda", "vdb")
    qemu.run(whole(qemu, FIRST))
    steps = len(list(remove_snapshots(qemu.facts(), {FIRST}).commands()))
    for upto in range(steps):
        qemu = FakeQemu("vda", "vdb")
        qemu.run(whole(qemu, FIRST))
        qemu.run(remove_snapshots(qemu.facts(), {FIRST}), upto=upto)
        qemu.run(remove_snapshots(qemu.facts(), {FIRST}))
        assert sorted(qemu.nodes) == ["node-vda", "node-vdb"]
        assert not qemu.exports
        assert not qemu.server, upto


def test_the_order_is_needed():
    """The fake is as strict as QEMU: any other order of nodes is refused."""
    qemu = FakeQemu("vda")
    qemu.run(whole(qemu, FIRST, exported=False))
    steps = list(remove_snapshots(qemu.facts(), {FIRST}).commands())
    for wrong in ([steps[1]], [steps[2]], [steps[3]], [steps[0], steps[2]], [steps[0], steps[3]]):
        other = FakeQemu("vda")
        other.run(whole(other, FIRST, exported=False))
        with pytest.raises(QemuError):
            other.run(Plan(tuple(wrong)))


# The NBD server


def test_an_export_of_others_keeps_the_server():
    qemu = FakeQemu("vda")
    qemu.run(whole(qemu, FIRST))
    seen = qemu.facts()
    foreign = replace(seen, exports=(*seen.exports, Export("theirs", "node-vda", "nbd")))
    said = commands(remove_snapshots(foreign, {FIRST}))
    assert "nbd-server-stop" not in said
    assert said[0] == f"block-export-del pullback-{FIRST}-0"
    assert not any("theirs" in line for line in said)


def test_an_export_of_another_kind_does_not_need_it():
    qemu = FakeQemu("vda")
    qemu.run(whole(qemu, FIRST))
    seen = qemu.facts()
    other = replace(seen, exports=(*seen.exports, Export("theirs", "node-vda", "vhost-user-blk")))
    assert "nbd-server-stop" in commands(remove_snapshots(other, {FIRST}))


def test_a_server_without_our_mark_is_not_ours():
    qemu = FakeQemu("vda")
    qemu.server = True
    plan = whole(qemu, FIRST)
    with pytest.raises(QemuError, match="already running"):
        qemu.run(plan)
    assert SERVER_MARK in qemu.nodes[f"pb-{FIRST}-0-access"].bitmaps
    qemu.run(disown_server(parts_of(qemu, FIRST)[0]))
    qemu.run(remove_snapshots(qemu.facts(), {FIRST}))
    assert qemu.server
    assert sorted(qemu.nodes) == ["node-vda"]


def test_a_mark_on_anything_else_means_nothing():
    seen = facts([device()], [node("node-vda", bitmaps=(bitmap(SERVER_MARK),))])
    assert not remove_snapshots(seen, {FIRST})


# Whose it is


def test_only_our_names_count():
    names = [
        "pb-x",
        "pb-b0000001-0-filter",
        "pb-b00000001-0-other",
        "pb-b00000001-0-filter-x",
        "xpb-b00000001-0-filter",
    ]
    jobs = [Job("backup", "backup", "running"), Job("pullback-b00000001", "create", "concluded")]
    seen = facts([device()], [node("node-vda"), *(node(name) for name in names)], jobs=jobs)
    assert snapshots_in(seen) == set()


def test_stale_are_the_private_ones():
    seen = facts(
        [device()],
        [node("node-vda"), node(f"pb-{THIRD}-0-scratch", "file")],
        exports=[Export(f"pullback-{SECOND}-3", "n", "nbd")],
        jobs=[Job(f"pullback-{FIRST}-0-create", "create", "concluded")],
    )
    assert snapshots_in(seen) == {FIRST, SECOND, THIRD}
    assert stale_snapshots(seen) == {FIRST, SECOND}


def test_only_finished_jobs_are_dismissed():
    jobs = [
        Job(f"pullback-{FIRST}-0-create", "create", "concluded"),
        Job(f"pullback-{FIRST}-1-create", "create", "running"),
        Job(f"pullback-{SECOND}-0-create", "create", "concluded"),
    ]
    assert commands(remove_snapshots(facts(jobs=jobs), {FIRST})) == [f"job-dismiss pullback-{FIRST}-0-create"]


def test_other_snapshots_stay():
    qemu = FakeQemu("vda", "vdb")
    before = qemu.graph()
    for snapshot, root in ((FIRST, "vda"), (THIRD, "vdb")):
        qemu.run(_on_one(qemu, snapshot, root))
    qemu.run(remove_snapshots(qemu.facts(), {FIRST}))
    assert snapshots_in(qemu.facts()) == {THIRD}
    assert qemu.roots["vda"] == "node-vda"
    qemu.run(remove_snapshots(qemu.facts(), {THIRD}))
    assert qemu.graph() == before


def _on_one(qemu: FakeQemu, snapshot: str, target: str) -> Plan:
    """A snapshot of one disk, without checkpoint and export."""
    (part,) = [one for one in parts_of(qemu, snapshot) if one.disk.target == target]
    return prepare_snapshot([part]) + freeze([part], [], None, True) + open_access([part])


# Stacks


def _stacked(*snapshots: str) -> FakeQemu:
    """Snapshots of vda one after the other, each on top of those before."""
    qemu = FakeQemu("vda")
    for snapshot in snapshots:
        qemu.run(_on_one(qemu, snapshot, "vda"))
    return qemu


@pytest.mark.parametrize("order", [(FIRST, SECOND, THIRD), (THIRD, SECOND, FIRST), (SECOND, FIRST, THIRD)])
def test_stacked_snapshots_go_in_any_order(order: tuple[str, ...]):
    qemu = _stacked(FIRST, SECOND, THIRD)
    assert qemu.facts().disk(qemu.facts().devices[0]).node == "node-vda"
    for gone, snapshot in enumerate(order, 1):
        qemu.run(remove_snapshots(qemu.facts(), {snapshot}))
        views = {name for name in qemu.nodes if name.endswith("access")}
        assert views == {f"pb-{one}-0-access" for one in order[gone:]}
    assert qemu.graph() == FakeQemu("vda").graph()


@pytest.mark.parametrize("which", [{FIRST, SECOND}, {FIRST, SECOND, THIRD}, {FIRST, THIRD}, {SECOND, THIRD}])
def test_several_of_a_stack_at_once(which: set[str]):
    qemu = _stacked(FIRST, SECOND, THIRD)
    qemu.run(remove_snapshots(qemu.facts(), which))
    assert {name for name in qemu.nodes if name.endswith("access")} == {
        f"pb-{one}-0-access" for one in {FIRST, SECOND, THIRD} - which
    }
    qemu.run(remove_snapshots(qemu.facts(), {FIRST, SECOND, THIRD}))
    assert qemu.graph() == FakeQemu("vda").graph()


def test_the_lower_of_two_stays_as_a_pass_through():
    qemu = _stacked(FIRST, SECOND)
    assert commands(remove_snapshots(qemu.facts(), {FIRST})) == [f"blockdev-del pb-{FIRST}-0-access"]
    qemu.run(remove_snapshots(qemu.facts(), {FIRST}))
    assert qemu.roots["vda"] == f"pb-{SECOND}-0-filter"
    assert f"pb-{FIRST}-0-scratch" in qemu.nodes
    assert not remove_snapshots(qemu.facts(), {FIRST})


def test_a_filter_that_never_got_in_goes_before_those_it_stands_on():
    qemu = _stacked(FIRST)
    steps = list(_on_one(qemu, SECOND, "vda").commands())
    (add,) = [n for n, step in enumerate(steps) if step.arguments.get("driver") == "copy-before-write"]
    qemu.run(_on_one(qemu, SECOND, "vda"), upto=add + 1)
    qemu.run(remove_snapshots(qemu.facts(), {FIRST, SECOND}))
    assert qemu.graph() == FakeQemu("vda").graph()
