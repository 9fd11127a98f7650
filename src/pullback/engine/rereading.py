# SPDX-License-Identifier: Apache-2.0
"""Reading restored images again, through QEMU's own drivers, and comparing every chunk's SHA-256 with the backup's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from pullback.engine.source import Blobs, DiskSource
from pullback.engine.workers import Connections, Work
from pullback.model.extents import Cover, Kind, Span, allocation
from pullback.nbd.address import UnixAddress
from pullback.nbd.blocking import NbdConnection
from pullback.plan.damage import joined
from pullback.plan.restore import Place, holds
from pullback.repository.blob import BlobId, blob_id

#: Reads under way on one connection.
_IN_FLIGHT = 8
_ALLOCATION = "base:allocation"


@dataclass(slots=True)
class _Waiting:
    blob: BlobId
    place: Place
    buffer: bytearray


class Rereading(Work[Blobs]):
    """Compares images with a backup; what could not be restored is left out.  Raises TransferError."""

    name = "verify"
    contexts = (_ALLOCATION,)

    def __init__(self, source: DiskSource, address: UnixAddress) -> None:
        super().__init__(address, sum(disk.virtual_size for disk in source.disks))
        self._source = source
        self._wrong: dict[str, list[Span]] = {disk.target: [] for disk in source.disks}
        self._lost = {disk.target: source.lost(disk.target) for disk in source.disks}

    def wrong(self, target: str) -> tuple[Span, ...]:
        """The ranges of a disk that are not what the backup holds."""
        return joined(self._wrong[target])

    def items(self) -> Iterator[Blobs]:
        return self._source.segments()

    def carry(self, item: Blobs, connections: Connections) -> None:
        places = [(blob, place) for blob, place in item.places() if place.length]
        if not places:
            return
        connection = connections.to(item.target)
        last = places[-1][1]
        found = connection.extents(_ALLOCATION, item.offset, last.offset + last.length - item.offset)
        data = Cover(Span(one.offset, one.length) for one in allocation(found) if one.kind is Kind.DATA)
        waiting: deque[_Waiting] = deque()
        for blob, place in places:
            if holds(self._lost[item.target], place):
                continue
            if data.meets(place.offset, place.offset + place.length):
                self._ask(connection, waiting, _Waiting(blob, place, bytearray(place.length)))
            else:
                self._judge(place, self._source.is_zero(blob, place.length))
        while waiting:
            self._answered(connection, waiting)

    def _ask(self, connection: NbdConnection, waiting: deque[_Waiting], one: _Waiting) -> None:
        if len(waiting) >= _IN_FLIGHT:
            self._answered(connection, waiting)
        view, most = memoryview(one.buffer), connection.info.max_payload
        for start in range(0, len(view), most):
            connection.submit_read(one.place.offset + start, view[start : start + most])
        waiting.append(one)

    def _answered(self, connection: NbdConnection, waiting: deque[_Waiting]) -> None:
        """Wait for all that is under way: replies may come in any order."""
        while connection.pending:
            connection.wait()
        while waiting:
            one = waiting.popleft()
            self._judge(one.place, blob_id(one.buffer) == one.blob)

    def _judge(self, place: Place, equal: bool) -> None:
        with self.lock:
            self.done += place.length
            if not equal:
                self._wrong[place.target].append(Span(place.offset, place.length))
