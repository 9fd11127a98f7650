# SPDX-License-Identifier: Apache-2.0
"""From the XML documents of the pull backup API to requests, and from a domain to its document."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pullback.documents import values as documents
from pullback.documents.printing import print_domain
from pullback.documents.reading import parse_export, parse_snapshot
from pullback.documents.values import (
    BrokenBitmap,
    CheckpointDocument,
    DiskDocument,
    DomainDocument,
    ExportDisk,
    ExportDocument,
    IpAddress,
    SnapshotDisk,
    SnapshotDocument,
)
from pullback.engine.exporting import ExportRequest
from pullback.engine.freezing import SnapshotRequest
from pullback.errors import UsageError
from pullback.nbd.address import Address, TcpAddress, UnixAddress, parse_uri

if TYPE_CHECKING:
    from pullback.engine.freezing import Freeze
    from pullback.engine.show import DomainView
    from pullback.plan.method import Method

#: No document of ours is larger; the parser refuses such too, but need not see it.
_LARGEST = 1 << 20


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def snapshot_request(path: Path, freeze: Freeze, scratch: str | None, method: Method | None) -> SnapshotRequest:
    """What a ``domainblocksnapshot`` document asks for."""
    document = parse_snapshot(_read(path))
    return SnapshotRequest(
        name=document.name or "",
        disks=tuple(disk.name for disk in document.disks),
        checkpoint=document.checkpoint,
        freeze=freeze,
        scratch=scratch,
        scratch_files={disk.name: disk.scratch for disk in document.disks if disk.scratch},
        method=method,
    )


def export_request(path: Path, tls: str | None, insecure: bool) -> tuple[str | None, ExportRequest]:
    """What a ``domainblockexport`` document asks for: its one snapshot (None: the domain's own disks), and the request.

    UsageError when its disks name several snapshots: each snapshot is exported by itself.
    """
    document = parse_export(_read(path))
    snapshots = {disk.snapshot for disk in document.disks}
    if len(snapshots) != 1:
        raise UsageError(f"{path} exports disks of {len(snapshots)} snapshots", todo="Write a document for each.")
    if document.address.tls and tls is None:
        raise UsageError(f"{path} wants TLS", todo="Name the directory of certificates with --tls.")
    if tls is not None and not document.address.tls:
        raise UsageError(f"{path} says nothing of TLS", todo="Write tls='yes' at its address, or leave --tls out.")
    address: Address
    if isinstance(document.address, IpAddress):
        address = TcpAddress(document.address.host, document.address.port or 0)
    else:
        address = UnixAddress(document.address.path)
    snapshot = snapshots.pop()
    request = ExportRequest(
        address,
        tuple(disk.name for disk in document.disks),
        {disk.name: "all" if disk.all_checkpoints else disk.checkpoints for disk in document.disks},
        {disk.name: disk.export_name for disk in document.disks},
        tls=tls if document.address.tls else None,
        insecure=insecure,
        writable=not all(disk.read_only for disk in document.disks),
    )
    return snapshot, request


def domain_xml(view: DomainView) -> str:
    """A domain's disks with their checkpoints, its snapshots and exports, as ``domain show --xml`` prints them."""
    disks = tuple(
        DiskDocument(
            disk.target,
            disk.node,
            disk.driver,
            disk.virtual_size,
            tuple(
                CheckpointDocument(edge.checkpoint, edge.parent, edge.changed, edge.recording) for edge in disk.chain
            ),
            tuple(BrokenBitmap(broken.bitmap, broken.reason) for broken in disk.broken),
        )
        for disk in view.disks
    )
    snapshots = tuple(
        SnapshotDocument(
            tuple(SnapshotDisk(target) for target in snapshot.disks),
            snapshot.name,
            snapshot.checkpoint,
            int(datetime.fromisoformat(snapshot.time).timestamp()),
        )
        for snapshot in view.snapshots
    )
    return print_domain(DomainDocument(view.name, view.uuid, disks, snapshots, _export_documents(view)))


def _export_documents(view: DomainView) -> tuple[ExportDocument, ...]:
    """The exports, a document for each place where a server of ours listens."""
    names = {snapshot.id: snapshot.name for snapshot in view.snapshots}
    places: dict[IpAddress | documents.UnixAddress, list[ExportDisk]] = {}
    for export in view.exports:
        if not export.uri:
            continue
        found = parse_uri(export.uri)
        place: IpAddress | documents.UnixAddress
        if isinstance(found.address, TcpAddress):
            place = IpAddress(found.address.host, found.address.port, found.tls)
        else:
            place = documents.UnixAddress(found.address.path, found.tls)
        snapshot = names.get(export.snapshot or "", export.snapshot)
        disk = ExportDisk(export.disk, export.name, snapshot, export.checkpoints, read_only=export.snapshot is not None)
        places.setdefault(place, []).append(disk)
    return tuple(ExportDocument(place, tuple(disks)) for place, disks in places.items())
