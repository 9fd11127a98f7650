# SPDX-License-Identifier: Apache-2.0
"""What reads a frozen view inside QEMU: pushes, probes, and views that can be believed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pullback.model.facts import Export, Facts
from pullback.model.snapshots import READER_ROLES, Names, ServerMark, SnapshotPart, read_snapshots
from pullback.model.units import CHUNK
from pullback.plan.command import JobGone
from pullback.plan.method import SAVED_UNIT
from pullback.plan.probe import clear_probe, end_probe, start_probe
from pullback.plan.push import PUSH_BITMAP, PushPart, choose_transport, start_push
from pullback.plan.view import open_view
from tests.support.fake_qemu import SIZE, FakeQemu, QemuError
from tests.support.making import SERVER, TLS, export_disks, probe, push, since, snapshot
from tests.support.values import disk, facts

FIRST, PUBLIC = "b00000001", "s00000002"
THREAD = "/objects/thread"


def frozen(*targets: str, snapshot_id: str = FIRST) -> FakeQemu:
    qemu = FakeQemu(*targets)
    qemu.run(snapshot(qemu.facts(), snapshot_id, checkpoint="A"))
    return qemu


# Pushing


@pytest.mark.parametrize("version", [(7, 2, 22), (8, 99, 0), (9, 0, 0)])
@pytest.mark.parametrize("iothread", ["", THREAD, None])
def test_a_disk_that_must_not_be_exported_is_pushed(version: tuple[int, int, int], iothread: str | None):
    pushed = version < (9, 0, 0) and iothread != ""
    seen = facts(version=version)
    assert (choose_transport(seen, [disk("vda"), disk("vdb", iothread=iothread)]) == "push") == pushed


@pytest.mark.parametrize(
    ("server", "transport"),
    [
        (SERVER, "pull"),
        (replace(SERVER, tls="/etc/tls"), "push"),
        (ServerMark("inet", "127.0.0.1:1"), "push"),
        (TLS, "push"),
    ],
)
def test_ours_is_pulled_from_where_our_client_can_reach_it(server: ServerMark, transport: str):
    qemu = frozen("vda", snapshot_id=PUBLIC)
    qemu.run(export_disks(qemu.facts(), PUBLIC, server))
    assert choose_transport(qemu.facts(), [disk()]) == transport


@pytest.mark.parametrize(("kind", "transport"), [("nbd", "push"), ("vhost-user-blk", "pull")])
def test_where_others_have_the_server_it_is_pushed(kind: str, transport: str):
    assert choose_transport(facts(exports=[Export("theirs", "node-vda", kind)]), [disk()]) == transport


def test_whole_disks_are_pushed_at_once():
    qemu = frozen("vda", "vdb")
    plan = push(qemu.facts(), FIRST, "/run/p")
    assert [step.execute for step in plan.commands()] == ["blockdev-add", "blockdev-backup"] * 2
    target, job, *_ = plan.commands()
    assert target.arguments == {
        "driver": "nbd",
        "node-name": f"pb-{FIRST}-0-target",
        "server": {"type": "unix", "path": "/run/p"},
        "export": "vda",
    }
    assert job.arguments == {
        "job-id": f"pullback-{FIRST}-0-push",
        "device": f"pb-{FIRST}-0-access",
        "target": f"pb-{FIRST}-0-target",
        "auto-dismiss": False,
        "sync": "full",
    }
    qemu.run(plan)
    assert len(qemu.jobs) == 2


def test_changes_are_pushed_in_whole_chunks_and_the_map_stays_as_it_is():
    edges = since(disk("vda", ["A", "B"]), "A")[0][1]
    plan = start_push([PushPart(Names(FIRST, 0), "vda", "node-vda", edges, "view")], "/run/p")
    add, merge, _, job = plan.commands()
    view = f"pb-{FIRST}-0-view"
    assert add.arguments == {
        "node": view,
        "name": PUSH_BITMAP,
        "disabled": True,
        "persistent": False,
        "granularity": CHUNK,
    }
    assert merge.arguments == {
        "node": view,
        "target": PUSH_BITMAP,
        "bitmaps": [{"node": "node-vda", "name": name} for name in ("pullback-A", "pullback-B^A")],
    }
    assert {key: job.arguments[key] for key in ("device", "sync", "bitmap", "bitmap-mode")} == {
        "device": view,
        "sync": "bitmap",
        "bitmap": PUSH_BITMAP,
        "bitmap-mode": "never",
    }


def test_no_changes_are_a_push_all_the_same():
    """Its map is empty: an incremental one without edges is not a whole one."""
    plan = start_push([PushPart(Names(FIRST, 0), "vda", "node-vda", ())], "/run/p")
    assert [step.arguments.get("sync") for step in plan.commands()][-1] == "bitmap"


# Probing


def part_of(seen: Facts, snapshot_id: str = FIRST) -> SnapshotPart:
    return next(state for state in read_snapshots(seen) if state.id == snapshot_id).parts[0]


def test_a_probe_reads_little_and_goes_nowhere():
    qemu = frozen("vda")
    nowhere, job = start_probe(part_of(qemu.facts())).commands()
    assert (nowhere.arguments["driver"], nowhere.arguments["size"]) == ("null-co", SIZE)
    assert job.arguments == {
        "job-id": f"pullback-{FIRST}-0-probe",
        "device": f"pb-{FIRST}-0-access",
        "target": nowhere.arguments["node-name"],
        "sync": "full",
        "speed": 1,
        "auto-dismiss": False,
    }


@pytest.mark.parametrize("concluded", [False, True])
def test_a_probe_leaves_nothing(concluded: bool):
    qemu = frozen("vda")
    before = qemu.graph()
    qemu.run(probe(qemu.facts(), FIRST))
    if concluded:
        qemu.end_job(f"pullback-{FIRST}-0-probe")
    end = end_probe(part_of(qemu.facts()), concluded)
    assert next(end.commands()).wait == (None if concluded else JobGone(f"pullback-{FIRST}-0-probe"))
    qemu.run(end)
    assert qemu.graph() == before


@pytest.mark.parametrize("concluded", [False, True])
def test_a_probe_that_a_client_left_is_cleared_from_every_step(concluded: bool):
    for upto in range(3):
        qemu = frozen("vda")
        before = qemu.graph()
        qemu.run(probe(qemu.facts(), FIRST), upto=upto)
        if concluded and qemu.jobs:
            qemu.end_job(f"pullback-{FIRST}-0-probe")
        plan = clear_probe(qemu.facts(), part_of(qemu.facts()))
        assert bool(plan) == bool(upto)
        qemu.run(plan)
        assert qemu.graph() == before, upto


# Views that can be believed


def test_a_view_reads_in_units_that_are_answered_right_and_denies_what_fails():
    align, void, deny, view = (step.arguments for step in open_view(Names(PUBLIC, 0), "vda", SIZE).commands())
    drivers = [node["driver"] for node in (view, align, deny, void)]
    assert drivers == ["quorum", "blkdebug", "blkdebug", "null-co"]
    assert (align["align"], align["max-transfer"]) == (SAVED_UNIT, SAVED_UNIT)
    assert align["image"] == f"pb-{PUBLIC}-0-access"
    assert (void["size"], void["read-zeroes"]) == (SIZE, False), "else all of it would be called zero"
    assert deny["image"] == void["node-name"]
    assert deny["inject-error"] == [{"event": "none", "iotype": "read", "errno": 13}]
    assert view["children"] == [align["node-name"], deny["node-name"]], "fifo: what can be read comes first"
    assert (view["read-pattern"], view["vote-threshold"]) == ("fifo", 1)


def test_nodes_of_a_view_go_in_the_order_of_their_roles():
    qemu = FakeQemu("vda")
    qemu.run(snapshot(qemu.facts(), PUBLIC))
    nodes = [f"pb-{PUBLIC}-0-{role}" for role in READER_ROLES]
    there = [name for name in nodes if name in qemu.nodes]
    assert len(there) == 4
    steps = {step.arguments["node-name"]: step for step in open_view(Names(PUBLIC, 0), "vda", SIZE).commands()}
    assert set(steps) == set(there)
    for wrong in there[1:]:
        if wrong.endswith(("void", "align", "deny")):
            with pytest.raises(QemuError, match="in use"):
                qemu._do_blockdev_del({"node-name": wrong})
    for name in there:
        qemu._do_blockdev_del({"node-name": name})
