# SPDX-License-Identifier: Apache-2.0
"""Reading the documents that others write: <domainblocksnapshot> and <domainblockexport>."""

from __future__ import annotations

from posixpath import normpath

from pullback.documents import checks
from pullback.documents.element import Element, load
from pullback.documents.values import (
    ExportDisk,
    ExportDocument,
    IpAddress,
    SnapshotDisk,
    SnapshotDocument,
    UnixAddress,
)


def parse_snapshot(data: bytes) -> SnapshotDocument:
    """Read a <domainblocksnapshot>; UsageError names the element and the line of what is wrong with it."""
    root = load(data, "domainblocksnapshot")
    root.only(once=("name", "checkpoint", "creationTime"), many=("disk",))
    if (time := root.child("creationTime")) is not None:
        raise time.error("only pullback writes it, to say when a snapshot was made", "Take the element out.")
    name, checkpoint = root.child("name"), root.child("checkpoint")
    return SnapshotDocument(
        disks=_snapshot_disks(root),
        name=None if name is None else name.text(checks.snapshot_name),
        checkpoint=None if checkpoint is None else checkpoint.text(checks.checkpoint_name),
    )


def _snapshot_disks(root: Element) -> tuple[SnapshotDisk, ...]:
    disks: dict[str, SnapshotDisk] = {}
    scratches: dict[str, str] = {}
    for element in _disk_elements(root):
        disk = _snapshot_disk(element)
        if disk.name in disks:
            raise element.error(f"disk {checks.quoted(disk.name)} stands in the document already")
        disks[disk.name] = disk
        if disk.scratch is not None:
            # Two disks writing to one file would spoil each other's old data.
            other = scratches.setdefault(normpath(disk.scratch.lstrip("/")), disk.name)
            if other != disk.name:
                raise element.error(f"its fleece is the same file as that of disk {checks.quoted(other)}")
    return tuple(disks.values())


def _snapshot_disk(element: Element) -> SnapshotDisk:
    element.only(attributes=("name", "type"), once=("fleece",))
    element.optional("type", checks.one_of("file"), "file")
    scratch = None
    if (fleece := element.child("fleece")) is not None:
        fleece.only(attributes=("file",))
        scratch = fleece.required("file", checks.file_path)
    return SnapshotDisk(element.required("name", checks.disk_name), scratch)


def parse_export(data: bytes) -> ExportDocument:
    """Read a <domainblockexport>; UsageError names the element and the line of what is wrong with it."""
    root = load(data, "domainblockexport")
    root.only(attributes=("type",), once=("address",), many=("disk",))
    root.required("type", checks.one_of("nbd"))
    address = root.child("address")
    if address is None:
        raise root.error("it has no <address>", "Say where the NBD server is to listen.")
    return ExportDocument(_address(address), _export_disks(root))


def _address(element: Element) -> IpAddress | UnixAddress:
    if element.required("type", checks.one_of("ip", "unix")) == "unix":
        element.only(attributes=("type", "path", "tls"))
        return UnixAddress(element.required("path", checks.socket_path), _choice(element, "tls"))
    element.only(attributes=("type", "host", "port", "autoport", "tls"))
    port = element.optional("port", checks.port, None)
    if _choice(element, "autoport") is (port is not None):
        problem = "port and autoport exclude each other" if port is not None else "there is neither a port nor autoport"
        raise element.error(problem, 'Write port="…" for a certain port, autoport="yes" for a free one.')
    return IpAddress(element.required("host", checks.host), port, _choice(element, "tls"))


def _export_disks(root: Element) -> tuple[ExportDisk, ...]:
    disks: dict[str, ExportDisk] = {}
    for element in _disk_elements(root):
        disk = _export_disk(element)
        if disk.export_name in disks:
            raise element.error(
                f"an export {checks.quoted(disk.export_name)} stands in the document already",
                "Give each disk an exportname of its own.",
            )
        disks[disk.export_name] = disk
    return tuple(disks.values())


def _export_disk(element: Element) -> ExportDisk:
    element.only(
        attributes=("name", "exportname", "snapshot", "checkpoint", "allcheckpoints", "readonly"), many=("checkpoint",)
    )
    name = element.required("name", checks.disk_name)
    snapshot = element.optional("snapshot", checks.snapshot_name, None)
    checkpoints = _checkpoints(element)
    everything = _choice(element, "allcheckpoints")
    if checkpoints and everything:
        raise element.error("checkpoints and allcheckpoints exclude each other")
    if snapshot is None and (checkpoints or everything):
        raise element.error(
            "changes since a checkpoint are those up to a snapshot, and it names none", 'Add snapshot="…".'
        )
    return ExportDisk(
        name=name,
        export_name=element.optional("exportname", checks.export_name, name),
        snapshot=snapshot,
        checkpoints=checkpoints,
        all_checkpoints=everything,
        read_only=_choice(element, "readonly", default=True),
    )


def _checkpoints(element: Element) -> tuple[str, ...]:
    """The one in the attribute, or those in elements of their own."""
    children = element.children("checkpoint")
    if element.has("checkpoint"):
        if children:
            raise children[0].error("the <disk> has an attribute checkpoint already", "Write all of them as elements.")
        return (element.required("checkpoint", checks.checkpoint_name),)
    names: dict[str, None] = {}
    for child in children:
        child.only(attributes=("name",))
        name = child.required("name", checks.checkpoint_name)
        if name in names:
            raise child.error(f"checkpoint {checks.quoted(name)} stands in this <disk> already")
        names[name] = None
    return tuple(names)


def _disk_elements(root: Element) -> list[Element]:
    disks = root.children("disk")
    if not disks:
        raise root.error("it names no disk", 'Add a <disk name="…"/> for each disk.')
    return disks


def _choice(element: Element, name: str, *, default: bool = False) -> bool:
    return element.optional(name, checks.yes_or_no, default)
