# SPDX-License-Identifier: Apache-2.0
"""The plans whose QMP is kept as golden files, made from captured observations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pullback.model.chain import Edge, read_chain
from pullback.model.facts import Disk, Facts
from pullback.plan.checkpoint import NodeChain, remove_checkpoints
from pullback.plan.cleanup import remove_snapshots
from pullback.plan.command import JobConcluded, Plan, Step
from pullback.plan.snapshot import (
    DiskSnapshot,
    ExportPart,
    disown_server,
    freeze,
    open_access,
    prepare_snapshot,
    start_export,
)
from tests.golden.replay import observed

SNAPSHOT = "b0000c0de"


def disks(facts: Facts) -> dict[str, Disk]:
    return {device.target: facts.disk(device) for device in facts.devices if device.root}


def _parts(facts: Facts, *targets: str) -> list[DiskSnapshot]:
    found = disks(facts)
    return [DiskSnapshot(found[one], SNAPSHOT, n, f"/var/tmp/pullback/{n}.scratch") for n, one in enumerate(targets)]


def _chains(facts: Facts, *targets: str) -> list[NodeChain]:
    found = disks(facts)
    return [NodeChain(found[one].node, read_chain(found[one].bitmaps)) for one in targets]


def _snapshot(facts: Facts, tracked: Collection[str], *targets: str) -> Plan:
    parts = _parts(facts, *targets)
    chains = _chains(facts, *(one for one in targets if one in tracked))
    return prepare_snapshot(parts) + freeze(parts, chains, "D", facts.running) + open_access(parts)


def _export(facts: Facts, since: str | None) -> Plan:
    items = []
    for part in _parts(facts, "vda", "vdb"):
        edges = read_chain(part.disk.bitmaps).since(since) if since else ()
        assert isinstance(edges, tuple)
        wanted: tuple[tuple[str, tuple[Edge, ...]], ...] = ((since, edges),) if since else ()
        items.append(ExportPart(part, wanted))
    return start_export(items, "/run/pullback/nbd", writable=True)


def _remove(facts: Facts, **remove: str) -> Plan:
    """``vda="AB"`` removes A and B from vda's chain."""
    return remove_checkpoints([(_chains(facts, target)[0], set(points)) for target, points in remove.items()])


def plans() -> dict[str, Plan]:
    """Every golden plan by the name of its file."""
    idle, frozen = observed("idle"), observed("frozen")
    return {
        "snapshot-one-disk": _snapshot(idle, ["vda"], "vda"),
        "snapshot-two-disks": _snapshot(idle, ["vda", "vdb"], "vda", "vdb"),
        "snapshot-untracked-disk": _snapshot(idle, ["vda"], "vda", "vdc"),
        "snapshot-on-top-of-another": _snapshot(frozen, [], "vda"),
        "export-full": _export(idle, None),
        "export-incremental": _export(idle, "B"),
        "export-server-not-ours": disown_server(_parts(idle, "vda")[0]),
        "cleanup": remove_snapshots(frozen, {SNAPSHOT}),
        "remove-first": _remove(idle, vda="A"),
        "remove-middle": _remove(idle, vda="B"),
        "remove-last": _remove(idle, vda="C", vdb="C"),
        "remove-several": _remove(idle, vda="AB", vdb="B"),
        "remove-all": _remove(idle, vda="ABC", vdb="BC"),
    }


def as_json(plan: Plan) -> list[dict[str, Any]]:
    """A plan as it stands in its golden file."""
    return [_step(step) for step in plan.commands()]


def _step(step: Step) -> dict[str, Any]:
    more: Mapping[str, Any] = {}
    if step.wait is not None:
        more = {"wait": f"{'job' if isinstance(step.wait, JobConcluded) else 'export'} {step.wait.id}"}
    optional = {"optional": True} if step.optional else {}
    return {"why": step.why, "execute": step.execute, "arguments": dict(step.arguments), **more, **optional}
