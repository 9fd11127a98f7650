# SPDX-License-Identifier: Apache-2.0
"""Whatever is created, written and removed: each remaining checkpoint knows exactly what changed since.

The truth is a set of blocks per point; beside it, planned transactions run on a model of QEMU's bitmaps.
tests/property/test_chain_machine.py does the same on a real QEMU.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pullback.model.chain import Chain, read_chain
from pullback.plan.checkpoint import NodeChain, remove_checkpoints, start_recording, stop_recording
from pullback.plan.command import Plan
from tests.support.fake_qemu import FakeQemu, blocks_since, recording

TARGETS = ("vda", "vdb")
blocks = st.integers(0, 15)
targets = st.sampled_from(TARGETS)


class Checkpoints(RuleBasedStateMachine):
    """Two disks; each joins the chain when it likes.

    ``since[target][point]`` is what was written since the bitmap of ``point`` began to record.
    """

    @initialize()
    def begin(self) -> None:
        self.qemu = FakeQemu(*TARGETS)
        self.count = 0
        self.order: dict[str, list[str]] = {target: [] for target in TARGETS}
        self.since: dict[str, dict[str, set[int]]] = {target: {} for target in TARGETS}
        # Between start and stop: the chains before, and from the freeze on what was written until then.
        self.creating: dict[str, NodeChain] = {}
        self.frozen: dict[str, dict[str, set[int]]] = {}
        # Disks of which a process died between start and stop, until the next stop.
        self.unsettled: set[str] = set()

    def chain(self, target: str) -> Chain:
        return read_chain(self.qemu.facts().nodes[f"node-{target}"].bitmaps)

    def forget(self, target: str, gone: set[str]) -> None:
        self.order[target] = [name for name in self.order[target] if name not in gone]
        for name in gone:
            self.since[target].pop(name, None)

    @rule(disk=targets, block=blocks)
    def write(self, disk: str, block: int) -> None:
        self.qemu.write(disk, block)
        for changed in self.since[disk].values():
            changed.add(block)

    @precondition(lambda self: not self.creating)
    @rule(which=st.sets(targets, min_size=1))
    def start(self, which: set[str]) -> None:
        """The new bitmaps record; the data is not frozen yet."""
        self.count += 1
        self.creating = {target: NodeChain(f"node-{target}", self.chain(target)) for target in sorted(which)}
        self.qemu.run(Plan((start_recording(list(self.creating.values()), f"c{self.count}"),)))
        for target in which:
            self.order[target].append(f"c{self.count}")
            self.since[target][f"c{self.count}"] = set()

    @precondition(lambda self: self.creating and not self.frozen)
    @rule()
    def freeze(self) -> None:
        self.frozen = {
            target: {point: set(changed) for point, changed in self.since[target].items()} for target in self.creating
        }

    @precondition(lambda self: self.frozen)
    @rule()
    def stop(self) -> None:
        """The old bitmaps stop.  What they say now is what the backup reads: never less than was written."""
        self.qemu.run(stop_recording(list(self.creating.values())))
        for target, before in self.creating.items():
            for point in before.chain.points:
                edges = before.chain.since(point)
                assert isinstance(edges, tuple)
                said = blocks_since(self.qemu, before.node, [edge.name for edge in edges])
                assert self.frozen[target][point] <= said <= self.since[target][point]
        self.unsettled -= set(self.creating)
        self.creating, self.frozen = {}, {}

    @precondition(lambda self: not self.creating)
    @rule(which=st.sets(targets, min_size=1), after=st.sets(blocks, min_size=1, max_size=3))
    def create(self, which: set[str], after: set[int]) -> None:
        """All of it at once, and what is written then; long chains come from this."""
        self.start(which)
        self.freeze()
        self.stop()
        for disk in TARGETS:
            for block in after:
                self.write(disk, block)

    @precondition(lambda self: self.creating)
    @rule()
    def die(self) -> None:
        """The process ends before it stops the old bitmaps; the next creation does."""
        self.unsettled |= set(self.creating)
        self.creating, self.frozen = {}, {}

    @precondition(lambda self: self.creating)
    @rule()
    def take_back(self) -> None:
        """The backup fails: its checkpoint goes again."""
        name = f"c{self.count}"
        self.qemu.run(remove_checkpoints([(NodeChain(f"node-{one}", self.chain(one)), {name}) for one in TARGETS]))
        for target in TARGETS:
            self.forget(target, {name})
        self.creating, self.frozen = {}, {}

    @precondition(lambda self: not self.creating)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """Any checkpoints, of each disk its own."""
        removals = []
        for target in TARGETS:
            gone = {name for name in self.order[target] if data.draw(st.booleans())}
            removals.append((NodeChain(f"node-{target}", self.chain(target)), gone))
            self.forget(target, gone)
        self.qemu.run(remove_checkpoints(removals))

    @invariant()
    def names_read_back_as_the_same_chain(self) -> None:
        for target in TARGETS:
            chain = self.chain(target)
            assert list(chain.points) == self.order[target]
            assert not chain.broken

    @invariant()
    def changes_are_known_exactly(self) -> None:
        for target in TARGETS:
            for point, changed in self.since[target].items():
                edges = self.chain(target).since(point)
                assert isinstance(edges, tuple)
                assert blocks_since(self.qemu, f"node-{target}", [edge.name for edge in edges]) == changed, point

    @invariant()
    def one_bitmap_records(self) -> None:
        for target in TARGETS:
            names, points = recording(self.qemu, f"node-{target}"), self.order[target]
            if target in self.unsettled:
                assert bool(names) == bool(points)
            elif target in self.creating:
                assert len(names) == min(2, len(points))
            else:
                assert len(names) == min(1, len(points))


Checkpoints.TestCase.settings = settings(max_examples=120, stateful_step_count=25)
TestCheckpoints = Checkpoints.TestCase
