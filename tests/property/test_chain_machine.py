# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on a real QEMU: writes through the device, planned QMP, clean restarts; the bitmaps are read over NBD.

The same as test_plan_checkpoint.py, where the model of QEMU's bitmaps could be wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lab import images
from lab.disks import DiskSpec
from lab.processes import run
from lab.qemu import BareQemu
from pullback.model.chain import Chain, read_chain
from pullback.model.extents import FLAG_DIRTY, merged
from pullback.nbd.address import UnixAddress
from pullback.nbd.blocking import NbdConnection
from pullback.plan.checkpoint import NodeChain, remove_checkpoints, start_recording, stop_recording
from pullback.plan.command import Plan
from pullback.qemu.execute import run_plan
from pullback.qemu.monitor import connect, dial
from pullback.qemu.observe import observe

BLOCK, BLOCKS = 65536, 12
TARGETS = ("vda", "vdb")
blocks = st.integers(0, BLOCKS - 1)
targets = st.sampled_from(TARGETS)


class Lab:
    """One QEMU for all examples: its disks, and planned QMP on them."""

    def __init__(self, directory: Path) -> None:
        disks = []
        for target in TARGETS:
            path = images.create(directory / f"{target}.qcow2", BLOCKS * BLOCK)
            disks.append(DiskSpec(path, id=target))
        self.qemu = BareQemu(disks)
        self.socket = str(directory / "nbd")

    def run(self, plan: Plan) -> None:
        async def carry_out() -> None:
            monitor = await connect(dial(str(self.qemu.qmp_path)))
            try:
                await run_plan(monitor, plan)
            finally:
                await monitor.close()

        asyncio.run(carry_out())

    def chains(self) -> dict[str, Chain]:
        async def look() -> dict[str, Chain]:
            monitor = await connect(dial(str(self.qemu.qmp_path)))
            try:
                facts = await observe(monitor)
            finally:
                await monitor.close()
            return {one.target: read_chain(facts.disk(one).bitmaps) for one in facts.devices}

        return asyncio.run(look())

    def nodes(self, which: set[str]) -> dict[str, NodeChain]:
        """The chains of these disks, by target."""
        return {one: NodeChain(f"node-{one}", chain) for one, chain in self.chains().items() if one in which}

    def clear(self) -> None:
        """A disk without bitmaps for the next example; what is written on it does not matter."""
        for target in TARGETS:
            for name in self.qemu.bitmaps(target):
                self.qemu.qmp("block-dirty-bitmap-remove", node=f"node-{target}", name=name)

    def changed(self, target: str, names: list[str], judge: bool = False) -> set[int]:
        """The blocks that the bitmaps say together, as an NBD client sees them; ``judge``: also as nbdinfo does."""
        node = f"node-{target}"
        self.qemu.qmp("block-dirty-bitmap-add", node=node, name="look", disabled=True)
        try:
            self.qemu.qmp("block-dirty-bitmap-merge", node=node, target="look", bitmaps=names)
            self.qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": self.socket}})
            self.qemu.qmp("block-export-add", id="look", type="nbd", node_name=node, name="look", bitmaps=["look"])
            context = "qemu:dirty-bitmap:look"
            with NbdConnection.connect(UnixAddress(self.socket), "look", contexts=[context]) as connection:
                changed = merged(connection.marked(context, 0, BLOCKS * BLOCK, FLAG_DIRTY))
            if judge:
                said = run(["nbdinfo", f"--map={context}", "--totals", f"nbd+unix:///look?socket={self.socket}"])
                dirty = sum(int(line.split()[0]) for line in said.decode().splitlines() if line.split()[2] == "1")
                assert dirty == sum(span.length for span in changed)
        finally:
            self.qemu.qmp("nbd-server-stop")
            self.qemu.qmp("block-dirty-bitmap-remove", node=node, name="look")
        return {n for span in changed for n in range(span.offset // BLOCK, -(-span.end // BLOCK))}


class OnQemu(RuleBasedStateMachine):
    """``since[target][point]`` is what was written since the bitmap of ``point`` began to record."""

    lab: Lab

    @initialize(length=st.integers(0, 4))
    def begin(self, length: int) -> None:
        """A chain of some points, with something of its own written after each."""
        self.lab.clear()
        self.count = 0
        self.since: dict[str, dict[str, set[int]]] = {target: {} for target in TARGETS}
        for number in range(length):
            self.create({TARGETS[0]} if number == 1 else set(TARGETS), 2 * number, early=False)

    @rule(disk=targets, first=blocks, length=st.integers(1, 3), kind=st.sampled_from(["data", "zero", "discard"]))
    def write(self, disk: str, first: int, length: int, kind: str) -> None:
        end = min(first + length, BLOCKS)
        span = (first * BLOCK, (end - first) * BLOCK)
        if kind == "data":
            self.lab.qemu.device_write(disk, *span)
        elif kind == "zero":
            self.lab.qemu.device_zero(disk, *span)
        else:
            self.lab.qemu.device_discard(disk, *span)
        for changed in self.since[disk].values():
            changed.update(range(first, end))

    @rule(which=st.sets(targets, min_size=1), block=blocks, early=st.booleans())
    def create(self, which: set[str], block: int, early: bool) -> None:
        """A new checkpoint; perhaps something is written while two bitmaps record, and then before the next."""
        self.count += 1
        chains = self.lab.nodes(which)
        self.lab.run(Plan((start_recording(list(chains.values()), f"c{self.count}"),)))
        for disk in which:
            self.since[disk][f"c{self.count}"] = set()
        if early:
            self.write(min(which), block, 1, "data")
        self.lab.run(stop_recording(list(chains.values())))
        self.write(max(which), (block + 5) % BLOCKS, 2, "data")

    @precondition(lambda self: any(self.since.values()))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        removals = []
        for target, chain in self.lab.nodes(set(TARGETS)).items():
            gone = {name for name in self.since[target] if data.draw(st.booleans())}
            removals.append((chain, gone))
            for name in gone:
                del self.since[target][name]
        self.lab.run(remove_checkpoints(removals))

    @precondition(lambda self: any(self.since.values()))
    @rule()
    def restart(self) -> None:
        """A clean end stores the bitmaps in the images."""
        self.lab.qemu.shutdown()
        self.lab.qemu.start()

    @invariant()
    def chains_are_as_they_were_made(self) -> None:
        for target, chain in self.lab.chains().items():
            assert list(chain.points) == list(self.since[target])
            assert not chain.broken
            recording = [edge for edge in chain.edges if edge.bitmap.recording]
            assert recording == list(chain.edges[-1:])

    def teardown(self) -> None:
        """The contents, of every point, at the end of an example: a removal that lost something lost it for good."""
        if not any(getattr(self, "since", {}).values()):
            return
        self.restart()
        for target, chain in self.lab.chains().items():
            for point, changed in self.since[target].items():
                edges = chain.since(point)
                assert isinstance(edges, tuple)
                said = self.lab.changed(target, [edge.name for edge in edges], judge=point == chain.points[0])
                assert said == changed, (target, point)


@pytest.fixture
def lab(lab_dir: Path) -> Iterator[Lab]:
    made = Lab(lab_dir)
    with made.qemu:
        yield made


def test_what_changed_since_each_checkpoint_is_known(lab: Lab) -> None:
    class Machine(OnQemu):
        pass

    Machine.lab = lab
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=12,
            deadline=None,
            database=None,
            # A failure is shown as it was found: making it smaller takes minutes here and a second in the model.
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )


@pytest.mark.parametrize("gone", range(8), ids=lambda bits: f"{bits:04b} and {15 - bits:04b}")
def test_every_choice_of_four_checkpoints(lab: Lab, gone: int) -> None:
    """One disk loses the checkpoints of the bits set in ``gone``, the other one the rest, in one transaction."""
    points = [f"c{number}" for number in range(4)]
    for number, point in enumerate(points):
        before = list(lab.nodes(set(TARGETS)).values())
        lab.run(Plan((start_recording(before, point),)) + stop_recording(before))
        for target in TARGETS:
            lab.qemu.device_write(target, number * BLOCK, BLOCK)
    remove = {
        target: {point for number, point in enumerate(points) if bits >> number & 1}
        for target, bits in zip(TARGETS, (gone, 15 - gone), strict=True)
    }
    chains = lab.nodes(set(TARGETS))
    lab.run(remove_checkpoints([(chains[target], remove[target]) for target in TARGETS]))
    for target, chain in lab.chains().items():
        assert list(chain.points) == [point for point in points if point not in remove[target]]
        assert [edge.bitmap.recording for edge in chain.edges] == [edge is chain.edges[-1] for edge in chain.edges]
        for point in chain.points:
            edges = chain.since(point)
            assert isinstance(edges, tuple)
            said = lab.changed(target, [edge.name for edge in edges])
            assert said == set(range(points.index(point), 4)), (target, point)
