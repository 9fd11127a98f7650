# SPDX-License-Identifier: Apache-2.0
"""Chunks of a repository for readers that ask for them in any order, several at a time.

    get ──► held? ──► on its way? wait for it ──► load it, verified
    fetch, fetch_ahead ──► those that are neither, one read for neighbours in a pack

Plain chunks are held up to ``capacity`` bytes, the ones used last.  A chunk is loaded once, however many threads ask.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from pullback.errors import PullbackError, RepositoryError
from pullback.model.units import MIB
from pullback.repository.blob import BlobId, BlobKind, PackId
from pullback.repository.repository import Repository

#: Plain bytes that one thread loads ahead at a time: one read of a pack if they are neighbours there.
_AHEAD = 2 * MIB

#: What loaded a chunk, or None if whoever needs it has to try by himself.
_Flight = Future[bytes | None]


class ChunkCache:
    """At most ``capacity`` bytes of chunks are held, besides those under way; ``threads`` load ahead."""

    def __init__(self, repository: Repository, capacity: int, threads: int) -> None:
        self.capacity = capacity
        self.bytes_loaded = 0
        self._repository = repository
        self._threads = threads
        self._ahead = ThreadPoolExecutor(threads, thread_name_prefix="pullback-ahead")
        self._ahead_jobs = 0
        self._closed = False
        self._lock = threading.Lock()
        self._chunks: OrderedDict[BlobId, bytes] = OrderedDict()
        self._held = 0
        self._flights: dict[BlobId, _Flight] = {}

    def get(self, blob: BlobId) -> bytes:
        """The verified plain bytes of a chunk; raises Damaged, and RepositoryError where the store fails."""
        while True:
            with self._lock:
                if (data := self._chunks.get(blob)) is not None:
                    self._chunks.move_to_end(blob)
                    return data
                if (flight := self._flights.get(blob)) is None:
                    self._flights[blob] = Future()
                    break
            if (data := flight.result()) is not None:
                return data
        try:
            data = self._repository.load_blob(BlobKind.DATA, blob)
        except PullbackError as error:
            # All who wait are told: a blob that cannot be read takes long to give up.
            self._land(blob, error)
            raise
        except BaseException:
            self._land(blob, None)
            raise
        self._land(blob, data)
        return data

    def fetch(self, blobs: Iterable[BlobId]) -> None:
        """Load those that are not here yet, in as few reads as is sensible; what cannot be read is left to ``get``."""
        self._load(self._claim(blobs))

    def fetch_ahead(self, blobs: Sequence[tuple[BlobId, int]]) -> None:
        """Have other threads do so for these blobs with their lengths; what they have no time for is left out."""
        job: list[BlobId] = []
        size = 0
        for blob, length in blobs:
            if blob in self._chunks or blob in self._flights:
                continue
            job.append(blob)
            size += length
            if size >= _AHEAD:
                if not self._submit(job):
                    return
                job, size = [], 0

    def close(self) -> None:
        """Wait for what is loaded ahead, and load nothing ahead any more."""
        with self._lock:
            self._closed = True
        self._ahead.shutdown()

    def _submit(self, blobs: list[BlobId]) -> bool:
        with self._lock:
            # No queue: a claimed chunk is one that a thread works on, so that nobody waits for long.
            if self._closed or self._ahead_jobs >= self._threads:
                return False
            self._ahead_jobs += 1
        claimed = self._claim(blobs)
        try:
            self._ahead.submit(self._load_ahead, claimed)
        except RuntimeError:  # closed meanwhile, or no thread can be started: then a busy one still gets the list
            mine = claimed.copy()
            claimed.clear()
            self._load_nothing(mine)
        return True

    def _load_ahead(self, claimed: list[BlobId]) -> None:
        try:
            self._load(claimed)
        finally:
            with self._lock:
                self._ahead_jobs -= 1

    def _claim(self, blobs: Iterable[BlobId]) -> list[BlobId]:
        """Those that nobody has or loads; they are ours to load from here on."""
        with self._lock:
            mine = [blob for blob in dict.fromkeys(blobs) if blob not in self._chunks and blob not in self._flights]
            for blob in mine:
                self._flights[blob] = Future()
        return mine

    def _load(self, claimed: list[BlobId]) -> None:
        left = dict.fromkeys(claimed)
        try:
            for pack, blobs in self._by_pack(claimed).items():
                try:
                    for blob, data in self._repository.load_blobs_of_pack(pack, blobs):
                        self._land(blob, data)
                        left.pop(blob)
                except RepositoryError:
                    continue  # whoever needs the chunk asks for it again, and is told
        finally:
            self._load_nothing(left)

    def _load_nothing(self, claimed: Iterable[BlobId]) -> None:
        for blob in claimed:
            self._land(blob, None)

    def _by_pack(self, blobs: Iterable[BlobId]) -> dict[PackId, list[BlobId]]:
        packs: dict[PackId, list[BlobId]] = {}
        for blob in blobs:
            if (place := self._repository.index.lookup(BlobKind.DATA, blob)) is not None:
                packs.setdefault(place.pack_id, []).append(blob)
        return packs

    def _land(self, blob: BlobId, found: bytes | PullbackError | None) -> None:
        with self._lock:
            flight = self._flights.pop(blob)
            if isinstance(found, bytes):
                self.bytes_loaded += len(found)
                self._chunks[blob] = found
                self._held += len(found)
                while self._held > self.capacity:
                    self._held -= len(self._chunks.popitem(last=False)[1])
        if isinstance(found, PullbackError):
            flight.set_exception(found)
        else:
            flight.set_result(found)
