# SPDX-License-Identifier: Apache-2.0
"""Taking a snapshot out of QEMU, from what is there.

It serves the end of a backup, its failure at any step, and what a killed process left: each observes and plans anew.
The order matters: while a frozen view hangs on a filter, taking the filter out is a permission conflict in QEMU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pullback.model.facts import ID_PREFIX, NODE_PREFIX, SERVER_MARK, Device, Facts, Node
from pullback.plan.command import ExportDeleted, Plan, Step

#: Snapshot ids: one letter for who holds it, then 8 hex digits.  "b" belongs to one backup run.
PRIVATE = "b"

_NODE = re.compile(re.escape(NODE_PREFIX) + r"([a-z][0-9a-f]{8})-(\d+)-(scratch|filter|access)")
_ID = re.compile(re.escape(ID_PREFIX) + r"([a-z][0-9a-f]{8})-(\d+)(-create|-saved)?")


@dataclass(frozen=True, slots=True)
class _Part:
    snapshot: str
    number: int
    role: str
    node: Node

    @property
    def key(self) -> tuple[str, int]:
        return self.snapshot, self.number


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
            others = others or export.type == "nbd"
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


def _stack(facts: Facts, device: Device) -> list[str]:
    """Our filters under a device, topmost first."""
    names = []
    node = facts.nodes.get(device.root)
    while node is not None and node.is_ours and "file" in node.children:
        names.append(node.name)
        node = facts.nodes[node.children["file"]]
    return names


def _take_out(facts: Facts, mine: dict[str, _Part], abandoned: dict[str, _Part]) -> tuple[list[Step], list[_Part]]:
    """The steps that take the filters ``mine`` out as far as that is possible now, and whose they are.

    QEMU lets only the topmost filter of a device go.  One that has another snapshot's above it stays and passes
    everything through; it is ``abandoned`` then, and leaves together with the last one above it.
    """
    stacks = [(device, _stack(facts, device)) for device in facts.devices]
    inserted = {name for _, stack in stacks for name in stack}
    gone = [part for name, part in mine.items() if name not in inserted]
    steps = [_remove(part) for part in gone]
    for device, stack in stacks:
        leaving = {**mine, **abandoned} if not mine.keys().isdisjoint(stack) else {}
        for name in stack:
            if (part := leaving.get(name)) is None:
                break
            below = part.node.children["file"]
            steps.append(
                Step(
                    "qom-set",
                    {"path": device.qdev, "property": "drive", "value": below},
                    f"{device.target} writes to {below} again",
                )
            )
            steps.append(_remove(part))
            gone.append(part)
    return steps, gone


def _remove_filters(facts: Facts, parts: Sequence[_Part], snapshots: set[str]) -> list[Step]:
    """Filters, and the scratch of those that leave."""
    viewed = {part.key for part in parts if part.role == "access"}
    filters = [part for part in parts if part.role == "filter"]
    mine = {part.node.name: part for part in filters if part.snapshot in snapshots}
    abandoned = {part.node.name: part for part in filters if part.key not in viewed}
    steps, gone = _take_out(facts, mine, abandoned)
    left = {part.key for part in gone}
    staying = {part.key for part in filters} - left
    for part in parts:
        if part.role == "scratch" and part.key not in staying and (part.snapshot in snapshots or part.key in left):
            steps.append(_remove(part))
    return steps


def remove_snapshots(facts: Facts, snapshots: set[str]) -> Plan:
    """Remove everything of these snapshots: exports, the NBD server if it is ours and unused, nodes, finished jobs.

    The scratch files themselves are unlinked as soon as QEMU has them open, so they end with their nodes.
    """
    steps, others = _exports(facts, snapshots)
    parts = _parts(facts)
    mine = [part for part in parts if part.snapshot in snapshots]
    marked = any(bitmap.name == SERVER_MARK for part in mine for bitmap in part.node.bitmaps)
    if marked and not others:
        steps.append(Step("nbd-server-stop", {}, "nobody exports any more", optional=True))
    steps += [_remove(part) for part in mine if part.role == "access"]
    steps += _remove_filters(facts, parts, snapshots)
    for job in facts.jobs:
        match = _ID.fullmatch(job.id)
        if match and match[1] in snapshots and job.status == "concluded":
            steps.append(Step("job-dismiss", {"id": job.id}, "a finished job nobody waited for"))
    return Plan(tuple(steps))
