# SPDX-License-Identifier: Apache-2.0
"""The plans whose QMP is kept as golden files, made from captured observations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pullback.model.chain import read_chain
from pullback.model.facts import DISK_NODE, Disk, Facts, Job
from pullback.model.snapshots import ServerMark, read_exports, read_snapshots
from pullback.plan.checkpoint import NodeChain, remove_checkpoints
from pullback.plan.cleanup import remove_snapshots, stop_exports
from pullback.plan.command import JobConcluded, JobGone, Plan, Step
from pullback.plan.export import disown_server
from pullback.plan.freeze import freeze, open_access, prepare_snapshot
from pullback.plan.probe import end_probe, start_probe
from tests.golden.replay import observed
from tests.support.fake_qemu import FakeQemu
from tests.support.making import (
    export_disks,
    export_own_disks,
    export_parts,
    freeze_parts,
    push,
    snapshot,
    tracked_of,
)

SNAPSHOT = "b0000c0de"
PUBLIC = "s0000cafe"
NBD = ServerMark("unix", "/run/pullback/nbd")
TLS = ServerMark("inet", "::1:10809", "/etc/pullback/tls")


def disks(facts: Facts) -> dict[str, Disk]:
    return {device.target: facts.disk(device) for device in facts.devices if device.root}


def _chains(facts: Facts, *targets: str) -> list[NodeChain]:
    found = disks(facts)
    return [NodeChain(found[one].node, read_chain(found[one].bitmaps)) for one in targets]


def _snapshot(facts: Facts, *targets: str, **more: Any) -> Plan:
    return snapshot(facts, SNAPSHOT, targets, **{"checkpoint": "D", **more})


def _untracked_second(facts: Facts) -> Plan:
    """vda and vdc, which is raw; the name of the snapshot is not one of ASCII alone."""
    return snapshot(facts, PUBLIC, ["vda", "vdc"], checkpoint="D", name='nächtlich "1"', view=True)


def _newer_job(facts: Facts) -> Plan:
    """Jobs where QEMU knows on-cbw-error."""
    parts = freeze_parts(facts, SNAPSHOT, ["vda", "vdb"], "/var/tmp/pullback", "", "D")
    frozen = freeze(parts, tracked_of(parts), "D", "job", running=True, break_snapshot=True)
    return prepare_snapshot(parts, map_saved=False) + frozen + open_access(parts)


def _remove(facts: Facts, **remove: str) -> Plan:
    """``vda="AB"`` removes A and B from vda's chain."""
    return remove_checkpoints([(_chains(facts, target)[0], set(points)) for target, points in remove.items()])


def stopped(facts: Facts) -> Facts:
    """The same disks in a storage daemon on the stopped domain's images."""
    devices = tuple(
        replace(device, qdev="", type="", root=f"{DISK_NODE}{device.target}") for device in facts.devices if device.root
    )
    nodes = {
        f"{DISK_NODE}{target}": replace(facts.nodes[disk.node], name=f"{DISK_NODE}{target}")
        for target, disk in disks(facts).items()
    }
    return replace(facts, daemon=True, run_state="shutdown", devices=devices, nodes=nodes)


def _stack(middle: str) -> Plan:
    """Three snapshots of one disk, the middle one of which goes; it was made by ``middle``."""
    qemu = FakeQemu("vda")
    for one, method in (("s00000001", "filter"), ("s00000002", middle), ("s00000003", middle)):
        qemu.run(snapshot(qemu.facts(), one, method="job" if method == "job" else "filter"))
        qemu.run(export_disks(qemu.facts(), one, suffix=f"-{one}", start_server=one == "s00000001"))
    return remove_snapshots(qemu.facts(), {"s00000002"})


def _probe(facts: Facts) -> Plan:
    part = read_snapshots(facts)[0].parts[0]
    return start_probe(part) + end_probe(part, concluded=False)


def _left_by_a_push(facts: Facts) -> Facts:
    """The frozen domain with one push that goes on and one that ended."""
    jobs = (
        Job(f"pullback-{SNAPSHOT}-0-push", "backup", "running"),
        Job(f"pullback-{SNAPSHOT}-1-push", "backup", "concluded"),
    )
    return replace(facts, jobs=jobs)


def plans() -> dict[str, Plan]:
    """Every golden plan by the name of its file."""
    idle, frozen = observed("idle"), observed("frozen")
    ended = {export.id for export in read_exports(frozen)}
    return {
        "snapshot-one-disk": _snapshot(idle, "vda"),
        "snapshot-two-disks": _snapshot(idle, "vda", "vdb"),
        "snapshot-untracked-disk-public": _untracked_second(idle),
        "snapshot-on-top-of-another": snapshot(frozen, PUBLIC, ["vda"]),
        "export-full": export_disks(idle, SNAPSHOT, NBD, ["vda", "vdb"]),
        "export-incremental": export_disks(idle, SNAPSHOT, NBD, ["vda", "vdb"], points=["B"]),
        "export-several-since-tls": export_disks(idle, SNAPSHOT, TLS, points=["A", "C"], role="view", writable=False),
        "export-server-not-ours": disown_server(export_parts(idle, SNAPSHOT, ["vda"]), NBD),
        "export-again": export_disks(frozen, SNAPSHOT, NBD, ["vda"], suffix="-2", points=["C"], start_server=False),
        "export-stop-one": stop_exports(frozen, sorted(ended)[:1]),
        "export-stop-all": stop_exports(frozen, ended),
        "push-full": push(frozen, SNAPSHOT, targets=["vda", "vdc"], view="view"),
        "push-changes": push(frozen, SNAPSHOT, targets=["vda", "vdb"], point="B"),
        "probe": _probe(frozen),
        "cleanup": remove_snapshots(frozen, {SNAPSHOT}),
        "cleanup-of-a-push": remove_snapshots(_left_by_a_push(frozen), {SNAPSHOT}),
        "cleanup-in-the-middle": _stack("filter"),
        "remove-first": _remove(idle, vda="A"),
        "remove-middle": _remove(idle, vda="B"),
        "remove-last": _remove(idle, vda="C", vdb="C"),
        "remove-several": _remove(idle, vda="AB", vdb="B"),
        "remove-all": _remove(idle, vda="ABC", vdb="BC"),
        **daemon_plans(idle),
    }


#: Plans for a QEMU that knows what the one installed may not: they are not held against its schema.
NEWER = {"job-breaks-the-snapshot"}


def daemon_plans(idle: Facts) -> dict[str, Plan]:
    """Those that a storage daemon gets, too."""
    offline = stopped(idle)
    qemu = FakeQemu("vda", "vdb", daemon=True)
    qemu.run(snapshot(qemu.facts(), PUBLIC, method="job"))
    qemu.run(export_disks(qemu.facts(), PUBLIC, TLS))
    return {
        "job-one-disk": _snapshot(idle, "vda", method="job"),
        "job-two-disks": _snapshot(idle, "vda", "vdb", method="job"),
        "job-breaks-the-snapshot": _newer_job(idle),
        "job-in-the-middle": _stack("job"),
        "offline-snapshot": _snapshot(offline, method="job", view=True),
        "offline-export": export_disks(offline, SNAPSHOT, TLS, ["vda", "vdb"], points=["B"], role="view"),
        "offline-writable-export": export_own_disks(offline, "w0000beef", NBD, ["vda", "vdb"]),
        "offline-cleanup": remove_snapshots(qemu.facts(), {PUBLIC}),
        "offline-push": push(offline, SNAPSHOT, targets=["vda", "vdb"], point="B"),
    }


def as_json(plan: Plan) -> list[dict[str, Any]]:
    """A plan as it stands in its golden file."""
    return [_step(step) for step in plan.commands()]


def _wait(step: Step) -> str:
    match step.wait:
        case JobConcluded(job):
            return f"job {job} to conclude"
        case JobGone(job):
            return f"job {job} to be gone"
        case _:
            assert step.wait is not None
            return f"export {step.wait.id}"


def _step(step: Step) -> dict[str, Any]:
    more: Mapping[str, Any] = {"wait": _wait(step)} if step.wait is not None else {}
    optional = {"optional": True} if step.optional else {}
    return {"why": step.why, "execute": step.execute, "arguments": dict(step.arguments), **more, **optional}
