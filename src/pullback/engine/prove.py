# SPDX-License-Identifier: Apache-2.0
"""Comparing a new backup, read back from the repository, with the still frozen disks.

    trees and index, from the store ─► blobs, pack by pack, verified ─┐
                                                                      ├─► the same?  then the range is let go
    frozen view, read again (NBD) ────────────────────────────────────┘

Only after that the backup gets its snapshot file.  Before QEMU 8.0 the view is read unit by unit: a proof does not
rely on what the pull relied on (``engine.reading``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pullback.engine.rate import Rate
from pullback.engine.reading import IN_FLIGHT, REQUEST, Connections, FrozenDisk, Readers, Window, cut, submit, wait
from pullback.errors import Damaged, PullbackError
from pullback.model.extents import Span, merged
from pullback.model.units import HOT_CHUNK, SECTOR, align_down, align_up
from pullback.nbd.blocking import NbdConnection
from pullback.plan.prove import Difference, Part, Proof, claims_by_segment, parts_by_pack, proof_failed
from pullback.repository.blob import BlobId, BlobKind, PackId
from pullback.repository.layout import SEGMENT, StoredBackup
from pullback.repository.repository import Repository

#: After so many differing ranges no more are looked for.
_ENOUGH = 1000


@dataclass(frozen=True, slots=True)
class _Batch:
    """What one pack holds of a segment that is to be compared."""

    disk: FrozenDisk
    size: int
    pack: PackId
    parts: Mapping[BlobId, list[Part]]


@dataclass(slots=True)
class _Comparison:
    """A part of the frozen disk in a window around it, and the bytes that the backup has for it."""

    part: Part
    stored: memoryview
    window: Window


class Proving:
    """Proves the disks of one backup that has no snapshot file yet; made once, run once.

    ``done`` (of ``total`` bytes to compare) may be looked at while it runs.
    """

    def __init__(
        self, repository: Repository, stored: StoredBackup, disks: Sequence[tuple[FrozenDisk, Proof]], rate: Rate
    ) -> None:
        self._repository = repository
        self._stored = stored
        self.rate = rate
        self._readers = Readers(self._all_batches(disks), rate)
        self._differences: list[Difference] = []
        self.total = sum(span.length for _, proof in disks for span in proof.spans)
        self.done = 0

    def run(self, threads: int) -> None:
        """Compare everything; raises the first failure, after all threads have ended.

        ProofFailed where the backup differs, Damaged where it cannot be read, SnapshotBroken when the frozen view was
        lost.
        """
        failure: PullbackError | None = None
        try:
            self._readers.run([_Line(self).carry for _ in range(threads)])
        except PullbackError as error:
            failure = error
        if self._differences:
            raise proof_failed(sorted(self._differences), more=len(self._differences) > _ENOUGH)
        if failure is not None:
            raise failure
        if self.done != self.total and not self._readers.stopped:
            raise Damaged(f"of {self.total} bytes to compare the backup holds {self.done}")

    def stop(self) -> None:
        """Make all threads end soon, from any thread; ``run`` then raises or returns early."""
        self._readers.stop()

    def _all_batches(self, disks: Sequence[tuple[FrozenDisk, Proof]]) -> Iterator[_Batch]:
        for disk, proof in disks:
            segments = self._stored.segments(disk.target)
            if sum(segment.size for segment in segments) != proof.size:
                raise Damaged(f"the segments of {disk.target} do not add up to the disk's {proof.size} bytes")
            for number, claims in claims_by_segment(proof):
                content = self._stored.content(segments[number])
                packs = parts_by_pack(content, number * SEGMENT, claims, self._pack_of)
                for pack, parts in packs.items():
                    yield _Batch(disk, proof.size, pack, parts)

    def _pack_of(self, blob: BlobId) -> PackId:
        place = self._repository.index.lookup(BlobKind.DATA, blob)
        if place is None:
            raise Damaged(f"data blob {blob.hex()} is missing from the repository")
        return place.pack_id

    def comparisons(self, batch: _Batch) -> Iterator[_Comparison]:
        """What the repository gives back, and where to read it again; the buffers are still to come."""
        for blob, data in self._repository.load_blobs_of_pack(batch.pack, batch.parts):
            view = memoryview(data)
            for part in batch.parts[blob]:
                for span in cut(Span(part.offset, part.length), REQUEST):
                    start = part.start + span.offset - part.offset
                    piece = Part(span.offset, start, span.length, part.changed)
                    yield _Comparison(piece, view[start : start + span.length], Window(_sectors(span), bytearray()))

    def compared(self, target: str, part: Part, different: list[Span]) -> None:
        """Account for a part; ends it all when there are differences enough."""
        with self._readers.lock:
            self.done += part.length
            self._differences += [Difference(target, span, part.changed) for span in different]
            self._readers.stopped |= len(self._differences) > _ENOUGH


class _Line:
    """What one thread does with its batches, and the buffers it does it in: several reads under way at a time."""

    def __init__(self, proving: Proving) -> None:
        self._proving = proving
        self._free = [bytearray(REQUEST) for _ in range(IN_FLIGHT)]
        self._flying: dict[int, _Comparison | None] = {}

    def carry(self, batch: _Batch, connections: Connections) -> None:
        """Make all comparisons of a batch."""
        connection = connections.to(batch.disk)
        for one in self._proving.comparisons(batch):
            while not self._free:
                self._take(batch, connection)
            one.window.buffer = self._free.pop()
            for cookie in submit(connection, one.window, batch.disk.unit, self._proving.rate):
                self._flying[cookie] = one
        while self._flying:
            self._take(batch, connection)

    def _take(self, batch: _Batch, connection: NbdConnection) -> None:
        arrived = self._flying.pop(wait(connection, batch.disk))
        if arrived is None:
            return
        arrived.window.requests -= 1
        if arrived.window.requests:
            return
        self._proving.compared(batch.disk.target, arrived.part, _different(arrived))
        self._free.append(arrived.window.buffer)
        offset, end = arrived.part.offset, arrived.part.offset + arrived.part.length
        # Only whole granules of the scratch: others share theirs with what is still to be compared.
        if offset % HOT_CHUNK == 0 and (end % HOT_CHUNK == 0 or end == batch.size):
            self._flying[connection.submit_trim(offset, end - offset)] = None


def _sectors(span: Span) -> Span:
    start = align_down(span.offset, SECTOR)
    return Span(start, align_up(span.end, SECTOR) - start)


def _different(one: _Comparison) -> list[Span]:
    """The sectors in which the frozen disk and the backup differ, as spans of the disk."""
    begin, buffer = one.part.offset - one.window.span.offset, one.window.buffer
    if buffer.startswith(one.stored, begin):
        return []
    found = []
    for at in range(0, one.part.length, SECTOR):
        sector = one.stored[at : at + SECTOR]
        if not buffer.startswith(sector, begin + at):
            found.append((one.part.offset + at, len(sector)))
    return merged(found)
