# SPDX-License-Identifier: Apache-2.0
"""Threads over the images of a restore: each has a connection of its own to every disk it comes to.

The first failure ends them all.  Whatever is next is done by whoever is free, of whichever disk: so all disks of a
restore share the threads, and memory is bounded by their number.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from pullback.engine.cores import cores
from pullback.engine.events import Emit, Progress
from pullback.errors import PullbackError, RestoreError
from pullback.nbd.address import UnixAddress
from pullback.nbd.blocking import NbdConnection

_PROGRESS_EVERY = 0.2
_LARGE = 256 << 20

Item = TypeVar("Item")


class Connections:
    """One thread's connections, made when they are needed."""

    def __init__(self, work: Work[Item]) -> None:
        self._work = work
        self.open: dict[str, NbdConnection] = {}

    def to(self, target: str) -> NbdConnection:
        """The connection to a disk."""
        if target not in self.open:
            self.open[target] = self._work.connect(target)
        return self.open[target]


class Work(Generic[Item]):
    """Work that threads share; a subclass says what is next (under the lock) and carries it out.

    ``done`` of ``total`` bytes may be looked at while it runs.
    """

    name = ""
    contexts: Sequence[str] = ()

    def __init__(self, address: UnixAddress, total: int) -> None:
        self.lock = threading.RLock()
        self.done = 0
        self.total = total
        self._address = address
        self._connections: list[NbdConnection] = []
        self._failure: PullbackError | None = None
        self._stop = False

    def items(self) -> Iterator[Item]:
        """What there is to do; taken by one thread at a time."""
        raise NotImplementedError

    def carry(self, item: Item, connections: Connections) -> None:
        """Do one thing."""
        raise NotImplementedError

    def finish(self, connections: Connections) -> None:
        """Complete what a thread still has under way, when there is nothing more to do."""

    def explain(self, error: PullbackError) -> PullbackError:
        """The error that the user sees in place of this one."""
        return error

    def stop(self) -> None:
        """End soon, from any thread; ``run`` then raises."""
        self._fail(RestoreError("the restore was interrupted"))

    def _fail(self, error: PullbackError) -> None:
        with self.lock:
            self._stop = True
            self._failure = self._failure or error
            for connection in self._connections:
                connection.abort()

    def run(self, emit: Emit) -> None:
        """Do everything; raises the first failure when all threads have ended."""
        items = self.items()
        threads = cores()
        with ThreadPoolExecutor(threads, thread_name_prefix=f"pullback-{self.name}") as pool:
            workers = [pool.submit(self._work, items) for _ in range(threads)]
            emit(Progress(self.name, self.done, self.total))
            while wait(workers, _PROGRESS_EVERY if self.total > _LARGE else 0.02).not_done:
                emit(Progress(self.name, self.done, self.total))
        if self._failure is not None:
            raise self._failure
        for worker in workers:
            worker.result()
        emit(Progress(self.name, self.total, self.total))

    def connect(self, target: str) -> NbdConnection:
        """A new connection to a disk, cut when the work ends early."""
        connection = NbdConnection.connect(self._address, target, contexts=self.contexts)
        with self.lock:
            self._connections.append(connection)
            if self._stop:
                connection.abort()
        return connection

    def _next(self, items: Iterator[Item]) -> Item | None:
        with self.lock:
            return None if self._stop else next(items, None)

    def _work(self, items: Iterator[Item]) -> None:
        connections = Connections(self)
        try:
            while (item := self._next(items)) is not None:
                self.carry(item, connections)
            self.finish(connections)
        except PullbackError as error:
            self._fail(self.explain(error))
        finally:
            for connection in connections.open.values():
                connection.close()
