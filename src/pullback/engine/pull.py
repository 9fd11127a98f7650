# SPDX-License-Identifier: Apache-2.0
"""Reading frozen disks into a repository: one thread and one connection per core, each doing the whole line.

    read (NBD) ─► zero? ─► hash ─► known? ─► compress ─► seal ─► pack ─► store;  then the range is let go

There is no hand-over between threads: the libraries release the interpreter's lock while they work.  Memory is
bounded by the threads (a read window and an open pack each) and by the segments they have begun.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pullback.errors import NbdRefused, PullbackError, SnapshotBroken
from pullback.model.extents import Span
from pullback.model.units import CHUNK, MIB, align_up
from pullback.nbd.address import Address
from pullback.nbd.blocking import NbdConnection
from pullback.plan.grid import Grid, Places
from pullback.plan.pull import Act, Run, SegmentPull
from pullback.repository.blob import BlobId, BlobKind, blob_id
from pullback.repository.layout import BackupBuilder
from pullback.repository.writer import PackWriter

#: Bytes asked for in one NBD request, and requests under way on one connection.
REQUEST = 1 * MIB
IN_FLIGHT = 4
#: Bytes that a thread takes on at a time.
BATCH = 16 * MIB

_ID = 32
_ZEROES = bytes(CHUNK)


@dataclass(frozen=True, slots=True)
class BaseSegment:
    """A segment as the base has it: its ``grid``, and the ids of its chunks one after the other."""

    grid: Grid
    ids: bytes


@dataclass(slots=True)
class DiskSource:
    """A frozen disk to read: its export, what to build, and what the base holds of it.

    ``base`` has each segment to build that keeps chunks.  No request crosses a multiple of ``unit`` bytes.
    """

    target: str
    address: Address
    export: str
    segments: Iterator[SegmentPull]
    base: dict[int, BaseSegment] = field(default_factory=dict)
    unit: int = REQUEST


@dataclass(slots=True)
class DiskCount:
    """What became of a disk's bytes, so far."""

    read: int = 0
    new: int = 0
    zero: int = 0


@dataclass(slots=True)
class _Segment:
    """A segment being built: the ids of its chunks, and how many of its bytes are still to be read."""

    source: DiskSource
    plan: SegmentPull
    places: Places
    ids: bytearray
    missing: int = 0


@dataclass(frozen=True, slots=True)
class _Batch:
    segment: _Segment
    span: Span


@dataclass(slots=True)
class Window:
    """A buffer being filled; ``requests`` of its reads are under way."""

    span: Span
    buffer: bytearray
    requests: int = 0


class Pull:
    """Carries out the pull of several disks; made once, run once.

    ``counts`` (by target) and ``done`` (bytes read) may be looked at while it runs.
    """

    def __init__(self, builder: BackupBuilder, sources: Sequence[DiskSource], let_go: bool) -> None:
        self._builder = builder
        self._let_go = let_go
        self._lock = threading.Lock()
        self._batches = self._all_batches(sources)
        self._connections: list[NbdConnection] = []
        self._zero_ids: dict[int, BlobId] = {}
        self._stop = False
        self._failure: PullbackError | None = None
        self.counts = {source.target: DiskCount() for source in sources}
        self.done = 0

    def run(self, writers: Sequence[PackWriter]) -> None:
        """Read everything with a thread for each of ``writers``; raises the first failure, after all have ended.

        SnapshotBroken when the frozen view was lost; TransferError or RepositoryError for the two ends.  The writers
        are not flushed.
        """
        with ThreadPoolExecutor(len(writers), thread_name_prefix="pullback-pull") as pool:
            workers = [pool.submit(self._work, writer) for writer in writers]
        if self._failure is not None:
            raise self._failure
        for worker in workers:
            worker.result()

    def stop(self) -> None:
        """Make all threads end soon, from any thread; ``run`` then raises or returns early."""
        with self._lock:
            self._stop = True
            for connection in self._connections:
                connection.abort()

    # -- what there is to do --------------------------------------------------------------------------------------

    def _all_batches(self, sources: Sequence[DiskSource]) -> Iterator[_Batch]:
        for source in sources:
            for plan in source.segments:
                yield from self._segment_batches(source, plan)

    def _segment_batches(self, source: DiskSource, plan: SegmentPull) -> Iterator[_Batch]:
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
            yield _Batch(segment, Span(plan.offset, 0))
        for run in plan.runs:
            if run.act is Act.READ:
                for span in cut(Span(run.offset, run.length), BATCH):
                    yield _Batch(segment, span)

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

    def _next(self) -> _Batch | None:
        with self._lock:
            return None if self._stop else next(self._batches, None)

    # -- one thread -----------------------------------------------------------------------------------------------

    def _work(self, writer: PackWriter) -> None:
        connections: dict[str, NbdConnection] = {}
        try:
            line = _Line(self, writer)
            while (batch := self._next()) is not None:
                source = batch.segment.source
                if source.target not in connections and batch.span.length:
                    connections[source.target] = self._connect(source)
                line.carry(batch, connections.get(source.target))
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
        self._free = [bytearray(REQUEST) for _ in range(IN_FLIGHT)]

    def carry(self, batch: _Batch, connection: NbdConnection | None) -> None:
        """Read a batch and store what is in it."""
        if connection is None or not batch.span.length:
            self._pull.finish_segment(batch.segment, self._writer)
            return
        reads = deque(cut(batch.span, REQUEST))
        flying: dict[int, Window | None] = {}
        complete = False
        while reads or flying:
            while reads and self._free:
                window = Window(reads.popleft(), self._free.pop())
                for cookie in submit(connection, window, batch.segment.source.unit):
                    flying[cookie] = window
            arrived = flying.pop(self._wait(connection, batch))
            if arrived is None:
                continue
            arrived.requests -= 1
            if arrived.requests:
                continue
            complete = self._store(batch.segment, arrived.span, arrived.buffer)
            self._free.append(arrived.buffer)
            if self._pull.let_go:
                flying[connection.submit_trim(arrived.span.offset, arrived.span.length)] = None
        if complete:
            self._pull.finish_segment(batch.segment, self._writer)

    def _wait(self, connection: NbdConnection, batch: _Batch) -> int:
        try:
            return connection.wait()
        except NbdRefused as error:
            raise read_failed(batch.segment.source.target, error) from error

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


def cut(span: Span, unit: int) -> Iterator[Span]:
    """Pieces that end at multiples of ``unit``, as chunks do."""
    offset = span.offset
    while offset < span.end:
        end = min(align_up(offset + 1, unit), span.end)
        yield Span(offset, end - offset)
        offset = end


def submit(connection: NbdConnection, window: Window, unit: int) -> list[int]:
    """Ask for what fills the window, by requests that cross no multiple of ``unit``."""
    view, begin = memoryview(window.buffer), window.span.offset
    cookies = [
        connection.submit_read(piece.offset, view[piece.offset - begin : piece.end - begin])
        for piece in cut(window.span, unit)
    ]
    window.requests = len(cookies)
    return cookies


def read_failed(target: str, error: NbdRefused) -> PullbackError:
    """What a failed read of a frozen disk means: QEMU answers EINVAL (EACCES in its own words) once it is broken."""
    if error.errno in (errno.EINVAL, errno.EACCES, errno.EPERM):
        return SnapshotBroken.of_disk(target)
    return error
