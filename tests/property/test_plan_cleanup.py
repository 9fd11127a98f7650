# SPDX-License-Identifier: Apache-2.0
"""Clients that come, die at any command and come again: the domain never aborts, and what is live stays as it is.

Against the fake QEMU, which refuses what QEMU refuses and aborts where it aborts; tests/golden holds it to that.
"""

from __future__ import annotations

import itertools

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pullback.errors import DomainBusy, Refused
from pullback.model.facts import Facts
from pullback.model.snapshots import current_server, read_exports, read_snapshots
from pullback.plan.cleanup import remove_snapshots, stale_snapshots, stale_writable, stop_exports
from pullback.plan.command import Plan
from pullback.plan.export import TLS_OBJECT, idle_server, need_server
from pullback.plan.method import Method, choose_method
from tests.support.fake_qemu import FakeExport, FakeQemu, QemuError
from tests.support.making import (
    SERVER,
    TLS,
    disks,
    export_disks,
    export_own_disks,
    probe,
    push,
    snapshot,
)

TARGETS = ("vda", "vdb")
chosen = st.lists(st.sampled_from(TARGETS), min_size=1, unique=True)
servers = st.sampled_from([SERVER, TLS])
# How many commands are carried out before the client dies; most do not.
dying = st.one_of(st.none(), st.integers(0, 30))
THEIRS = "theirs"


class Clients(RuleBasedStateMachine):
    """``live`` are the public snapshots that were finished, by id: their nodes of the frozen view and their disks."""

    @initialize(daemon=st.booleans())
    def begin(self, daemon: bool) -> None:
        self.qemu = FakeQemu(*TARGETS, daemon=daemon)
        self.clean = FakeQemu(*TARGETS, daemon=daemon).graph()
        self.live: dict[str, tuple[str, ...]] = {}
        self.exported: dict[str, FakeExport] = {}
        self.ids = itertools.count(1)

    def facts(self) -> Facts:
        return self.qemu.facts()

    def recover(self) -> None:
        """What every client does first."""
        self.qemu.run(remove_snapshots(self.facts(), stale_snapshots(self.facts())))
        if idle_server(self.facts()):
            self.qemu.run(stop_exports(self.facts(), ()))

    def carry_out(self, plan: Plan, upto: int | None) -> bool:
        """Whether it got to the end."""
        steps = len(list(plan.commands()))
        self.qemu.run(plan, upto=upto)
        return upto is None or upto >= steps

    def whole(self) -> list[str]:
        return sorted(state.id for state in read_snapshots(self.facts()) if state.whole and state.parts)

    # Clients

    @rule(
        which=chosen,
        private=st.booleans(),
        wanted=st.sampled_from([None, "filter", "job"]),
        upto=dying,
        recovering=st.booleans(),
    )
    def freeze(
        self, which: list[str], private: bool, wanted: Method | None, upto: int | None, recovering: bool
    ) -> None:
        if recovering:
            self.recover()
        seen = self.facts()
        wanted = None if seen.daemon else wanted
        try:
            method = choose_method(seen, disks(seen, which), wanted)
        except Refused:
            return
        snapshot_id = f"{'b' if private else 's'}{next(self.ids):08x}"
        if self.carry_out(snapshot(seen, snapshot_id, which, method=method), upto) and not private:
            mine = [name for name in self.qemu.nodes if snapshot_id in name]
            self.live[snapshot_id] = tuple(name for name in mine if name.endswith(("access", "view", "align")))

    @precondition(lambda self: self.whole())
    @rule(data=st.data(), server=servers, upto=dying, direct=st.booleans())
    def export(self, data: st.DataObject, server: object, upto: int | None, direct: bool) -> None:
        snapshot_id = data.draw(st.sampled_from(self.whole()))
        if idle_server(self.facts()):
            self.qemu.run(stop_exports(self.facts(), ()))
        seen = self.facts()
        at = current_server(seen) or (SERVER if server == SERVER else TLS)
        targets = [part.target for state in read_snapshots(seen) if state.id == snapshot_id for part in state.parts]
        believable = f"pb-{snapshot_id}-0-view" in self.qemu.nodes
        try:
            start = need_server(seen, at)
        except DomainBusy:
            return
        plan = export_disks(
            seen,
            snapshot_id,
            at,
            sorted(targets),
            role="view" if believable and not direct else "access",
            suffix=f"-{next(self.ids)}",
            start_server=start,
            writable=False,
        )
        before = set(self.qemu.exports)
        self.carry_out(plan, upto)
        if snapshot_id in self.live:
            self.exported |= {name: one for name, one in self.qemu.exports.items() if name not in before}

    @precondition(lambda self: self.qemu.daemon)
    @rule(server=servers, upto=dying)
    def export_own(self, server: object, upto: int | None) -> None:
        if idle_server(self.facts()):
            self.qemu.run(stop_exports(self.facts(), ()))
        seen = self.facts()
        at = current_server(seen) or (SERVER if server == SERVER else TLS)
        try:
            start = need_server(seen, at)
        except DomainBusy:
            return
        before = set(self.qemu.exports)
        try:
            self.carry_out(export_own_disks(seen, f"w{next(self.ids):08x}", at, start_server=start), upto)
        except QemuError:
            return  # a second writer; a client takes its own exports back
        finally:
            self.exported |= {name: one for name, one in self.qemu.exports.items() if name not in before}

    @precondition(lambda self: self.whole())
    @rule(data=st.data(), kind=st.sampled_from(["probe", "push"]), upto=dying, ends=st.booleans())
    def read(self, data: st.DataObject, kind: str, upto: int | None, ends: bool) -> None:
        """A probe, or a push, whose client dies."""
        snapshot_id = data.draw(st.sampled_from(self.whole()))
        if any(snapshot_id in name and name.endswith(("target", "probe")) for name in self.qemu.nodes):
            return
        seen = self.facts()
        targets = [part.target for state in read_snapshots(seen) if state.id == snapshot_id for part in state.parts]
        plan = probe(seen, snapshot_id) if kind == "probe" else push(seen, snapshot_id, targets=sorted(targets))
        self.carry_out(plan, upto)
        if ends:
            for name in [name for name in self.qemu.jobs if name.endswith(("-probe", "-push"))]:
                if self.qemu.jobs[name].status == "running":
                    self.qemu.end_job(name)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), upto=dying)
    def delete(self, data: st.DataObject, upto: int | None) -> None:
        """Some of the public ones; a client that dies over it has begun, and the next one goes on."""
        self.recover()
        gone = data.draw(st.sets(st.sampled_from(sorted(self.live)), min_size=1))
        for snapshot_id in gone:
            del self.live[snapshot_id]
        self.exported = {name: one for name, one in self.exported.items() if not any(one in name for one in gone)}
        self.qemu.run(remove_snapshots(self.facts(), gone), upto=upto)
        self.qemu.run(remove_snapshots(self.facts(), gone))

    @precondition(lambda self: self.exported)
    @rule(data=st.data(), upto=dying)
    def stop(self, data: st.DataObject, upto: int | None) -> None:
        gone = data.draw(st.sets(st.sampled_from(sorted(self.exported)), min_size=1))
        for name in gone:
            del self.exported[name]
        self.qemu.run(stop_exports(self.facts(), gone), upto=upto)
        self.qemu.run(stop_exports(self.facts(), gone))

    @rule()
    def another_program(self) -> None:
        """It exports a disk, with a server of its own or in ours, or ends that."""
        if THEIRS in self.qemu.exports:
            self._they_end()
        elif self.qemu.server and self.qemu.exports:
            self.qemu.exports[THEIRS] = FakeExport(next(name for name in self.qemu.nodes if "pb-" not in name))

    def _they_end(self) -> None:
        """When ours ended first, its server was left to them, and is theirs to end."""
        self.qemu.exports.pop(THEIRS, None)
        if not self.qemu.exports and current_server(self.facts()) is None:
            self.qemu.server = False
            self.qemu.objects.clear()

    # What holds

    @invariant()
    def live_ones_stay(self) -> None:
        """Neither a recovery nor the removal of others touches a snapshot somebody may use, or its exports."""
        stale = stale_snapshots(self.facts())
        assert not stale & set(self.live)
        for nodes in self.live.values():
            assert set(nodes) <= set(self.qemu.nodes)
        for name, export in self.exported.items():
            assert self.qemu.exports[name] == export
        assert set(self.live) <= set(self.whole())

    @invariant()
    def exports_have_a_server(self) -> None:
        assert self.qemu.server or not self.qemu.exports
        if self.qemu.server and self.qemu.exports and THEIRS not in self.qemu.exports:
            assert current_server(self.facts()) is not None

    def teardown(self) -> None:
        """Whatever happened, one client takes everything back."""
        if not hasattr(self, "qemu"):
            return
        self._they_end()
        self.recover()
        assert not any(node.endswith(("target", "probe")) for node in self.qemu.nodes if "-b" in node)
        self.qemu.run(stop_exports(self.facts(), stale_writable(self.facts())))
        ids = {state.id for state in read_snapshots(self.facts())}
        self.qemu.run(remove_snapshots(self.facts(), ids))
        if idle_server(self.facts()):
            self.qemu.run(stop_exports(self.facts(), ()))
        assert read_exports(self.facts()) == ()
        assert TLS_OBJECT not in self.qemu.objects
        assert self.qemu.graph() == self.clean


TestClients = Clients.TestCase
TestClients.settings = settings(max_examples=60, stateful_step_count=15, phases=[Phase.generate])
