# SPDX-License-Identifier: Apache-2.0
"""Whole plans from what is observed, as the engine makes them; for the fake QEMU and for real ones."""

from __future__ import annotations

from collections.abc import Sequence

from pullback.model.chain import Edge, read_chain
from pullback.model.facts import Disk, Facts
from pullback.model.snapshots import FROZEN_VIEW_EXACT, PUBLIC, Names, ServerMark, SnapshotMark, read_snapshots
from pullback.plan.checkpoint import NodeChain
from pullback.plan.command import Plan
from pullback.plan.export import ExportPart, start_export
from pullback.plan.freeze import FreezePart, freeze, open_access, prepare_snapshot
from pullback.plan.method import Method
from pullback.plan.probe import start_probe
from pullback.plan.push import PushPart, start_push
from pullback.plan.view import open_view

TIME = "2026-05-04T03:02:01+00:00"
SERVER = ServerMark("unix", "/run/pullback/nbd")
TLS = ServerMark("inet", "127.0.0.1:10809", "/etc/pullback/tls")


def disks(facts: Facts, targets: Sequence[str] = ()) -> list[Disk]:
    """The domain's disks, or these of them, in its order."""
    return [facts.disk(device) for device in facts.devices if device.root and (not targets or device.target in targets)]


def freeze_parts(
    facts: Facts, snapshot_id: str, targets: Sequence[str], directory: str, name: str, checkpoint: str | None
) -> list[FreezePart]:
    return [
        FreezePart(
            disk,
            Names(snapshot_id, number),
            f"{directory}/{snapshot_id}-{number}.scratch",
            SnapshotMark(name or snapshot_id, disk.target, disk.node, TIME, checkpoint),
        )
        for number, disk in enumerate(disks(facts, targets))
    ]


def tracked_of(parts: Sequence[FreezePart]) -> list[NodeChain]:
    return [NodeChain(part.disk.node, read_chain(part.disk.bitmaps)) for part in parts if not part.disk.untracked]


def snapshot(
    facts: Facts,
    snapshot_id: str,
    targets: Sequence[str] = (),
    *,
    method: Method = "filter",
    checkpoint: str | None = None,
    directory: str = "/var/tmp/pullback",
    name: str = "",
    view: bool | None = None,
) -> Plan:
    """Scratches, the freeze and the frozen views.

    ``view`` puts one that can be believed on each; None does where a public snapshot needs it.  Who says what it is to
    be gets the plan for views that are not exact, whatever QEMU the facts are of.
    """
    exact = view is None and facts.version >= FROZEN_VIEW_EXACT
    public = snapshot_id.startswith(PUBLIC)
    if view is None:
        view = public and not exact
    parts = freeze_parts(facts, snapshot_id, targets, directory, name, checkpoint)
    plan = prepare_snapshot(parts, map_saved=not (public or exact))
    plan += freeze(parts, tracked_of(parts), checkpoint, method, running=facts.running)
    plan += open_access(parts)
    for part in parts if view else ():
        plan += open_view(part.names, part.disk.target, part.disk.virtual_size)
    return plan


def since(disk: Disk, *points: str) -> tuple[tuple[str, tuple[Edge, ...]], ...]:
    """What changed since each of these checkpoints of a disk."""
    made = []
    for point in points:
        edges = read_chain(disk.bitmaps).since(point)
        assert isinstance(edges, tuple), edges
        made.append((point, edges))
    return tuple(made)


def export_parts(
    facts: Facts,
    snapshot_id: str,
    targets: Sequence[str] = (),
    *,
    points: Sequence[str] = (),
    role: str = "access",
    suffix: str = "",
) -> list[ExportPart]:
    """The disks of a snapshot, numbered as they are when all ``targets`` were frozen; ``points`` where tracked."""
    made = []
    for number, disk in enumerate(disks(facts, targets)):
        names = Names(snapshot_id, number)
        changes = since(disk, *(one for one in points if one in read_chain(disk.bitmaps).points))
        made.append(ExportPart(names, disk.target, names.node(role), disk.node, disk.target + suffix, changes))
    return made


def export_disks(
    facts: Facts,
    snapshot_id: str,
    server: ServerMark = SERVER,
    targets: Sequence[str] = (),
    *,
    points: Sequence[str] = (),
    role: str = "access",
    suffix: str = "",
    start_server: bool = True,
    writable: bool | None = None,
) -> Plan:
    """Exports of a snapshot; by default those of a backup run's can be trimmed, those for others only read."""
    writable = not snapshot_id.startswith(PUBLIC) if writable is None else writable
    parts = export_parts(facts, snapshot_id, targets, points=points, role=role, suffix=suffix)
    return start_export(facts, parts, server, start_server=start_server, writable=writable)


def export_own_disks(
    facts: Facts, owner: str, server: ServerMark = SERVER, targets: Sequence[str] = (), *, start_server: bool = True
) -> Plan:
    """Exports of the domain's own disks, for writing."""
    parts = [
        ExportPart(Names(owner, number), disk.target, disk.node, disk.node, f"own-{disk.target}")
        for number, disk in enumerate(disks(facts, targets))
    ]
    return start_export(facts, parts, server, start_server=start_server, writable=True)


def push(
    facts: Facts,
    snapshot_id: str,
    socket: str = "/run/pullback/push",
    targets: Sequence[str] = (),
    *,
    point: str = "",
    view: str = "access",
) -> Plan:
    """All disks of a snapshot pushed; whole, or what changed since ``point``."""
    parts = [
        PushPart(
            Names(snapshot_id, number),
            disk.target,
            disk.node,
            since(disk, point)[0][1] if point else None,
            view,
        )
        for number, disk in enumerate(disks(facts, targets))
    ]
    return start_push(parts, socket)


def probe(facts: Facts, snapshot_id: str) -> Plan:
    """All frozen views of a snapshot probed at once."""
    (state,) = [one for one in read_snapshots(facts) if one.id == snapshot_id]
    plan = Plan()
    for part in state.parts:
        plan += start_probe(part)
    return plan
