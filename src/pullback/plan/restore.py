# SPDX-License-Identifier: Apache-2.0
"""In which order a restore reads a repository and where each blob goes.

Blobs are fetched in the order they lie in their packs, so that each pack is read once and in one sweep; a window of
some segments at a time bounds the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

from pullback.errors import UsageError
from pullback.model.manifest import DiskEntry, Manifest

#: Segments planned at a time: 2 GiB of disk, some 8,000 chunks.
WINDOW = 8

Blob = TypeVar("Blob", bound=bytes)
Pack = TypeVar("Pack", bound=bytes)


class Place(NamedTuple):
    """Where a blob belongs: byte ``offset`` of disk ``target``."""

    target: str
    offset: int


@dataclass(frozen=True, slots=True)
class PackRead(Generic[Pack, Blob]):
    """What one pack holds for this restore: its blobs, each with every place it goes to."""

    pack: Pack
    places: dict[Blob, list[Place]]


def windows(segments: Iterable[tuple[Place, Sequence[tuple[Blob, int]]]]) -> Iterator[list[tuple[Blob, Place, int]]]:
    """Blobs with place and length, ``WINDOW`` segments at a time; a segment is its place and its content."""
    position = iter(segments)
    while window := list(islice(position, WINDOW)):
        blobs = []
        for start, content in window:
            offset = start.offset
            for blob, length in content:
                blobs.append((blob, Place(start.target, offset), length))
                offset += length
        yield blobs


def pack_reads(
    window: Iterable[tuple[Blob, Place, int]], pack_of: Callable[[Blob], Pack], is_zero: Callable[[Blob, int], bool]
) -> list[PackRead[Pack, Blob]]:
    """The reads of one window, without blobs that are all zero: a new image is zero where nothing is written."""
    packs: dict[Pack, dict[Blob, list[Place]]] = {}
    known: dict[Blob, list[Place]] = {}
    for blob, place, length in window:
        if blob not in known:
            if is_zero(blob, length):
                continue
            known[blob] = packs.setdefault(pack_of(blob), {}).setdefault(blob, [])
        known[blob].append(place)
    return [PackRead(pack, places) for pack, places in packs.items()]


def choose_disks(manifest: Manifest, wanted: Sequence[str]) -> tuple[DiskEntry, ...]:
    """The disks of a backup to restore: all, or those in ``wanted``; UsageError for one it does not hold."""
    for target in wanted:
        if manifest.disk(target) is None:
            there = ", ".join(disk.target for disk in manifest.disks)
            raise UsageError(f"this backup of {manifest.domain} has no disk {target}", todo=f"It has {there}.")
    return tuple(disk for disk in manifest.disks if not wanted or disk.target in wanted)
