# SPDX-License-Identifier: Apache-2.0
"""The way back on a real QEMU, from every step of a snapshot and from stacks; and the fake one held to it."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lab import images
from lab.disks import DiskSpec
from lab.processes import LabError, wait_for
from lab.qemu import BareQemu
from pullback.errors import CommandFailed, DomainError
from pullback.model.facts import Facts
from pullback.model.snapshots import ServerMark, read_snapshots
from pullback.plan.cleanup import remove_snapshots, stale_snapshots, stale_writable, stop_exports
from pullback.plan.command import JobGone, Plan, Step
from pullback.plan.method import Method
from pullback.qemu.execute import run_plan
from pullback.qemu.observe import observe, observe_daemon
from tests.golden.capture import session
from tests.golden.daemon import RealDaemon
from tests.support.certificates import write_certificates
from tests.support.fake_qemu import FakeQemu, QemuAborted, QemuError
from tests.support.making import export_disks, export_own_disks, probe, push, snapshot

FIRST, SECOND, THIRD = "b00000001", "b00000002", "s00000003"
TARGETS = ("vda", "vdb")
PATTERN = 0x5A


class Real:
    """A real QEMU that is asked what the fake one is asked."""

    def __init__(self, qemu: BareQemu, directory: Path) -> None:
        self.qemu = qemu
        self.directory = directory

    def facts(self) -> Facts:
        async def look() -> Facts:
            async with session(self.qemu) as monitor:
                return await observe(monitor)

        return asyncio.run(look())

    def run(self, plan: Plan, upto: int | None = None) -> None:
        async def carry_out() -> None:
            async with session(self.qemu) as monitor:
                await run_plan(monitor, Plan(tuple(plan.commands())[:upto]) if upto is not None else plan)

        asyncio.run(carry_out())


Either = Real | FakeQemu


def one_disk(qemu: Either, snapshot_id: str, directory: Path, method: Method = "filter") -> Plan:
    # The same on a QEMU that would not need the believable view, as the fake is one that does.
    view = snapshot_id == THIRD
    return snapshot(qemu.facts(), snapshot_id, ["vda"], method=method, directory=str(directory), view=view)


def whole(qemu: Either, server: ServerMark, directory: Path, *, method: Method = "filter", view: bool = False) -> Plan:
    """A snapshot of all disks, exported; ``view`` puts one that can be believed between."""
    plan = snapshot(qemu.facts(), FIRST, method=method, directory=str(directory), view=view)
    return plan + export_disks(qemu.facts(), FIRST, server, role="view" if view else "access")


def graph(facts: Facts) -> dict[str, Any]:
    """What of us is in QEMU."""
    return {
        "nodes": {one.name: (one.driver, dict(one.children)) for one in facts.nodes.values() if one.is_ours},
        "roots": {device.target: device.root for device in facts.devices},
        "exports": {(export.id, export.node) for export in facts.exports},
        "jobs": {(job.id, job.type) for job in facts.jobs},
        "marks": {(one.name, bitmap.name) for one in facts.nodes.values() for bitmap in one.bitmaps},
    }


CLEAN = graph(FakeQemu(*TARGETS).facts())


@pytest.fixture
def real(bare_qemu: Callable[..., BareQemu], lab_dir: Path) -> Real:
    disks = [DiskSpec(images.create(lab_dir / f"{one}.qcow2", 1 << 22), id=one) for one in TARGETS]
    qemu = bare_qemu(disks, running=True)
    qemu.qdev("vda")  # kept: once a filter is in, the laboratory could no longer find it by its node
    return Real(qemu, lab_dir)


def unused(real: Real) -> None:
    """Nothing that observing does not see is left either."""
    objects = {one["name"] for one in real.qemu.qmp("qom-list", path="/objects")}
    assert "pullback-tls" not in objects
    real.qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(real.directory / "free")}})
    real.qemu.qmp("nbd-server-stop")


def tls_server(real: Real) -> ServerMark:
    write_certificates(real.directory)
    # An address of this process's own: on one that all use, another may get the port while QEMU does not listen.
    host = f"127.{1 + os.getpid() % 250}.{os.getpid() >> 8 & 255}.7"
    with socket.create_server((host, 0)) as probe_of_a_port:
        port = probe_of_a_port.getsockname()[1]
    return ServerMark("inet", f"{host}:{port}", str(real.directory))


@pytest.mark.parametrize(
    ("method", "view", "tls"),
    [("filter", False, False), ("job", False, False), ("filter", True, True), ("job", True, True)],
)
def test_from_every_step_there_is_a_way_back(real: Real, method: Method, view: bool, tls: bool) -> None:
    assert graph(real.facts()) == CLEAN
    server = tls_server(real) if tls else ServerMark("unix", str(real.directory / "nbd"))
    plan = partial(whole, server=server, directory=real.directory, method=method, view=view)
    steps = len(list(plan(real).commands()))
    assert steps > (15 if method == "filter" else 12)
    for upto in range(steps + 1):
        fake = FakeQemu(*TARGETS)
        fake.run(plan(fake), upto=upto)
        real.run(plan(real), upto)
        assert graph(real.facts()) == graph(fake.facts()), upto
        assert stale_snapshots(real.facts()) == stale_snapshots(fake.facts())
        real.run(remove_snapshots(real.facts(), {FIRST}))
        assert graph(real.facts()) == CLEAN, upto
        unused(real)
        real.qemu.qmp("cont")  # a pause that was cut short is the guard's matter
    real.qemu.device_write("vda", 0, 65536, PATTERN)
    real.qemu.device_read_check("vda", 0, 65536, PATTERN)


@pytest.mark.parametrize("method", ["filter", "job"])
@pytest.mark.parametrize("kind", ["push", "push changes", "push the view", "probe"])
def test_readers_of_a_frozen_view_go_from_every_step(real: Real, kind: str, method: Method) -> None:
    """Pushed into a server of QEMU's own kind that is slow; probes end by themselves, or not."""
    target = real.directory / "server"
    target.mkdir()
    made = images.create(target / "sink.qcow2", 1 << 22)
    with RealDaemon(target, {"vda": made}) as sink:
        place = str(target / "nbd")
        sink.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": place}})
        sink.qmp("block-export-add", id="vda", type="nbd", node_name="disk-vda", name="vda", writable=True)
        for upto in itertools.count():
            frozen = snapshot(
                real.facts(),
                FIRST,
                ["vda"],
                method=method,
                checkpoint=f"c{upto}",
                directory=str(real.directory),
                view=kind == "push the view",
            )
            real.run(frozen)
            real.qemu.device_write("vda", 0, 65536, upto + 1)
            seen = real.facts()
            plan = _reader(seen, kind, place, f"c{upto}")
            real.run(plan, upto)
            real.run(remove_snapshots(real.facts(), {FIRST}))
            left = graph(real.facts())
            assert {key: left[key] for key in CLEAN if key != "marks"} == {
                key: CLEAN[key] for key in CLEAN if key != "marks"
            }
            if upto == len(list(plan.commands())):
                break
    real.qemu.device_read_check("vda", 0, 65536, upto + 1)


def _reader(seen: Facts, kind: str, place: str, point: str) -> Plan:
    if kind == "probe":
        return probe(seen, FIRST)
    view = "view" if kind == "push the view" else "access"
    return push(seen, FIRST, place, ["vda"], point=point if kind == "push changes" else "", view=view)


STACKS: dict[str, tuple[Method, ...]] = {
    "filters": ("filter", "filter", "filter"),
    "jobs": ("job", "job", "job"),
    "jobs below a filter": ("filter", "job", "job"),
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("order", list(itertools.permutations([FIRST, SECOND, THIRD])), ids="-".join)
def test_stacked_snapshots_go_in_any_order(real: Real, order: tuple[str, ...], stack: str) -> None:
    """Each is written over after its freeze; the views that are left read as they did, the disk as it was written."""
    fake = FakeQemu(*TARGETS)
    live: dict[str, int] = {}
    for number, snapshot_id in enumerate((FIRST, SECOND, THIRD)):
        for one in (real, fake):
            one.run(one_disk(one, snapshot_id, real.directory, STACKS[stack][number]))
        live[snapshot_id] = number
        real.qemu.device_write("vda", 0, 65536, number + 1)
        assert graph(real.facts()) == graph(fake.facts()), snapshot_id
    for gone, snapshot_id in enumerate(order):
        for one in (real, fake):
            one.run(remove_snapshots(one.facts(), {snapshot_id}))
        del live[snapshot_id]
        assert graph(real.facts()) == graph(fake.facts()), snapshot_id
        real.qemu.device_write("vda", 0, 65536, 0x70 + gone)
        real.qemu.device_write("vda", (1 + gone) << 20, 65536, PATTERN)
        for one_left, pattern in live.items():
            _read_check(real, f"pb-{one_left}-0-access", pattern)
            _read_check(real, f"pb-{one_left}-0-access", 0, offset=(1 + gone) << 20)
    assert graph(real.facts()) == CLEAN
    real.qemu.device_read_check("vda", 0, 65536, 0x72)


def _read_check(real: Real, node: str, pattern: int, offset: int = 0) -> None:
    """LabError unless a block of the node is ``pattern``; its words are on QEMU's output, as device_read_check's."""
    before = len(real.qemu.log())
    real.qemu.hmp(f'qemu-io {node} "read -P {pattern} {offset} 65536"')
    said = real.qemu.log()[before:]
    if "read 65536/65536" not in said or "failed" in said:
        raise LabError(f"{node} is not {pattern}: {said}")


def _moves(qemu: Either) -> list[Step]:
    """Everything one could do to nodes and jobs of ours in one command, right or wrong."""
    seen = qemu.facts()
    device = seen.devices[0]
    ours = sorted(name for name, node in seen.nodes.items() if node.is_ours)
    moves = [Step("blockdev-del", {"node-name": name}, "") for name in ours]
    moves += [Step("job-cancel", {"id": job.id}, "", wait=JobGone(job.id)) for job in seen.jobs]
    below = [name for name in ["node-vda", *ours] if name.endswith(("filter", "vda"))]
    return moves + [
        Step("qom-set", {"path": device.qdev, "property": "drive", "value": name}, "")
        for name in below
        if name != device.root and not seen.jobs  # the first ends QEMU 7.2.22
    ]


# One filter: its three nodes, and back to the disk's own.  Two: six nodes, the disk's own and the lower filter.
# Jobs: their nodes, and themselves.
STARTS: list[tuple[Method, int, int]] = [("filter", 1, first) for first in range(4)]
STARTS += [("filter", 2, first) for first in range(8)]
STARTS += [("job", 1, first) for first in range(4)] + [("job", 2, first) for first in range(8)]


@pytest.mark.parametrize(("method", "depth", "first"), STARTS)
def test_the_fake_refuses_what_qemu_refuses(real: Real, method: Method, depth: int, first: int) -> None:
    """Each move that there is, one after the other as far as it is still there, each compared."""
    fake = FakeQemu(*TARGETS)
    for snapshot_id in (FIRST, SECOND)[:depth]:
        for one in (real, fake):
            one.run(one_disk(one, snapshot_id, real.directory, method))
    moves = _moves(fake)
    assert len(moves) == sum(1 for *one, _ in STARTS if one == [method, depth])
    for move in moves[first:] + moves[:first]:
        if move in _moves(fake):
            assert _taken(real, move) == _taken(fake, move), (move.execute, dict(move.arguments))
            assert graph(real.facts()) == graph(fake.facts())


def _taken(qemu: Either, move: Step) -> bool:
    try:
        qemu.run(Plan((move,)))
    except (CommandFailed, QemuError):
        return False
    return True


def test_an_export_shows_each_map_of_changes_alone(real: Real) -> None:
    """A map that one export shows is in use: QEMU gives it to no second one, and the fake neither."""
    fake = FakeQemu(*TARGETS)
    server = ServerMark("unix", str(real.directory / "nbd"))
    for one in (real, fake):
        one.run(snapshot(one.facts(), THIRD, ["vda"], checkpoint="A", directory=str(real.directory), view=True))
        one.run(export_disks(one.facts(), THIRD, server, ["vda"], points=["A"], role="view"))
        again = export_disks(
            one.facts(), THIRD, server, ["vda"], points=["A"], role="view", suffix="-2", start_server=False
        )
        with pytest.raises((CommandFailed, QemuError), match=r"in use"):
            one.run(again)
        one.run(stop_exports(one.facts(), {export.id for export in one.facts().exports}))
        one.run(export_disks(one.facts(), THIRD, server, ["vda"], points=["A"], role="view", suffix="-2"))
        one.run(remove_snapshots(one.facts(), {THIRD}))
    assert graph(real.facts()) == graph(fake.facts())


def test_a_view_that_can_be_believed_lets_nobody_write_below_it(real: Real) -> None:
    fake = FakeQemu(*TARGETS)
    server = ServerMark("unix", str(real.directory / "nbd"))
    for one in (real, fake):
        one.run(snapshot(one.facts(), THIRD, ["vda"], directory=str(real.directory), view=True))
        with pytest.raises((CommandFailed, QemuError), match=r"(?i)permission conflict"):
            one.run(export_disks(one.facts(), THIRD, server, ["vda"], role="access", writable=True))
        one.run(remove_snapshots(one.facts(), {THIRD}))
    assert graph(real.facts()) == graph(fake.facts()) == CLEAN


def test_a_filter_over_a_jobs_ends_qemu_where_it_ends_the_fake(real: Real) -> None:
    """Why plan.method refuses it; a QEMU that has learnt better may end the job."""
    fake = FakeQemu(*TARGETS)
    for number, method in enumerate(("job", "filter")):
        for one in (real, fake):
            one.run(one_disk(one, f"b0000000{number}", real.directory, "job" if method == "job" else "filter"))
    cancel = Plan((Step("job-cancel", {"id": "pullback-b00000000-0"}, "", wait=JobGone("pullback-b00000000-0")),))
    for name in ("pb-b00000000-0-access",):
        for one in (real, fake):
            one.run(Plan((Step("blockdev-del", {"node-name": name}, ""),)))
    with pytest.raises(QemuAborted):
        fake.run(cancel)
    if real.facts().version < (8, 0, 0):
        with pytest.raises(DomainError):
            real.run(cancel)
        wait_for(lambda: not real.qemu.running(), "QEMU to end")
        assert "bdrv_close" in real.qemu.log()


def test_the_device_is_never_given_the_node_it_has(real: Real) -> None:
    """Why no plan does: it ends QEMU 7.2.22."""
    fake = FakeQemu(*TARGETS)
    device = real.facts().devices[0]
    same = Plan((Step("qom-set", {"path": device.qdev, "property": "drive", "value": device.root}, ""),))
    with pytest.raises(QemuAborted):
        fake.run(same)
    if real.facts().version < (8, 0, 0):
        with pytest.raises(DomainError):
            real.run(same)
        wait_for(lambda: not real.qemu.running(), "QEMU to end")
        assert "bdrv_replace_child_noperm" in real.qemu.log()


# A stopped domain's storage daemon


class Stopped(Real):
    """A real storage daemon that is asked what a real QEMU is."""

    def __init__(self, daemon: RealDaemon, directory: Path) -> None:
        self.daemon = daemon
        self.directory = directory

    def facts(self) -> Facts:
        async def look() -> Facts:
            async with session(self.daemon) as monitor:
                return await observe_daemon(monitor, "web")

        return asyncio.run(look())

    def run(self, plan: Plan, upto: int | None = None) -> None:
        async def carry_out() -> None:
            async with session(self.daemon) as monitor:
                await run_plan(monitor, Plan(tuple(plan.commands())[:upto]) if upto is not None else plan)

        asyncio.run(carry_out())


@pytest.fixture
def stopped(lab_dir: Path) -> Iterator[Stopped]:
    made = {one: images.create(lab_dir / f"{one}.qcow2", 1 << 22) for one in TARGETS}
    with RealDaemon(lab_dir, made) as daemon:
        yield Stopped(daemon, lab_dir)


@pytest.mark.parametrize("view", [False, True])
def test_from_every_step_in_a_daemon_there_is_a_way_back(stopped: Stopped, view: bool) -> None:
    clean = graph(stopped.facts())
    assert clean == graph(FakeQemu(*TARGETS, daemon=True).facts())
    server = ServerMark("unix", str(stopped.directory / "nbd"))
    plan = partial(whole, server=server, directory=stopped.directory, method="job", view=view)
    steps = len(list(plan(stopped).commands()))
    for upto in range(steps + 1):
        fake = FakeQemu(*TARGETS, daemon=True)
        fake.run(plan(fake), upto=upto)
        stopped.run(plan(stopped), upto)
        assert graph(stopped.facts()) == graph(fake.facts()), upto
        stopped.run(remove_snapshots(stopped.facts(), {FIRST}))
        assert graph(stopped.facts()) == clean, upto


def test_a_daemons_own_disks_are_exported_and_taken_back(stopped: Stopped) -> None:
    clean = graph(stopped.facts())
    server = ServerMark("unix", str(stopped.directory / "nbd"))
    steps = len(list(export_own_disks(stopped.facts(), "w00000001", server).commands()))
    for upto in range(steps + 1):
        stopped.run(export_own_disks(stopped.facts(), "w00000001", server), upto)
        seen = stopped.facts()
        assert read_snapshots(seen) == ()
        stopped.run(stop_exports(seen, stale_writable(seen)))
        assert graph(stopped.facts()) == clean, upto
