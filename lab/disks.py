# SPDX-License-Identifier: Apache-2.0
"""What a laboratory disk is, and the one table from kinds of disks to QEMU's arguments.

image file ── file-ID ── node-ID ── device ID        (kind "drive": QEMU names nodes and device itself)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """One disk: an existing image ``path`` in ``format``, seen by QEMU as device ``id`` on ``bus``.

    ``bus`` is a key of KINDS.  ``node_options`` and ``device_options`` are added to the format node's and the
    device's own properties and win over what the table says.
    """

    path: Path
    id: str = "vda"
    format: str = "qcow2"
    bus: str = "virtio"
    iothread: bool = False
    read_only: bool = False
    discard: bool = True
    detect_zeroes: str = "off"
    node_options: Mapping[str, object] = field(default_factory=dict)
    device_options: Mapping[str, object] = field(default_factory=dict)

    @property
    def node(self) -> str:
        """The name of the format node, which the device sits on."""
        return f"node-{self.id}"

    @property
    def file_node(self) -> str:
        return f"file-{self.id}"

    @property
    def thread(self) -> str:
        return f"thread-{self.id}"


@dataclass(frozen=True, slots=True)
class Kind:
    """How a bus becomes arguments, and which kernel modules the guest needs for it (None: it has none)."""

    device: Callable[[DiskSpec, int], list[str]]
    modules: tuple[str, ...] | None
    own_node: bool = True
    iothread: bool = False


def _option(name: str, properties: Mapping[str, object]) -> list[str]:
    return [name, json.dumps(properties)]


def _device(driver: str, disk: DiskSpec, **properties: object) -> list[str]:
    whole = {"driver": driver, "id": disk.id, "drive": disk.node, **properties, **disk.device_options}
    return _option("-device", whole)


def _virtio(disk: DiskSpec, _: int) -> list[str]:
    thread = {"iothread": disk.thread} if disk.iothread else {}
    return _device("virtio-blk-pci", disk, discard=disk.discard, **thread)


def _scsi(disk: DiskSpec, _: int) -> list[str]:
    controller: dict[str, object] = {"driver": "virtio-scsi-pci", "id": f"scsi-{disk.id}"}
    if disk.iothread:
        controller["iothread"] = disk.thread
    return _option("-device", controller) + _device("scsi-hd", disk, bus=f"scsi-{disk.id}.0")


def _ide(disk: DiskSpec, number: int) -> list[str]:
    return _device("ide-hd", disk, bus=f"ide.{number}")


def _usb(disk: DiskSpec, _: int) -> list[str]:
    return _option("-device", {"driver": "qemu-xhci", "id": f"usb-{disk.id}"}) + _device(
        "usb-storage", disk, bus=f"usb-{disk.id}.0"
    )


def _nvme(disk: DiskSpec, _: int) -> list[str]:
    return _device("nvme", disk, serial=disk.id)


def _drive(disk: DiskSpec, _: int) -> list[str]:
    path = str(disk.path).replace(",", ",,")
    value = f"file={path},format={disk.format},if=virtio,id={disk.id},detect-zeroes={disk.detect_zeroes}"
    discard = ",discard=unmap" if disk.discard else ""
    return ["-drive", value + discard + (",readonly=on" if disk.read_only else "")]


KINDS: Mapping[str, Kind] = {
    "virtio": Kind(_virtio, ("virtio_pci", "virtio_blk"), iothread=True),
    "scsi": Kind(_scsi, ("virtio_pci", "virtio_scsi", "sd_mod"), iothread=True),
    "ide": Kind(_ide, ("ata_piix", "sd_mod")),
    "usb": Kind(_usb, None),  # the cloud kernel has no usb-storage
    "nvme": Kind(_nvme, ("nvme",)),
    "drive": Kind(_drive, ("virtio_pci", "virtio_blk"), own_node=False),
}


def arguments(disks: Sequence[DiskSpec]) -> list[str]:
    """Turn disks into QEMU arguments; ValueError for a bus, or an I/O thread on a bus, that does not exist."""
    argv: list[str] = []
    taken: dict[str, int] = {}
    for disk in disks:
        if disk.bus not in KINDS:
            raise ValueError(f"no such bus: {disk.bus}; there are {', '.join(KINDS)}")
        kind = KINDS[disk.bus]
        if disk.iothread and not kind.iothread:
            raise ValueError(f"a disk on {disk.bus} cannot have an I/O thread")
        if disk.iothread:
            argv += _option("-object", {"qom-type": "iothread", "id": disk.thread})
        if kind.own_node:
            argv += _option("-blockdev", _blockdev(disk))
        number = taken[disk.bus] = taken.get(disk.bus, -1) + 1
        argv += kind.device(disk, number)
    return argv


def _blockdev(disk: DiskSpec) -> dict[str, object]:
    return {
        "driver": disk.format,
        "node-name": disk.node,
        "read-only": disk.read_only,
        "discard": "unmap" if disk.discard else "ignore",
        "detect-zeroes": disk.detect_zeroes,
        "file": {
            "driver": "file",
            "node-name": disk.file_node,
            "filename": str(disk.path),
            "read-only": disk.read_only,
            "discard": "unmap" if disk.discard else "ignore",
        },
        **disk.node_options,
    }
