# SPDX-License-Identifier: Apache-2.0
"""The way back on a real QEMU, from every step of a snapshot and from stacks; and the fake one held to it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab import images
from lab.disks import DiskSpec
from lab.processes import LabError
from lab.qemu import BareQemu
from pullback.errors import CommandFailed
from pullback.model.facts import Facts
from pullback.plan.cleanup import remove_snapshots, stale_snapshots
from pullback.plan.command import Plan, Step
from pullback.plan.snapshot import DiskSnapshot, ExportPart, freeze, open_access, prepare_snapshot, start_export
from pullback.qemu.execute import run_plan
from pullback.qemu.observe import observe
from tests.golden.capture import session
from tests.support.fake_qemu import FakeQemu, QemuError

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


def whole(
    qemu: Either, snapshot: str, directory: Path, *, targets: Sequence[str] = TARGETS, exported: bool = True
) -> Plan:
    seen = qemu.facts()
    devices = [one for one in seen.devices if one.target in targets]
    parts = [
        DiskSnapshot(seen.disk(one), snapshot, number, str(directory / f"{snapshot}-{number}"))
        for number, one in enumerate(devices)
    ]
    plan = prepare_snapshot(parts) + freeze(parts, [], None, seen.running) + open_access(parts)
    socket = str(directory / "nbd")
    return plan + start_export([ExportPart(one) for one in parts], socket, True) if exported else plan


def graph(facts: Facts) -> dict[str, Any]:
    """What of us is in QEMU."""
    return {
        "nodes": {one.name: (one.driver, dict(one.children)) for one in facts.nodes.values() if one.is_ours},
        "roots": {device.target: device.root for device in facts.devices},
        "exports": {(export.id, export.node) for export in facts.exports},
        "jobs": {job.id for job in facts.jobs},
    }


CLEAN = graph(FakeQemu(*TARGETS).facts())


@pytest.fixture
def real(bare_qemu: Callable[..., BareQemu], lab_dir: Path) -> Real:
    disks = [DiskSpec(images.create(lab_dir / f"{one}.qcow2", 1 << 22), id=one) for one in TARGETS]
    qemu = bare_qemu(disks, running=True)
    qemu.qdev("vda")  # kept: once a filter is in, the laboratory could no longer find it by its node
    return Real(qemu, lab_dir)


def test_from_every_step_there_is_a_way_back(real: Real) -> None:
    assert graph(real.facts()) == CLEAN
    steps = len(list(whole(real, FIRST, real.directory).commands()))
    assert steps > 15
    for upto in range(steps + 1):
        fake = FakeQemu(*TARGETS)
        fake.run(whole(fake, FIRST, real.directory), upto=upto)
        real.run(whole(real, FIRST, real.directory), upto)
        assert graph(real.facts()) == graph(fake.facts()), upto
        assert stale_snapshots(real.facts()) == stale_snapshots(fake.facts())
        real.run(remove_snapshots(real.facts(), {FIRST}))
        assert graph(real.facts()) == CLEAN, upto
        real.qemu.qmp("cont")  # a pause that was cut short is the guard's matter
    real.qemu.device_write("vda", 0, 65536, PATTERN)
    real.qemu.device_read_check("vda", 0, 65536, PATTERN)


@pytest.mark.parametrize("order", list(itertools.permutations([FIRST, SECOND, THIRD])), ids="-".join)
def test_stacked_snapshots_go_in_any_order(real: Real, order: tuple[str, ...]) -> None:
    fake = FakeQemu(*TARGETS)
    for number, snapshot in enumerate((FIRST, SECOND, THIRD)):
        for one in (real, fake):
            one.run(whole(one, snapshot, real.directory, targets=["vda"], exported=False))
        real.qemu.device_write("vda", number << 16, 65536, PATTERN)
    for snapshot in order:
        for one in (real, fake):
            one.run(remove_snapshots(one.facts(), {snapshot}))
        assert graph(real.facts()) == graph(fake.facts()), snapshot
        real.qemu.device_write("vda", 1 << 20, 65536, PATTERN)
    assert graph(real.facts()) == CLEAN
    real.qemu.device_read_check("vda", 0, 3 << 16, PATTERN)


def test_each_of_a_stack_keeps_its_own_instant(real: Real) -> None:
    """vda is written between three snapshots; each view reads as the disk did at its freeze."""
    for number, snapshot in enumerate((FIRST, SECOND, THIRD)):
        real.run(whole(real, snapshot, real.directory, targets=["vda"], exported=False))
        real.qemu.device_write("vda", 0, 65536, number + 1)
    for number, snapshot in enumerate((FIRST, SECOND, THIRD)):
        _read_check(real, f"pb-{snapshot}-0-access", number)
    real.run(remove_snapshots(real.facts(), {SECOND}))
    real.qemu.device_write("vda", 0, 65536, 9)
    for number, snapshot in ((0, FIRST), (2, THIRD)):
        _read_check(real, f"pb-{snapshot}-0-access", number)
    real.run(remove_snapshots(real.facts(), {FIRST, THIRD}))
    assert graph(real.facts()) == CLEAN


def _read_check(real: Real, node: str, pattern: int) -> None:
    """LabError unless the node's first block is ``pattern``; its words are on QEMU's output, as device_read_check's."""
    before = len(real.qemu.log())
    real.qemu.hmp(f'qemu-io {node} "read -P {pattern} 0 65536"')
    said = real.qemu.log()[before:]
    if "read 65536/65536" not in said or "failed" in said:
        raise LabError(f"{node} is not {pattern}: {said}")


def _moves(qemu: Either) -> list[Step]:
    """Everything one could do to nodes of ours in one command, right or wrong."""
    seen = qemu.facts()
    device = seen.devices[0]
    ours = sorted(name for name, node in seen.nodes.items() if node.is_ours)
    below = [name for name in ["node-vda", *ours] if name.endswith(("filter", "vda"))]
    return [Step("blockdev-del", {"node-name": name}, "") for name in ours] + [
        Step("qom-set", {"path": device.qdev, "property": "drive", "value": name}, "")
        for name in below
        if name != device.root  # ends QEMU 7.2.22
    ]


# One filter: its three nodes, and back to the disk's own.  Two: six nodes, the disk's own and the lower filter.
STARTS = [(1, first) for first in range(4)] + [(2, first) for first in range(8)]


@pytest.mark.parametrize(("depth", "first"), STARTS)
def test_the_fake_refuses_what_qemu_refuses(real: Real, depth: int, first: int) -> None:
    """Each move that there is, one after the other as far as it is still there, each compared."""
    fake = FakeQemu(*TARGETS)
    for snapshot in (FIRST, SECOND)[:depth]:
        for one in (real, fake):
            one.run(whole(one, snapshot, real.directory, targets=["vda"], exported=False))
    moves = _moves(fake)
    assert len(moves) == sum(1 for one, _ in STARTS if one == depth)
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
