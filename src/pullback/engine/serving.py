# SPDX-License-Identifier: Apache-2.0
"""Serving a backup: its disks as read-only NBD exports of our own server, until it is stopped.

The repository's lock is held meanwhile, so that no prune takes away what a reader will ask for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pullback.engine.chunk_cache import ChunkCache
from pullback.engine.cores import cores
from pullback.engine.events import Emit, Note, ServedExport, Serving
from pullback.engine.listening import check_address, dead_socket
from pullback.engine.listing import manifest_of
from pullback.engine.reader_lock import acquire_for_reading, release_after_reading
from pullback.engine.served_disk import ServedDisk
from pullback.engine.walking import walk
from pullback.engine.workdir import work_directory
from pullback.errors import Damaged, PullbackError, RepositoryError, RepositoryLocked, UsageError
from pullback.model.manifest import DiskEntry, Manifest
from pullback.model.units import MIB
from pullback.nbd.address import Address, UnixAddress
from pullback.nbd.server import NbdServer
from pullback.plan.restore import choose_disks
from pullback.qemu.monitor import Peer
from pullback.repository.blob import BlobId
from pullback.repository.locks import RepositoryLock
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot

CACHE_SIZE = 64 * MIB

#: Requests answered at a time: of those that wait for a store, and for one another's chunks, there have to be some.
_WORKERS = 4 * cores()
_AHEAD = max(4, cores())
#: Seconds between two looks at whether the repository's lock is still ours.
_LOOK_EVERY = 5.0


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """What to serve where.

    ``address`` may be a TCP one with port 0 (a free one is taken), or None for a unix socket in a new directory that
    only we may enter.  ``tls`` is a directory with ca-cert.pem, server-cert.pem and server-key.pem; TCP without it
    needs ``insecure``.  ``cache_size`` is bytes of chunks that are held.
    """

    backup: str
    disks: tuple[str, ...] = ()
    address: Address | None = None
    tls: str | None = None
    insecure: bool = False
    cache_size: int = CACHE_SIZE
    lock_retry: float = 0.0


@dataclass(frozen=True, slots=True)
class Served:
    """What was served: the backup's id, bytes of chunks loaded from the repository, and for how long."""

    backup: str
    bytes_loaded: int
    seconds: float


class _Everything:
    """A container of all trees: ``walk`` then loads none of the segments."""

    def __contains__(self, tree: object) -> bool:
        return True


class Serve:
    """One server; :meth:`run` serves until :meth:`stop`, which is to be called in the same event loop."""

    def __init__(self, request: ServeRequest, open_repository: Callable[[], Repository], emit: Emit) -> None:
        self._request = request
        self._open = open_repository
        self._emit = emit
        self._stopping = asyncio.Event()
        self._lock: RepositoryLock | None = None

    def stop(self) -> None:
        """End soon: ``run`` returns if it serves already, and raises otherwise."""
        self._stopping.set()
        if self._lock is not None:
            self._lock.give_up()

    async def run(self) -> Served:
        """Serve; a Serving event says when clients can connect.

        UsageError, BackupNotFound, Damaged and RepositoryError before that.  RepositoryLocked if the lock is lost
        later.  What cannot be read of a disk fails the requests for it only, and is told once.
        """
        begin = time.monotonic()
        request = self._request
        if request.address is not None:
            check_address(request.address, request.tls, request.insecure)
        if isinstance(request.address, UnixAddress):
            dead_socket(Path(request.address.path))
        tls = _tls_context(request.tls) if request.tls is not None else None
        repository = await asyncio.to_thread(self._open)
        self._lock = repository.lock(retry=request.lock_retry, waiting=lambda note: self._emit(Note(note)))
        self._check_stopped()
        await asyncio.to_thread(acquire_for_reading, self._lock, "Serving", self._emit)
        cache = ChunkCache(repository, request.cache_size, _AHEAD)
        try:
            snapshot, manifest, disks = await asyncio.to_thread(self._disks, repository, cache)
            self._check_stopped()
            descriptions = dict.fromkeys(disks, f"backup {snapshot.short_id} of {manifest.domain}, {manifest.time}")
            async with self._listening(disks, descriptions, tls) as address:
                exports = [
                    ServedExport(name, name, disk.size, address.uri(name, tls=tls is not None))
                    for name, disk in disks.items()
                ]
                self._emit(Serving(snapshot.id, tuple(exports)))
                await self._until_stopped(self._lock)
        finally:
            await asyncio.to_thread(cache.close)
            await asyncio.to_thread(release_after_reading, self._lock, self._emit)
        return Served(snapshot.id, cache.bytes_loaded, time.monotonic() - begin)

    def _check_stopped(self) -> None:
        if self._stopping.is_set():
            raise PullbackError("serving was interrupted before it began")

    async def _until_stopped(self, lock: RepositoryLock) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _LOOK_EVERY)
            try:
                lock.check()
            except RepositoryLocked as error:
                raise RepositoryLocked(
                    error.what,
                    means="Serving ended: a prune may take away what readers need. The backup itself is untouched.",
                    todo="Serve it again.",
                ) from error

    # -- the backup -----------------------------------------------------------------------------------------------

    def _disks(self, repository: Repository, cache: ChunkCache) -> tuple[Snapshot, Manifest, dict[str, ServedDisk]]:
        snapshot = repository.find(self._request.backup)
        manifest, disks = served_disks(repository, cache, snapshot, self._request.disks, self._tell)
        return snapshot, manifest, disks

    def _tell(self, target: str, offset: int, length: int, error: RepositoryError) -> None:
        self._emit(
            Note(
                f"{target}: bytes {offset:,}-{offset + length - 1:,} cannot be read: {error.what}. Who reads there"
                " gets an input/output error; everything else is served."
            )
        )

    # -- the server -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _listening(
        self, disks: dict[str, ServedDisk], descriptions: dict[str, str], tls: ssl.SSLContext | None
    ) -> AsyncIterator[Address]:
        with _place(self._request.address) as address:
            async with NbdServer(disks, tls=tls, workers=_WORKERS, descriptions=descriptions) as server:
                try:
                    if isinstance(address, UnixAddress):
                        _remove_dead(Path(address.path))
                    yield await server.listen(address)
                except OSError as error:
                    raise UsageError(
                        f"cannot listen at {address}: {error.strerror or error}", means="Nothing is served."
                    ) from error


def served_disks(
    repository: Repository,
    cache: ChunkCache,
    snapshot: Snapshot,
    wanted: Sequence[str],
    told: Callable[[str, int, int, RepositoryError], None],
) -> tuple[Manifest, dict[str, ServedDisk]]:
    """A backup's manifest, and its disks (all, or those ``wanted``) as backends that share ``cache``.

    ``told`` hears of bytes that cannot be read: of which disk, offset, length and why.  UsageError for a disk that it
    does not hold, Damaged where manifest or directories cannot be read.
    """
    manifest = manifest_of(repository, snapshot)
    if not manifest.segment_size:
        raise Damaged(f"The manifest of the backup {snapshot.short_id} says that segments have no bytes")
    chosen = choose_disks(manifest, wanted)
    trees = _segments(repository, snapshot, chosen)
    disks = {}
    for disk in chosen:
        of_disk = partial(told, disk.target)
        size = disk.virtual_size
        disks[disk.target] = ServedDisk(repository, cache, size, manifest.segment_size, trees[disk.target], of_disk)
    return manifest, disks


def _segments(repository: Repository, snapshot: Snapshot, disks: Sequence[DiskEntry]) -> dict[str, list[BlobId]]:
    """The trees of each disk's segments, in order; Damaged where a disk's own tree cannot be read."""
    found: dict[str, dict[int, BlobId]] = {disk.target: {} for disk in disks}
    for piece in walk(repository, snapshot, _Everything()):
        if piece.wrong and (piece.disk is None or piece.disk in found):
            raise Damaged(
                f"The backup {snapshot.short_id} cannot be served: {piece.wrong}",
                means="Nothing is served.",
                todo="Choose other disks with --disk, or another backup.",
            )
        if piece.number is not None and piece.disk in found:
            found[piece.disk][piece.number] = piece.tree
    for target, numbered in found.items():
        if sorted(numbered) != list(range(len(numbered))):
            raise Damaged(f"Segments of {target} are missing from the backup {snapshot.short_id}")
    return {target: [numbered[number] for number in sorted(numbered)] for target, numbered in found.items()}


@contextmanager
def _place(address: Address | None) -> Iterator[Address]:
    """The address, or a socket in a new directory that only we may enter."""
    if address is not None:
        yield address
        return
    with work_directory(_runtime_directory(), Peer(os.getpid(), os.geteuid(), os.getegid())) as directory:
        yield UnixAddress(str(directory / "nbd"))


def _runtime_directory() -> str:
    places = ("/run", f"/run/user/{os.geteuid()}", "/tmp")
    return next((place for place in places if os.access(place, os.W_OK | os.X_OK)), "/tmp")


def _remove_dead(path: Path) -> None:
    """Remove the socket of a server that was killed; UsageError for anything else that lies there."""
    if dead_socket(path):
        path.unlink(missing_ok=True)


def _tls_context(directory: str) -> ssl.SSLContext:
    """A server's context that wants a client's certificate of the same authority, as QEMU's exports do."""
    place = Path(directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(place / "server-cert.pem", place / "server-key.pem")
        context.load_verify_locations(place / "ca-cert.pem")
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(
            f"the certificates in {directory} cannot be used: {error.strerror or error}",
            todo="It needs ca-cert.pem, server-cert.pem and server-key.pem.",
        ) from error
    return context
