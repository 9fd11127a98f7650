# SPDX-License-Identifier: Apache-2.0
"""The way back: from whatever is there to nothing of ours, in an order that QEMU takes."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from pullback.model.facts import Export, Job
from pullback.model.snapshots import Names, ServerMark, read_snapshots
from pullback.plan.cleanup import remove_snapshots, stale_snapshots, stale_writable, stop_exports
from pullback.plan.command import ExportDeleted, JobGone, Plan
from pullback.plan.export import TLS_OBJECT, disown_server
from pullback.plan.method import Method
from tests.support.fake_qemu import FakeQemu, QemuAborted, QemuError
from tests.support.making import SERVER, TLS, export_disks, export_own_disks, export_parts, probe, push, snapshot
from tests.support.values import bitmap, device, facts, node

FIRST, SECOND, THIRD = "b00000001", "b00000002", "s00000003"


def whole(qemu: FakeQemu, snapshot_id: str, *, method: Method = "filter", server: ServerMark = SERVER) -> Plan:
    """Everything that a backup does to QEMU until it reads."""
    plan = snapshot(qemu.facts(), snapshot_id, checkpoint=f"of-{snapshot_id}", method=method)
    return plan + export_disks(qemu.facts(), snapshot_id, server)


def seen_in(qemu: FakeQemu) -> set[str]:
    return {state.id for state in read_snapshots(qemu.facts())}


def commands(plan: Plan) -> list[str]:
    return [f"{step.execute} {next(iter(step.arguments.values()), '')}".strip() for step in plan.commands()]


def test_a_whole_snapshot_goes_in_this_order():
    qemu = FakeQemu("vda", "vdb")
    qemu.run(whole(qemu, FIRST))
    plan = remove_snapshots(qemu.facts(), {FIRST})
    path = "/machine/peripheral/{}/virtio-backend"
    assert commands(plan) == [
        f"block-export-del pullback-{FIRST}-0-x766461",
        f"block-export-del pullback-{FIRST}-1-x766462",
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
    assert [step.arguments for step in plan.commands() if step.execute == "qom-set"] == [
        {"path": path.format(target), "property": "drive", "value": f"node-{target}"} for target in ("vda", "vdb")
    ]
    first = next(plan.commands())
    assert first.wait == ExportDeleted(f"pullback-{FIRST}-0-x766461")
    assert first.arguments["mode"] == "hard"


def test_nothing_there_is_no_plan():
    assert not remove_snapshots(facts(), {FIRST})
    assert not remove_snapshots(facts(), set())
    assert stale_snapshots(facts()) == set()


KINDS = {
    "filter": (False, "filter", SERVER),
    "job": (False, "job", SERVER),
    "filter, TLS": (False, "filter", TLS),
    "daemon": (True, "job", SERVER),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, *targets: str, upto: int | None = None, wait: bool = True) -> FakeQemu:
    """A QEMU in which FIRST was begun, as far as ``upto``."""
    daemon, method, server = KINDS[kind]
    qemu = FakeQemu(*targets, daemon=daemon)
    qemu.run(whole(qemu, FIRST, method=method, server=server), upto=upto, wait=wait)
    return qemu


def length(kind: str, *targets: str) -> int:
    daemon, method, server = KINDS[kind]
    return len(list(whole(FakeQemu(*targets, daemon=daemon), FIRST, method=method, server=server).commands()))


def without_checkpoints(qemu: FakeQemu) -> object:
    """What is there but the checkpoints, which are not the snapshot's."""
    for node_of in qemu.nodes.values():
        node_of.bitmaps.clear()
    return qemu.graph()


@kinds
@pytest.mark.parametrize("targets", [("vda",), ("vda", "vdb")])
@pytest.mark.parametrize("wait", [True, False], ids=["", "killed before the reply"])
def test_from_every_step_there_is_a_way_back(kind: str, targets: tuple[str, ...], wait: bool):
    before = FakeQemu(*targets, daemon=KINDS[kind][0]).graph()
    for upto in range(length(kind, *targets) + 1):
        qemu = made(kind, *targets, upto=upto, wait=wait)
        if upto and not (upto == 1 and wait):  # a finished job that was waited for leaves nothing to find
            assert stale_snapshots(qemu.facts()) == {FIRST}, upto
        qemu.run(remove_snapshots(qemu.facts(), {FIRST}))
        assert without_checkpoints(qemu) == before, upto


@kinds
def test_the_way_back_may_itself_be_interrupted(kind: str):
    steps = len(list(remove_snapshots(made(kind, "vda", "vdb").facts(), {FIRST}).commands()))
    for upto in range(steps):
        for wait in (True, False):
            qemu = made(kind, "vda", "vdb")
            qemu.run(remove_snapshots(qemu.facts(), {FIRST}), upto=upto, wait=wait)
            qemu.run(remove_snapshots(qemu.facts(), {FIRST}))
            assert without_checkpoints(qemu) == FakeQemu("vda", "vdb", daemon=KINDS[kind][0]).graph(), upto


def test_the_order_is_needed():
    """The fake is as strict as QEMU: any other order of nodes is refused."""
    qemu = FakeQemu("vda")
    qemu.run(snapshot(qemu.facts(), FIRST))
    steps = list(remove_snapshots(qemu.facts(), {FIRST}).commands())
    for wrong in ([steps[1]], [steps[2]], [steps[3]], [steps[0], steps[2]], [steps[0], steps[3]]):
        other = FakeQemu("vda")
        other.run(snapshot(other.facts(), FIRST))
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
    assert said[0] == f"block-export-del pullback-{FIRST}-0-x766461"
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
    assert SERVER.bitmap_name() in qemu.nodes[f"pb-{FIRST}-0-access"].bitmaps
    qemu.run(disown_server(export_parts(qemu.facts(), FIRST), SERVER))
    qemu.run(remove_snapshots(qemu.facts(), {FIRST}))
    assert qemu.server
    assert sorted(qemu.nodes) == ["node-vda"]


def test_a_mark_on_anything_else_means_nothing():
    seen = facts([device()], [node("node-vda", bitmaps=(bitmap(SERVER.bitmap_name(), persistent=False),))])
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
    assert read_snapshots(seen) == ()


def test_stale_are_the_private_ones_and_the_unfinished():
    seen = facts(
        [device()],
        [node("node-vda"), node(f"pb-{THIRD}-0-scratch", "file")],
        exports=[Export(f"pullback-{SECOND}-3-x", "n", "nbd")],
        jobs=[Job(f"pullback-{FIRST}-0-create", "create", "concluded")],
    )
    assert [state.id for state in read_snapshots(seen)] == [FIRST, SECOND, THIRD]
    assert stale_snapshots(seen) == {FIRST, SECOND, THIRD}


@pytest.mark.parametrize("method", ["filter", "job"])
def test_a_public_snapshot_is_stale_only_while_it_is_half_made(method: Method):
    plan = snapshot(FakeQemu("vda", "vdb").facts(), THIRD, method=method)
    steps = len(list(plan.commands()))
    for upto in range(2, steps + 1):
        qemu = FakeQemu("vda", "vdb")
        qemu.run(plan, upto=upto)
        assert stale_snapshots(qemu.facts()) == ({THIRD} if upto < steps else set()), upto


def test_finished_jobs_are_dismissed_and_others_cancelled():
    jobs = [
        Job(f"pullback-{FIRST}-0-create", "create", "concluded"),
        Job(f"pullback-{FIRST}-1-create", "create", "running"),
        Job(f"pullback-{SECOND}-0-create", "create", "concluded"),
        Job("backup", "backup", "running"),
    ]
    plan = remove_snapshots(facts(jobs=jobs), {FIRST})
    assert commands(plan) == [
        f"job-dismiss pullback-{FIRST}-0-create",
        f"job-cancel pullback-{FIRST}-1-create",
    ]
    assert [step.wait for step in plan.commands()] == [None, JobGone(f"pullback-{FIRST}-1-create")]


def test_other_snapshots_stay():
    qemu = FakeQemu("vda", "vdb")
    before = qemu.graph()
    for snapshot_id, target in ((FIRST, "vda"), (THIRD, "vdb")):
        qemu.run(snapshot(qemu.facts(), snapshot_id, [target]))
    qemu.run(remove_snapshots(qemu.facts(), {FIRST}))
    assert seen_in(qemu) == {THIRD}
    assert qemu.roots["vda"] == "node-vda"
    qemu.run(remove_snapshots(qemu.facts(), {THIRD}))
    assert qemu.graph() == before


# Stacks


def _stacked(*snapshots: str) -> FakeQemu:
    """Snapshots of vda one after the other, each on top of those before."""
    qemu = FakeQemu("vda")
    for snapshot_id in snapshots:
        qemu.run(snapshot(qemu.facts(), snapshot_id))
    return qemu


@pytest.mark.parametrize("order", [(FIRST, SECOND, THIRD), (THIRD, SECOND, FIRST), (SECOND, FIRST, THIRD)])
def test_stacked_snapshots_go_in_any_order(order: tuple[str, ...]):
    qemu = _stacked(FIRST, SECOND, THIRD)
    assert qemu.facts().disk(qemu.facts().devices[0]).node == "node-vda"
    for gone, snapshot_id in enumerate(order, 1):
        qemu.run(remove_snapshots(qemu.facts(), {snapshot_id}))
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
    assert commands(remove_snapshots(qemu.facts(), {FIRST})) == [
        f'human-monitor-command qemu-io pb-{FIRST}-0-access "discard 0 4194304"',
        f"blockdev-del pb-{FIRST}-0-access",
    ]
    qemu.run(remove_snapshots(qemu.facts(), {FIRST}))
    assert qemu.roots["vda"] == f"pb-{SECOND}-0-filter"
    assert f"pb-{FIRST}-0-scratch" in qemu.nodes
    assert not remove_snapshots(qemu.facts(), {FIRST})


def test_the_lower_of_two_stays_under_every_disk():
    qemu = FakeQemu("vda", "vdb")
    for snapshot_id in (FIRST, SECOND):
        qemu.run(snapshot(qemu.facts(), snapshot_id))
    qemu.run(remove_snapshots(qemu.facts(), {FIRST}))
    assert {f"pb-{FIRST}-0-filter", f"pb-{FIRST}-1-filter"} <= set(qemu.nodes)


def test_all_of_a_large_disk_is_let_go():
    qemu = _stacked(FIRST, SECOND)
    seen = qemu.facts()
    size = (5 << 29) + 512
    large = replace(seen, nodes={name: replace(one, virtual_size=size) for name, one in seen.nodes.items()})
    lines = [step.arguments.get("command-line", "") for step in remove_snapshots(large, {FIRST}).commands()]
    assert lines[:-1] == [
        f'qemu-io pb-{FIRST}-0-access "discard {offset} {count}"'
        for offset, count in ((0, 1 << 30), (1 << 30, 1 << 30), (2 << 30, (1 << 29) + 512))
    ]


def test_a_retired_one_leaves_with_the_last_above_it():
    qemu = _stacked(FIRST, THIRD, SECOND)
    qemu.run(remove_snapshots(qemu.facts(), {FIRST}))
    qemu.run(remove_snapshots(qemu.facts(), {SECOND}))
    assert f"pb-{FIRST}-0-filter" in qemu.nodes, "the public one above it still stands"
    assert stale_snapshots(qemu.facts()) == {FIRST}
    qemu.run(remove_snapshots(qemu.facts(), {THIRD}))
    assert qemu.graph() == FakeQemu("vda").graph(), "nobody had to name it again"


def test_a_filter_that_never_got_in_goes_before_those_it_stands_on():
    qemu = _stacked(FIRST)
    plan = snapshot(qemu.facts(), SECOND)
    steps = list(plan.commands())
    (add,) = [n for n, step in enumerate(steps) if step.arguments.get("driver") == "copy-before-write"]
    qemu.run(plan, upto=add + 1)
    qemu.run(remove_snapshots(qemu.facts(), {FIRST, SECOND}))
    assert qemu.graph() == FakeQemu("vda").graph()


@pytest.mark.parametrize("daemon", [False, True])
def test_jobs_of_a_stack_go_in_any_order(daemon: bool):
    for order in permutations((FIRST, SECOND, THIRD)):
        qemu = FakeQemu("vda", "vdb", daemon=daemon)
        for snapshot_id in (FIRST, SECOND, THIRD):
            qemu.run(snapshot(qemu.facts(), snapshot_id, method="job"))
        for gone, snapshot_id in enumerate(order, 1):
            qemu.run(remove_snapshots(qemu.facts(), {snapshot_id}))
            assert seen_in(qemu) == set(order[gone:]), order
            assert len(qemu.jobs) == 2 * (3 - gone)
        assert qemu.graph() == FakeQemu("vda", "vdb", daemon=daemon).graph()


def test_jobs_below_a_filter_go_in_any_order():
    for order in permutations((FIRST, SECOND, THIRD)):
        qemu = FakeQemu("vda")
        qemu.run(snapshot(qemu.facts(), FIRST))
        for snapshot_id in (SECOND, THIRD):
            qemu.run(snapshot(qemu.facts(), snapshot_id, method="job"))
        for snapshot_id in order:
            qemu.run(remove_snapshots(qemu.facts(), {snapshot_id}))
        assert qemu.graph() == FakeQemu("vda").graph(), order


def test_the_fake_aborts_where_qemu_does():
    """A filter over a job's: ending the job takes the filter's bitmaps with it."""
    qemu = FakeQemu("vda")
    qemu.run(snapshot(qemu.facts(), FIRST, method="job"))
    qemu.run(snapshot(qemu.facts(), SECOND, method="filter"))
    with pytest.raises(QemuAborted, match="bitmaps"):
        qemu.run(remove_snapshots(qemu.facts(), {FIRST}))


# Jobs that read a frozen view


@pytest.mark.parametrize("concluded", [False, True])
@pytest.mark.parametrize("kind", ["push", "push changes", "probe"])
def test_readers_go_first_from_every_step(kind: str, concluded: bool):
    def begun(upto: int | None = None) -> FakeQemu:
        qemu = FakeQemu("vda", "vdb")
        qemu.run(snapshot(qemu.facts(), FIRST, checkpoint="A"))
        seen = qemu.facts()
        qemu.run(probe(seen, FIRST) if kind == "probe" else push(seen, FIRST, point="A" * (kind != "push")), upto=upto)
        return qemu

    steps = 4 if kind != "push changes" else 8
    for upto in range(steps + 1):
        qemu = begun(upto)
        if concluded:
            for name in list(qemu.jobs):
                qemu.end_job(name)
        qemu.run(remove_snapshots(qemu.facts(), {FIRST}))
        assert without_checkpoints(qemu) == FakeQemu("vda", "vdb").graph(), upto
    verb = "job-dismiss" if concluded else "job-cancel"
    qemu = begun()
    if concluded:
        for name in list(qemu.jobs):
            qemu.end_job(name)
    said = commands(remove_snapshots(qemu.facts(), {FIRST}))
    role = "probe" if kind == "probe" else "push"
    assert said[:2] == [f"{verb} pullback-{FIRST}-{number}-{role}" for number in (0, 1)]


@pytest.mark.parametrize("exported", ["view", "access"])
def test_views_that_can_be_believed_go_before_what_they_stand_on(exported: str):
    def plan(qemu: FakeQemu) -> Plan:
        made = snapshot(qemu.facts(), THIRD, view=True)
        return made + export_disks(qemu.facts(), THIRD, TLS, role=exported)

    steps = len(list(plan(FakeQemu("vda", "vdb")).commands()))
    for upto in range(steps + 1):
        qemu = FakeQemu("vda", "vdb")
        qemu.run(plan(qemu), upto=upto)
        qemu.run(remove_snapshots(qemu.facts(), {THIRD}))
        assert qemu.graph() == FakeQemu("vda", "vdb").graph(), upto


# Ending exports


def exported(*snapshots: str, server: ServerMark = TLS) -> FakeQemu:
    """A snapshot of vda each, exported one after the other at the one server."""
    qemu = FakeQemu("vda")
    for number, snapshot_id in enumerate(snapshots):
        qemu.run(snapshot(qemu.facts(), snapshot_id))
        more = export_disks(qemu.facts(), snapshot_id, server, suffix=str(number), start_server=number == 0)
        qemu.run(more)
    return qemu


@pytest.mark.parametrize("order", list(permutations((FIRST, SECOND, THIRD))), ids="-".join)
def test_the_server_ends_with_the_last_export_of_ours(order: tuple[str, ...]):
    for by_export in (True, False):
        qemu = exported(FIRST, SECOND, THIRD)
        for left, snapshot_id in zip((2, 1, 0), order, strict=True):
            assert qemu.server
            assert qemu.objects == {TLS_OBJECT}
            mine = {name for name in qemu.exports if snapshot_id in name}
            seen = qemu.facts()
            qemu.run(stop_exports(seen, mine) if by_export else remove_snapshots(seen, {snapshot_id}))
            assert len(qemu.exports) == left
        assert not qemu.server
        assert not qemu.objects


def test_an_export_ends_before_its_server_and_what_says_whose_that_is():
    qemu = exported(THIRD)
    (mine,) = qemu.exports
    plan = stop_exports(qemu.facts(), {mine})
    assert commands(plan) == [
        f"block-export-del {mine}",
        "nbd-server-stop",
        f"object-del {TLS_OBJECT}",
        f"block-dirty-bitmap-remove pb-{THIRD}-0-access",
    ]
    assert [step.optional for step in plan.commands()] == [False, True, True, True], "all but the export may be gone"


def test_marks_leave_with_the_last_export_of_their_node():
    qemu = exported(FIRST, SECOND)
    qemu.run(export_disks(qemu.facts(), FIRST, TLS, suffix="-again", start_server=False))
    marked = {FIRST: TLS.bitmap_name() in qemu.nodes[f"pb-{FIRST}-0-access"].bitmaps}
    assert marked == {FIRST: True}
    first, second, again = qemu.exports
    for stopped, there in (({first}, {FIRST, SECOND}), ({second}, {FIRST}), ({again}, set())):
        qemu.run(stop_exports(qemu.facts(), stopped))
        nodes = {one for one in (FIRST, SECOND) if TLS.bitmap_name() in qemu.nodes[f"pb-{one}-0-access"].bitmaps}
        assert nodes == there
    assert not qemu.server


@pytest.mark.parametrize("theirs", ["nbd", "vhost-user-blk"])
def test_stopping_the_last_export_of_ours_leaves_a_server_that_others_use(theirs: str):
    qemu = exported(THIRD)
    seen = qemu.facts()
    foreign = replace(seen, exports=(*seen.exports, Export("theirs", "node-vda", theirs)))
    said = commands(stop_exports(foreign, set(qemu.exports)))
    assert ("nbd-server-stop" in said) == (theirs != "nbd")
    assert not any("theirs" in line for line in said)


def test_exports_of_own_disks_are_their_own():
    qemu = FakeQemu("vda", "vdb", daemon=True)
    before = qemu.graph()
    for upto in range(len(list(export_own_disks(qemu.facts(), "w00000001", TLS).commands())) + 1):
        qemu.run(export_own_disks(qemu.facts(), "w00000001", TLS), upto=upto)
        seen = qemu.facts()
        assert stale_snapshots(seen) == set()
        assert read_snapshots(seen) == ()
        assert stale_writable(seen) == set(qemu.exports)
        qemu.run(stop_exports(seen, stale_writable(seen)))
        assert qemu.graph() == before, upto


def test_snapshots_leave_exports_of_own_disks_and_their_server():
    qemu = FakeQemu("vda", "vdb", daemon=True)
    qemu.run(export_own_disks(qemu.facts(), "w00000001", targets=["vda"]))
    qemu.run(snapshot(qemu.facts(), THIRD, ["vdb"], method="job"))
    qemu.run(export_disks(qemu.facts(), THIRD, targets=["vdb"], start_server=False))
    qemu.run(remove_snapshots(qemu.facts(), {THIRD}))
    assert list(qemu.exports) == [Names("w00000001", 0).export("own-vda")]
    assert qemu.server
