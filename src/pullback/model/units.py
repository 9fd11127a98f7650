# SPDX-License-Identifier: Apache-2.0
"""Sizes in bytes, and how they are written for people."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

#: QEMU's sector: sizes and bounds of what it handles are multiples of it.
SECTOR = 512

#: Granularity of the dirty bitmaps pullback creates: one bit per this many bytes.  It is qcow2's default cluster
#: size, below which QEMU's copy-before-write does not go either.
BITMAP_GRANULARITY = 64 * KIB

#: A disk is stored in pieces of this many bytes, each a directory of its own that backups share as a whole.
SEGMENT = 256 * MIB

#: The length of a chunk (one blob of the repository) where the disk is cold, and where it is hot: ``plan.grid``.
CHUNK = 256 * KIB
HOT_CHUNK = 64 * KIB


def align_down(offset: int, alignment: int) -> int:
    """The greatest multiple of ``alignment`` not above ``offset`` (bytes)."""
    return offset - offset % alignment


def align_up(offset: int, alignment: int) -> int:
    """The least multiple of ``alignment`` not below ``offset`` (bytes)."""
    return -(-offset // alignment) * alignment


def human_bytes(count: float) -> str:
    """``count`` bytes in binary units, three significant figures: ``1.50 GiB``."""
    if count < KIB - 0.5:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        count /= KIB
        if count < 999.5 or unit == "PiB":
            break
    digits = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:.{digits}f} {unit}"


def human_seconds(seconds: float) -> str:
    """A duration for people: ``4.2 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
