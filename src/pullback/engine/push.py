# SPDX-License-Identifier: Apache-2.0
"""Taking what QEMU pushes into a repository: the other way round, for disks that must not be exported.

QEMU writes whole chunks, in pieces and in any order.  A chunk is stored when its last piece is there; what is never
written did not change.  Memory: 32 bytes per chunk of the disk that changed, and the chunks begun.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pullback.engine.pull import DiskCount
from pullback.errors import PullbackError, TransferError
from pullback.model.units import CHUNK, SEGMENT
from pullback.nbd.protocol import AllocationFlag
from pullback.plan.pull import chunk_lengths, on_grid, segment_count, segment_size
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

    def __init__(self, target: str, size: int, writers: Writers) -> None:
        self.target = target
        self.size = size
        self.count = DiskCount()
        self.failure: PullbackError | None = None
        self._writers = writers
        self._lock = threading.Lock()
        self._begun: dict[int, _Begun] = {}
        self._ids: dict[int, bytearray] = {}
        self._zero_ids: dict[int, BlobId] = {}

    # -- what the server calls, from several threads --------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """Zeroes: QEMU only writes here."""
        return bytes(length)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """One hole: nothing is known to be here yet, so everything that is pushed gets written."""
        return [(length, int(AllocationFlag.HOLE | AllocationFlag.ZERO))]

    def write(self, offset: int, data: memoryview) -> None:
        """Take a piece; the chunks it completes are stored."""
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
            chunk = offset // CHUNK
            start = chunk * CHUNK
            size = min(CHUNK, self.size - start)
            piece = min(end, start + size) - offset
            if piece == size:
                self._whole(chunk, size, data[:piece] if data is not None else None)
            else:
                self._piece(chunk, size, offset - start, piece, data)
            if data is not None:
                data = data[piece:]
            offset += piece

    def _piece(self, chunk: int, size: int, at: int, length: int, data: memoryview | None) -> None:
        with self._lock:
            begun = self._begun.get(chunk)
            if begun is None:
                if len(self._begun) >= _MOST_OPEN:
                    raise TransferError(f"QEMU left more than {_MOST_OPEN} chunks of {self.target} unfinished")
                begun = self._begun[chunk] = _Begun(bytearray(size), size)
            if data is not None:
                begun.data[at : at + length] = data[:length]
            begun.missing -= length
            if begun.missing > 0:
                return
            del self._begun[chunk]
        self._whole(chunk, size, memoryview(begun.data))

    def _whole(self, chunk: int, size: int, data: memoryview | None) -> None:
        if data is None or bytes(data) == _ZEROES[:size]:
            self._note(chunk, self._zero_id(size), size, zero=True)
            return
        kept = data
        identifier = blob_id(kept)

        def store(writer: PackWriter) -> int:
            before = writer.bytes_added
            writer.add(BlobKind.DATA, kept, identifier)
            return writer.bytes_added - before

        self._note(chunk, identifier, size, new=self._writers.use(store))

    def _note(self, chunk: int, blob: BlobId, size: int, *, new: int = 0, zero: bool = False) -> None:
        segment, at = divmod(chunk * CHUNK, SEGMENT)
        with self._lock:
            ids = self._ids.get(segment)
            if ids is None:
                ids = self._ids[segment] = bytearray(_ID * -(-segment_size(segment, self.size) // CHUNK))
            ids[at // CHUNK * _ID : (at // CHUNK + 1) * _ID] = blob
            self.count.read += 0 if zero else size
            self.count.zero += size if zero else 0
            self.count.new += new

    def _zero_id(self, length: int) -> BlobId:
        with self._lock:
            if length not in self._zero_ids:
                self._zero_ids[length] = blob_id(bytes(length))
            return self._zero_ids[length]

    # -- after the push -------------------------------------------------------------------------------------------

    def finish(
        self, repository: Repository, builder: BackupBuilder, writer: PackWriter, base: StoredBackup | None
    ) -> None:
        """Store the segments: what was pushed, and everything else as in ``base`` (without one: zero).

        TransferError when QEMU left a chunk unfinished.
        """
        if self._begun:
            raise TransferError(f"QEMU did not finish chunk {min(self._begun)} of {self.target}")
        builder.add_disk(self.target)
        known = {segment.number: segment for segment in base.segments(self.target)} if base else {}
        for number in range(segment_count(self.size)):
            pushed = self._ids.pop(number, None)
            if pushed is None and number in known:
                builder.keep_segment(self.target, number, known[number].subtree_id)
                continue
            size = segment_size(number, self.size)
            before = list(self._before(repository, writer, base, known.get(number), size))
            ids = pushed if pushed is not None else bytearray(_ID * len(before))
            content = [
                BlobId(bytes(ids[at : at + _ID])) if any(ids[at : at + _ID]) else before[at // _ID]
                for at in range(0, len(ids), _ID)
            ]
            for length in set(chunk_lengths(size)):
                writer.add(BlobKind.DATA, _ZEROES[:length], self._zero_id(length))
            builder.add_segment(self.target, number, size, content, writer)

    def _before(
        self,
        repository: Repository,
        writer: PackWriter,
        base: StoredBackup | None,
        segment: SegmentRef | None,
        size: int,
    ) -> Iterator[BlobId]:
        """The chunks of a segment as they were in the base; cut anew where another program cut it."""
        if base is None or segment is None:
            yield from (self._zero_id(length) for length in chunk_lengths(size))
            return
        content = base.content(segment)
        if on_grid([length for _, length in content], size):
            yield from (blob for blob, _ in content)
            return
        rest = bytearray()
        for blob, _ in content:
            rest += repository.load_blob(BlobKind.DATA, blob)
            while len(rest) >= CHUNK:
                yield writer.add(BlobKind.DATA, bytes(rest[:CHUNK]))
                del rest[:CHUNK]
        if rest:
            yield writer.add(BlobKind.DATA, bytes(rest))
