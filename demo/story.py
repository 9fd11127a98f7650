# SPDX-License-Identifier: Apache-2.0
"""The steps: two disks, a full and an incremental backup of a VM that never stops, a disaster, and the way back."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

from demo import guest
from demo.commands import Backup, Commands
from demo.narration import DemoFailed, Narrator
from demo.reference import Reference, changed_bytes, check_restored, take_reference
from lab import images
from lab.disks import DiskSpec
from lab.vm import Vm, accelerator
from pullback.model.units import MIB, human_bytes, human_seconds

NAME = "demo"
FIRE = 1 * MIB
"""Bytes that the guest overwrites on each disk after the freeze, before pullback may read."""


class Story:
    """All that happens, in order; everything that has to be undone is left with ``stack``."""

    def __init__(self, place: Path, narrator: Narrator, stack: ExitStack) -> None:
        self._place = place
        self._narrator = narrator
        self._stack = stack
        self._commands = Commands(place, narrator)
        self._points: list[tuple[Backup, Reference]] = []

    def tell(self) -> None:
        """Run all steps; DemoFailed or LabError at the first thing that is not as it has to be."""
        step = self._narrator.step
        with step(f"A Linux boots, with two ext4 disks ({accelerator()})"):
            vm = self._boot(self._place / "disks", make=True)
        with step("It writes files on both disks; from now on it overwrites parts of them without end"):
            guest.fill(vm)
            guest.start_writer(vm)
        with step("A new repository"):
            self._commands.show("pullback", "init")
        with step("A full backup, while the guest writes"):
            self._back_up(vm, "full")
        with step("The guest overwrites, appends, adds, deletes, fills with zeroes and trims"):
            self._narrator.say(guest.change(vm))
        with step("An incremental backup, while the guest writes"):
            self._back_up(vm, "incremental")
            self._check_incremental()
        with step("The disaster: the guest deletes all files, QEMU is killed, the images are lost"):
            guest.wreck(vm)
            vm.kill()
            shutil.rmtree(self._place / "disks")
        with step("Both points are restored, and held against what the disks held"):
            self._commands.show("pullback", "list")
            for backup, reference in self._points:
                self._restore(backup, reference)
        with step("The restored VM boots, and has its files"):
            self._boot_restored()
        with step("restic finds the repository in order"):
            self._commands.show("restic", "check", "--read-data", "--no-cache")
        self._sum_up()

    def _boot(self, place: Path, *, make: bool = False) -> Vm:
        if make:
            place.mkdir()
            for disk, size in guest.DISKS.items():
                images.make_ext4(place / f"{disk}.qcow2", size)
        disks = [DiskSpec(place / f"{disk}.qcow2", id=disk) for disk in guest.DISKS]
        vm = self._stack.enter_context(Vm(disks, name=NAME))
        guest.mount(vm)
        return vm

    def _back_up(self, vm: Vm, mode: str) -> None:
        guest.freeze(vm)
        reference = take_reference(vm, self._place / f"reference-{mode}")
        self._narrator.say("the guest's file systems are frozen; the guest and qemu-img agree on what the disks hold")
        before = guest.written(vm)

        def fire() -> None:
            guest.thaw(vm)
            guest.wait_until_written(vm, before, FIRE)

        backup = self._commands.backup(vm.qmp_path, fire)
        after = guest.written(vm)
        under_fire = sum(after[disk] - before[disk] for disk in guest.DISKS)
        self._narrator.say(
            f"{backup.mode} backup {backup.id[:8]}: read {human_bytes(backup.bytes_read)}, stored"
            f" {human_bytes(backup.bytes_stored)} in {human_seconds(backup.seconds)}; the VM stood still for"
            f" {backup.paused_ms:.1f} ms"
        )
        self._narrator.say(f"from the freeze to its end the guest wrote {human_bytes(under_fire)}: not in this backup")
        if backup.mode != mode:
            raise DemoFailed(f"the backup is {backup.mode}, and had to be {mode}")
        self._points.append((backup, reference))

    def _check_incremental(self) -> None:
        (full, before), (incremental, after) = self._points
        changed = changed_bytes(before, after)
        self._narrator.say(
            f"changed between the two instants: {human_bytes(changed)}; read: {human_bytes(incremental.bytes_read)}"
            f" (the full backup: {human_bytes(full.bytes_read)})"
        )
        if not changed:
            raise DemoFailed("the guest changed nothing between the two backups, so they prove nothing")
        if incremental.bytes_read * 3 > full.bytes_read:
            raise DemoFailed("the incremental backup read more than a third of what the full one read")

    def _restore(self, backup: Backup, reference: Reference) -> None:
        self._commands.show("pullback", "restore", backup.id[:8], "--to", f"restored-{backup.mode}")
        restored = {disk: self._restored(backup) / f"{disk}.qcow2" for disk in guest.DISKS}
        check_restored(reference, restored)
        self._narrator.say("equal, byte for byte: to qemu-img's copies, and to the guest's own SHA-256 of its disks")

    def _restored(self, backup: Backup) -> Path:
        return self._place / f"restored-{backup.mode}"

    def _boot_restored(self) -> None:
        backup, reference = self._points[-1]
        vm = self._boot(self._restored(backup))
        self._narrator.command("ls -l /mnt/vda /mnt/vdb", guest.listing(vm))
        sums = guest.file_sums(vm)
        if sums != reference.file_sums:
            raise DemoFailed("the files of the restored VM are not those that the guest had when it was backed up")
        self._narrator.say(f"all {len(sums.splitlines())} files have the SHA-256 they had at the second instant")

    def _sum_up(self) -> None:
        self._narrator.table(
            ("point", "mode", "read", "stored", "seconds"),
            [
                (
                    backup.id[:8],
                    backup.mode,
                    human_bytes(backup.bytes_read),
                    human_bytes(backup.bytes_stored),
                    f"{backup.seconds:.1f}",
                )
                for backup, _ in self._points
            ],
        )
        self._narrator.end()
