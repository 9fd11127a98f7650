# SPDX-License-Identifier: Apache-2.0
"""How disks are frozen: by copy-before-write filters under their devices, or by backup jobs.

filter   every QEMU from 7.1; a full scratch breaks the snapshot, never the domain's write.  Several disks of a
         running domain need a pause of milliseconds.  Needs a device whose drive can be swapped.
job      one transaction over all disks, without a pause.  Before QEMU 10.1 a full scratch makes the domain's own
         write fail, so there it is used only on request, and in a storage daemon, which has no devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pullback.errors import Refused, UsageError
from pullback.model.facts import ON_CBW_ERROR, Disk, Facts
from pullback.model.snapshots import FROZEN_VIEW_EXACT as FROZEN_VIEW_EXACT
from pullback.model.snapshots import filter_stack
from pullback.model.units import KIB

Method = Literal["filter", "job"]

#: QEMU's block layer was reworked in 9.0.  Before it, a client that disconnects from an export of a disk on an I/O
#: thread aborts the process (seen on 7.2.22: ``nbd_blockdev_client_closed``, qemu_in_main_thread), and so does
#: ``snapshot-access`` on a backup job's filter.
IOTHREAD_SAFE = (9, 0, 0)

#: Before ``FROZEN_VIEW_EXACT`` a read of a frozen view must not cross a multiple of this many bytes, and what block
#: status calls zero is zero only if the scratch holds nothing there.
SAVED_UNIT = 64 * KIB

#: ``snapshot-access`` and ``copy-before-write`` with ``on-cbw-error`` came with this version.
OLDEST_QEMU = (7, 1, 0)


def version_text(facts: Facts) -> str:
    return ".".join(map(str, facts.version))


def on_unsafe_iothread(facts: Facts, disk: Disk) -> bool:
    """Whether an export of this disk, or a job's frozen view of it, could end QEMU; unknown counts as yes."""
    return facts.version < IOTHREAD_SAFE and disk.iothread != ""


def _swappable(disk: Disk) -> bool:
    # Without a type its QOM path leads nowhere.
    return bool(disk.qdev and disk.device_type)


def _over_job(facts: Facts, disks: Sequence[Disk]) -> str:
    """The name of a job's snapshot that one of the disks is frozen by; empty when there is none."""
    targets = {disk.target for disk in disks}
    for device in facts.devices:
        if device.target in targets:
            for part in filter_stack(facts, device):
                if part.job is not None:
                    return part.mark.name if part.mark else part.names.snapshot
    return ""


def choose_method(facts: Facts, disks: Sequence[Disk], wanted: Method | None = None) -> Method:
    """The method for these disks together.

    Refused, with the reason and the remedy, where none can be used without risk to the domain; UsageError where
    ``wanted`` is not possible at all.
    """
    if facts.version < OLDEST_QEMU:
        raise Refused(
            f"QEMU {version_text(facts)} of domain {facts.name} is too old: snapshots need 7.1 or newer",
            todo="Upgrade QEMU and restart the domain.",
        )
    if facts.daemon:
        if wanted == "filter":
            raise UsageError("a stopped domain has no devices to put filters under", todo="Leave --method out.")
        return "job"
    method = wanted or ("job" if ON_CBW_ERROR in facts.features else "filter")
    if method == "job":
        _refuse_job_on_iothread(facts, disks)
        return method
    for disk in disks:
        if not _swappable(disk):
            raise Refused(
                f"disk {disk.target} of domain {facts.name} belongs to a device that QEMU can put no filter under",
                means="Nothing was touched.",
                todo="Leave the disk out by naming the others with --disk; or freeze with --method job, knowing that"
                " before QEMU 10.1 a full scratch then makes the domain's own writes fail.",
            )
    # Seen on 7.2.22: a filter keeps its bitmaps in the node below it; that being a job's filter, the job's end aborts.
    if job := _over_job(facts, disks):
        raise Refused(
            f"snapshot {job} of domain {facts.name} was frozen with a job, and QEMU can abort when a filter is put"
            " over it",
            means="Nothing was touched.",
            todo=f"Delete snapshot {job} first, or freeze with --method job.",
        )
    return method


def _refuse_job_on_iothread(facts: Facts, disks: Sequence[Disk]) -> None:
    for disk in disks:
        if on_unsafe_iothread(facts, disk):
            raise Refused(
                f"disk {disk.target} of domain {facts.name} is on an I/O thread, and QEMU {version_text(facts)} can"
                " abort when a job's frozen view of it is opened",
                means="Nothing was touched.",
                todo="Leave --method out, or use QEMU 9.0 or newer.",
            )


def refuse_export(facts: Facts, disks: Sequence[Disk]) -> None:
    """Refused when an NBD export of one of these disks could end the domain's QEMU."""
    for disk in disks:
        if on_unsafe_iothread(facts, disk):
            where = f"runs on I/O thread {disk.iothread}" if disk.iothread else "may run on an I/O thread"
            raise Refused(
                f"disk {disk.target} of domain {facts.name} {where}, and QEMU {version_text(facts)} can abort when an"
                " export of such a disk is closed",
                means="Nothing was exported.",
                todo="Use QEMU 9.0 or newer, or remove the iothread= property of the device (or of its virtio-scsi"
                " controller). pullback backup can back the disk up all the same.",
            )
