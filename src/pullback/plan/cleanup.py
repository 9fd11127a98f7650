# SPDX-License-Identifier: Apache-2.0
"""Taking snapshots and exports out of QEMU, from what is there.

It serves the end of a snapshot, its failure at any step, and what a killed process left: each observes and plans anew.
The order matters: while a frozen view hangs on a filter, taking the filter out is a permission conflict in QEMU.

Only the topmost filter of a device can go.  One that has another snapshot's above it lets all its ranges go and
stays as a pass-through; it leaves together with the last one above it.  A job's filter can go from anywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from pullback.model.facts import Facts
from pullback.model.snapshots import (
    WRITABLE,
    SnapshotPart,
    SnapshotState,
    filter_stack,
    foreign_exports,
    owner_of,
    read_snapshots,
    server_mark,
)
from pullback.model.units import GIB
from pullback.plan.command import JobGone, Plan, Step
from pullback.plan.export import delete_export, stop_server

#: A discard through the human monitor goes in steps of this many bytes (below BDRV_REQUEST_MAX_BYTES).
_DISCARD_STEP = GIB


def stale_snapshots(facts: Facts) -> set[str]:
    """Snapshots nobody uses: of a backup (the caller holds the domain's lock, so it died), or never finished."""
    return {state.id for state in read_snapshots(facts) if state.private or not state.whole}


def clearable(facts: Facts) -> list[str]:
    """Of the stale snapshots those that something can be done about now.

    One that was given up below a live one waits, empty and passing everything through, until that one goes.
    """
    return sorted(snapshot for snapshot in stale_snapshots(facts) if remove_snapshots(facts, {snapshot}))


@dataclass(frozen=True, slots=True)
class _Leaving:
    """What becomes of filters: ``swaps`` take the topmost ones out; ``retired`` have to stay for now."""

    swaps: list[Step]
    gone: list[SnapshotPart]
    retired: list[SnapshotPart]


def _remove(name: str, why: str) -> Step:
    return Step("blockdev-del", {"node-name": name}, why)


def _leaving(facts: Facts, states: Iterable[SnapshotState], ids: Collection[str]) -> _Leaving:
    mine = {part.names: part for state in states if state.id in ids for part in state.parts}
    swaps: list[Step] = []
    gone = {names: part for names, part in mine.items() if part.filter is None or part.job is not None}
    inserted = set()
    for device in facts.devices:
        stack = [part for part in filter_stack(facts, device) if part.job is None]
        inserted |= {part.names for part in stack}
        if not any(part.names in mine for part in stack):
            continue
        for part in stack:
            if part.names not in mine and part.viewed:
                break
            assert part.filter is not None
            below = part.filter.children["file"]
            why = f"{device.target} writes to {below} again"
            swaps.append(Step("qom-set", {"path": device.qdev, "property": "drive", "value": below}, why))
            swaps.append(_remove(part.filter.name, f"remove the filter of {part.target}"))
            gone[part.names] = part
    # One that stands on another keeps that one from being taken out, put in or not.
    never_in = [part for names, part in mine.items() if names not in gone and names not in inserted]
    for part in never_in:
        assert part.filter is not None
        swaps.insert(0, _remove(part.filter.name, f"remove the filter of {part.target}, which was never put in"))
        gone[part.names] = part
    retired = [part for names, part in mine.items() if names not in gone]
    return _Leaving(swaps, list(gone.values()), retired)


def _let_go(part: SnapshotPart) -> list[Step]:
    """Let all ranges of a frozen view go, so that its filter only passes through and its scratch is empty."""
    if part.access is None:
        return []
    size = part.access.virtual_size
    return [
        Step(
            "human-monitor-command",
            {"command-line": f'qemu-io {part.access.name} "discard {offset} {min(_DISCARD_STEP, size - offset)}"'},
            f"nobody needs the old data of {part.target} any more",
        )
        for offset in range(0, size, _DISCARD_STEP)
    ]


def _end_exports(facts: Facts, ids: Collection[str]) -> list[Step]:
    mine = [export for export in facts.exports if owner_of(export.id) in ids]
    steps = [delete_export(export.id) for export in mine]
    ending = {export.id for export in mine}
    others = [export for export in facts.exports if export.id not in ending and export.type == "nbd"]
    marks = [
        mark
        for state in read_snapshots(facts)
        if state.id in ids
        for part in state.parts
        for node in (part.scratch, part.access, *part.readers)
        if node is not None and (mark := server_mark(node)) is not None
    ]
    if marks and not others:
        steps += stop_server(marks[0])
    return steps


def _end_jobs(facts: Facts, ids: Collection[str], which: str) -> list[Step]:
    """End jobs that read or write frozen views (``push``, ``probe``), or the ones that made the filters (empty)."""
    steps = []
    for job in facts.jobs:
        if owner_of(job.id) not in ids or _role(job.id) != which:
            continue
        if job.status == "concluded":
            steps.append(Step("job-dismiss", {"id": job.id}, "a finished job nobody waited for"))
        else:
            steps.append(Step("job-cancel", {"id": job.id}, "nobody waits for this job any more", wait=JobGone(job.id)))
    return steps


def _role(job: str) -> str:
    last = job.rsplit("-", 1)[1]
    return "" if last.isdigit() else last


def remove_snapshots(facts: Facts, ids: Collection[str]) -> Plan:
    """Remove everything of these snapshots: exports, the NBD server if it is ours and unused, jobs and nodes.

    The scratch files themselves are unlinked as soon as QEMU has them open, so they end with their nodes.
    """
    states = read_snapshots(facts)
    mine = [part for state in states if state.id in ids for part in state.parts]
    leaving = _leaving(facts, states, ids)
    steps = _end_exports(facts, ids)
    steps += [step for role in ("push", "probe", "create") for step in _end_jobs(facts, ids, role)]
    steps += [
        _remove(node.name, f"nobody reads the frozen {part.target} any more") for part in mine for node in part.readers
    ]
    steps += [step for part in leaving.retired for step in _let_go(part)]
    steps += [_remove(part.access.name, f"remove the frozen view of {part.target}") for part in mine if part.access]
    steps += leaving.swaps
    steps += _end_jobs(facts, ids, "")
    steps += [
        _remove(part.scratch.name, f"remove the scratch of {part.target}")
        for part in leaving.gone
        if part.scratch is not None
    ]
    return Plan(tuple(steps))


def stop_exports(facts: Facts, export_ids: Collection[str]) -> Plan:
    """End these exports, and the NBD server with the last one; marks of writable exports of own disks go too."""
    steps = [delete_export(export.id) for export in facts.exports if export.id in export_ids]
    left = [export for export in facts.exports if export.id not in export_ids and export.type == "nbd"]
    still_used = {export.node for export in left}
    marks = {name: mark for name, node in facts.nodes.items() if (mark := server_mark(node)) is not None}
    if marks and not left and not foreign_exports(facts):
        steps += stop_server(next(iter(marks.values())))
    for name, mark in marks.items():
        if name not in still_used:
            steps.append(
                Step(
                    "block-dirty-bitmap-remove",
                    {"node": name, "name": mark.bitmap_name()},
                    "nothing of it is exported any more",
                    optional=True,
                )
            )
    return Plan(tuple(steps))


def stale_writable(facts: Facts) -> set[str]:
    """Writable exports of own disks: exports of ours that belong to no snapshot."""
    return {export.id for export in facts.exports if (owner_of(export.id) or "").startswith(WRITABLE)}
