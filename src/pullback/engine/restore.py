# SPDX-License-Identifier: Apache-2.0
"""Restoring a backup to new images: packs in order, decrypted, verified, written over NBD into QEMU's own drivers.

An image has its name only when it is whole: until then it is ``DISK.FORMAT.part``, and what died leaves only that.
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pullback.engine.events import Emit, Note, Progress
from pullback.engine.workdir import DEFAULT_BASE, work_directory
from pullback.errors import Damaged, NbdRefused, PullbackError, RepositoryError, RestoreError, TargetExists
from pullback.model.manifest import DiskEntry, Manifest, parse_manifest
from pullback.nbd.address import UnixAddress
from pullback.nbd.blocking import NbdConnection
from pullback.plan.pull import segment_count
from pullback.plan.restore import PackRead, Place, choose_disks, pack_reads, windows
from pullback.qemu.monitor import Peer
from pullback.qemu.storage_daemon import StorageDaemon, qemu_program
from pullback.repository.blob import BlobId, BlobKind, PackId, blob_id
from pullback.repository.layout import SEGMENT, StoredBackup
from pullback.repository.locks import RepositoryLock
from pullback.repository.repository import Repository
from pullback.repository.snapshots import LATEST, Snapshot, find_snapshot

ImageFormat = Literal["qcow2", "raw"]

#: Writes under way on one connection.
_IN_FLIGHT = 8
_PROGRESS_EVERY = 0.2


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """What to restore where: ``to`` is a directory that gets ``DISK.qcow2`` (or ``.raw``) for each disk."""

    backup: str
    to: Path
    disks: tuple[str, ...] = ()
    format: ImageFormat = "qcow2"
    lock_retry: float = 0.0


@dataclass(frozen=True, slots=True)
class RestoredDisk:
    """One image that is whole; ``bytes_written`` leaves out what is zero."""

    target: str
    path: str
    virtual_size: int
    bytes_written: int


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """Which backup was restored, and the images."""

    backup: str
    manifest: Manifest
    disks: tuple[RestoredDisk, ...]
    seconds: float


class Restore:
    """One restore; :meth:`run` blocks, :meth:`stop` ends it early from another thread."""

    def __init__(self, request: RestoreRequest, open_repository: Callable[[], Repository], emit: Emit) -> None:
        self._request = request
        self._open = open_repository
        self._emit = emit
        self._write: _Write | None = None
        self._lock: RepositoryLock | None = None
        self._stopped = False

    def stop(self) -> None:
        """Make ``run`` fail soon; nothing but finished images of an earlier run is left."""
        self._stopped = True
        if self._lock is not None:
            self._lock.give_up()
        if self._write is not None:
            self._write.stop()

    def run(self) -> RestoreResult:
        """Restore, all disks or none.

        BackupNotFound, TargetExists, UsageError before anything is written; RestoreError, Damaged or TransferError
        later, and then no image of this run is left.
        """
        begin = time.monotonic()
        repository = self._open()
        self._lock = repository.lock(retry=self._request.lock_retry, waiting=lambda note: self._emit(Note(note)))
        if self._stopped:
            self._lock.give_up()
        with self._locked(self._lock):
            snapshot = self._find(repository)
            stored = StoredBackup(repository, snapshot)
            manifest = parse_manifest(stored.manifest_bytes())
            disks = choose_disks(manifest, self._request.disks)
            with _targets(self._request, disks) as parts:
                written = self._fill(repository, stored, disks, parts)
        done = tuple(
            RestoredDisk(disk.target, str(_final(self._request, disk)), disk.virtual_size, written[disk.target])
            for disk in disks
        )
        return RestoreResult(snapshot.id, manifest, done, time.monotonic() - begin)

    def _find(self, repository: Repository) -> Snapshot:
        """The backup asked for; a broken snapshot file is in the way only of what is asked for as the newest."""
        broken: list[Damaged] = []
        known = repository.snapshots(broken=broken.append)
        if broken and self._request.backup.rpartition("@")[2] == LATEST:
            raise Damaged(
                f"it cannot be told which backup is the newest: {broken[0].what}",
                means="Nothing was written.",
                todo="Name a backup by its id: pullback list shows those that can be read.",
            )
        try:
            found = find_snapshot(known, self._request.backup)
        except RepositoryError as error:
            raise (broken[0] if broken else error) from None  # it may be the broken one
        for damage in broken:
            self._emit(Note(f"{damage.what}."))
        return found

    @contextmanager
    def _locked(self, lock: RepositoryLock) -> Iterator[None]:
        """Hold the lock; where none can be written (a full or read-only file system) say so and do without.

        The worst that a prune beside us can do is to make the restore fail: every blob is verified.
        """
        try:
            lock.acquire()
        except RepositoryError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            self._emit(Note(f"Restoring without a lock, so nothing may prune the repository meanwhile: {error.what}."))
        try:
            yield
        finally:
            lock.release()

    def _fill(
        self, repository: Repository, stored: StoredBackup, disks: Sequence[DiskEntry], parts: dict[str, Path]
    ) -> dict[str, int]:
        for disk in disks:
            _create_image(parts[disk.target], self._request.format, disk.virtual_size)
        ourselves = Peer(os.getpid(), os.geteuid(), os.getegid())
        with (
            work_directory(DEFAULT_BASE, ourselves) as directory,
            StorageDaemon(*_daemon_options(parts, self._request.format), directory) as daemon,
        ):
            self._write = _Write(repository, stored, disks, UnixAddress(daemon.socket))
            if self._stopped:
                self._write.stop()
            self._write.run(os.cpu_count() or 1, self._emit)
            return self._write.written


def _final(request: RestoreRequest, disk: DiskEntry) -> Path:
    return request.to / f"{disk.target}.{request.format}"


@contextmanager
def _targets(request: RestoreRequest, disks: Sequence[DiskEntry]) -> Iterator[dict[str, Path]]:
    """Temporary names for the images; they get their own when the block ends well, and go when it does not."""
    made = not request.to.exists()
    try:
        request.to.mkdir(parents=True, exist_ok=True)
        handle = os.open(request.to, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise RestoreError(f"cannot restore into {request.to}: {error.strerror}") from error
    parts = {disk.target: request.to / f"{disk.target}.{request.format}.part" for disk in disks}
    try:
        # Until the directory is ours, what is in it is somebody else's.
        _claim(handle, request, disks)
        finished = False
        try:
            yield parts
            _publish(request, disks, parts, handle)
            finished = True
        finally:
            if not finished:
                _discard(parts, request.to if made else None)
    finally:
        os.close(handle)


def _publish(request: RestoreRequest, disks: Sequence[DiskEntry], parts: dict[str, Path], handle: int) -> None:
    """Give the images their names, all of them or none."""
    done: list[Path] = []
    try:
        for disk in disks:
            _sync(parts[disk.target])
        for disk in disks:
            parts[disk.target].rename(_final(request, disk))
            done.append(_final(request, disk))
        os.fsync(handle)
    except OSError as error:
        for path in done:
            path.unlink(missing_ok=True)
        raise RestoreError(f"cannot store the images in {request.to}: {error.strerror}") from error


def _claim(handle: int, request: RestoreRequest, disks: Sequence[DiskEntry]) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TargetExists(f"another restore is writing into {request.to}") from error
    existing = [str(path) for disk in disks if (path := _final(request, disk)).exists()]
    if existing:
        raise TargetExists(
            f"{', '.join(existing)} exists already",
            means="Nothing was written.",
            todo="Name another directory with --to, or move the file away.",
        )


def _discard(parts: dict[str, Path], directory: Path | None) -> None:
    for path in parts.values():
        with suppress(OSError):
            path.unlink()
    if directory is not None:
        with suppress(OSError):
            directory.rmdir()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _create_image(path: Path, image_format: ImageFormat, size: int) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RestoreError(f"cannot replace {path}, left by an earlier restore: {error.strerror}") from error
    done = subprocess.run(
        [qemu_program("qemu-img"), "create", "-q", "-f", image_format, str(path), str(size)],
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        raise RestoreError(f"qemu-img cannot create {path}: {done.stderr.decode(errors='replace').strip()}")
    # A disk holds what its domain kept to itself.
    path.chmod(0o600)


def _daemon_options(
    parts: dict[str, Path], image_format: ImageFormat
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    blockdevs: list[dict[str, object]] = []
    exports: list[dict[str, object]] = []
    for number, (target, path) in enumerate(parts.items()):
        file = {"driver": "file", "filename": str(path.absolute())}
        blockdevs.append({"driver": image_format, "node-name": f"disk{number}", "file": file})
        exports.append(
            {"type": "nbd", "id": f"disk{number}", "node-name": f"disk{number}", "name": target, "writable": True}
        )
    return blockdevs, exports


class _Write:
    """Reads packs and writes blobs to where they belong; one thread and one connection per core and disk."""

    def __init__(
        self, repository: Repository, stored: StoredBackup, disks: Sequence[DiskEntry], address: UnixAddress
    ) -> None:
        self._repository = repository
        self._stored = stored
        self._disks = disks
        self._address = address
        self._lock = threading.Lock()
        self._reads = self._all_reads()
        self._zero_ids: dict[int, BlobId] = {}
        self._connections: list[NbdConnection] = []
        self._failure: PullbackError | None = None
        self._stop = False
        self.written = {disk.target: 0 for disk in disks}
        self.done = 0
        self.total = sum(disk.virtual_size for disk in disks)

    def stop(self) -> None:
        """End soon, from any thread; ``run`` then raises."""
        with self._lock:
            self._stop = True
            self._failure = self._failure or RestoreError("the restore was interrupted")
            for connection in self._connections:
                connection.abort()

    def run(self, threads: int, emit: Emit) -> None:
        """Write everything and flush; raises the first failure when all threads have ended."""
        with ThreadPoolExecutor(threads, thread_name_prefix="pullback-restore") as pool:
            workers = [pool.submit(self._work) for _ in range(threads)]
            while not all(worker.done() for worker in workers):
                emit(Progress("restore", self.done, self.total))
                time.sleep(_PROGRESS_EVERY if self.total > SEGMENT else 0.02)
        if self._failure is not None:
            raise self._failure
        for worker in workers:
            worker.result()
        emit(Progress("restore", self.total, self.total))

    def _all_reads(self) -> Iterator[PackRead[PackId, BlobId]]:
        for window in windows(self._segments()):
            yield from pack_reads(window, self._pack_of, self._is_zero)
            self.done += sum(length for blob, _, length in window if self._is_zero(blob, length))

    def _segments(self) -> Iterator[tuple[Place, list[tuple[BlobId, int]]]]:
        for disk in self._disks:
            segments = self._stored.segments(disk.target)
            if sum(segment.size for segment in segments) != disk.virtual_size:
                raise Damaged(f"the segments of {disk.target} do not add up to the disk's {disk.virtual_size} bytes")
            if segments and len(segments) != segment_count(disk.virtual_size):
                raise Damaged(f"{disk.target} has {len(segments)} segments")
            for segment in segments:
                yield Place(disk.target, segment.number * SEGMENT), self._stored.content(segment)

    def _pack_of(self, blob: BlobId) -> PackId:
        place = self._repository.index.lookup(BlobKind.DATA, blob)
        if place is None:
            raise Damaged(f"data blob {blob.hex()} is missing from the repository")
        return place.pack_id

    def _is_zero(self, blob: BlobId, length: int) -> bool:
        if length not in self._zero_ids:
            self._zero_ids[length] = blob_id(bytes(length))
        return blob == self._zero_ids[length]

    def _next(self) -> PackRead[PackId, BlobId] | None:
        with self._lock:
            return None if self._stop else next(self._reads, None)

    def _work(self) -> None:
        connections: dict[str, NbdConnection] = {}
        try:
            while (read := self._next()) is not None:
                self._carry(read, connections)
            for connection in connections.values():
                connection.flush()
        except PullbackError as error:
            with self._lock:
                self._failure = self._failure or _no_space(error)
            self.stop()
        finally:
            for connection in connections.values():
                connection.close()

    def _carry(self, read: PackRead[PackId, BlobId], connections: dict[str, NbdConnection]) -> None:
        for blob, data in self._repository.load_blobs_of_pack(read.pack, read.places):
            for place in read.places[blob]:
                connection = self._connection(place.target, connections)
                connection.submit_write(place.offset, data)
                if connection.pending >= _IN_FLIGHT:
                    connection.wait()
                with self._lock:
                    self.written[place.target] += len(data)
                    self.done += len(data)
        for connection in connections.values():
            while connection.pending:
                connection.wait()

    def _connection(self, target: str, connections: dict[str, NbdConnection]) -> NbdConnection:
        if target not in connections:
            connections[target] = NbdConnection.connect(self._address, target)
            with self._lock:
                self._connections.append(connections[target])
        return connections[target]


def _no_space(error: PullbackError) -> PullbackError:
    if isinstance(error, NbdRefused) and error.errno == errno.ENOSPC:
        return RestoreError(
            "there is no space left for the images",
            means="No image was left behind.",
            todo="Make room and restore again.",
        )
    return error
