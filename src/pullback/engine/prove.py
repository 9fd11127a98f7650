# SPDX-License-Identifier: Apache-2.0
"""Comparing a new backup, read back from the repository, with the still frozen disks.

    trees and index, from the store ─► blobs, pack by pack, verified ─┐
                                                                      ├─► the same?  then the range is let go
    frozen view, read again (NBD) ────────────────────────────────────┘

Only after that the backup gets its snapshot file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pullback.engine.pull import IN_FLIGHT, REQUEST, DiskSource, Window, cut, read_failed, submit
from pullback.errors import Damaged, NbdRefused, PullbackError
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

    source: DiskSource
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

    def __init__(self, repository: Repository, stored: StoredBackup, disks: Sequence[tuple[DiskSource, Proof]]) -> None:
        self._repository = repository
        self._stored = stored
        self._lock = threading.Lock()
        self._batches = self._all_batches(disks)
        self._connections: list[NbdConnection] = []
        self._differences: list[Difference] = []
        self._failure: PullbackError | None = None
        self._stop = False
        self.total = sum(span.length for _, proof in disks for span in proof.spans)
        self.done = 0

    def run(self, threads: int) -> None:
        """Compare everything; raises the first failure, after all threads have ended.

        ProofFailed where the backup differs, Damaged where it cannot be read, SnapshotBroken when the frozen view was
        lost.
        """
        with ThreadPoolExecutor(threads, thread_name_prefix="pullback-prove") as pool:
            workers = [pool.submit(self._work) for _ in range(threads)]
        if self._differences:
            raise proof_failed(sorted(self._differences), more=len(self._differences) > _ENOUGH)
        if self._failure is not None:
            raise self._failure
        for worker in workers:
            worker.result()
        if self.done != self.total and not self._stop:
            raise Damaged(f"of {self.total} bytes to compare the backup holds {self.done}")

    def stop(self) -> None:
        """Make all threads end soon, from any thread; ``run`` then raises or returns early."""
        with self._lock:
            self._stop = True
            for connection in self._connections:
                connection.abort()

    def _all_batches(self, disks: Sequence[tuple[DiskSource, Proof]]) -> Iterator[_Batch]:
        for source, proof in disks:
            segments = self._stored.segments(source.target)
            if sum(segment.size for segment in segments) != proof.size:
                raise Damaged(f"the segments of {source.target} do not add up to the disk's {proof.size} bytes")
            for number, claims in claims_by_segment(proof):
                content = self._stored.content(segments[number])
                packs = parts_by_pack(content, number * SEGMENT, claims, self._pack_of)
                for pack, parts in packs.items():
                    yield _Batch(source, proof.size, pack, parts)

    def _pack_of(self, blob: BlobId) -> PackId:
        place = self._repository.index.lookup(BlobKind.DATA, blob)
        if place is None:
            raise Damaged(f"data blob {blob.hex()} is missing from the repository")
        return place.pack_id

    def _next(self) -> _Batch | None:
        with self._lock:
            return None if self._stop else next(self._batches, None)

    def _work(self) -> None:
        connections: dict[str, NbdConnection] = {}
        line = _Line(self)
        try:
            while (batch := self._next()) is not None:
                target = batch.source.target
                if target not in connections:
                    connections[target] = self._connect(batch.source)
                line.carry(batch, connections[target], self._comparisons(batch))
        except PullbackError as error:
            with self._lock:
                # What fails after the first failure fails because of it: stop() cuts all connections.
                self._failure = self._failure or error
            self.stop()
        finally:
            for connection in connections.values():
                connection.close()

    def _connect(self, source: DiskSource) -> NbdConnection:
        connection = NbdConnection.connect(source.address, source.export)
        with self._lock:
            self._connections.append(connection)
        return connection

    def _comparisons(self, batch: _Batch) -> Iterator[_Comparison]:
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
        with self._lock:
            self.done += part.length
            self._differences += [Difference(target, span, part.changed) for span in different]
            self._stop = self._stop or len(self._differences) > _ENOUGH


class _Line:
    """What one thread does with its batches, and the buffers it does it in: several reads under way at a time."""

    def __init__(self, proving: Proving) -> None:
        self._proving = proving
        self._free = [bytearray(REQUEST) for _ in range(IN_FLIGHT)]
        self._flying: dict[int, _Comparison | None] = {}

    def carry(self, batch: _Batch, connection: NbdConnection, comparisons: Iterator[_Comparison]) -> None:
        """Make all comparisons of a batch."""
        for one in comparisons:
            while not self._free:
                self._take(batch, connection)
            one.window.buffer = self._free.pop()
            for cookie in submit(connection, one.window, batch.source.unit):
                self._flying[cookie] = one
        while self._flying:
            self._take(batch, connection)

    def _take(self, batch: _Batch, connection: NbdConnection) -> None:
        try:
            arrived = self._flying.pop(connection.wait())
        except NbdRefused as error:
            raise read_failed(batch.source.target, error) from error
        if arrived is None:
            return
        arrived.window.requests -= 1
        if arrived.window.requests:
            return
        self._proving.compared(batch.source.target, arrived.part, _different(arrived))
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
