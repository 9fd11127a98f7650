# SPDX-License-Identifier: Apache-2.0
"""The disks of a backup as a restore reads them: segments in order, and what of them cannot be read."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from pullback.errors import Damaged
from pullback.model.extents import Span
from pullback.model.manifest import DiskEntry
from pullback.plan.damage import joined, on_disk, touched_spans
from pullback.plan.pull import segment_count, segment_size
from pullback.plan.restore import Place, Segment, image_room, in_turn
from pullback.repository.blob import BlobId, BlobKind, PackId, blob_id
from pullback.repository.layout import SEGMENT, SegmentRef, StoredBackup
from pullback.repository.repository import Repository

Blobs = Segment[BlobId]


class DiskSource:
    """The disks to restore of one backup; with ``keep_going`` what is lost is passed over, and told by ``lost``.

    For any thread.  Without ``keep_going`` everything raises Damaged where the repository is.
    """

    def __init__(
        self, repository: Repository, stored: StoredBackup, disks: Sequence[DiskEntry], keep_going: bool
    ) -> None:
        self.disks = disks
        self.keep_going = keep_going
        self._repository = repository
        self._stored = stored
        self._zero_ids: dict[int, BlobId] = {}
        self._lost: set[Place] = set()
        self._lock = threading.Lock()

    def only(self, targets: Sequence[str]) -> DiskSource:
        """The same backup with fewer disks; what it loses this one has lost, too."""
        disks = [disk for disk in self.disks if disk.target in targets]
        fewer = DiskSource(self._repository, self._stored, disks, self.keep_going)
        fewer._lost, fewer._lock = self._lost, self._lock
        return fewer

    def is_zero(self, blob: BlobId, length: int) -> bool:
        """Whether this is the blob of so many zeroes."""
        if length not in self._zero_ids:
            self._zero_ids[length] = blob_id(bytes(length))
        return blob == self._zero_ids[length]

    def pack_of(self, blob: BlobId) -> PackId:
        """The pack to read a blob from."""
        place = self._repository.index.lookup(BlobKind.DATA, blob)
        if place is None:
            raise Damaged(f"data blob {blob.hex()} is missing from the repository")
        return place.pack_id

    def lose(self, places: Sequence[Place]) -> None:
        """Remember ranges that cannot be read."""
        with self._lock:
            self._lost.update(places)

    def lost(self, target: str) -> tuple[Span, ...]:
        """The ranges of a disk that could not be read so far."""
        with self._lock:
            return joined(Span(place.offset, place.length) for place in self._lost if place.target == target)

    def load(self, pack: PackId, places: dict[BlobId, list[Place]]) -> Iterator[tuple[BlobId, bytes]]:
        """Blobs of one pack, verified; those that are lost are remembered."""
        given: set[BlobId] = set()
        try:
            for blob, data in self._repository.load_blobs_of_pack(pack, places):
                given.add(blob)
                yield blob, data
        except Damaged:
            if not self.keep_going:
                raise
            yield from self._one_by_one({blob: where for blob, where in places.items() if blob not in given})

    def _one_by_one(self, places: dict[BlobId, list[Place]]) -> Iterator[tuple[BlobId, bytes]]:
        for blob, where in places.items():
            try:
                data = self._repository.load_blob(BlobKind.DATA, blob)
            except Damaged:
                self.lose(where)
            else:
                yield blob, data

    def segments(self) -> Iterator[Blobs]:
        """Every segment of every disk, the disks in turn."""
        return in_turn([self._segments(disk) for disk in self.disks])

    def room(self, image_format: str) -> int:
        """Bytes that the images of all disks take, a little more rather than less; reads every segment's tree."""
        return sum(self._room(disk, image_format) for disk in self.disks)

    def most_room(self, image_format: str) -> int:
        """The same if no byte were zero; reads nothing."""
        return sum(image_room([(0, disk.virtual_size)], disk.virtual_size, image_format) for disk in self.disks)

    def _room(self, disk: DiskEntry, image_format: str) -> int:
        data = (
            (place.offset, place.length)
            for segment in self._segments(disk)
            for blob, place in segment.places()
            if not self.is_zero(blob, place.length)
        )
        return image_room(data, disk.virtual_size, image_format)

    def _segments(self, disk: DiskEntry) -> Iterator[Blobs]:
        subtrees = self._stored.subtrees(disk.target)
        if len(subtrees) != segment_count(disk.virtual_size):
            raise Damaged(
                f"{disk.target} has {len(subtrees)} segments, which do not add up to its {disk.virtual_size} bytes"
            )
        for number, subtree in enumerate(subtrees):
            segment = SegmentRef(number, subtree, segment_size(number, disk.virtual_size))
            try:
                yield Segment(disk.target, number * SEGMENT, self._stored.content(segment))
            except Damaged:
                if not self.keep_going:
                    raise
                yield from self._what_is_left(disk.target, segment)

    def _what_is_left(self, target: str, segment: SegmentRef) -> Iterator[Blobs]:
        """The parts of a broken segment whose place in it is known."""
        begin = segment.number * SEGMENT
        content = self._known(segment)
        if content is None:
            self.lose([Place(target, begin, segment.size)])
            return
        lost = touched_spans(content, segment.size, lambda blob: False)
        self.lose([Place(target, *span) for span in on_disk(lost, segment.number, SEGMENT)])
        unknown = [at for at, (_, length) in enumerate(content) if length is None]
        head = [(blob, length or 0) for blob, length in content[: unknown[0]]]
        tail = [(blob, length or 0) for blob, length in content[unknown[-1] + 1 :]]
        yield Segment(target, begin, head)
        yield Segment(target, begin + segment.size - sum(length for _, length in tail), tail)

    def _known(self, segment: SegmentRef) -> list[tuple[BlobId, int | None]] | None:
        """The blobs of a segment with the lengths that the index knows; None where no place can be told."""
        try:
            nodes = self._repository.load_tree(segment.subtree_id).nodes
        except Damaged:
            return None
        if len(nodes) != 1 or nodes[0].content is None or nodes[0].size != segment.size:
            return None
        blobs = nodes[0].content
        content = list(zip(blobs, self._repository.index.lengths(BlobKind.DATA, blobs), strict=True))
        known = sum(length or 0 for _, length in content)
        if known > segment.size or all(length is not None for _, length in content):
            return None
        return content
