# SPDX-License-Identifier: Apache-2.0
"""Finding out what a pull has to read: block status of the frozen disks, and what their bases hold.

The changed-block map is asked for on a connection of its own and first: asking for both contexts at once makes the
server walk the whole allocation of the disk as well.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pullback.engine.pull import REQUEST, DiskSource, read_failed
from pullback.errors import NbdRefused
from pullback.model.extents import Extent, Span, allocation, dirty_spans
from pullback.model.units import align_up
from pullback.nbd.address import Address
from pullback.nbd.blocking import NbdConnection
from pullback.plan.method import SAVED_UNIT
from pullback.plan.pull import (
    clean_spans,
    fetch_spans,
    on_grid,
    plan_segments,
    read_spans,
    segment_count,
    segment_size,
    touched_segments,
)
from pullback.repository.blob import BlobId, blob_id
from pullback.repository.layout import SEGMENT, SegmentRef, StoredBackup

ALLOCATION = "base:allocation"


@dataclass(frozen=True, slots=True)
class Survey:
    """What will be read of one disk; ``kept`` are segments that stay as the base has them.

    ``distrust`` says why the base was not used after all.
    """

    source: DiskSource
    reads: list[Span]
    kept: list[SegmentRef]
    distrust: str = ""

    @property
    def to_read(self) -> int:
        return sum(span.length for span in self.reads)


@dataclass(frozen=True, slots=True)
class Offered:
    """A frozen disk as it is offered: ``target`` of ``size`` bytes, as ``export`` at ``address``.

    Unless ``exact`` its scratch is offered too, as ``saved_name(export)``.
    """

    address: Address
    export: str
    target: str
    size: int
    exact: bool = True


def saved_name(export: str) -> str:
    """The name of the export of a disk's scratch; no disk's own name holds a slash."""
    return f"{export}/saved"


def _dirty(disk: Offered, checkpoint: str) -> list[Span]:
    context = f"qemu:dirty-bitmap:{checkpoint}"
    with NbdConnection.connect(disk.address, disk.export, contexts=[context]) as connection:
        return dirty_spans(connection.extents(context, 0, disk.size))


def _allocation(connection: NbdConnection, spans: Sequence[Span]) -> Iterator[Extent]:
    for span in spans:
        yield from allocation(connection.extents(ALLOCATION, span.offset, span.length))


def _saved(disk: Offered, spans: Sequence[Span]) -> Iterator[Extent]:
    with NbdConnection.connect(disk.address, saved_name(disk.export), contexts=[ALLOCATION]) as connection:
        yield from _allocation(connection, spans)


def survey(disk: Offered, base: tuple[StoredBackup, str] | None, let_go: bool) -> Survey:
    """Find out what to read of a frozen disk, and let everything else go.

    ``base`` is the backup to build on and the checkpoint it was made at; None reads the whole disk.  Unless the view is
    exact, what QEMU calls zero is only believed where the scratch, asked afterwards, holds nothing: old data is saved
    before the domain's zeroes take its place.  SnapshotBroken when the frozen view is lost already.
    """
    size = disk.size
    dirty = _dirty(disk, base[1]) if base else [Span(0, size)] if size else []
    kept: list[SegmentRef] = []
    chunks: dict[int, bytes] = {}
    whole: list[int] = []
    distrust = ""
    if base:
        kept, chunks, whole = _base(base[0], disk.target, size, dirty)
        if kept or chunks:
            distrust = _distrust(disk, base[0], dirty)
    if distrust:
        kept, chunks, whole, dirty = [], {}, [], [Span(0, size)]
    fetch = fetch_spans(dirty, size, whole)
    try:
        with NbdConnection.connect(disk.address, disk.export, contexts=[ALLOCATION]) as connection:
            status = list(_allocation(connection, fetch))
            if not disk.exact:
                status += _saved(disk, fetch)
            reads = read_spans(fetch, status, size)
            if let_go:
                _trim(connection, clean_spans(reads, size))
    except NbdRefused as error:
        raise read_failed(disk.target, error) from error
    source = DiskSource(
        disk.target,
        disk.address,
        disk.export,
        plan_segments(fetch, reads, size),
        chunks,
        REQUEST if disk.exact else SAVED_UNIT,
    )
    return Survey(source, reads, kept, distrust)


def _base(
    backup: StoredBackup, target: str, size: int, dirty: Sequence[Span]
) -> tuple[list[SegmentRef], dict[int, bytes], list[int]]:
    """Of the base's segments: those that stay, the chunk ids of those that change, those to read whole."""
    touched = set(touched_segments(dirty))
    kept, chunks, whole = [], {}, []
    segments = backup.segments(target)
    if len(segments) != segment_count(size):
        # Another program laid the base out; nothing of it can be shared by place.
        return [], {}, list(range(segment_count(size)))
    for segment in segments:
        if segment.number not in touched:
            kept.append(segment)
            continue
        content = backup.content(segment)
        if on_grid([length for _, length in content], segment_size(segment.number, size)):
            chunks[segment.number] = b"".join(blob for blob, _ in content)
        else:
            whole.append(segment.number)
    return kept, chunks, whole


def _distrust(disk: Offered, backup: StoredBackup, dirty: Sequence[Span]) -> str:
    """Why what is clean may not be what the base holds; empty when it is.

    A disk that was shrunk and then grown again has lost its end without a bit being set (seen on QEMU 7.2).  Then the
    last clean piece that the base has data of is lost too: it is enough to compare that one.
    """
    last = _last_data(backup, disk.target, dirty)
    if last is None:
        return ""
    span, blob = last
    data = bytearray(span.length)
    try:
        with NbdConnection.connect(disk.address, disk.export) as connection:
            at = span.offset
            while at < span.end:
                end = min(align_up(at + 1, SAVED_UNIT), span.end)
                connection.read_into(at, memoryview(data)[at - span.offset : end - span.offset])
                at = end
    except NbdRefused as error:
        raise read_failed(disk.target, error) from error
    if blob_id(data) == blob:
        return ""
    return "content changed without a trace in the dirty bitmaps, as after shrinking and growing the disk"


def _last_data(backup: StoredBackup, target: str, dirty: Sequence[Span]) -> tuple[Span, BlobId] | None:
    """The last piece of the base that is not zero and shares no byte with ``dirty``."""
    ends = [span.end for span in dirty]
    zeroes: set[BlobId] = set()
    zero_of = functools.cache(lambda length: blob_id(bytes(length)))
    for segment in reversed(backup.segments(target)):
        if segment.subtree_id in zeroes:
            continue
        end = segment.number * SEGMENT + segment.size
        only_zero = True
        for blob, length in reversed(backup.content(segment)):
            end -= length
            if blob == zero_of(length):
                continue
            only_zero = False
            later = bisect.bisect_right(ends, end)
            if later == len(dirty) or dirty[later].offset >= end + length:
                return Span(end, length), blob
        if only_zero:
            zeroes.add(segment.subtree_id)
    return None


def _trim(connection: NbdConnection, spans: Sequence[Span]) -> None:
    """Let ranges go, many requests at a time."""
    for span in spans:
        if span.length >= 1 << 31:
            connection.trim(span.offset, span.length)
            continue
        connection.submit_trim(span.offset, span.length)
        if connection.pending >= 64:
            connection.wait()
    while connection.pending:
        connection.wait()
