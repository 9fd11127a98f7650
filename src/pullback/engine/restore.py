# SPDX-License-Identifier: Apache-2.0
"""Restoring a backup to new images: packs in order, decrypted, verified, written over NBD into QEMU's own drivers.

An image has its name only when it is whole: until then it is ``DISK.FORMAT.partial``, and a restore that was cut short
goes on from there when it is run again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pullback.engine.events import Emit, Note
from pullback.engine.listing import manifest_of
from pullback.engine.rate import Rate
from pullback.engine.reader_lock import acquire_for_reading, release_after_reading
from pullback.engine.rereading import Rereading
from pullback.engine.restoring import Writing
from pullback.engine.source import DiskSource
from pullback.engine.targets import Target, claimed, free_room, publish
from pullback.engine.workdir import DEFAULT_BASE, work_directory
from pullback.errors import PullbackError, RestoreError
from pullback.model.extents import Span
from pullback.model.manifest import Manifest
from pullback.model.unfinished import Unfinished
from pullback.model.units import human_bytes
from pullback.nbd.address import UnixAddress
from pullback.plan.restore import choose_disks
from pullback.plan.target import NOTHING_WRITTEN, Act
from pullback.qemu.monitor import Peer
from pullback.qemu.storage_daemon import StorageDaemon, file_node
from pullback.repository.layout import StoredBackup
from pullback.repository.locks import RepositoryLock
from pullback.repository.repository import Repository

ImageFormat = Literal["qcow2", "raw"]


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """What to restore where: ``to`` is a directory that gets ``DISK.qcow2`` (or ``.raw``) for each disk.

    ``overwrite`` replaces images that are there, once the new ones are whole.  ``verify`` reads the new ones again.
    ``keep_going`` leaves zeroes where the backup cannot be read.  ``check_space`` refuses what does not fit.
    ``limit_rate`` is bytes a second to write, at most; 0 for no limit, UsageError below 64 KiB.
    """

    backup: str
    to: Path
    disks: tuple[str, ...] = ()
    format: ImageFormat = "qcow2"
    lock_retry: float = 0.0
    overwrite: bool = False
    verify: bool = False
    keep_going: bool = False
    check_space: bool = True
    limit_rate: int = 0


@dataclass(frozen=True, slots=True)
class RestoredDisk:
    """One image; ``bytes_written`` leaves out what is zero, and ``bytes_kept``, written by an interrupted restore.

    ``lost`` are the ranges that the backup did not give back, zeroes in the image: none unless ``keep_going``.
    """

    target: str
    path: str
    virtual_size: int
    bytes_written: int
    bytes_kept: int = 0
    lost: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """Which backup was restored, and the images; ``verified`` when they were read again."""

    backup: str
    manifest: Manifest
    disks: tuple[RestoredDisk, ...]
    seconds: float
    verified: bool = False


class Restore:
    """One restore; :meth:`run` blocks, :meth:`stop` ends it early from another thread."""

    def __init__(self, request: RestoreRequest, open_repository: Callable[[], Repository], emit: Emit) -> None:
        self._request = request
        self._open = open_repository
        self._emit = emit
        self._rate = Rate(request.limit_rate)
        self._work: Writing | Rereading | None = None
        self._lock: RepositoryLock | None = None
        self._stopped = False

    def stop(self) -> None:
        """Make ``run`` fail soon; what was restored is kept to go on from."""
        self._stopped = True
        if self._lock is not None:
            self._lock.give_up()
        if self._work is not None:
            self._work.stop()

    def run(self) -> RestoreResult:
        """Restore, all disks or none; go on where an interrupted restore of the same backup left off.

        BackupNotFound, TargetExists, UsageError, and RestoreError for too little space, before anything is written;
        RestoreError, Damaged or TransferError later, and then no image of this run has its name.  Running it again goes
        on from there.
        """
        begin = time.monotonic()
        request = self._request
        repository = self._open()
        self._lock = repository.lock(retry=request.lock_retry, waiting=lambda note: self._emit(Note(note)))
        if self._stopped:
            self._lock.give_up()
        with self._locked(self._lock):
            snapshot = repository.find(request.backup, lambda damage: self._emit(Note(f"{damage.what}.")))
            manifest = manifest_of(repository, snapshot)
            stored = StoredBackup(repository, snapshot)
            disks = choose_disks(manifest, request.disks)
            source = DiskSource(repository, stored, disks, request.keep_going)
            wanted = [
                Unfinished(repository.id, snapshot.id, disk.target, request.format, disk.virtual_size) for disk in disks
            ]
            with claimed(request.to, wanted, request.overwrite) as targets:
                done = self._restore(source, targets)
        return RestoreResult(snapshot.id, manifest, done, time.monotonic() - begin, request.verify)

    def _restore(self, source: DiskSource, targets: Sequence[Target]) -> tuple[RestoredDisk, ...]:
        left = [target for target in targets if target.act is not Act.FINISH]
        if self._request.check_space:
            self._check_space(source.only([target.name for target in left]), left)
        with self._keeping(targets):
            writing = self._write(source.only([target.name for target in left]), left) if left else None
            for target in left:
                target.sync()
            if self._request.verify:
                self._reread(source, targets)
            publish(self._request.to, targets, self._request.overwrite)
        return tuple(
            RestoredDisk(
                target.name,
                str(target.final),
                target.state.virtual_size,
                writing.written.get(target.name, 0) if writing else 0,
                writing.kept.get(target.name, 0) if writing else 0,
                target.missing,
            )
            for target in targets
        )

    @contextmanager
    def _locked(self, lock: RepositoryLock) -> Iterator[None]:
        """Hold the lock."""
        acquire_for_reading(lock, "Restoring", self._emit)
        try:
            yield
        finally:
            release_after_reading(lock, self._emit)

    def _check_space(self, source: DiskSource, targets: Sequence[Target]) -> None:
        """All images are on one file system; what an unfinished one takes already is not needed again."""
        image_format, free = self._request.format, free_room(self._request.to)
        had = sum(target.allocated for target in targets)
        if source.most_room(image_format) - had <= free:
            return
        needed = source.room(image_format) - had
        if needed > free:
            raise RestoreError(
                f"the images need {human_bytes(needed)} more, and {self._request.to} has {human_bytes(free)}: there is"
                " no space left for them",
                means=NOTHING_WRITTEN,
                todo="Make room, name another directory with --to, or use --no-space-check where the file system"
                " compresses.",
            )

    @contextmanager
    def _keeping(self, targets: Sequence[Target]) -> Iterator[None]:
        """Should the block fail, keep what a later restore can go on from, and say so; remove the rest."""
        try:
            yield
        except PullbackError as error:
            kept = [target for target in targets if target.worth_keeping]
            if self._stopped:
                means = "What was restored is kept in files called .partial." if kept else "No image was left."
                todo = "The same command goes on from there." if kept else ""
                raise RestoreError("the restore was interrupted", means=means, todo=todo) from error
            if kept:
                self._emit(
                    Note(
                        f"What was restored is kept in {self._request.to}, in files called .partial: the same command"
                        " goes on from there, and removing them gives it up."
                    )
                )
            raise
        finally:
            for target in targets:
                if not target.worth_keeping:
                    target.discard()

    def _write(self, source: DiskSource, targets: Sequence[Target]) -> Writing:
        for target in targets:
            if target.act is Act.GO_ON and not target.prepare():
                self._emit(Note(f"{target.partial} was damaged since; it is made anew."))
            elif target.act is Act.BEGIN:
                target.prepare()
        with self._daemon(targets, writable=True) as address:
            writing = Writing(source, targets, address, self._rate)
            try:
                self._run(writing)
            except PullbackError:
                writing.keep_what_is_written()
                raise
            return writing

    def _reread(self, source: DiskSource, targets: Sequence[Target]) -> None:
        with self._daemon(targets, writable=False) as address:
            work = Rereading(source, address)
            self._run(work)
        found = {target: wrong for target in targets if (wrong := work.wrong(target.name))}
        for target, wrong in found.items():
            target.undo(wrong)
        if found:
            said = "; ".join(f"{target.name} {_ranges(wrong)}" for target, wrong in found.items())
            raise RestoreError(
                f"the images do not read as they were written: {said}",
                means="No image got its name; the backup is whole.",
                todo="Suspect the disk or the memory of this machine. The same command writes these ranges again.",
            )

    def _run(self, work: Writing | Rereading) -> None:
        self._work = work
        if self._stopped:
            work.stop()
        work.run(self._emit)

    @contextmanager
    def _daemon(self, targets: Sequence[Target], writable: bool) -> Iterator[UnixAddress]:
        """The images, exported by QEMU's storage daemon under their disks' names."""
        blockdevs: list[dict[str, object]] = []
        exports: list[dict[str, object]] = []
        for number, target in enumerate(targets):
            node = f"disk{number}"
            file = file_node(target.place.absolute(), target.state.format)
            blockdevs.append(
                {"driver": target.state.format, "node-name": node, "read-only": not writable, "file": file}
            )
            exports.append({"type": "nbd", "id": node, "node-name": node, "name": target.name, "writable": writable})
        ourselves = Peer(os.getpid(), os.geteuid(), os.getegid())
        with (
            work_directory(DEFAULT_BASE, ourselves) as directory,
            StorageDaemon(blockdevs, exports, directory) as daemon,
        ):
            yield UnixAddress(daemon.socket)


def _ranges(spans: Sequence[Span]) -> str:
    """Ranges of a disk for people, the first few of many."""
    shown = ", ".join(f"bytes {span.offset:,}-{span.end - 1:,}" for span in spans[:10])
    return shown + (f" and {len(spans) - 10} more" if len(spans) > 10 else "")
