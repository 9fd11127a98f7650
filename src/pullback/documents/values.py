# SPDX-License-Identifier: Apache-2.0
"""What the XML documents say, as values; sizes in bytes, times in whole seconds since the epoch.

A value made here is not checked: ``reading`` checks what comes from outside, and pullback means what it makes itself.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SnapshotDisk:
    """A disk to freeze; ``scratch`` is the absolute path where old data goes, None where the caller chooses it."""

    name: str
    scratch: str | None = None


@dataclass(frozen=True, slots=True)
class SnapshotDocument:
    """A ``<domainblocksnapshot>``: disks frozen at one instant.

    ``name`` is None where the caller chooses it; ``checkpoint`` is the one made at that instant, None for none.
    ``creation_time`` stands only in what is printed.
    """

    disks: tuple[SnapshotDisk, ...]
    name: str | None = None
    checkpoint: str | None = None
    creation_time: int | None = None


@dataclass(frozen=True, slots=True)
class IpAddress:
    """A TCP port to listen on; ``host`` is a name or an address without brackets, ``port`` None a free one."""

    host: str
    port: int | None = None
    tls: bool = False


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix socket to listen on, at an absolute path."""

    path: str
    tls: bool = False


@dataclass(frozen=True, slots=True)
class ExportDisk:
    """A disk to export under ``export_name``: as frozen in ``snapshot``, or the disk itself where that is None.

    ``checkpoints`` are those since which changes can be asked; ``all_checkpoints`` stands for all there are, and then
    ``checkpoints`` is empty.
    """

    name: str
    export_name: str
    snapshot: str | None = None
    checkpoints: tuple[str, ...] = ()
    all_checkpoints: bool = False
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class ExportDocument:
    """A ``<domainblockexport>``: disks exported over NBD at one address."""

    address: IpAddress | UnixAddress
    disks: tuple[ExportDisk, ...]


@dataclass(frozen=True, slots=True)
class CheckpointDocument:
    """A checkpoint of one disk; ``size`` is how many bytes its own bitmap holds as changed."""

    name: str
    parent: str | None
    size: int
    recording: bool


@dataclass(frozen=True, slots=True)
class BrokenBitmap:
    """A bitmap of pullback's that is of no use, and why."""

    bitmap: str
    reason: str


@dataclass(frozen=True, slots=True)
class DiskDocument:
    """A disk of a domain; ``size`` is its virtual size, ``checkpoints`` are oldest first."""

    name: str
    node: str
    driver: str
    size: int
    checkpoints: tuple[CheckpointDocument, ...] = ()
    broken: tuple[BrokenBitmap, ...] = ()


@dataclass(frozen=True, slots=True)
class DomainDocument:
    """A ``<domain>``: what pullback knows of it; ``uuid`` is empty where the domain has none."""

    name: str
    uuid: str
    disks: tuple[DiskDocument, ...]
    snapshots: tuple[SnapshotDocument, ...] = ()
    exports: tuple[ExportDocument, ...] = ()
