# SPDX-License-Identifier: Apache-2.0
"""On which backup an incremental one builds: decided anew each time, from the repository and the chains alone.

There is no other record of "the last backup".  A backup names its checkpoint; it is a base for a disk if that
checkpoint still stands in the disk's chain.  So a client that died, a lost state directory or a second repository with
its own schedule cannot make a wrong incremental.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pullback.model.chain import Chain, Edge, Unknown
from pullback.model.facts import Disk
from pullback.model.manifest import DiskEntry, Manifest


@dataclass(frozen=True, slots=True)
class Full:
    """The disk is read whole, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Incremental:
    """Only what changed since ``checkpoint`` is read; the rest is what backup ``backup`` holds."""

    backup: str
    checkpoint: str
    edges: tuple[Edge, ...]


Base = Full | Incremental


@dataclass(frozen=True, slots=True)
class StoredPoint:
    """A backup in the repository, as far as choosing a base needs it."""

    backup: str
    manifest: Manifest


def _judge(chain: Chain, point: StoredPoint, entry: DiskEntry) -> Base:
    if entry.checkpoint is None:
        return Full("the last backup has no checkpoint of this disk")
    edges = chain.since(entry.checkpoint)
    if isinstance(edges, Unknown):
        return Full(f"changes since the last backup are not known: {edges.reason}")
    return Incremental(point.backup, entry.checkpoint, edges)


def choose_bases(
    disks: Sequence[Disk], chains: Mapping[str, Chain], points: Iterable[StoredPoint], force_full: bool = False
) -> dict[str, Base]:
    """For each disk (by target), its base: the newest backup whose checkpoint still stands in the disk's chain.

    ``points`` are this domain's backups in this repository, newest first; they are taken one by one and only as
    long as a disk still looks for its base.  A disk whose size differs from its newest backup looks no further: a
    shrink and a later growth change content without marking it dirty (seen on QEMU 7.2).
    """
    if force_full:
        return {disk.target: Full("asked for with --full") for disk in disks}
    found: dict[str, Base] = {disk.target: Full(disk.untracked) for disk in disks if disk.untracked}
    why: dict[str, str] = {}
    looking = {disk.target: disk for disk in disks if not disk.untracked}
    for disk in list(looking.values()):
        if not chains[disk.target].edges:
            broken = chains[disk.target].broken
            why[disk.target] = f"its checkpoints cannot be used: {broken[-1][1]}" if broken else ""
    for point in points if looking else ():
        for target, disk in list(looking.items()):
            entry = point.manifest.disk(target)
            if entry is None:
                continue
            if entry.virtual_size != disk.virtual_size:
                found[target] = Full(f"the disk's size changed from {entry.virtual_size} to {disk.virtual_size} bytes")
                del looking[target]
                continue
            base = _judge(chains[target], point, entry)
            if isinstance(base, Incremental):
                found[target] = base
                del looking[target]
            elif not why.get(target):
                why[target] = base.reason
        if not any(chains[target].edges for target in looking):
            break
    for target in looking:
        found[target] = Full(why.get(target) or "this is the first backup of the disk in this repository")
    return found
