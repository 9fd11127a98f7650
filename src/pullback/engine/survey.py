# SPDX-License-Identifier: Apache-2.0
"""Finding out what a pull has to read: block status of the frozen disks, and what their bases hold.

The changed-block map is asked for on a connection of its own and first: asking for both contexts at once makes the
server walk the whole allocation of the disk as well.
"""

from __future__ import annotations

import bisect
import functools
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pullback.engine.pull import BaseSegment, DiskPull
from pullback.engine.reading import REQUEST, FrozenDisk, read_failed
from pullback.errors import Damaged, NbdRefused
from pullback.model.extents import FLAG_DIRTY, Extent, Span, allocation, merged
from pullback.model.units import CHUNK, align_up
from pullback.nbd.address import Address
from pullback.nbd.backend import Buffer
from pullback.nbd.blocking import NbdConnection
from pullback.plan.export import saved_name
from pullback.plan.grid import DiskGrid, Grid, Slot, read_grid
from pullback.plan.method import SAVED_UNIT
from pullback.plan.prove import Proof, Prove, plan_proof
from pullback.plan.pull import (
    clean_spans,
    fetch_spans,
    next_grids,
    plan_segments,
    read_spans,
    segment_count,
    segment_size,
    status_spans,
    touched_segments,
)
from pullback.repository.blob import BlobId, blob_id
from pullback.repository.layout import SEGMENT, SegmentRef, StoredBackup

ALLOCATION = "base:allocation"


@dataclass(frozen=True, slots=True)
class Survey:
    """What will be read of one disk; ``kept`` are segments that stay as the base has them.

    ``distrust`` says why the base was not used after all.  ``proof`` is what stays protected until compared.
    """

    source: DiskPull
    reads: list[Span]
    kept: list[SegmentRef]
    distrust: str = ""
    proof: Proof | None = None

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


def _dirty(disk: Offered, checkpoint: str) -> list[Span]:
    context = f"qemu:dirty-bitmap:{checkpoint}"
    with NbdConnection.connect(disk.address, disk.export, contexts=[context]) as connection:
        return merged(connection.marked(context, 0, disk.size, FLAG_DIRTY))


def _allocation(connection: NbdConnection, spans: Sequence[Span]) -> Iterator[Extent]:
    for span in spans:
        yield from allocation(connection.extents(ALLOCATION, span.offset, span.length))


def _saved(disk: Offered, spans: Sequence[Span]) -> Iterator[Extent]:
    with NbdConnection.connect(disk.address, saved_name(disk.export), contexts=[ALLOCATION]) as connection:
        yield from _allocation(connection, spans)


@dataclass(slots=True)
class _Base:
    """What the base holds of a disk.

    ``kept`` stay as they are, ``changed`` (by number) are built anew from it; of the segments ``whole`` it has nothing.
    """

    kept: list[SegmentRef] = field(default_factory=list)
    changed: dict[int, BaseSegment] = field(default_factory=dict)
    whole: list[int] = field(default_factory=list)

    @property
    def grids(self) -> dict[int, Grid]:
        return {number: segment.grid for number, segment in self.changed.items()}


def survey(
    disk: Offered, base: tuple[StoredBackup, str] | None, like: StoredBackup | None, prove: Prove | None = None
) -> Survey:
    """Find out what to read of a frozen disk, or to ``prove`` afterwards, and let everything else go.

    ``base`` is the backup to build on and the checkpoint it was made at; None reads the whole disk, cut as in ``like``:
    what did not change since is stored already.  Unless the view is exact, what QEMU calls zero is only believed where
    the scratch, asked afterwards, holds nothing: old data is saved before the domain's zeroes take its place.
    SnapshotBroken when the frozen view is lost already.
    """
    distrust = ""
    if base:
        dirty = _dirty(disk, base[1])
        known = _base(base[0], disk.target, disk.size, dirty)
        if known.kept or known.changed:
            distrust = _distrust(disk, base[0], dirty)
    if base and not distrust:
        grids = next_grids(dirty, known.grids)
        fetch = fetch_spans(dirty, disk.size, known.grids, grids, known.whole)
        del dirty  # of a large disk some tens of MiB
    else:
        known, grids = _Base(), grids_like(base[0] if base else like, disk.target, disk.size)
        fetch = [Span(0, disk.size)] if disk.size else []
    grid = DiskGrid(disk.size, grids)
    # Drawn before anything is let go: what was let go cannot be read any more.
    proof = plan_proof(prove, fetch, disk.size, _draw) if prove else None
    reads = _reads(disk, fetch, grid, proof)
    segments = plan_segments(fetch, reads, grid)
    unit = REQUEST if disk.exact else SAVED_UNIT
    frozen = FrozenDisk(disk.target, disk.address, disk.export, unit)
    source = DiskPull(frozen, segments, known.changed)
    return Survey(source, reads, known.kept, distrust, proof)


def _draw(among: int, count: int) -> list[int]:
    return secrets.SystemRandom().sample(range(among), count)


def _reads(disk: Offered, fetch: Sequence[Span], grid: DiskGrid, proof: Proof | None) -> list[Span]:
    """The chunks to read; what is neither read nor proved is let go."""
    try:
        with NbdConnection.connect(disk.address, disk.export, contexts=[ALLOCATION]) as connection:
            ask = status_spans(fetch)
            status = list(_allocation(connection, ask))
            if not disk.exact:
                status += _saved(disk, ask)
            reads = read_spans(fetch, status, grid)
            needed = merged(sorted(reads + proof.spans)) if proof else reads
            _trim(connection, clean_spans(needed, disk.size))
    except NbdRefused as error:
        raise read_failed(disk.target, error) from error
    return reads


def _base(backup: StoredBackup, target: str, size: int, dirty: Sequence[Span]) -> _Base:
    touched = set(touched_segments(dirty))
    base = _Base()
    segments = backup.segments(target)
    if len(segments) != segment_count(size):
        # Another program laid the base out; nothing of it can be shared by place.
        return _Base(whole=list(range(segment_count(size))))
    for segment in segments:
        if segment.number not in touched:
            base.kept.append(segment)
        elif found := read_segment(backup, segment, segment_size(segment.number, size)):
            base.changed[segment.number] = found
        else:
            base.whole.append(segment.number)
    return base


def read_segment(backup: StoredBackup, segment: SegmentRef, size: int) -> BaseSegment | None:
    """A stored segment and how it is cut; None when another program cut it, or it has another size."""
    content = backup.content(segment)
    grid = read_grid([length for _, length in content], size)
    if grid is None:
        return None
    ids = b"".join(blob for blob, _ in content)
    return BaseSegment(Grid(size, _with_empty(grid, ids)), ids)


def _with_empty(grid: Grid, ids: bytes) -> bytes:
    """The slots of a grid, with those that hold the chunk of zeroes marked as empty."""
    zero, slots = bytes(blob_id(bytes(CHUNK))), bytearray(grid.slots)
    if zero not in ids:
        return grid.slots
    for slot, number in enumerate(grid.numbers()[:-1]):
        if slots[slot] == Slot.COLD and ids.startswith(zero, number * len(zero)):
            slots[slot] = Slot.EMPTY
    return bytes(slots)


def grids_like(like: StoredBackup | None, target: str, size: int) -> dict[int, Grid]:
    """How a disk that is read whole is to be cut: as it was last time, so that only what differs is stored.

    By number, the segments that are not cold; of what cannot be read of that backup none.
    """
    grids: dict[int, Grid] = {}
    try:
        for segment in like.segments(target) if like else ():
            inside = segment.number < segment_count(size)
            found = read_segment(like, segment, segment_size(segment.number, size)) if like and inside else None
            if found and not found.grid.all_cold:
                grids[segment.number] = found.grid
    except Damaged:
        # A whole backup must be possible whatever became of the last one; cut otherwise, it takes more room.
        return grids
    return grids


def _distrust(disk: Offered, backup: StoredBackup, dirty: Sequence[Span]) -> str:
    """Why what is clean may not be what the base holds; empty when it is.

    A disk that was shrunk and then grown again has lost its end without a bit being set (seen on QEMU 7.2).  Then the
    last clean piece that the base has data of is lost too: it is enough to compare that one.
    """
    last = last_data(backup, disk.target, dirty)
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
    return judge_last(data, blob)


def judge_last(data: Buffer, blob: BlobId) -> str:
    """Why the base is not used after all, if the last clean piece of data is not what the base has."""
    if blob_id(data) == blob:
        return ""
    return "content changed without a trace in the dirty bitmaps, as after shrinking and growing the disk"


def last_data(backup: StoredBackup, target: str, dirty: Sequence[Span]) -> tuple[Span, BlobId] | None:
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


def _trim(connection: NbdConnection, spans: Iterable[Span]) -> None:
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
