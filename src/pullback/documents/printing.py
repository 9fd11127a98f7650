# SPDX-License-Identifier: Apache-2.0
"""Printing documents: two spaces of indentation, everything said that has a default, a newline at the end.

The same value always gives the same text.  What cannot stand in XML, and control characters, which a name that
another program gave to QEMU may hold, are printed as U+FFFD.
"""

from __future__ import annotations

from lxml import etree

from pullback.documents.checks import printable
from pullback.documents.values import (
    DiskDocument,
    DomainDocument,
    ExportDisk,
    ExportDocument,
    SnapshotDocument,
    UnixAddress,
)


def print_snapshot(document: SnapshotDocument) -> str:
    """The <domainblocksnapshot> of a snapshot; ``parse_snapshot`` takes it back if it has no creation time."""
    return _text(_snapshot(document))


def print_export(document: ExportDocument) -> str:
    """The <domainblockexport> of an export; ``parse_export`` gives ``document`` back."""
    return _text(_export(document))


def print_domain(document: DomainDocument) -> str:
    """The <domain> of all that pullback knows of a domain, with its snapshots and exports in it."""
    root = etree.Element("domain")
    _say(root, "name", document.name)
    if document.uuid:
        _say(root, "uuid", document.uuid)
    for disk in document.disks:
        root.append(_disk(disk))
    root.extend([_snapshot(snapshot) for snapshot in document.snapshots])
    root.extend([_export(export) for export in document.exports])
    return _text(root)


def _snapshot(document: SnapshotDocument) -> etree._Element:
    root = etree.Element("domainblocksnapshot")
    if document.name is not None:
        _say(root, "name", document.name)
    if document.creation_time is not None:
        _say(root, "creationTime", str(document.creation_time))
    if document.checkpoint is not None:
        _say(root, "checkpoint", document.checkpoint)
    for disk in document.disks:
        element = _add(root, "disk", name=disk.name, type="file")
        if disk.scratch is not None:
            _add(element, "fleece", file=disk.scratch)
    return root


def _export(document: ExportDocument) -> etree._Element:
    root = etree.Element("domainblockexport", type="nbd")
    address = document.address
    if isinstance(address, UnixAddress):
        _add(root, "address", type="unix", path=address.path, tls=address.tls)
    elif address.port is None:
        _add(root, "address", type="ip", host=address.host, autoport=True, tls=address.tls)
    else:
        _add(root, "address", type="ip", host=address.host, port=address.port, tls=address.tls)
    for disk in document.disks:
        _export_disk(root, disk)
    return root


def _export_disk(root: etree._Element, disk: ExportDisk) -> None:
    single = disk.checkpoints[0] if len(disk.checkpoints) == 1 else None
    element = _add(
        root,
        "disk",
        name=disk.name,
        exportname=disk.export_name,
        snapshot=disk.snapshot,
        checkpoint=single,
        allcheckpoints=True if disk.all_checkpoints else None,
        readonly=disk.read_only,
    )
    if single is None:
        for checkpoint in disk.checkpoints:
            _add(element, "checkpoint", name=checkpoint)


def _disk(disk: DiskDocument) -> etree._Element:
    element = etree.Element("disk")
    _set(element, name=disk.name, node=disk.node, driver=disk.driver, size=disk.size)
    for point in disk.checkpoints:
        _add(element, "checkpoint", name=point.name, parent=point.parent, size=point.size, recording=point.recording)
    for broken in disk.broken:
        _add(element, "broken", bitmap=broken.bitmap, reason=broken.reason)
    return element


def _add(above: etree._Element, tag: str, /, **attributes: str | int | None) -> etree._Element:
    element = etree.SubElement(above, tag)
    _set(element, **attributes)
    return element


def _set(element: etree._Element, /, **attributes: str | int | None) -> None:
    """Set attributes in this order, leaving out those that are None."""
    for name, value in attributes.items():
        if isinstance(value, bool):
            element.set(name, "yes" if value else "no")
        elif value is not None:
            element.set(name, _clean(str(value)))


def _say(parent: etree._Element, tag: str, text: str) -> None:
    etree.SubElement(parent, tag).text = _clean(text)


def _clean(text: str) -> str:
    return "".join(character if printable(character) else "\ufffd" for character in text)


def _text(root: etree._Element) -> str:
    return etree.tostring(root, encoding="unicode", pretty_print=True)
