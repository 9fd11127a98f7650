# SPDX-License-Identifier: Apache-2.0
"""Which disks of a domain are backed up, which are left out and why, and what must not be touched at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pullback.errors import Refused, UsageError
from pullback.model.facts import Device, Disk, Facts

#: QEMU's NBD server was reworked in 9.0; before it, a client that disconnects from an export of a disk on an I/O
#: thread aborts the process (seen on 7.2.22: ``nbd_blockdev_client_closed``, qemu_in_main_thread).
IOTHREAD_EXPORT_SAFE = (9, 0, 0)

#: ``snapshot-access`` and ``copy-before-write`` with ``on-cbw-error`` came with this version.
OLDEST_QEMU = (7, 1, 0)


@dataclass(frozen=True, slots=True)
class Selection:
    """Disks to back up, and ``(target, reason)`` of the drives that are not."""

    disks: tuple[Disk, ...]
    skipped: tuple[tuple[str, str], ...]


def left_out_reason(facts: Facts, device: Device) -> str:
    """Why a drive is not backed up although nobody said so; empty when it is."""
    if not device.root:
        return "the drive is empty"
    if device.type == "cfi.pflash01":
        return "firmware flash is not a disk"
    if facts.below_filters(device.root).read_only:
        return "the drive is read-only"
    return ""


def select_disks(facts: Facts, wanted: Sequence[str] = ()) -> Selection:
    """The disks to back up: all writable ones, or those in ``wanted``.

    UsageError when ``wanted`` names none or an unusable one, or when nothing is left.
    """
    targets = {device.target: device for device in facts.devices}
    for target in wanted:
        if target not in targets:
            raise UsageError(
                f"domain {facts.name} has no disk {target}", todo=f"It has {', '.join(targets) or 'none'}."
            )
        if reason := left_out_reason(facts, targets[target]):
            raise UsageError(f"disk {target} of domain {facts.name} cannot be backed up: {reason}")
    disks, skipped = [], []
    for target, device in targets.items():
        if wanted and target not in wanted:
            continue
        if reason := left_out_reason(facts, device):
            skipped.append((target, reason))
        else:
            disks.append(facts.disk(device))
    if not disks:
        raise UsageError(
            f"domain {facts.name} has no disk to back up",
            means="; ".join(f"{target}: {reason}" for target, reason in skipped) + "." if skipped else "",
        )
    return Selection(tuple(disks), tuple(skipped))


def refuse_unsafe(facts: Facts, disks: Sequence[Disk]) -> None:
    """Refused when exporting one of these disks could end the domain's QEMU, or cannot work on it."""
    version = ".".join(map(str, facts.version))
    if facts.version < OLDEST_QEMU:
        raise Refused(
            f"QEMU {version} of domain {facts.name} is too old: snapshots need 7.1 or newer",
            todo="Upgrade QEMU and restart the domain.",
        )
    for disk in disks:
        if facts.version < IOTHREAD_EXPORT_SAFE and disk.iothread != "":
            where = f"runs on I/O thread {disk.iothread}" if disk.iothread else "may run on an I/O thread"
            raise Refused(
                f"disk {disk.target} of domain {facts.name} {where}, and QEMU {version} can abort when an export"
                " of such a disk is closed",
                means="Nothing was touched, no backup was made.",
                todo="Use QEMU 9.0 or newer, remove the iothread= property of the device (or of its virtio-scsi"
                " controller), or leave the disk out by naming the others with --disk.",
            )
        if not disk.qdev or not disk.device_type:  # without a type its QOM path leads nowhere
            raise Refused(
                f"disk {disk.target} of domain {facts.name} belongs to no device that QEMU can put a filter under",
                means="Nothing was touched, no backup was made.",
                todo="Leave the disk out by naming the others with --disk.",
            )
