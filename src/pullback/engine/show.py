# SPDX-License-Identifier: Apache-2.0
"""A domain as it is shown to people: disks and their chains, snapshots, exports, what is broken and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

from pullback.engine.domain import Domain
from pullback.engine.exporting import Export, exports_in
from pullback.engine.freezing import snapshots_in
from pullback.model.chain import read_chain
from pullback.model.facts import ID_PREFIX, Device, Facts
from pullback.plan.cleanup import clearable
from pullback.plan.method import version_text

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
    """A disk; ``chain`` is oldest first, ``foreign`` are other programs' bitmaps."""

    target: str
    node: str
    driver: str
    filename: str
    virtual_size: int
    untracked: str
    chain: tuple[EdgeView, ...]
    broken: tuple[BrokenView, ...]
    foreign: tuple[str, ...]


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
class DomainView:
    """Everything ``domain show`` shows; ``left_over`` are snapshots that died clients left."""

    name: str
    uuid: str
    qemu: str
    state: str
    disks: tuple[DiskView, ...]
    snapshots: tuple[SnapshotView, ...]
    exports: tuple[Export, ...]
    left_over: tuple[str, ...]


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
    )


async def look_at(domain: Domain) -> DomainView:
    """Everything there is to show of a domain; a little of each snapshot is read to see whether it still can be."""
    facts = await domain.facts()
    snapshots = []
    for snapshot in snapshots_in(facts):
        broken = await domain.broken_disks(snapshot)
        snapshots.append(
            SnapshotView(
                snapshot.id,
                snapshot.name,
                snapshot.time.isoformat(),
                snapshot.checkpoint,
                snapshot.targets,
                snapshot.consistency,
                broken,
                _WHY_BROKEN if broken else None,
            )
        )
    return DomainView(
        name=domain.name_of(facts),
        uuid=facts.uuid,
        qemu=version_text(facts),
        state="stopped" if facts.daemon else facts.run_state,
        disks=tuple(_disk(facts, device) for device in facts.devices if device.root),
        snapshots=tuple(snapshots),
        exports=exports_in(facts),
        left_over=tuple(clearable(facts)),
    )
