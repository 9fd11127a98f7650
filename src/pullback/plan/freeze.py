# SPDX-License-Identifier: Apache-2.0
"""Freezing several disks at one instant, with a checkpoint made at it.

    method filter                                   method job
          device                                          device
            │                                               │
      copy-before-write ──target──► scratch           copy-before-write ──target──► scratch      (the job's own)
            │        ▲                                      │        ▲
          node       └─file── snapshot-access             node       └─file── snapshot-access

Another snapshot of the disk may stand already; a new filter goes on top of its filter, a new job's right above the
node.

The order protects the chain.  Filters: new bitmaps record before the freeze, old ones stop after it, so each is exact
or a hair too large.  Jobs: all of it is one transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pullback.model.facts import Disk
from pullback.model.snapshots import FROZEN_MARK, SAVED_MAP, Names, SnapshotMark
from pullback.plan.checkpoint import NodeChain, recording_actions, start_recording, stop_actions, stop_recording
from pullback.plan.command import JobConcluded, Paused, Plan, Step, transaction
from pullback.plan.method import SAVED_UNIT, Method

#: How long, in seconds, a write of the domain may wait for old data to reach the scratch before the snapshot breaks.
CBW_TIMEOUT = 30
#: A mark needs no bits; the coarsest granularity keeps it small on any disk.
MARK_GRANULARITY = 1 << 30


@dataclass(frozen=True, slots=True)
class FreezePart:
    """One disk to freeze: its names, where its scratch is made, and what it says of itself."""

    disk: Disk
    names: Names
    scratch_path: str
    mark: SnapshotMark

    @property
    def scratch(self) -> str:
        return self.names.node("scratch")

    @property
    def filter(self) -> str:
        return self.names.node("filter")

    @property
    def access(self) -> str:
        return self.names.node("access")


def add_mark(node: str, name: str, why: str) -> Step:
    """Write a mark on a node: a bitmap that records nothing and ends with the node."""
    return Step(
        "block-dirty-bitmap-add",
        {"node": node, "name": name, "disabled": True, "persistent": False, "granularity": MARK_GRANULARITY},
        why,
    )


def mark_frozen(parts: Sequence[FreezePart]) -> Plan:
    """Write down that the guest's file systems were frozen; before the frozen views make the snapshot whole."""
    return Plan(
        tuple(add_mark(part.scratch, FROZEN_MARK, "write down that the file systems were frozen") for part in parts)
    )


def _map_saved(part: FreezePart) -> Step:
    return Step(
        "block-dirty-bitmap-add",
        {"node": part.scratch, "name": SAVED_MAP, "persistent": False, "granularity": SAVED_UNIT},
        f"note what old data of {part.disk.target} is saved: readers of its frozen view have to know",
    )


def _prepare(part: FreezePart) -> list[Step]:
    target = part.disk.target
    job = part.names.id("create")
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
        add_mark(part.scratch, part.mark.bitmap_name(), f"write down whose the scratch of {target} is"),
    ]


def prepare_snapshot(parts: Sequence[FreezePart], *, map_saved: bool) -> Plan:
    """Make, open and mark the scratch images; nothing of the domain is touched yet.

    ``map_saved`` has a bitmap on each note what is saved to it, for readers of a view that is not exact.
    """
    maps = [_map_saved(part) for part in parts if map_saved]
    return Plan((*(step for part in parts for step in _prepare(part)), *maps))


def _add_filter(part: FreezePart) -> Step:
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


def _insert(part: FreezePart) -> Step:
    """Put the filter under the device.  Naming the node it sits on already would abort QEMU (seen on 7.2.22)."""
    return Step(
        "qom-set",
        {"path": part.disk.qdev, "property": "drive", "value": part.filter},
        f"{part.disk.target} is frozen from here on",
    )


def _flush(part: FreezePart) -> Step:
    return Step(
        "human-monitor-command",
        {"command-line": f'qemu-io {part.disk.node} "flush"'},
        f"flush {part.disk.target} beforehand, so that the pause has little left to flush",
    )


def _freeze_with_filters(
    parts: Sequence[FreezePart], tracked: Sequence[NodeChain], checkpoint: str | None, running: bool
) -> Plan:
    record = Plan((start_recording(tracked, checkpoint),)) if checkpoint is not None and tracked else Plan()
    settle = stop_recording(tracked) if checkpoint is not None else Plan()
    filters = Plan(tuple(_add_filter(part) for part in parts))
    inserts = tuple(_insert(part) for part in parts)
    if len(parts) > 1 and running:
        swap = Plan((Paused(inserts, "one instant over all disks", before=tuple(_flush(part) for part in parts)),))
    else:
        swap = Plan(inserts)
    return record + filters + swap + settle


def _backup_job(part: FreezePart, break_snapshot: bool) -> Mapping[str, Any]:
    data = {
        "job-id": part.names.id(),
        "device": part.disk.node,
        "target": part.scratch,
        "sync": "none",
        "filter-node-name": part.filter,
    }
    if break_snapshot:
        data["on-cbw-error"] = "break-snapshot"
    return {"type": "blockdev-backup", "data": data}


def _freeze_with_jobs(
    parts: Sequence[FreezePart], tracked: Sequence[NodeChain], checkpoint: str | None, break_snapshot: bool
) -> Plan:
    actions = [_backup_job(part, break_snapshot) for part in parts]
    if checkpoint is not None:
        actions = [*recording_actions(tracked, checkpoint), *actions, *stop_actions(tracked)]
    point = f", with checkpoint {checkpoint}" if checkpoint is not None and tracked else ""
    return Plan((transaction(actions, f"freeze all disks at one instant{point}"),))


def freeze(
    parts: Sequence[FreezePart],
    tracked: Sequence[NodeChain],
    checkpoint: str | None,
    method: Method,
    *,
    running: bool,
    break_snapshot: bool = False,
) -> Plan:
    """Freeze the disks at one instant, with ``checkpoint`` made on the ``tracked`` ones.

    With filters, several disks of a running domain are one instant only if it does not write meanwhile, so it is paused
    for the milliseconds that swapping them in takes.  ``break_snapshot`` says that jobs know ``on-cbw-error``.
    """
    if method == "job":
        return _freeze_with_jobs(parts, tracked, checkpoint, break_snapshot)
    return _freeze_with_filters(parts, tracked, checkpoint, running)


def open_access(parts: Sequence[FreezePart]) -> Plan:
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
