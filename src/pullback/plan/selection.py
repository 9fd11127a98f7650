# SPDX-License-Identifier: Apache-2.0
"""Which disks of a domain are meant, and which are left out and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pullback.errors import UsageError
from pullback.model.facts import Device, Disk, Facts


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
