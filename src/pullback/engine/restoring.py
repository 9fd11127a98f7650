# SPDX-License-Identifier: Apache-2.0
"""Writing a backup's disks into images, over NBD into QEMU's own drivers; what is durable is kept beside them.

    segments ─► window ─► packs, each in one sweep ─► verified blobs ─► writes
                                                                          │ every few seconds
                                                     flush ─► state file ◄┘

Memory: for each thread at most one read of a pack (16 MiB) and one blob, and the list of one window's blobs.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from pullback.engine.events import Emit
from pullback.engine.rate import Rate
from pullback.engine.source import DiskSource
from pullback.engine.targets import Target, spans_by_target
from pullback.engine.workers import Connections, Work
from pullback.errors import NbdRefused, PullbackError, RestoreError
from pullback.model.extents import Cover, Kind, Span, allocation
from pullback.nbd.address import UnixAddress
from pullback.nbd.blocking import NbdConnection
from pullback.nbd.framing import pieces
from pullback.plan.restore import PackRead, Place, holds, pack_reads, windows
from pullback.repository.blob import BlobId, PackId

#: Writes under way on one connection.
_IN_FLIGHT = 8
#: Seconds between two flushes: so much of the work is done again after a crash, at most.
CHECKPOINT_EVERY = 5.0

_WARM_UP = 16 << 20
_ALLOCATION = "base:allocation"

Read = PackRead[PackId, BlobId]


class Writes:
    """Writes into images, several under way on each connection; a connection is one thread's.

    From one read of a pack to the next they go on: QEMU is not kept waiting for us.
    """

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._flying: dict[NbdConnection, dict[int, Place]] = {}

    def write(self, connection: NbdConnection, place: Place, data: memoryview) -> Iterator[Place]:
        """Send ``data`` for ``place``, when the rate lets it; gives what, sent earlier, was found to be written."""
        flying = self._flying.setdefault(connection, {})
        for start, length in pieces(len(data), self._rate.piece(connection.info.max_payload)):
            self._rate.take(length)
            cookie = connection.submit_write(place.offset + start, data[start : start + length])
            flying[cookie] = Place(place.target, place.offset + start, length)
            if len(flying) >= _IN_FLIGHT:
                yield flying.pop(connection.wait())

    def rest(self, connections: Connections) -> Iterator[Place]:
        """Wait for all that a thread has under way."""
        for connection in connections.open.values():
            flying = self._flying.get(connection, {})
            while flying:
                yield flying.pop(connection.wait())


class Writing(Work[Read]):
    """Reads packs and writes blobs to where they belong; ``written`` and ``kept`` are bytes per disk, without zeroes.

    What the state of a target says is done is neither read nor written.
    """

    name = "restore"
    contexts = (_ALLOCATION,)

    def __init__(self, source: DiskSource, targets: Sequence[Target], address: UnixAddress, rate: Rate) -> None:
        super().__init__(address, sum(disk.virtual_size for disk in source.disks))
        self._writes = Writes(rate)
        self._source = source
        self._targets: Mapping[str, Target] = {target.name: target for target in targets}
        self._had = {target.name: target.state.done for target in targets}
        self._keeping = threading.Lock()
        self._due = time.monotonic() + CHECKPOINT_EVERY
        self.written = dict.fromkeys(self._targets, 0)
        self.kept = dict.fromkeys(self._targets, 0)

    def items(self) -> Iterator[Read]:
        for window in windows(self._source.segments()):
            zeroes, left = [], []
            for blob, place in window:
                if self._source.is_zero(blob, place.length):
                    # A new image is zero where nothing is written.
                    zeroes.append(place)
                elif holds(self._had[place.target], place):
                    self.kept[place.target] += place.length
                    self.done += place.length
                else:
                    left.append((blob, place))
            self._clear([place for place in zeroes if not holds(self._had[place.target], place)])
            self._account(zeroes)
            yield from pack_reads(left, self._source.pack_of)

    def _clear(self, zeroes: Sequence[Place]) -> None:
        """Write zeroes where an image that is gone on with has anything: what was read again and was wrong."""
        for name, spans in spans_by_target(zeroes).items():
            if not self._had[name]:
                continue
            with self.connect(name) as connection:
                begin = spans[0].offset
                found = allocation(connection.extents(_ALLOCATION, begin, spans[-1].end - begin))
                data = Cover(Span(one.offset, one.length) for one in found if one.kind is Kind.DATA)
                for span in spans:
                    if data.meets(span.offset, span.end):
                        connection.write_zeroes(span.offset, span.length)

    def carry(self, item: Read, connections: Connections) -> None:
        written: list[Place] = []
        for blob, data in self._source.load(item.pack, item.places):
            for place in item.places[blob]:
                written += self._writes.write(connections.to(place.target), place, memoryview(data))
        self._count(written)
        if time.monotonic() >= self._due and self._keeping.acquire(blocking=False):
            try:
                self.finish(connections)
                self._keep(connections)
            finally:
                self._due = time.monotonic() + CHECKPOINT_EVERY
                self._keeping.release()

    def finish(self, connections: Connections) -> None:
        self._count(list(self._writes.rest(connections)))

    def _count(self, written: Sequence[Place]) -> None:
        with self.lock:
            for place in written:
                self.written[place.target] += place.length
            self._account(written)

    def run(self, emit: Emit) -> None:
        """Write everything and make it durable; raises the first failure when all threads have ended."""
        self._warm_up()
        super().run(emit)
        for target in self._targets.values():
            if target.has_fresh:
                with NbdConnection.connect(self._address, target.name) as connection:
                    self._keep_target(target, connection)

    def _warm_up(self) -> None:
        """One large read: QEMU's allocator keeps its buffers after it (seen on 7.2: a quarter less system time)."""
        largest = max(self._targets.values(), key=lambda target: target.state.virtual_size)
        if largest.state.virtual_size > _WARM_UP:
            with NbdConnection.connect(self._address, largest.name) as connection:
                connection.read_into(0, bytearray(_WARM_UP))

    def explain(self, error: PullbackError) -> PullbackError:
        if isinstance(error, NbdRefused) and error.errno == errno.ENOSPC:
            return RestoreError.no_space()
        return error

    def keep_what_is_written(self) -> None:
        """After the threads have ended, whatever ended them: keep what was written, as far as that is possible."""
        for target in self._targets.values():
            with suppress(PullbackError), self._keeping, NbdConnection.connect(self._address, target.name) as one:
                self._keep_target(target, one)

    def _account(self, places: Sequence[Place]) -> None:
        with self.lock:
            self.done += sum(place.length for place in places)
            for name, spans in spans_by_target(places).items():
                self._targets[name].written(spans)

    def _keep(self, connections: Connections) -> None:
        for target in self._targets.values():
            if target.has_fresh:
                self._keep_target(target, connections.to(target.name))

    def _keep_target(self, target: Target, connection: NbdConnection) -> None:
        """What was written before the flush is durable after it, on whichever connection it came."""
        with self.lock:
            fresh = target.take_fresh()
        try:
            connection.flush()
            target.durable(fresh)
        except PullbackError:
            with self.lock:
                target.written(fresh)
            raise
