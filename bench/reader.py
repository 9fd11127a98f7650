# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.reader SOCKET`: read what an export holds with the product's own threads, and throw it away."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator

from pullback.engine.rate import Rate
from pullback.engine.reading import IN_FLIGHT, REQUEST, Connections, FrozenDisk, Readers, Window, cut, submit, wait
from pullback.model.extents import Kind, Span, allocation
from pullback.model.units import MIB
from pullback.nbd.address import UnixAddress
from pullback.nbd.blocking import NbdConnection

#: As in engine.pull.
BATCH = 16 * MIB
UNLIMITED = Rate(0)


def batches(disk: FrozenDisk) -> Iterator[Span]:
    """What is data, by the server's own word."""
    context = "base:allocation"
    with NbdConnection.connect(disk.address, disk.export, contexts=[context]) as connection:
        extents = allocation(connection.extents(context, 0, connection.info.size))
        for extent in extents:
            if extent.kind is Kind.DATA:
                yield from cut(Span(extent.offset, extent.length), BATCH)


class Line:
    """What a thread does: everything of engine.pull but storing."""

    def __init__(self, disk: FrozenDisk) -> None:
        self._disk = disk
        self._free = [bytearray(REQUEST) for _ in range(IN_FLIGHT)]

    def carry(self, batch: Span, connections: Connections) -> None:
        """Read one batch."""
        connection = connections.to(self._disk)
        reads, flying = deque(cut(batch, REQUEST)), dict[int, Window]()
        while reads or flying:
            while reads and self._free:
                window = Window(reads.popleft(), self._free.pop())
                for cookie in submit(connection, window, self._disk.unit, UNLIMITED):
                    flying[cookie] = window
            arrived = flying.pop(wait(connection, self._disk))
            arrived.requests -= 1
            if not arrived.requests:
                self._free.append(arrived.buffer)


def main() -> None:
    """The command."""
    disk = FrozenDisk("disk", UnixAddress(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
    readers = Readers(batches(disk), UNLIMITED)
    readers.run([Line(disk).carry for _ in range(os.cpu_count() or 1)])


if __name__ == "__main__":
    main()
