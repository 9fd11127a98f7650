# SPDX-License-Identifier: Apache-2.0
"""In which order a restore reads a repository, where each blob goes, and how much room the images take.

Blobs are fetched in the order they lie in their packs, so that each pack is read once and in one sweep; a window of
some segments at a time bounds the memory.  Windows take the segments of all disks in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

from pullback.errors import UsageError
from pullback.model.extents import Span, merged
from pullback.model.manifest import DiskEntry, Manifest
from pullback.model.units import KIB, MIB, align_down, align_up

#: Segments planned at a time: 2 GiB of disk, some 8,000 chunks.
WINDOW = 8

#: qemu-img's default cluster size; a table of one cluster maps so many bytes of the disk.
_CLUSTER = 64 * KIB
_TABLE_MAPS = 512 * MIB
#: Clusters that one of reference counts, two bytes each, is for beside itself.
_COUNTED = _CLUSTER // 2 - 1
#: The block size of most file systems, for raw images.
_BLOCK = 4 * KIB

Blob = TypeVar("Blob", bound=bytes)
Pack = TypeVar("Pack", bound=bytes)
T = TypeVar("T")


class Place(NamedTuple):
    """Where a blob belongs: ``length`` bytes at ``offset`` of disk ``target``."""

    target: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Segment(Generic[Blob]):
    """A segment that begins at ``offset`` of disk ``target``: its blobs in order, each with its length."""

    target: str
    offset: int
    content: Sequence[tuple[Blob, int]]

    def places(self) -> Iterator[tuple[Blob, Place]]:
        """Every blob with its place."""
        offset = self.offset
        for blob, length in self.content:
            yield blob, Place(self.target, offset, length)
            offset += length


@dataclass(frozen=True, slots=True)
class PackRead(Generic[Pack, Blob]):
    """What one pack holds for this restore: its blobs, each with every place it goes to."""

    pack: Pack
    places: dict[Blob, list[Place]]


def in_turn(sequences: Sequence[Iterable[T]]) -> Iterator[T]:
    """One of each, then the next of each: all disks grow side by side."""
    left = [iter(sequence) for sequence in sequences]
    while left:
        still = []
        for one in left:
            for item in islice(one, 1):
                yield item
                still.append(one)
        left = still


def windows(segments: Iterable[Segment[Blob]]) -> Iterator[list[tuple[Blob, Place]]]:
    """Blobs with their places, ``WINDOW`` segments at a time."""
    position = iter(segments)
    while window := list(islice(position, WINDOW)):
        yield [one for segment in window for one in segment.places()]


def pack_reads(window: Iterable[tuple[Blob, Place]], pack_of: Callable[[Blob], Pack]) -> list[PackRead[Pack, Blob]]:
    """The reads that bring these blobs to their places, each blob read once."""
    packs: dict[Pack, dict[Blob, list[Place]]] = {}
    known: dict[Blob, list[Place]] = {}
    for blob, place in window:
        if blob not in known:
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


def image_room(data: Iterable[tuple[int, int]], size: int, image_format: str) -> int:
    """Bytes on the file system, a little more rather than less, of an image of ``size`` bytes with these sorted spans.

    For qcow2 its own tables count: what maps the data, and two bytes of reference count for each cluster.
    """
    grain = _CLUSTER if image_format == "qcow2" else _BLOCK
    spans = merged(
        (align_down(offset, grain), align_up(offset + length, grain) - align_down(offset, grain))
        for offset, length in data
        if length
    )
    # The file system keeps a block of its own for some hundred extents of a file, from the fifth on.
    room = sum(span.length for span in spans) + -(-len(spans) // 64) * _BLOCK
    if image_format != "qcow2":
        return room
    mapping = merged(_tables(span) for span in spans)
    tables = sum(span.length for span in mapping) + -(-size // _TABLE_MAPS) * 8 // _CLUSTER + 4
    blocks = -(-(room // _CLUSTER + tables) // _COUNTED) + 1
    return room + (tables + blocks + blocks * 8 // _CLUSTER) * _CLUSTER


def _tables(span: Span) -> tuple[int, int]:
    first = span.offset // _TABLE_MAPS
    return first, (span.end - 1) // _TABLE_MAPS + 1 - first


def holds(spans: Sequence[Span], place: Place) -> bool:
    """Whether one of the sorted spans covers a place as a whole."""
    low, high = 0, len(spans)
    while low < high:
        middle = (low + high) // 2
        if spans[middle].end <= place.offset:
            low = middle + 1
        else:
            high = middle
    return low < len(spans) and spans[low].offset <= place.offset and place.offset + place.length <= spans[low].end
