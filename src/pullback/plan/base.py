# SPDX-License-Identifier: Apache-2.0
"""On which backup an incremental one builds: decided anew each time, from the repository and the chains alone.

There is no other record of "the last backup".  A backup names its checkpoint; it is a base for a disk if that
checkpoint still stands in the disk's chain.  So a client that died, a lost state directory or a second repository with
its own schedule cannot make a wrong incremental.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pullback.model.chain import Chain, Edge, Unknown
from pullback.model.facts import Disk
from pullback.model.manifest import DiskEntry, Manifest
from pullback.model.units import SEGMENT


@dataclass(frozen=True, slots=True)
class Full:
    """The disk is read whole, and why; cut into chunks as in backup ``like``, where there is one."""

    reason: str
    like: str | None = None


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
    if point.manifest.segment_size != SEGMENT:
        return Full(f"the last backup is laid out in segments of {point.manifest.segment_size} bytes")
    edges = chain.since(entry.checkpoint)
    if isinstance(edges, Unknown):
        return Full(f"changes since the last backup are not known: {edges.reason}")
    return Incremental(point.backup, entry.checkpoint, edges)


def choose_bases(
    disks: Sequence[Disk], chains: Mapping[str, Chain], points: Iterable[StoredPoint], force_full: bool = False
) -> dict[str, Base]:
    """For each disk (by target), its base: the newest backup whose checkpoint still stands in the disk's chain.

    ``points`` are this domain's backups in this repository, newest first; after the first they are taken one by one and
    only as long as a disk still looks for its base.  A disk whose size differs from its newest backup looks no further:
    a shrink and a later growth change content without marking it dirty (seen on QEMU 7.2).
    """
    found: dict[str, Base] = {disk.target: Full(disk.untracked) for disk in disks if disk.untracked}
    if force_full:
        found = {disk.target: Full("asked for with --full") for disk in disks}
    search = _Search(chains, found, {disk.target: disk for disk in disks if disk.target not in found})
    likes: dict[str, str] = {}
    for point in points:
        for disk in disks:
            if point.manifest.disk(disk.target) is not None:
                likes.setdefault(disk.target, point.backup)
        search.look_at(point)
        if not any(chains[target].edges for target in search.looking):
            break
    return {
        target: replace(base, like=likes.get(target)) if isinstance(base, Full) else base
        for target, base in search.end().items()
    }


class _Search:
    """Disks that look for their bases, backup by backup; ``found`` by target, and ``why`` not yet."""

    def __init__(self, chains: Mapping[str, Chain], found: dict[str, Base], looking: dict[str, Disk]) -> None:
        self._chains = chains
        self._found = found
        self.looking = looking
        self._why: dict[str, str] = {}
        for target in looking:
            if not chains[target].edges:
                broken = chains[target].broken
                self._why[target] = f"its checkpoints cannot be used: {broken[-1][1]}" if broken else ""

    def look_at(self, point: StoredPoint) -> None:
        """Judge the next older backup."""
        for target, disk in list(self.looking.items()):
            entry = point.manifest.disk(target)
            if entry is None:
                continue
            if entry.virtual_size != disk.virtual_size:
                reason = f"the disk's size changed from {entry.virtual_size} to {disk.virtual_size} bytes"
                self._found[target] = Full(reason)
                del self.looking[target]
                continue
            base = _judge(self._chains[target], point, entry)
            if isinstance(base, Incremental):
                self._found[target] = base
                del self.looking[target]
            elif not self._why.get(target):
                self._why[target] = base.reason

    def end(self) -> dict[str, Base]:
        """All answers: what still looks for its base has none."""
        for target in self.looking:
            reason = self._why.get(target) or "this is the first backup of the disk in this repository"
            self._found[target] = Full(reason)
        return self._found
