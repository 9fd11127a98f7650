# SPDX-License-Identifier: Apache-2.0
"""Freezing several disks at one instant with copy-before-write filters, and exporting the frozen view.

          device                      device
            │                           │
            │                    copy-before-write ──target──► scratch
            │                           │        ▲
          node                        node       └─file── snapshot-access ◄── NBD export

Another snapshot of the disk may stand already; the new filter then goes on top of its filter.

The order protects the chain: new bitmaps record before the freeze, old ones stop after it.  A filter that cannot save
old data breaks the snapshot, never the domain's write (``on-cbw-error: break-snapshot``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pullback.model.chain import Edge
from pullback.model.facts import ID_PREFIX, NODE_PREFIX, SERVER_MARK, Disk
from pullback.model.units import KIB
from pullback.plan.checkpoint import NodeChain, start_recording, stop_recording
from pullback.plan.command import JobConcluded, Paused, Plan, Step

#: Before this version, a request on a frozen view that begins in a range the domain has overwritten and ends beyond it
#: is answered with the domain's new data (hbitmap_status() says of such a range that nothing was saved: seen on 7.2.22,
#: mended in 8.0).  There, a read must not cross a multiple of ``SAVED_UNIT``, and what block status calls zero is zero
#: only if the scratch holds nothing there.
FROZEN_VIEW_EXACT = (8, 0, 0)
SAVED_UNIT = 64 * KIB

#: How long, in seconds, a write of the domain may wait for old data to reach the scratch before the snapshot breaks.
CBW_TIMEOUT = 30


@dataclass(frozen=True, slots=True)
class DiskSnapshot:
    """One disk of a snapshot: the names of its nodes and export, and where its scratch is made."""

    disk: Disk
    snapshot: str
    number: int
    scratch_path: str

    def _node(self, role: str) -> str:
        return f"{NODE_PREFIX}{self.snapshot}-{self.number}-{role}"

    @property
    def scratch(self) -> str:
        return self._node("scratch")

    @property
    def filter(self) -> str:
        return self._node("filter")

    @property
    def access(self) -> str:
        return self._node("access")

    @property
    def export(self) -> str:
        return f"{ID_PREFIX}{self.snapshot}-{self.number}"

    @property
    def saved_export(self) -> str:
        return f"{self.export}-saved"


def _prepare(part: DiskSnapshot) -> list[Step]:
    target = part.disk.target
    job = f"{part.export}-create"
    return [
        Step(
            "blockdev-create",
            {
                "job-id": job,
                "options": {"driver": "file", "filename": part.scratch_path, "size": part.disk.virtual_size},
            },
            f"make the scratch of {target}; QEMU makes it, so it can open it",
            wait=JobConcluded(job),
        ),
        Step(
            "blockdev-add",
            {"driver": "file", "node-name": part.scratch, "filename": part.scratch_path, "discard": "unmap"},
            f"open the scratch of {target}; freed parts give their space back",
        ),
    ]


def _add_filter(part: DiskSnapshot) -> Step:
    return Step(
        "blockdev-add",
        {
            "driver": "copy-before-write",
            "node-name": part.filter,
            "file": part.disk.root,
            "target": part.scratch,
            "on-cbw-error": "break-snapshot",
            "cbw-timeout": CBW_TIMEOUT,
            # Without it the domain's discards would end here and not give space back (seen on 7.2).
            "discard": "unmap",
        },
        f"the filter that saves old data of {part.disk.target} before it is overwritten",
    )


def _insert(part: DiskSnapshot) -> Step:
    """Put the filter under the device.  Naming the node it sits on already would abort QEMU (seen on 7.2.22)."""
    return Step(
        "qom-set",
        {"path": part.disk.qdev, "property": "drive", "value": part.filter},
        f"{part.disk.target} is frozen from here on",
    )


def _flush(part: DiskSnapshot) -> Step:
    return Step(
        "human-monitor-command",
        {"command-line": f'qemu-io {part.disk.node} "flush"'},
        f"flush {part.disk.target} beforehand, so that the pause has little left to flush",
    )


def prepare_snapshot(parts: Sequence[DiskSnapshot]) -> Plan:
    """Make and open the scratch images; nothing of the domain is touched yet."""
    return Plan(tuple(step for part in parts for step in _prepare(part)))


def freeze(parts: Sequence[DiskSnapshot], tracked: Sequence[NodeChain], checkpoint: str | None, running: bool) -> Plan:
    """Freeze the disks at one instant, with ``checkpoint`` made on the ``tracked`` ones.

    Several disks of a running domain are one instant only if it does not write meanwhile, so it is paused for the
    milliseconds that swapping the filters in takes; a single disk needs no pause.
    """
    record = Plan((start_recording(tracked, checkpoint),)) if checkpoint is not None and tracked else Plan()
    settle = stop_recording(tracked) if checkpoint is not None else Plan()
    filters = Plan(tuple(_add_filter(part) for part in parts))
    inserts = tuple(_insert(part) for part in parts)
    if len(parts) > 1 and running:
        swap = Plan((Paused(inserts, "one instant over all disks", before=tuple(_flush(part) for part in parts)),))
    else:
        swap = Plan(inserts)
    return record + filters + swap + settle


def open_access(parts: Sequence[DiskSnapshot]) -> Plan:
    """Put a node on each filter that reads as the disk did at the freeze."""
    return Plan(
        tuple(
            Step(
                "blockdev-add",
                {"driver": "snapshot-access", "node-name": part.access, "file": part.filter, "discard": "unmap"},
                f"the frozen view of {part.disk.target}; a discard lets a range go",
            )
            for part in parts
        )
    )


def _changes(part: DiskSnapshot, checkpoint: str, edges: Sequence[Edge]) -> list[Step]:
    sources: list[Any] = [{"node": part.disk.node, "name": edge.name} for edge in edges]
    return [
        Step(
            "block-dirty-bitmap-add",
            {"node": part.access, "name": checkpoint, "disabled": True, "persistent": False},
            f"where {part.disk.target}'s changes since {checkpoint} are gathered; gone with the frozen view",
        ),
        Step(
            "block-dirty-bitmap-merge",
            {"node": part.access, "target": checkpoint, "bitmaps": sources},
            f"all edges from {checkpoint} to the snapshot",
        ),
    ]


@dataclass(frozen=True, slots=True)
class ExportPart:
    """One disk of an export; ``since`` are checkpoints, each with the edges that lead from it to the freeze."""

    part: DiskSnapshot
    since: tuple[tuple[str, tuple[Edge, ...]], ...] = ()


def saved_name(target: str) -> str:
    """The name of the export of a disk's scratch; no disk's own name holds a slash."""
    return f"{target}/saved"


def _offer_saved(part: DiskSnapshot) -> Step:
    return Step(
        "block-export-add",
        {"id": part.saved_export, "type": "nbd", "node-name": part.scratch, "name": saved_name(part.disk.target)},
        f"offer what was saved of {part.disk.target}: this QEMU's block status leaves it out",
    )


def start_export(parts: Sequence[ExportPart], socket: str, writable: bool, saved: bool = False) -> Plan:
    """Export frozen disks over NBD on a unix socket, with a context ``qemu:dirty-bitmap:CHECKPOINT`` each.

    ``writable`` lets the client trim, which lets ranges go; a write is refused by the node all the same.  ``saved``
    offers the scratch images too, for a QEMU older than ``FROZEN_VIEW_EXACT``.
    """
    steps = [step for item in parts for name, edges in item.since for step in _changes(item.part, name, edges)]
    steps.append(
        Step(
            "block-dirty-bitmap-add",
            {"node": parts[0].part.access, "name": SERVER_MARK, "disabled": True, "persistent": False},
            "remember that the NBD server is ours, should we die",
        )
    )
    steps.append(
        Step(
            "nbd-server-start",
            {"addr": {"type": "unix", "data": {"path": socket}}},
            "QEMU's one NBD server",
        )
    )
    steps += [
        Step(
            "block-export-add",
            {
                "id": item.part.export,
                "type": "nbd",
                "node-name": item.part.access,
                "name": item.part.disk.target,
                "writable": writable,
                "bitmaps": [name for name, _ in item.since],
            },
            f"offer the frozen {item.part.disk.target}",
        )
        for item in parts
    ]
    steps += [_offer_saved(item.part) for item in parts if saved]
    return Plan(tuple(steps))


def disown_server(part: DiskSnapshot) -> Plan:
    """The NBD server that runs is somebody else's: forget that it was to be ours."""
    return Plan(
        (
            Step(
                "block-dirty-bitmap-remove",
                {"node": part.access, "name": SERVER_MARK},
                "the NBD server is not ours",
            ),
        )
    )
