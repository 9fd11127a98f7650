# SPDX-License-Identifier: Apache-2.0
"""A domain as it is shown to people: disks and their chains, snapshots, exports, what is broken and what that costs."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from pullback.engine.domain import Domain
from pullback.engine.events import Emit, silent
from pullback.engine.exporting import Export, exports_in
from pullback.engine.freezing import Snapshot, snapshots_in
from pullback.engine.storing import stored_points
from pullback.model.chain import read_chain
from pullback.model.facts import ID_PREFIX, Device, Disk, Facts
from pullback.model.snapshots import unfinished_marks
from pullback.plan.base import Base, Full, StoredPoint, choose_bases
from pullback.plan.cleanup import clearable
from pullback.plan.method import version_text
from pullback.plan.selection import left_out_reason
from pullback.repository.repository import Repository

_COST_INCONSISTENT = "the next backup reads the disk whole; pullback recover removes it"
_COST_UNUSABLE = "changes since before it are unknown; backups that need them read the disk whole"
_WHY_BROKEN = "its old data could not be saved (the scratch is full, failing or too slow); delete it"


@dataclass(frozen=True, slots=True)
class EdgeView:
    """A checkpoint, its parent, and the bytes that changed from it to the next point."""

    checkpoint: str
    parent: str | None
    changed: int
    recording: bool


@dataclass(frozen=True, slots=True)
class BrokenView:
    """A bitmap of ours that is of no use, why, and what that costs."""

    bitmap: str
    reason: str
    cost: str


@dataclass(frozen=True, slots=True)
class DiskView:
    """A disk; ``chain`` is oldest first, ``foreign`` are other programs' bitmaps.

    ``unfinished`` are the backups whose restores into it did not end: it is between two states.
    """

    target: str
    node: str
    driver: str
    filename: str
    virtual_size: int
    untracked: str
    chain: tuple[EdgeView, ...]
    broken: tuple[BrokenView, ...]
    foreign: tuple[str, ...]
    unfinished: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SnapshotView:
    """A snapshot; ``broken`` are the disks of it that cannot be read any more, ``why_broken`` is None without any."""

    id: str
    name: str
    time: str
    checkpoint: str | None
    disks: tuple[str, ...]
    consistency: str
    broken: tuple[str, ...]
    why_broken: str | None


@dataclass(frozen=True, slots=True)
class NextDiskView:
    """How the next backup reads a disk: ``checkpoint`` and ``backup`` are what it builds on, None where it is full.

    ``reason`` says why it is full; ``most`` is how many bytes are read, at most.
    """

    target: str
    mode: Literal["full", "incremental"]
    reason: str
    checkpoint: str | None
    backup: str | None
    most: int


@dataclass(frozen=True, slots=True)
class NextBackupView:
    """What the next backup into a repository builds on.

    ``last`` is the newest backup of ``domain`` there, ``gone`` are its disks that the domain has no more.
    """

    domain: str
    last: str | None
    disks: tuple[NextDiskView, ...]
    gone: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DomainView:
    """Everything ``domain show`` shows; ``left_over`` are snapshots that died clients left.

    ``next_backup`` is None where no repository was named.
    """

    name: str
    uuid: str
    qemu: str
    state: str
    disks: tuple[DiskView, ...]
    snapshots: tuple[SnapshotView, ...]
    exports: tuple[Export, ...]
    left_over: tuple[str, ...]
    next_backup: NextBackupView | None = None


def _disk(facts: Facts, device: Device) -> DiskView:
    disk = facts.disk(device)
    chain = read_chain(disk.bitmaps)
    return DiskView(
        target=device.target,
        node=disk.node,
        driver=disk.driver,
        filename=disk.filename,
        virtual_size=disk.virtual_size,
        untracked=disk.untracked,
        chain=tuple(
            EdgeView(edge.checkpoint, edge.parent, edge.bitmap.count, edge.bitmap.recording) for edge in chain.edges
        ),
        broken=tuple(
            BrokenView(bitmap.name, reason, _COST_INCONSISTENT if bitmap.inconsistent else _COST_UNUSABLE)
            for bitmap, reason in chain.broken
        ),
        foreign=tuple(bitmap.name for bitmap in disk.bitmaps if not bitmap.name.startswith(ID_PREFIX)),
        unfinished=tuple(mark.backup for mark in unfinished_marks(disk.bitmaps)),
    )


def _snapshot(snapshot: Snapshot, broken: tuple[str, ...]) -> SnapshotView:
    return SnapshotView(
        id=snapshot.id,
        name=snapshot.name,
        time=snapshot.time.isoformat(),
        checkpoint=snapshot.checkpoint,
        disks=snapshot.targets,
        consistency=snapshot.consistency,
        broken=broken,
        why_broken=_WHY_BROKEN if broken else None,
    )


def next_backup(facts: Facts, name: str, points: Iterable[StoredPoint], wanted: Collection[str] = ()) -> NextBackupView:
    """What the next backup of a domain builds on; ``points`` are its backups, newest first, ``wanted`` the disks.

    QEMU cannot know that a disk was taken out, or had another size: the last backup does.
    """
    following = iter(points)
    last = next(following, None)
    drives = [device for device in facts.devices if not left_out_reason(facts, device)]
    disks = [facts.disk(device) for device in drives if not wanted or device.target in wanted]
    chains = {disk.target: read_chain(disk.bitmaps) for disk in disks}
    bases = choose_bases(disks, chains, itertools.chain([last] if last else (), following))
    there = {device.target for device in facts.devices}
    before = [entry.target for entry in last.manifest.disks] if last else []
    return NextBackupView(
        domain=name,
        last=last.backup if last else None,
        disks=tuple(_next_disk(disk, bases[disk.target]) for disk in disks),
        gone=tuple(target for target in before if target not in there),
    )


def _next_disk(disk: Disk, base: Base) -> NextDiskView:
    if isinstance(base, Full):
        return NextDiskView(disk.target, "full", base.reason, None, None, disk.virtual_size)
    most = min(sum(edge.bitmap.count for edge in base.edges), disk.virtual_size)
    return NextDiskView(disk.target, "incremental", "", base.checkpoint, base.backup, most)


async def look_at(
    domain: Domain,
    open_repository: Callable[[], Repository] | None = None,
    wanted: Collection[str] = (),
    emit: Emit = silent,
) -> DomainView:
    """Everything there is to show of a domain; a little of each snapshot is read to see whether it still can be.

    With a repository also what the next backup of the disks ``wanted`` (all if empty) builds on; it is only read.
    Raises RepositoryError when that cannot be.
    """
    facts = await domain.facts()
    snapshots = [_snapshot(snapshot, await domain.broken_disks(snapshot)) for snapshot in snapshots_in(facts)]
    outlook = None
    if open_repository is not None:
        name = domain.name_of(facts)
        outlook = await asyncio.to_thread(_look_into, open_repository, facts, name, wanted, emit)
    return DomainView(
        name=domain.name_of(facts),
        uuid=facts.uuid,
        qemu=version_text(facts),
        state="stopped" if facts.daemon else facts.run_state,
        disks=tuple(_disk(facts, device) for device in facts.devices if device.root),
        snapshots=tuple(snapshots),
        exports=exports_in(facts),
        left_over=tuple(clearable(facts)),
        next_backup=outlook,
    )


def _look_into(
    open_repository: Callable[[], Repository], facts: Facts, name: str, wanted: Collection[str], emit: Emit
) -> NextBackupView:
    return next_backup(facts, name, stored_points(open_repository(), name, emit), wanted)
