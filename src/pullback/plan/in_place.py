# SPDX-License-Identifier: Apache-2.0
"""Restoring into a domain's own disks: what is refused, which blocks are written, and how a disk is marked meanwhile.

    mark every disk ─► find what differs ─► write it ─► flush ─► take the marks away

A disk with such a mark is between two states.  What is written goes through the node that records changes, so a restore
that was cut short loses nothing of the chain, and the same command run again completes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pullback.errors import Refused, UsageError
from pullback.model.chain import Chain, Edge, Unknown, read_chain
from pullback.model.extents import Span
from pullback.model.facts import Disk, Facts
from pullback.model.manifest import DiskEntry, Manifest
from pullback.model.snapshots import UnfinishedMark, read_exports, read_snapshots, unfinished_marks
from pullback.model.units import human_bytes
from pullback.plan.command import Plan, transaction
from pullback.plan.freeze import MARK_GRANULARITY
from pullback.plan.restore import Place

#: Unchanged chunks of each disk that are compared with the backup before the dirty bitmaps are believed.
SAMPLE = 32
#: States of QEMU in which nobody runs on the disks.
_STILL = ("prelaunch", "inmigrate", "paused", "shutdown")

Blob = TypeVar("Blob", bound=bytes)


@dataclass(frozen=True, slots=True)
class ByChanges:
    """Only what changed since ``checkpoint``, the backup's own, is written: the OR of ``edges``."""

    checkpoint: str
    edges: tuple[Edge, ...]


@dataclass(frozen=True, slots=True)
class ByComparison:
    """The whole disk is read and compared with the backup, and why; what differs is written."""

    reason: str


Way = ByChanges | ByComparison

#: Disks of a domain, each with what the backup says of it.
Pairs = Sequence[tuple[Disk, DiskEntry]]


def choose_way(disk: Disk, entry: DiskEntry, chain: Chain) -> Way:
    """How to find out where a disk differs from a backup of it."""
    if disk.untracked:
        return ByComparison(disk.untracked)
    if entry.checkpoint is None:
        return ByComparison("the backup has no checkpoint of this disk")
    edges = chain.since(entry.checkpoint)
    if isinstance(edges, Unknown):
        return ByComparison(f"changes since the backup are not known: {edges.reason}")
    return ByChanges(entry.checkpoint, edges)


def most_written(disk: Disk, way: Way) -> int:
    """Bytes that are written to a disk at most."""
    if isinstance(way, ByComparison):
        return disk.virtual_size
    return min(sum(edge.bitmap.count for edge in way.edges), disk.virtual_size)


def refuse_another(name: str, manifest: Manifest, pairs: Pairs, mark: UnfinishedMark) -> None:
    """UsageError for a backup of a domain that is not called ``name``, unless a disk knows that backup.

    It knows it by the backup's checkpoint, or by the mark of a restore of it that was cut short.
    """
    if name in ("", manifest.domain):
        return
    for disk, entry in pairs:
        way = choose_way(disk, entry, read_chain(disk.bitmaps))
        if isinstance(way, ByChanges) or mark in unfinished_marks(disk.bitmaps):
            return
    raise UsageError(
        f"the backup is of domain {manifest.domain}, and this is domain {name}, whose disks never were at it",
        means="Nothing was written.",
        todo="If they are to be overwritten with it all the same, stop the domain and name its images: --into"
        " disk:TARGET=PATH,…",
    )


def match_disks(facts: Facts, disks: Sequence[Disk], entries: Sequence[DiskEntry]) -> list[tuple[Disk, DiskEntry]]:
    """Each disk of a backup with the domain's disk of this name; UsageError without one, Refused for another size."""
    there = {disk.target: disk for disk in disks}
    pairs = []
    for entry in entries:
        disk = there.get(entry.target)
        if disk is None:
            raise UsageError(
                f"domain {facts.name} has no disk {entry.target}, which the backup holds",
                means="Nothing was written.",
                todo=f"It has {', '.join(there) or 'none'}: choose with --disk, or name an image TARGET=PATH.",
            )
        if disk.virtual_size != entry.virtual_size:
            raise Refused(
                f"disk {disk.target} has {disk.virtual_size} bytes and {entry.virtual_size} in the backup",
                means="Nothing was written.",
                todo=f"Resize it to {human_bytes(entry.virtual_size)} ({entry.virtual_size} bytes), or restore to new"
                " images with --to.",
            )
        pairs.append((disk, entry))
    return pairs


def refuse_in_place(facts: Facts) -> None:
    """Refused while somebody may run on the disks, or reads frozen views of them, which writing below would change."""
    if facts.run_state not in _STILL:
        raise Refused(
            f"domain {facts.name} runs (QEMU says {facts.run_state}), and its disks would change below it",
            means="Nothing was written.",
            todo="Stop the domain and name its images (disk:PATH), or restore to new images with --to.",
        )
    snapshots = [state.name for state in read_snapshots(facts)]
    exports = [export.name for export in read_exports(facts)]
    if snapshots or exports:
        held = [f"snapshot {name}" for name in snapshots] + [f"export {name}" for name in exports]
        raise Refused(
            f"domain {facts.name} has {', '.join(held)}, which would show other data than it was made of",
            means="Nothing was written.",
            todo="End them with pullback export stop and pullback snapshot delete first.",
        )


def refuse_unfinished(disks: Iterable[Disk]) -> None:
    """Refused for disks that an unfinished restore left between two states."""
    for disk in disks:
        for mark in unfinished_marks(disk.bitmaps):
            raise Refused(
                f"disk {disk.target} is between two states: a restore of backup {mark.backup[:8]} into it did not end",
                means="No backup was made: it would be of a disk that never was like that.",
                todo=f"Run pullback restore {mark.backup[:8]} --into the domain again, which completes it.",
            )


def mark_disks(disks: Iterable[Disk], mark: UnfinishedMark) -> Plan:
    """Mark disks, all or none, that can keep it in their image; others and marked ones are passed over."""
    name = mark.bitmap_name()
    actions = [
        {
            "type": "block-dirty-bitmap-add",
            "data": {
                "node": disk.node,
                "name": name,
                "granularity": MARK_GRANULARITY,
                "persistent": True,
                "disabled": True,
            },
        }
        for disk in disks
        if not disk.untracked and all(bitmap.name != name for bitmap in disk.bitmaps)
    ]
    return Plan((transaction(actions, "write down that a restore into these disks began"),)) if actions else Plan()


def unmark_disks(disks: Iterable[Disk]) -> Plan:
    """Take all marks of unfinished restores away from these disks, at once."""
    actions = [
        {"type": "block-dirty-bitmap-remove", "data": {"node": disk.node, "name": mark.bitmap_name()}}
        for disk in disks
        for mark in unfinished_marks(disk.bitmaps)
    ]
    return Plan((transaction(actions, "the disks are whole again"),)) if actions else Plan()


def pieces(place: Place, spans: Sequence[Span]) -> Iterator[Span]:
    """What of a place the sorted ``spans`` cover, as spans of the disk."""
    end = place.offset + place.length
    at = _first_beyond(spans, place.offset)
    while place.length and at < len(spans) and spans[at].offset < end:
        begin = max(spans[at].offset, place.offset)
        yield Span(begin, min(spans[at].end, end) - begin)
        at += 1


def _first_beyond(spans: Sequence[Span], offset: int) -> int:
    """The number of the first of the sorted spans that ends beyond ``offset``."""
    low, high = 0, len(spans)
    while low < high:
        middle = (low + high) // 2
        if spans[middle].end <= offset:
            low = middle + 1
        else:
            high = middle
    return low


def pick_unchanged(
    data: Iterable[tuple[Blob, Place]], spans: Sequence[Span], draw: Callable[[int], int], count: int = SAMPLE
) -> list[tuple[Blob, Place]]:
    """The last place that shares no byte with ``spans``, and at most ``count`` random ones, sorted.

    ``data`` are the places of one disk in order, ``draw(n)`` is a random number below n.  The last one is lost first
    where a disk was shrunk and grown again, which no bitmap tells.
    """
    kept: list[tuple[Blob, Place]] = []
    last: list[tuple[Blob, Place]] = []
    seen = 0
    for one in data:
        if next(pieces(one[1], spans), None) is not None:
            continue
        last = [one]
        seen += 1
        if len(kept) < count:
            kept.append(one)
        elif (at := draw(seen)) < count:
            kept[at] = one
    return sorted({one[1].offset: one for one in kept + last}.values(), key=lambda one: one[1].offset)
