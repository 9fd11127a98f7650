# SPDX-License-Identifier: Apache-2.0
"""Taking a snapshot out of QEMU, from what is there.

It serves the end of a backup, its failure at any step, and what a killed process left: each observes and plans anew.
The order matters: while a frozen view hangs on a filter, taking the filter out is a permission conflict in QEMU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pullback.model.facts import ID_PREFIX, NODE_PREFIX, SERVER_MARK, Facts, Node
from pullback.plan.command import ExportDeleted, Plan, Step

#: Snapshot ids: one letter for who holds it, then 8 hex digits.  "b" belongs to one backup run.
PRIVATE = "b"

_NODE = re.compile(re.escape(NODE_PREFIX) + r"([a-z][0-9a-f]{8})-(\d+)-(scratch|filter|access)")
_ID = re.compile(re.escape(ID_PREFIX) + r"([a-z][0-9a-f]{8})-(\d+)(-create)?")


@dataclass(frozen=True, slots=True)
class _Part:
    snapshot: str
    number: int
    role: str
    node: Node


def _parts(facts: Facts) -> list[_Part]:
    found = []
    for name, node in facts.nodes.items():
        if match := _NODE.fullmatch(name):
            found.append(_Part(match[1], int(match[2]), match[3], node))
    return sorted(found, key=lambda part: (part.snapshot, part.number))


def snapshots_in(facts: Facts) -> set[str]:
    """The ids of all snapshots that left anything in QEMU's block graph, exports or jobs."""
    ids = {part.snapshot for part in _parts(facts)}
    for name in [export.id for export in facts.exports] + [job.id for job in facts.jobs]:
        if match := _ID.fullmatch(name):
            ids.add(match[1])
    return ids


def stale_snapshots(facts: Facts) -> set[str]:
    """Private snapshots.  The caller holds the domain's lock, so nobody is using them."""
    return {snapshot for snapshot in snapshots_in(facts) if snapshot.startswith(PRIVATE)}


def _exports(facts: Facts, snapshots: set[str]) -> tuple[list[Step], bool]:
    steps, others = [], False
    for export in facts.exports:
        match = _ID.fullmatch(export.id)
        if match is None or match[1] not in snapshots:
            others = True
            continue
        steps.append(
            Step(
                "block-export-del",
                {"id": export.id, "mode": "hard"},
                "end the export, clients or not",
                wait=ExportDeleted(export.id),
            )
        )
    return steps, others


def _remove(part: _Part) -> Step:
    return Step("blockdev-del", {"node-name": part.node.name}, f"remove the {part.role} of disk {part.number}")


def _take_out(facts: Facts, part: _Part) -> list[Step]:
    below = part.node.children.get("file", "")
    return [
        Step(
            "qom-set",
            {"path": device.qdev, "property": "drive", "value": below},
            f"{device.target} writes to its own node again",
        )
        for device in facts.devices
        if device.root == part.node.name and below
    ]


def remove_snapshots(facts: Facts, snapshots: set[str]) -> Plan:
    """Remove everything of these snapshots: exports, the NBD server if it is ours and unused, nodes, finished jobs.

    The scratch files themselves are unlinked as soon as QEMU has them open, so they end with their nodes.
    """
    steps, others = _exports(facts, snapshots)
    mine = [part for part in _parts(facts) if part.snapshot in snapshots]
    marked = any(bitmap.name == SERVER_MARK for part in mine for bitmap in part.node.bitmaps)
    if marked and not others:
        steps.append(Step("nbd-server-stop", {}, "nobody exports any more", optional=True))
    steps += [_remove(part) for part in mine if part.role == "access"]
    for part in mine:
        if part.role == "filter":
            steps += [*_take_out(facts, part), _remove(part)]
    steps += [_remove(part) for part in mine if part.role == "scratch"]
    for job in facts.jobs:
        match = _ID.fullmatch(job.id)
        if match and match[1] in snapshots and job.status == "concluded":
            steps.append(Step("job-dismiss", {"id": job.id}, "a finished job nobody waited for"))
    return Plan(tuple(steps))
