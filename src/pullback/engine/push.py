# SPDX-License-Identifier: Apache-2.0
"""Taking what QEMU pushes into a repository: the other way round, for disks that must not be exported.

QEMU writes whole chunks, in pieces and in any order.  A chunk is stored when its last piece is there; what is never
written did not change.  Memory: 32 bytes per chunk of the disk that changed, and the chunks begun.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pullback.engine.pull import DiskCount
from pullback.engine.rate import Rate
from pullback.engine.survey import read_segment
from pullback.errors import PullbackError, TransferError
from pullback.model.extents import Span, merged
from pullback.model.units import CHUNK, SEGMENT, align_down
from pullback.nbd.framing import pieces
from pullback.nbd.protocol import AllocationFlag
from pullback.plan.grid import Grid, Places, cold_grid
from pullback.plan.pull import segment_count, segment_size
from pullback.repository.blob import BlobId, BlobKind, blob_id
from pullback.repository.layout import BackupBuilder, SegmentRef, StoredBackup
from pullback.repository.repository import Repository
from pullback.repository.writer import PackWriter

#: Chunks that may be begun at a time; QEMU has at most 64 MiB of copying under way.
_MOST_OPEN = 512

_ID = 32
_ZEROES = bytes(CHUNK)


@dataclass(slots=True)
class _Begun:
    """A chunk of which some bytes are there."""

    data: bytearray
    missing: int


@dataclass(slots=True)
class _Segment:
    """A segment of which something was pushed: how it is cut, and the ids of what is there (else zeroes)."""

    grid: Grid
    places: Places
    ids: bytearray


class Writers:
    """Pack writers that worker threads borrow: each is used by one thread at a time."""

    def __init__(self, writers: Sequence[PackWriter]) -> None:
        self._free: queue.SimpleQueue[PackWriter] = queue.SimpleQueue()
        for writer in writers:
            self._free.put(writer)

    def use(self, work: Callable[[PackWriter], int]) -> int:
        """Run ``work`` with a writer of its own."""
        writer = self._free.get()
        try:
            return work(writer)
        finally:
            self._free.put(writer)


class PushedDisk:
    """The export that QEMU writes one disk to; what arrives goes to the repository.

    ``failure`` is the first error of our own: to QEMU it is an error of the server.
    """

    def __init__(self, target: str, size: int, writers: Writers, cut: Callable[[int], Grid], rate: Rate) -> None:
        self.target = target
        self.size = size
        self.count = DiskCount()
        self.failure: PullbackError | None = None
        self._writers = writers
        self._cut = cut
        self._rate = rate
        self._lock = threading.Lock()
        self._begun: dict[int, _Begun] = {}
        self._segments: dict[int, _Segment] = {}
        self._zero_ids: dict[int, BlobId] = {}

    # -- what the server calls, from several threads --------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """Zeroes: QEMU only writes here."""
        return bytes(length)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """One hole: nothing is known to be here yet, so everything that is pushed gets written."""
        return [(length, int(AllocationFlag.HOLE | AllocationFlag.ZERO))]

    def write(self, offset: int, data: memoryview) -> None:
        """Take a piece, when the limit lets it; the chunks it completes are stored."""
        for _, length in pieces(len(data), self._rate.piece(CHUNK)):
            self._rate.take(length)
        self._guarded(lambda: self._take(offset, len(data), data))

    def write_zeroes(self, offset: int, length: int, no_hole: bool) -> None:
        """Take a piece that is all zero."""
        self._guarded(lambda: self._take(offset, length, None))

    def trim(self, offset: int, length: int) -> None:
        """The same as zeroes: what the domain discarded reads as zero."""
        self.write_zeroes(offset, length, False)

    def flush(self) -> None:
        """Nothing to do: the commit makes everything durable."""

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except PullbackError as error:
            self.failure = self.failure or error
            raise

    def _take(self, offset: int, length: int, data: memoryview | None) -> None:
        end = offset + length
        while offset < end:
            number, inside = divmod(offset, SEGMENT)
            grid = self._segment(number).grid
            first = align_down(inside, grid.unit(inside))
            size = min(grid.unit(inside), grid.size - first)
            start = number * SEGMENT + first
            piece = min(end, start + size) - offset
            if piece == size:
                self._whole(start, size, data[:piece] if data is not None else None)
            else:
                self._piece(start, size, offset - start, piece, data)
            if data is not None:
                data = data[piece:]
            offset += piece

    def _segment(self, number: int) -> _Segment:
        with self._lock:
            found = self._segments.get(number)
            if found is None:
                grid = self._cut(number)
                places = Places(grid)
                found = self._segments[number] = _Segment(grid, places, bytearray(_ID * places.count))
            return found

    def _piece(self, start: int, size: int, at: int, length: int, data: memoryview | None) -> None:
        with self._lock:
            begun = self._begun.get(start)
            if begun is None:
                if len(self._begun) >= _MOST_OPEN:
                    raise TransferError(f"QEMU left more than {_MOST_OPEN} chunks of {self.target} unfinished")
                begun = self._begun[start] = _Begun(bytearray(size), size)
            if data is not None:
                begun.data[at : at + length] = data[:length]
            begun.missing -= length
            if begun.missing > 0:
                return
            del self._begun[start]
        self._whole(start, size, memoryview(begun.data))

    def _whole(self, start: int, size: int, data: memoryview | None) -> None:
        if data is None or bytes(data) == _ZEROES[:size]:
            self._note(start, self._zero_id(size), size, zero=True)
            return
        kept = data
        identifier = blob_id(kept)

        def store(writer: PackWriter) -> int:
            before = writer.bytes_added
            writer.add(BlobKind.DATA, kept, identifier)
            return writer.bytes_added - before

        self._note(start, identifier, size, new=self._writers.use(store))

    def _note(self, start: int, blob: BlobId, size: int, *, new: int = 0, zero: bool = False) -> None:
        number, inside = divmod(start, SEGMENT)
        segment = self._segment(number)
        at = segment.places.number(inside) * _ID
        with self._lock:
            segment.ids[at : at + _ID] = blob
            self.count.read += 0 if zero else size
            self.count.zero += size if zero else 0
            self.count.new += new

    def forget(self) -> None:
        """Begin anew: the disk is pushed again; nothing is under way."""
        with self._lock:
            self._begun.clear()
            self._segments.clear()
            self.count.read = self.count.zero = 0

    def _zero_id(self, length: int) -> BlobId:
        with self._lock:
            if length not in self._zero_ids:
                self._zero_ids[length] = blob_id(bytes(length))
            return self._zero_ids[length]

    # -- after the push -------------------------------------------------------------------------------------------

    def spans(self) -> list[Span]:
        """What was pushed."""
        return merged(
            Span(number * SEGMENT + offset, length)
            for number, segment in sorted(self._segments.items())
            for at, (offset, length) in enumerate(segment.grid.chunks(0, segment.grid.size))
            if any(segment.ids[at * _ID : (at + 1) * _ID])
        )

    def finish(
        self, repository: Repository, builder: BackupBuilder, writer: PackWriter, base: StoredBackup | None
    ) -> None:
        """Store the segments: what was pushed, and everything else as in ``base`` (without one: zero).

        TransferError when QEMU left a chunk unfinished.
        """
        if self._begun:
            raise TransferError(f"QEMU did not finish the chunk at {min(self._begun)} of {self.target}")
        builder.add_disk(self.target)
        known = {segment.number: segment for segment in base.segments(self.target)} if base else {}
        for number in range(segment_count(self.size)):
            pushed = self._segments.pop(number, None)
            if pushed is None and number in known:
                builder.keep_segment(self.target, number, known[number].subtree_id)
                continue
            size = segment_size(number, self.size)
            grid = pushed.grid if pushed else cold_grid(size)
            before = self._before(repository, writer, base, known.get(number), grid)
            ids = pushed.ids if pushed else bytearray(len(before))
            content = [
                BlobId(bytes(source[at : at + _ID]))
                for at in range(0, len(ids), _ID)
                for source in (ids if any(ids[at : at + _ID]) else before,)
            ]
            for length in {length for _, length in grid.chunks(0, size)}:
                writer.add(BlobKind.DATA, _ZEROES[:length], self._zero_id(length))
            builder.add_segment(self.target, number, size, content, writer)

    def _before(
        self,
        repository: Repository,
        writer: PackWriter,
        base: StoredBackup | None,
        segment: SegmentRef | None,
        grid: Grid,
    ) -> bytes:
        """The chunks of a segment as they were in the base; cut anew where another program cut it."""
        if base is None or segment is None:
            return b"".join(self._zero_id(length) for _, length in grid.chunks(0, grid.size))
        if found := read_segment(base, segment, grid.size):
            return found.ids
        rest, ids = bytearray(), bytearray()
        for blob, _ in base.content(segment):
            rest += repository.load_blob(BlobKind.DATA, blob)
            while len(rest) >= CHUNK:
                ids += writer.add(BlobKind.DATA, bytes(rest[:CHUNK]))
                del rest[:CHUNK]
        if rest:
            ids += writer.add(BlobKind.DATA, bytes(rest))
        return bytes(ids)
