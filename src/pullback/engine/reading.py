# SPDX-License-Identifier: Apache-2.0
"""Reading frozen disks over NBD with several threads, each over connections of its own.

Whoever reads cuts the work into batches.  A thread takes one after the other and carries it from end to end; there is
no hand-over between threads.  The first failure ends them all.

Before QEMU 8.0 a request that meets saved data, and ends beyond it, is answered with the domain's new data
(``plan.method.SAVED_UNIT``).  Old data is in the scratch, and a bitmap says so, before the domain's write is carried
out: a request of any length was answered right if that bitmap, asked after the answer, has nothing of its range.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from pullback.engine.rate import Rate
from pullback.errors import NbdRefused, PullbackError, SnapshotBroken
from pullback.model.extents import FLAG_DIRTY, Span, merged
from pullback.model.snapshots import SAVED_MAP
from pullback.model.units import KIB, align_up
from pullback.nbd.address import Address
from pullback.nbd.blocking import NbdConnection
from pullback.plan.export import saved_name

#: Bytes asked for in one NBD request, and so many under way on one connection.  Of 1 MiB, QEMU takes twice the
#: processor time: its buffers are larger than the processor's cache.
REQUEST = 512 * KIB
IN_FLIGHT = 4

_SAVED = f"qemu:dirty-bitmap:{SAVED_MAP}"
#: What is no longer than this is read unit by unit: looking at the map costs as much as two requests.
_WORTH_A_LOOK = 128 * KIB

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class FrozenDisk:
    """Where a frozen disk is read: its target, its export.

    No request crosses a multiple of ``unit`` bytes, if it is to be right whatever the domain writes; where that is less
    than ``REQUEST``, the disk's scratch is exported too, as ``saved_name(export)``.
    """

    target: str
    address: Address
    export: str
    unit: int = REQUEST


@dataclass(slots=True)
class Window:
    """A buffer being filled; ``requests`` of its reads are under way, ``wide`` ones if longer than the disk's unit."""

    span: Span
    buffer: bytearray
    requests: int = 0
    wide: bool = False


class Readers(Generic[Batch]):
    """The threads; made once, run once.  ``lock`` is held while the next batch is taken.

    All of them together read no faster than ``rate`` lets them.
    """

    def __init__(self, batches: Iterator[Batch], rate: Rate) -> None:
        self.lock = threading.Lock()
        self.rate = rate
        self._batches = batches
        self._connections: list[NbdConnection] = []
        self._failure: PullbackError | None = None
        self.stopped = False

    def run(self, lines: Sequence[Callable[[Batch, Connections], None]]) -> None:
        """Carry out all batches, with a thread for each of ``lines``.

        Raises the first failure, after all have ended; what fails after it fails because all connections were cut.
        """
        with ThreadPoolExecutor(len(lines), thread_name_prefix="pullback-read") as pool:
            workers = [pool.submit(self._work, line) for line in lines]
        if self._failure is not None:
            raise self._failure
        for worker in workers:
            worker.result()

    def stop(self) -> None:
        """Make all threads end soon, from any thread; ``run`` then raises or returns early."""
        with self.lock:
            self.stopped = True
            for connection in self._connections:
                connection.abort()
        self.rate.stop()

    def _next(self) -> Batch | None:
        with self.lock:
            return None if self.stopped else next(self._batches, None)

    def _work(self, line: Callable[[Batch, Connections], None]) -> None:
        connections = Connections(self.opened)
        try:
            while (batch := self._next()) is not None:
                line(batch, connections)
        except PullbackError as error:
            with self.lock:
                self._failure = self._failure or error
            self.stop()
        finally:
            connections.close()

    def opened(self, connection: NbdConnection) -> None:
        """Remember a connection, to cut it when all is to end."""
        with self.lock:
            self._connections.append(connection)


class Connections:
    """One thread's connections, opened when they are needed."""

    def __init__(self, opened: Callable[[NbdConnection], None]) -> None:
        self._opened = opened
        self._open: dict[str, NbdConnection] = {}

    def to(self, disk: FrozenDisk) -> NbdConnection:
        """The connection to a disk's export."""
        return self._to(disk.address, disk.export)

    def to_saved(self, disk: FrozenDisk) -> NbdConnection:
        """The connection to the export of a disk's scratch, with the map of what is saved."""
        return self._to(disk.address, saved_name(disk.export), _SAVED)

    def _to(self, address: Address, export: str, *contexts: str) -> NbdConnection:
        found = self._open.get(export)
        if found is None:
            found = self._open[export] = NbdConnection.connect(address, export, contexts=contexts)
            self._opened(found)
        return found

    def close(self) -> None:
        """Close all."""
        for connection in self._open.values():
            connection.close()


def cut(span: Span, unit: int) -> Iterator[Span]:
    """Pieces that end at multiples of ``unit``, as chunks do."""
    offset = span.offset
    while offset < span.end:
        end = min(align_up(offset + 1, unit), span.end)
        yield Span(offset, end - offset)
        offset = end


def submit(connection: NbdConnection, window: Window, unit: int, rate: Rate) -> list[int]:
    """Ask for what fills the window, by requests that cross no multiple of ``unit``, when ``rate`` lets them."""
    view, begin = memoryview(window.buffer), window.span.offset
    reads = [
        (piece.offset, view[piece.offset - begin : piece.end - begin]) for piece in cut(window.span, rate.piece(unit))
    ]
    cookies = []
    # All at once, or each when its bytes are paid for.
    for several in [[one] for one in reads] if rate.limited else [reads]:
        rate.take(sum(len(part) for _, part in several))
        cookies += connection.submit_reads(several)
    window.requests = len(cookies)
    return cookies


class Asking:
    """How one thread asks for the windows of ``spans``: in long requests where they are answered right.

    Windows that are full are right unless ``doubtful`` names them; that is one more request for all of them, which
    ``looks_again`` says is made.
    """

    def __init__(self, disk: FrozenDisk, spans: Sequence[Span], connections: Connections, rate: Rate) -> None:
        self._disk = disk
        self._rate = rate
        self._connection = connections.to(disk)
        # Below a limit, long requests take long, and asking twice counts twice.
        long = any(span.length > _WORTH_A_LOOK for span in spans)
        careful = disk.unit < REQUEST and not rate.limited and long
        self._map = connections.to_saved(disk) if careful else None
        # One that is asked for at once needs no look before it.
        self._known = self._saved(_around(spans)) if sum(span.length for span in spans) > REQUEST else []

    def submit(self, window: Window) -> list[int]:
        """Ask for what fills the window; the cookies of its requests."""
        window.wide = self.looks_again and window.span.length > _WORTH_A_LOOK and not _meets(self._known, window.span)
        return submit(self._connection, window, REQUEST if window.wide else self._disk.unit, self._rate)

    @property
    def looks_again(self) -> bool:
        """Whether ``doubtful`` has to ask."""
        return self._map is not None

    def doubtful(self, windows: Sequence[Window]) -> list[Window]:
        """Those of the full windows whose answers may be wrong: to be submitted once more."""
        wide = [window for window in windows if window.wide]
        if not wide:
            return []
        self._known = merged(sorted(self._known + self._saved(_around([window.span for window in wide]))))
        return [window for window in wide if _meets(self._known, window.span)]

    def _saved(self, span: Span) -> list[Span]:
        """What of a range was saved by now."""
        if self._map is None:
            return []
        try:
            return merged(self._map.marked(_SAVED, span.offset, span.length, FLAG_DIRTY))
        except NbdRefused as error:
            raise read_failed(self._disk.target, error) from error


def _around(spans: Sequence[Span]) -> Span:
    """From the first byte of any to the last of any."""
    begin = min(span.offset for span in spans)
    return Span(begin, max(span.end for span in spans) - begin)


def _meets(spans: Sequence[Span], span: Span) -> bool:
    return any(one.offset < span.end and span.offset < one.end for one in spans)


def wait(connection: NbdConnection, disk: FrozenDisk) -> int:
    """The cookie of a request that is done; SnapshotBroken when the frozen view was lost."""
    try:
        return connection.wait()
    except NbdRefused as error:
        raise read_failed(disk.target, error) from error


def read_failed(target: str, error: NbdRefused) -> PullbackError:
    """What a failed read of a frozen disk means: QEMU answers EINVAL (EACCES in its own words) once it is broken."""
    if error.errno in (errno.EINVAL, errno.EACCES, errno.EPERM):
        return SnapshotBroken.of_disk(target)
    return error
