# SPDX-License-Identifier: Apache-2.0
"""What the disks held at one instant, told by two witnesses that know nothing of pullback.

    guest's file systems frozen ──────────────┬───────────────────────── thawed: the guest writes on
              │                               │                              ▲
              ├─ the guest hashes its disks   │                              │
              └─ qemu-img copies the images   └─ pullback backup ── "frozen" ┘  and reads only from now on

Why this proves it: from the first witness's first byte to pullback's "frozen" the guest can write nothing, because
its kernel blocks every writer to a frozen file system and no other program has its disks open.  So the disks hold at
pullback's instant what the witnesses saw, byte for byte.  The guest reads through its own block layer and QEMU's
devices, qemu-img reads the image files beside QEMU; they must agree with each other before either is believed.  And
the guest is let go at that instant and overwrites what pullback has not read yet: a backup that lets one such write in
differs from the reference.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from demo import guest
from demo.narration import DemoFailed
from lab import images
from lab.processes import run
from lab.vm import Vm

BLOCK = 64 << 10
"""The unit in which changes are counted: qcow2's cluster, and what a bit of a dirty bitmap stands for."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Both testimonies: raw copies of the disks, the guest's SHA-256 of them, and of every file on them."""

    copies: dict[str, Path]
    disk_sums: dict[str, str]
    file_sums: str


def take_reference(vm: Vm, place: Path) -> Reference:
    """Question both witnesses; the guest's file systems are frozen, and stay so.

    Raises DemoFailed when they do not agree.
    """
    sums = guest.disk_sums(vm)
    place.mkdir()
    copies = {}
    for disk in guest.DISKS:
        copies[disk] = place / f"{disk}.raw"
        run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", vm.disk(disk).path, copies[disk]])
        if sha256(copies[disk]) != sums[disk]:
            raise DemoFailed(f"the witnesses disagree on {disk}: guest and qemu-img do not see the same content")
    return Reference(copies, sums, guest.file_sums(vm))


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_restored(reference: Reference, restored: dict[str, Path]) -> None:
    """Hold restored images against both witnesses; DemoFailed unless all bytes are the same."""
    for disk, image in restored.items():
        if not images.compare(reference.copies[disk], image):
            raise DemoFailed(f"the restored {disk} is not what qemu-img had copied: {_where(reference, disk, image)}")
        if images.raw_sha256(image) != reference.disk_sums[disk]:
            raise DemoFailed(f"the restored {disk} does not have the SHA-256 that the guest had computed")


def _where(reference: Reference, disk: str, image: Path) -> str:
    copy = reference.copies[disk].read_bytes()
    content = images.raw_bytes(image)
    if len(copy) != len(content):
        return f"{len(content)} bytes instead of {len(copy)}"
    first = next(offset for offset in range(0, len(copy), BLOCK) if copy[offset:][:BLOCK] != content[offset:][:BLOCK])
    return f"the first difference is in the {BLOCK >> 10} KiB at offset {first}"


def changed_bytes(before: Reference, after: Reference) -> int:
    """Bytes in the blocks whose content is not the same in both references, all disks together."""
    return sum(_changed(before.copies[disk], after.copies[disk]) for disk in before.copies) * BLOCK


def _changed(before: Path, after: Path) -> int:
    count = 0
    with before.open("rb") as old, after.open("rb") as new:
        while block := old.read(BLOCK):
            count += block != new.read(BLOCK)
    return count
