# SPDX-License-Identifier: Apache-2.0
"""Making ranges of disks that exist what a backup holds there, over NBD; and looking whether the rest is."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterator, Mapping, Sequence

from pullback.engine.rate import Rate
from pullback.engine.rereading import Rereading
from pullback.engine.restoring import Read, Writes
from pullback.engine.source import Blobs, DiskSource
from pullback.engine.workers import Connections, Work
from pullback.errors import NbdRefused, PullbackError, RestoreError
from pullback.model.extents import FLAG_DIRTY, Span, merged
from pullback.nbd.address import UnixAddress
from pullback.nbd.blocking import NbdConnection
from pullback.plan.damage import joined
from pullback.plan.in_place import pick_unchanged, pieces
from pullback.plan.restore import Place, Segment, pack_reads, windows
from pullback.repository.blob import BlobId


class Overwriting(Work[Read | Place]):
    """Writes the bytes of ``spans``, by disk, as the backup has them; zeroes are written as zeroes.

    ``written`` counts bytes per disk.  After ``run`` everything is durable.
    """

    name = "restore"

    def __init__(
        self, source: DiskSource, spans: Mapping[str, Sequence[Span]], address: UnixAddress, rate: Rate
    ) -> None:
        super().__init__(address, sum(span.length for some in spans.values() for span in some))
        self._writes = Writes(rate)
        self._source = source
        self._spans = spans
        self.written = dict.fromkeys(spans, 0)

    def items(self) -> Iterator[Read | Place]:
        for window in windows(self._source.segments()):
            data: list[tuple[BlobId, Place]] = []
            for blob, place in window:
                if next(pieces(place, self._spans[place.target]), None) is None:
                    continue
                if self._source.is_zero(blob, place.length):
                    yield place
                else:
                    data.append((blob, place))
            yield from pack_reads(data, self._source.pack_of)

    def carry(self, item: Read | Place, connections: Connections) -> None:
        if isinstance(item, Place):
            connection = connections.to(item.target)
            for span in pieces(item, self._spans[item.target]):
                connection.write_zeroes(span.offset, span.length)
                self._count(Place(item.target, *span))
            return
        for blob, data in self._source.load(item.pack, item.places):
            for place in item.places[blob]:
                self._write(connections.to(place.target), place, memoryview(data))

    def _write(self, connection: NbdConnection, place: Place, data: memoryview) -> None:
        for span in pieces(place, self._spans[place.target]):
            begin = span.offset - place.offset
            part = Place(place.target, *span)
            for written in self._writes.write(connection, part, data[begin : begin + span.length]):
                self._count(written)

    def finish(self, connections: Connections) -> None:
        for written in self._writes.rest(connections):
            self._count(written)

    def _count(self, place: Place) -> None:
        with self.lock:
            self.done += place.length
            self.written[place.target] += place.length

    def flush(self) -> None:
        """Make everything written durable; NbdRefused when that fails."""
        for target in self.written:
            with NbdConnection.connect(self._address, target) as connection:
                connection.flush()

    def explain(self, error: PullbackError) -> PullbackError:
        if isinstance(error, NbdRefused) and error.errno == errno.ENOSPC:
            return RestoreError("there is no space left for the domain's images", todo="Make room for them.")
        return error


class Sampling(Rereading):
    """Compares only these places with the backup."""

    name = "verify"

    def __init__(self, source: DiskSource, sample: Sequence[tuple[BlobId, Place]], address: UnixAddress) -> None:
        super().__init__(source, address)
        self._sample = sample
        self.total = sum(place.length for _, place in sample)

    def items(self) -> Iterator[Blobs]:
        for blob, place in self._sample:
            yield Segment(place.target, place.offset, [(blob, place.length)])


def map_export(target: str) -> str:
    """The name of the export that shows what changed; no disk's own name holds a slash."""
    return f"{target}/changes"


def changed_spans(address: UnixAddress, target: str, size: int, bitmaps: Sequence[str]) -> tuple[Span, ...]:
    """What any of a disk's dirty bitmaps says changed, asked of the export that shows them."""
    spans: list[Span] = []
    for bitmap in bitmaps:
        context = f"qemu:dirty-bitmap:{bitmap}"
        with NbdConnection.connect(address, map_export(target), contexts=[context]) as connection:
            spans += merged(connection.marked(context, 0, size, FLAG_DIRTY))
    return joined(spans)


def draw_sample(source: DiskSource, spans: Sequence[Span]) -> list[tuple[BlobId, Place]]:
    """Some of the data that did not change, to be compared; reads all trees of the one disk of ``source``."""
    data = (
        (blob, place)
        for segment in source.segments()
        for blob, place in segment.places()
        if place.length and not source.is_zero(blob, place.length)
    )
    return pick_unchanged(data, spans, secrets.randbelow)
