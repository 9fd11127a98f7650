# SPDX-License-Identifier: Apache-2.0
"""Pulling frozen disks into a repository: one thread and one connection per core, each doing the whole line.

    read (NBD) ─► zero? ─► hash ─► known? ─► compress ─► seal ─► pack ─► store;  then the range is let go

There is no hand-over between threads: the libraries release the interpreter's lock while they work.  Memory is
bounded by the threads (a read window and an open pack each) and by the segments they have begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pullback.engine.rate import Rate
from pullback.engine.reading import IN_FLIGHT, REQUEST, Asking, Connections, FrozenDisk, Readers, Window, cut, wait
from pullback.model.extents import Span
from pullback.model.units import CHUNK, MIB
from pullback.plan.grid import Grid, Places
from pullback.plan.pull import Act, Run, SegmentPull
from pullback.repository.blob import BlobId, BlobKind, blob_id
from pullback.repository.layout import BackupBuilder
from pullback.repository.writer import PackWriter

#: Bytes in a row that a thread takes on at a time, and how many where they are scattered: several requests are under
#: way then, too, and all threads have something to do until shortly before the end.
BATCH = 16 * MIB
_SCATTERED = 4 * MIB

_ID = 32
_ZEROES = bytes(CHUNK)


@dataclass(frozen=True, slots=True)
class BaseSegment:
    """A segment as the base has it: its ``grid``, and the ids of its chunks one after the other."""

    grid: Grid
    ids: bytes


@dataclass(slots=True)
class DiskPull:
    """A frozen disk to pull: what to build of it, and ``base`` with each segment to build that keeps chunks."""

    frozen: FrozenDisk
    segments: Iterator[SegmentPull]
    base: dict[int, BaseSegment] = field(default_factory=dict)

    @property
    def target(self) -> str:
        return self.frozen.target


@dataclass(slots=True)
class DiskCount:
    """What became of a disk's bytes, so far."""

    read: int = 0
    new: int = 0
    zero: int = 0


@dataclass(slots=True)
class _Segment:
    """A segment being built: the ids of its chunks, and how many of its bytes are still to be read."""

    source: DiskPull
    plan: SegmentPull
    places: Places
    ids: bytearray
    missing: int = 0


@dataclass(frozen=True, slots=True)
class _Batch:
    segment: _Segment
    spans: tuple[Span, ...]


class Pull:
    """Carries out the pull of several disks; made once, run once.

    ``counts`` (by target) and ``done`` (bytes read) may be looked at while it runs.
    """

    def __init__(self, builder: BackupBuilder, sources: Sequence[DiskPull], let_go: bool, rate: Rate) -> None:
        self._builder = builder
        self._let_go = let_go
        self.rate = rate
        self._readers = Readers(self._all_batches(sources), rate)
        self._lock = self._readers.lock
        self._zero_ids: dict[int, BlobId] = {}
        self.counts = {source.target: DiskCount() for source in sources}
        self.done = 0

    def run(self, writers: Sequence[PackWriter]) -> None:
        """Read everything with a thread for each of ``writers``; raises the first failure, after all have ended.

        SnapshotBroken when the frozen view was lost; TransferError or RepositoryError for the two ends.  The writers
        are not flushed.
        """
        self._readers.run([_Line(self, writer).carry for writer in writers])

    def stop(self) -> None:
        """Make all threads end soon, from any thread; ``run`` then raises or returns early."""
        self._readers.stop()

    # -- what there is to do --------------------------------------------------------------------------------------

    def _all_batches(self, sources: Sequence[DiskPull]) -> Iterator[_Batch]:
        for source in sources:
            for plan in source.segments:
                yield from self._segment_batches(source, plan)

    def _segment_batches(self, source: DiskPull, plan: SegmentPull) -> Iterator[_Batch]:
        places = Places(plan.grid)
        segment = _Segment(source, plan, places, bytearray(_ID * places.count))
        for run in plan.runs:
            if run.act is Act.KEEP:
                _keep(segment, run)
            elif run.act is Act.ZERO:
                self._zero(segment, run)
        # Before the first batch is handed out, or the segment could be complete too early.
        segment.missing = sum(run.length for run in plan.runs if run.act is Act.READ)
        if not segment.missing:
            yield _Batch(segment, ())
        reads = (Span(run.offset, run.length) for run in plan.runs if run.act is Act.READ)
        for spans in _gathered(span for run in reads for span in cut(run, BATCH)):
            yield _Batch(segment, spans)

    def _zero(self, segment: _Segment, run: Run) -> None:
        grid, (start, end) = segment.plan.grid, _inside(segment.plan, run)
        if grid.all_cold:
            whole, rest = divmod(run.length, CHUNK)
            ids = self._zero_id(CHUNK) * whole + (self._zero_id(rest) if rest else b"")
        else:
            ids = b"".join(self._zero_id(length) for _, length in grid.chunks(start, end))
        first = segment.places.number(start) * _ID
        segment.ids[first : first + len(ids)] = ids
        self.counts[segment.source.target].zero += run.length

    def _zero_id(self, length: int) -> BlobId:
        if length not in self._zero_ids:
            self._zero_ids[length] = blob_id(bytes(length))
        return self._zero_ids[length]

    # -- what the threads tell ------------------------------------------------------------------------------------

    def read_done(self, segment: _Segment, length: int, new: int, zero: int) -> bool:
        """Account for ``length`` bytes of a segment; whether it is complete now."""
        with self._lock:
            count = self.counts[segment.source.target]
            count.read += length
            count.new += new
            count.zero += zero
            self.done += length
            segment.missing -= length
            return segment.missing == 0

    def finish_segment(self, segment: _Segment, writer: PackWriter) -> None:
        """Store the segment's directory; every chunk of it was added before."""
        ids = [BlobId(bytes(segment.ids[at : at + _ID])) for at in range(0, len(segment.ids), _ID)]
        with self._lock:
            zeroes = list(self._zero_ids.items())
        for length, zero in zeroes:
            writer.add(BlobKind.DATA, _ZEROES[:length], zero)
        self._builder.add_segment(segment.source.target, segment.plan.number, segment.plan.size, ids, writer)

    @property
    def let_go(self) -> bool:
        return self._let_go

    def zero_id(self, length: int) -> BlobId:
        with self._lock:
            return self._zero_id(length)


class _Line:
    """What one thread does with its batches, and the buffers it does it in."""

    def __init__(self, pull: Pull, writer: PackWriter) -> None:
        self._pull = pull
        self._writer = writer
        # Below a limit that cuts requests, what came is stored before more is waited for.
        windows = IN_FLIGHT if pull.rate.piece(REQUEST) == REQUEST else 1
        self._free = [bytearray(REQUEST) for _ in range(windows)]

    def carry(self, batch: _Batch, connections: Connections) -> None:
        """Read a batch and store what is in it."""
        if not batch.spans or self._read(batch, connections):
            self._pull.finish_segment(batch.segment, self._writer)

    def _read(self, batch: _Batch, connections: Connections) -> bool:
        """Read a batch and store what is in it; whether its segment is complete now."""
        frozen = batch.segment.source.frozen
        connection = connections.to(frozen)
        asking = Asking(frozen, batch.spans, connections, self._pull.rate)
        reads = deque(piece for span in batch.spans for piece in cut(span, REQUEST))
        flying: dict[int, Window | None] = {}
        full: list[Window] = []
        complete = False

        def ask(window: Window) -> None:
            flying.update(dict.fromkeys(asking.submit(window), window))

        def ask_for_more() -> None:
            while reads and self._free:
                ask(Window(reads.popleft(), self._free.pop()))

        ask_for_more()
        while flying:
            arrived = flying.pop(wait(connection, frozen))
            if arrived is None:
                continue
            arrived.requests -= 1
            if arrived.requests:
                continue
            full.append(arrived)
            if asking.looks_again and any(flying.values()):
                continue  # one look for all of them
            for window in asking.doubtful(full):
                full.remove(window)
                ask(window)
            for window in full:
                complete = self._store(batch.segment, window.span, window.buffer)
                self._free.append(window.buffer)
                ask_for_more()
                if self._pull.let_go:
                    flying[connection.submit_trim(window.span.offset, window.span.length)] = None
            full.clear()
        return complete

    def _store(self, segment: _Segment, span: Span, buffer: bytearray) -> bool:
        new = zero = 0
        view = memoryview(buffer)
        before = self._writer.bytes_added
        first = span.offset - segment.plan.offset
        at = segment.places.number(first) * _ID
        for offset, length in segment.plan.grid.chunks(first, first + span.length):
            start = offset - first
            if buffer.startswith(_ZEROES if length == CHUNK else _ZEROES[:length], start):
                blob = self._pull.zero_id(length)
                zero += length
            else:
                blob = self._writer.add(BlobKind.DATA, view[start : start + length])
            segment.ids[at : at + _ID] = blob
            at += _ID
        new = self._writer.bytes_added - before
        return self._pull.read_done(segment, span.length, new, zero)


def _gathered(spans: Iterable[Span]) -> Iterator[tuple[Span, ...]]:
    """Short ones together, as many as are worth a batch."""
    several: list[Span] = []
    held = 0
    for span in spans:
        if several and held + span.length > _SCATTERED:
            yield tuple(several)
            several, held = [], 0
        several.append(span)
        held += span.length
    if several:
        yield tuple(several)


def _inside(plan: SegmentPull, run: Run) -> tuple[int, int]:
    """Where a run begins and ends in its segment."""
    return run.offset - plan.offset, run.end - plan.offset


def _keep(segment: _Segment, run: Run) -> None:
    """Take chunks over from the base, which is cut the same way wherever any are kept."""
    base, (start, end) = segment.source.base[segment.plan.number], _inside(segment.plan, run)
    before = Places(base.grid)
    kept = base.ids[before.number(start) * _ID : before.number(end) * _ID]
    first = segment.places.number(start) * _ID
    segment.ids[first : first + len(kept)] = kept
