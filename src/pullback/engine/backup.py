# SPDX-License-Identifier: Apache-2.0
"""One backup of a running domain: freeze, pull, commit, let go.

    lock repository ─► observe ─► choose bases ─► freeze (new checkpoint) ─► export ─► survey ─► pull
        ─► packs ─► index ─► end the snapshot ─► snapshot file ─► merge old checkpoints away

The backup exists when its snapshot file does.  Before that, a failure takes the new checkpoint back and leaves the
chain as it was; being killed leaves an orphan checkpoint, which is harmless and goes with the next backup.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pullback
from pullback.engine.domain import Domain, Export, open_domain, uncancelled
from pullback.engine.domain import Snapshot as DomainSnapshot
from pullback.engine.events import DiskPlanned, Emit, Frozen, Note, Progress
from pullback.engine.pull import Pull
from pullback.engine.survey import Survey, survey
from pullback.errors import Damaged, DomainError, DomainUnreachable, NbdDisconnected, RepositoryUnsupported
from pullback.model.chain import read_chain
from pullback.model.facts import Disk, Facts
from pullback.model.manifest import BaseRef, DiskEntry, Manifest, parse_manifest
from pullback.model.units import MIB, SEGMENT
from pullback.nbd.address import UnixAddress
from pullback.plan.base import Base, Full, Incremental, StoredPoint, choose_bases
from pullback.plan.retention import checkpoint_name, checkpoints_to_remove
from pullback.plan.selection import Selection, refuse_unsafe, select_disks
from pullback.qemu.monitor import Trace
from pullback.repository.layout import BackupBuilder, StoredBackup, check_disk_name, check_name
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot
from pullback.repository.writer import PackWriter

#: A further thread is worth its packs for every so many bytes to read.
_BYTES_PER_THREAD = 64 * MIB
_PROGRESS_EVERY = 0.2


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """What to back up and how; ``name`` overrides QEMU's own name of the domain, ``scratch`` is a directory."""

    socket: str
    name: str = ""
    disks: tuple[str, ...] = ()
    full: bool = False
    scratch: str | None = None
    keep_checkpoints: int = 4
    lock_retry: float = 0.0
    threads: int = 0


@dataclass(frozen=True, slots=True)
class BackupResult:
    """A committed backup; ``bytes_stored`` are the bytes of packs that the repository grew by."""

    id: str
    manifest: Manifest
    bytes_read: int
    bytes_stored: int
    seconds: float
    paused_seconds: float


@dataclass(frozen=True, slots=True)
class _Prepared:
    """All that is decided before anything is touched."""

    name: str
    facts: Facts
    selection: Selection
    bases: dict[str, Base]
    checkpoint: str | None


async def run_backup(
    request: BackupRequest, open_repository: Callable[[], Repository], emit: Emit, trace: Trace | None = None
) -> BackupResult:
    """Make one backup and commit it.

    Raises DomainError, Refused, SnapshotBroken, TransferError or RepositoryError; then no backup was made, earlier
    ones and the chain are as they were, and nothing of ours is left in QEMU (or, if QEMU could not be reached any
    more, the next run clears it).
    """
    begin = asyncio.get_running_loop().time()
    opening = asyncio.ensure_future(asyncio.to_thread(open_repository))
    try:
        async with open_domain(request.socket, trace) as domain:
            repository = await opening
            async with _locked(repository, request, emit):
                return await _backup(domain, repository, request, emit, begin)
    finally:
        if not opening.done():
            await asyncio.wait({opening})
        with suppress(asyncio.CancelledError):
            opening.exception()


@asynccontextmanager
async def _locked(repository: Repository, request: BackupRequest, emit: Emit) -> AsyncIterator[None]:
    lock = repository.lock(retry=request.lock_retry, waiting=lambda message: emit(Note(message)))
    acquiring = asyncio.ensure_future(asyncio.to_thread(lock.acquire))
    try:
        await asyncio.shield(acquiring)
    except asyncio.CancelledError:
        lock.give_up()
        await asyncio.wait({acquiring})
        if acquiring.exception() is None:
            await asyncio.to_thread(lock.release)
        raise
    try:
        yield
    finally:
        await asyncio.to_thread(lock.release)


async def _backup(
    domain: Domain, repository: Repository, request: BackupRequest, emit: Emit, begin: float
) -> BackupResult:
    if await domain.clear_stale():
        emit(Note("Cleared what a backup that was killed had left in QEMU."))
    prepared = await _prepare(domain, repository, request, emit)
    _tell(prepared, emit)
    work = _Work(repository, request, prepared, emit)
    try:
        await _store(domain, work, emit)
        await _forget_checkpoints(domain, repository.id, prepared, request.keep_checkpoints, emit)
    except asyncio.CancelledError:
        # Asked to end when the backup existed already: all that was left to do is done, or waits for the next one.
        if work.committed is None:
            raise
    manifest, backup = work.result
    return BackupResult(
        id=backup,
        manifest=manifest,
        bytes_read=sum(disk.bytes_read for disk in manifest.disks),
        bytes_stored=repository.bytes_stored,
        seconds=asyncio.get_running_loop().time() - begin,
        paused_seconds=work.paused_seconds,
    )


async def _store(domain: Domain, work: _Work, emit: Emit) -> None:
    """Freeze, pull, commit; when this returns the backup exists and nothing of it is left in QEMU."""
    prepared = work.prepared
    async with domain.snapshot(prepared.selection.disks, prepared.checkpoint, work.request.scratch) as snapshot:
        emit(Frozen(snapshot.time.isoformat(), snapshot.checkpoint, round(snapshot.paused_seconds * 1000, 1)))
        since = {
            target: (base.checkpoint, base.edges)
            for target, base in prepared.bases.items()
            if isinstance(base, Incremental)
        }
        async with domain.export(snapshot, since, writable=True) as export:
            try:
                await _in_thread(work, snapshot, export, emit)
                await domain.end_snapshot(snapshot.id)
                await uncancelled(_commit(work, snapshot))
            except NbdDisconnected as error:
                work.abandon()
                await _was_it_qemu(domain, error)
                raise
            except BaseException:
                work.abandon()
                raise


async def _was_it_qemu(domain: Domain, error: NbdDisconnected) -> None:
    """DomainUnreachable when the export broke off because QEMU ended."""
    try:
        await domain.observe()
    except DomainUnreachable:
        raise DomainUnreachable(
            "QEMU ended during the backup",
            means="No backup was stored; the earlier ones are untouched.",
            todo="Start the domain and run the backup again.",
        ) from error


async def _prepare(domain: Domain, repository: Repository, request: BackupRequest, emit: Emit) -> _Prepared:
    facts = await domain.observe()
    name = check_name(request.name or facts.name or Path(request.socket).stem, "domain")
    selection = select_disks(facts, request.disks)
    for disk in selection.disks:
        check_disk_name(disk.target)
    refuse_unsafe(facts, selection.disks)
    chains = {disk.target: read_chain(disk.bitmaps) for disk in selection.disks}
    bases = await asyncio.to_thread(
        lambda: choose_bases(selection.disks, chains, _points(repository, name, emit), request.full)
    )
    tracked = any(not disk.untracked for disk in selection.disks)
    checkpoint = checkpoint_name(repository.id, datetime.now(UTC), secrets.token_hex(2)) if tracked else None
    return _Prepared(name, facts, selection, bases, checkpoint)


def _points(repository: Repository, domain: str, emit: Emit) -> Iterator[StoredPoint]:
    for snapshot in reversed(repository.snapshots(domain)):
        if "pullback" not in snapshot.tags:
            continue
        try:
            manifest = parse_manifest(StoredBackup(repository, snapshot).manifest_bytes())
        except (Damaged, RepositoryUnsupported) as error:
            emit(Note(f"Passing over backup {snapshot.short_id} as a base, it cannot be read: {error.what}."))
            continue
        yield StoredPoint(snapshot.id, manifest)


def _tell(prepared: _Prepared, emit: Emit) -> None:
    for target, reason in prepared.selection.skipped:
        emit(Note(f"Leaving out {target}: {reason}."))
    for disk in prepared.selection.disks:
        base = prepared.bases[disk.target]
        if isinstance(base, Incremental):
            emit(DiskPlanned(disk.target, "incremental", f"since {base.checkpoint}", disk.virtual_size))
        else:
            emit(DiskPlanned(disk.target, "full", base.reason, disk.virtual_size))


class _Work:
    """The blocking part: survey, pull, commit.  Each method runs on a thread, one after the other."""

    def __init__(
        self,
        repository: Repository,
        request: BackupRequest,
        prepared: _Prepared,
        emit: Emit,
    ) -> None:
        self._emit = emit
        self._repository = repository
        self.request = request
        self.prepared = prepared
        self._stored = {
            base.backup: StoredBackup(repository, repository.find(base.backup))
            for base in prepared.bases.values()
            if isinstance(base, Incremental)
        }
        self._writers: list[PackWriter] = []
        self._stopped = False
        self.pull: Pull | None = None
        self.total = 0
        self.paused_seconds = 0.0
        self.committed: tuple[Manifest, str] | None = None

    def stop(self) -> None:
        """Make ``run`` end soon, from any thread."""
        self._stopped = True
        if self.pull is not None:
            self.pull.stop()

    def run(self, snapshot: DomainSnapshot, export: Export) -> None:
        """Survey all disks, then read and store them; only the writers are still open afterwards."""
        self._snapshot, self._export = snapshot, export
        self.paused_seconds = snapshot.paused_seconds
        # What a full backup reads may be in the repository already; only the index tells.
        self._repository.load_index()
        surveys = [self._survey(disk) for disk in self.prepared.selection.disks]
        self.total = sum(one.to_read for one in surveys)
        count = self.request.threads or os.cpu_count() or 1
        count = max(1, min(count, 1 + self.total // _BYTES_PER_THREAD))
        self._writers = [self._repository.new_writer() for _ in range(count)]
        builder = BackupBuilder(self._repository, self._writers[0], self.prepared.name, self._snapshot.time)
        for one in surveys:
            builder.add_disk(one.source.target)
            for segment in one.kept:
                builder.keep_segment(one.source.target, segment.number, segment.subtree_id)
        self.pull = Pull(builder, [one.source for one in surveys], let_go=True)
        if self._stopped:
            return
        self.pull.run(self._writers)
        if self._stopped:
            return
        self._manifest = self._describe(self.pull)
        self._tree = builder.finish(self._manifest.to_bytes())
        self._path = builder.path

    def _survey(self, disk: Disk) -> Survey:
        base = self.prepared.bases[disk.target]
        stored = (self._stored[base.backup], base.checkpoint) if isinstance(base, Incremental) else None
        address = UnixAddress(self._export.socket)
        try:
            found = survey(address, disk.target, disk.virtual_size, stored, let_go=True, exact=self._export.exact)
        except Damaged as error:
            raise Damaged(
                f"the last backup cannot be built on: {error.what}",
                means="No backup was stored.",
                todo="Run the backup with --full, and look into the repository with restic check.",
            ) from error
        if found.distrust:
            self.prepared.bases[disk.target] = Full(found.distrust)
            self._emit(Note(f"Reading {disk.target} whole after all: {found.distrust}."))
        return found

    def _describe(self, pull: Pull) -> Manifest:
        entries = []
        for disk in self.prepared.selection.disks:
            base, count = self.prepared.bases[disk.target], pull.counts[disk.target]
            incremental = isinstance(base, Incremental)
            entries.append(
                DiskEntry(
                    target=disk.target,
                    virtual_size=disk.virtual_size,
                    checkpoint=None if disk.untracked else self._snapshot.checkpoint,
                    mode="incremental" if incremental else "full",
                    reason="" if isinstance(base, Incremental) else base.reason,
                    base=BaseRef(base.backup, base.checkpoint) if isinstance(base, Incremental) else None,
                    source_format=disk.driver,
                    bytes_read=count.read,
                    bytes_new=count.new,
                    bytes_zero=count.zero,
                )
            )
        return Manifest(
            domain=self.prepared.name,
            uuid=self.prepared.facts.uuid,
            time=self._snapshot.time,
            consistency="crash",
            qemu=".".join(map(str, self.prepared.facts.version)),
            pullback=pullback.__version__,
            segment_size=SEGMENT,
            disks=tuple(entries),
            skipped=self.prepared.selection.skipped,
        )

    @property
    def result(self) -> tuple[Manifest, str]:
        """The manifest and the id of the backup, once it is committed."""
        assert self.committed is not None
        return self.committed

    def commit(self) -> None:
        """Packs, then index, then the snapshot file; when this returns the backup exists."""
        for writer in self._writers:
            writer.flush()
        self._repository.save_index()
        parents = [snapshot.snapshot for snapshot in self._stored.values()]
        parent = max(parents, key=lambda snapshot: snapshot.time, default=None)
        backup = self._repository.save_snapshot(
            Snapshot(
                time=self._snapshot.time,
                tree=self._tree,
                paths=(self._path,),
                hostname=self.prepared.name,
                tags=("pullback",),
                parent=parent.id if parent else None,
                program_version=f"pullback {pullback.__version__}",
            )
        )
        self.committed = self._manifest, backup

    def abandon(self) -> None:
        """Give up what is not stored; no thread is at work any more."""
        for writer in self._writers:
            writer.abandon()


async def _commit(work: _Work, snapshot: DomainSnapshot) -> None:
    """Make the backup exist; from then on its checkpoint stays, whatever happens."""
    await asyncio.to_thread(work.commit)
    snapshot.keep_checkpoint = True


async def _in_thread(work: _Work, snapshot: DomainSnapshot, export: Export, emit: Emit) -> None:
    """Run the pull on a thread, telling how far it is; being cancelled stops it first."""
    task = asyncio.ensure_future(asyncio.to_thread(work.run, snapshot, export))
    try:
        while not (await asyncio.wait({task}, timeout=_PROGRESS_EVERY))[0]:
            if work.pull is not None:
                emit(Progress("backup", work.pull.done, work.total))
    except asyncio.CancelledError:
        work.stop()
        await asyncio.wait({task})
        task.exception()  # whatever came of it, it was cut off
        raise
    task.result()
    emit(Progress("backup", work.total, work.total))


async def _forget_checkpoints(domain: Domain, repository_id: str, prepared: _Prepared, keep: int, emit: Emit) -> None:
    """Merge this repository's older checkpoints away.  The backup is committed: a failure here is only worth a note."""
    selected = {disk.node for disk in prepared.selection.disks}
    try:
        await domain.prune(
            lambda disk: (
                checkpoints_to_remove(disk.chain.points, repository_id, keep) if disk.node in selected else set()
            )
        )
    except DomainError as error:
        emit(Note(f"The backup is stored, but older checkpoints could not be merged away: {error}"))
