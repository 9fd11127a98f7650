# SPDX-License-Identifier: Apache-2.0
"""One backup of a domain: freeze, pull (or have it pushed), commit, let go.

    lock repository ─► observe ─► choose bases ─► freeze (new checkpoint) ─► export ─► survey ─► pull
        ─► end the snapshot ─► packs ─► index ─► snapshot file ─► merge old checkpoints away

With a proof, packs and index come before the snapshot's end, and between them everything is read back and compared.

The backup exists when its snapshot file does.  Before that, a failure takes the new checkpoint back and leaves the
chain as it was; being killed leaves an orphan checkpoint, which is harmless and goes with the next backup.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pullback.engine.domain import Domain, DomainAddress, open_domain
from pullback.engine.events import DiskPlanned, Emit, Frozen, Note
from pullback.engine.exporting import ExportRequest
from pullback.engine.freezing import Freeze, Snapshot, SnapshotRequest
from pullback.engine.rate import Rate
from pullback.engine.session import Tell
from pullback.engine.workdir import DEFAULT_BASE, work_directory
from pullback.errors import DomainBusy, DomainError, DomainUnreachable, NbdDisconnected, ProofFailed
from pullback.model.chain import read_chain
from pullback.model.facts import Facts
from pullback.model.manifest import Manifest
from pullback.model.snapshots import current_server
from pullback.nbd.address import UnixAddress
from pullback.plan.base import Incremental, choose_bases
from pullback.plan.checkpoint import NodeChain
from pullback.plan.in_place import refuse_unfinished
from pullback.plan.method import FROZEN_VIEW_EXACT, Method
from pullback.plan.prove import SAMPLE, Prove, Proved, chains_dropped, chains_stay, refuse_pushed
from pullback.plan.push import choose_transport
from pullback.plan.retention import checkpoint_name, checkpoints_to_remove, made_by_backups
from pullback.plan.selection import select_disks
from pullback.qemu.cancelling import together, uncancelled
from pullback.qemu.monitor import Trace
from pullback.repository.layout import check_disk_name, check_name
from pullback.repository.repository import Repository

# What stores is imported when QEMU has answered, while the password is tried.
if TYPE_CHECKING:
    from pullback.engine.storing import Prepared, Storing

_PROGRESS_EVERY = 0.2


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """What to back up and how; ``scratch`` is a directory, ``threads`` 0 means one per core.

    ``limit_rate`` is in bytes per second, 0 for none; UsageError below 64 KiB.
    """

    domain: DomainAddress
    disks: tuple[str, ...] = ()
    full: bool = False
    freeze: Freeze = "no"
    scratch: str | None = None
    method: Method | None = None
    keep_checkpoints: int = 4
    lock_retry: float = 0.0
    threads: int = 0
    prove: Prove | None = None
    limit_rate: int = 0


@dataclass(frozen=True, slots=True)
class BackupResult:
    """A committed backup; ``bytes_stored`` are the bytes of packs that the repository grew by.

    ``proved`` says how much of it was compared with the frozen disks; None when that was not asked for.
    """

    id: str
    manifest: Manifest
    bytes_read: int
    bytes_stored: int
    seconds: float
    paused_seconds: float
    proved: Proved | None = None


async def run_backup(
    request: BackupRequest, open_repository: Callable[[], Repository], emit: Emit, trace: Trace | None = None
) -> BackupResult:
    """Make one backup and commit it.

    Raises DomainError, Refused, SnapshotBroken, TransferError, ProofFailed or RepositoryError; then no backup was made,
    earlier ones and the chain are as they were, and nothing of ours is left in QEMU (or, if QEMU could not be reached
    any more, the next run clears it).  Where a proof found that a bitmap lied, no backup's checkpoint is left on that
    disk.  For a proof the repository is opened a second time.
    """
    begin = asyncio.get_running_loop().time()
    opening = asyncio.ensure_future(asyncio.to_thread(open_repository))
    try:
        async with open_domain(request.domain, trace=trace) as domain:
            # What takes longer is that a password is tried meanwhile.
            await domain.facts()
            from pullback.engine import pushing, storing  # noqa: F401

            repository = await opening
            async with _locked(repository, request, emit):
                return await _backup(domain, repository, request, open_repository, emit, begin)
    finally:
        if not opening.done():
            await asyncio.wait({opening})
        with suppress(asyncio.CancelledError):
            opening.exception()


async def plan_backup(
    request: BackupRequest,
    open_repository: Callable[[], Repository],
    emit: Emit,
    tell: Tell,
    trace: Trace | None = None,
) -> None:
    """Tell what a backup would send to QEMU, and change nothing.  Raises as :func:`run_backup` does."""
    repository = await asyncio.to_thread(open_repository)
    async with open_domain(request.domain, tell=tell, trace=trace) as domain, _locked(repository, request, emit):
        facts, _ = await domain.cleared()
        prepared = await _prepare(domain, facts, repository, request, emit)
        _tell(prepared, emit)
        snapshot = await domain.freeze(_snapshot_request(request, prepared))
        facts = prepared.facts
        if choose_transport(facts, prepared.selection.disks) == "push":
            emit(Note("QEMU would push the disks into a server of ours."))
            return
        running = current_server(facts)
        address = UnixAddress(running.place if running else f"{DEFAULT_BASE}/nbd")
        request_export = _export_request(prepared, snapshot, address, saved=facts.version < FROZEN_VIEW_EXACT)
        await domain.offer(snapshot, request_export)


@asynccontextmanager
async def _locked(repository: Repository, request: BackupRequest, emit: Emit) -> AsyncIterator[None]:
    repository.check_writable()
    lock = repository.lock(retry=request.lock_retry, waiting=lambda message: emit(Note(message)))
    # Who would rather wait for others than fail has to know of them before anything is begun.
    settle = request.lock_retry > 0
    acquiring = asyncio.ensure_future(asyncio.to_thread(lock.acquire, settle))
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
    domain: Domain,
    repository: Repository,
    request: BackupRequest,
    reopen: Callable[[], Repository],
    emit: Emit,
    begin: float,
) -> BackupResult:
    # Unusable bitmaps stay until the backup is stored: they tell why it had to read a disk whole.
    (facts, cleared), _ = await together(domain.cleared(), asyncio.to_thread(repository.load_index))
    for what in cleared:
        emit(Note(f"Cleared what a client that died had left: {what}."))
    prepared = await _prepare(domain, facts, repository, request, emit)
    _tell(prepared, emit)
    from pullback.engine.storing import Storing

    storing = Storing(repository, prepared, request.threads, emit, reopen, Rate(request.limit_rate))
    try:
        try:
            await _store(domain, request, prepared, storing, emit)
        except ProofFailed as error:
            raise await uncancelled(_drop_chains(domain, prepared, error)) from None
        await _forget_checkpoints(domain, repository.id, prepared, request.keep_checkpoints, emit)
    except asyncio.CancelledError:
        # Asked to end when the backup existed already: all that was left to do is done, or waits for the next one.
        if storing.committed is None:
            raise
    except DomainError as error:
        if storing.committed is None:
            raise
        emit(Note(f"The backup is stored, but QEMU could not be told of its end: {error}"))
    return _result(storing, repository.bytes_stored, asyncio.get_running_loop().time() - begin)


def _result(storing: Storing, bytes_stored: int, seconds: float) -> BackupResult:
    manifest, backup = storing.result
    read = sum(disk.bytes_read for disk in manifest.disks)
    return BackupResult(backup, manifest, read, bytes_stored, seconds, storing.paused_seconds, storing.proved)


async def _store(domain: Domain, request: BackupRequest, prepared: Prepared, storing: Storing, emit: Emit) -> None:
    """Freeze, transfer, commit; when this returns the backup exists and nothing of it is left in QEMU."""
    async with domain.temporary_snapshot(_snapshot_request(request, prepared)) as snapshot:
        storing.snapshot = snapshot
        emit(Frozen(snapshot.time.isoformat(), snapshot.checkpoint, round(snapshot.paused_seconds * 1000, 1)))
        if request.freeze == "try" and snapshot.consistency == "crash":
            emit(Note("No guest agent answered: the point is crash-consistent."))
        try:
            await _transfer(domain, prepared, snapshot, storing, emit)
            await domain.end_snapshot(snapshot)
            await uncancelled(_commit(storing, snapshot))
        except NbdDisconnected as error:
            storing.abandon()
            await _was_it_qemu(domain, error)
            raise
        except BaseException:
            storing.abandon()
            raise


async def _drop_chains(domain: Domain, prepared: Prepared, error: ProofFailed) -> ProofFailed:
    """Have no backup build on bitmaps that lied; the failure to raise then.

    Other repositories' checkpoints go, too: their next incremental would be as wrong, and nobody would notice.  Those
    that a user named are the user's; they are said.
    """
    if not error.lied:
        return error
    nodes = {disk.node for disk in prepared.selection.disks if disk.target in error.lied}
    left: set[str] = set()

    def choose(disk: NodeChain) -> set[str]:
        if disk.node not in nodes:
            return set()
        ours = made_by_backups(disk.chain.points)
        left.update(set(disk.chain.points) - ours)
        return ours

    try:
        await domain.prune(choose)
    except DomainError as failure:
        return chains_stay(error, failure.what)
    return chains_dropped(error, left)


async def _was_it_qemu(domain: Domain, error: NbdDisconnected) -> None:
    """DomainUnreachable when the export broke off because QEMU ended."""
    try:
        await domain.facts()
    except DomainUnreachable:
        raise DomainUnreachable(
            "QEMU ended during the backup",
            means="No backup was stored; the earlier ones are untouched.",
            todo="Start the domain and run the backup again.",
        ) from error


async def _prepare(
    domain: Domain, facts: Facts, repository: Repository, request: BackupRequest, emit: Emit
) -> Prepared:
    from pullback.engine.storing import Prepared, stored_points

    name = check_name(domain.name_of(facts), "domain")
    selection = select_disks(facts, request.disks)
    refuse_unfinished(selection.disks)
    if request.prove:
        refuse_pushed(facts, selection.disks)
    for disk in selection.disks:
        check_disk_name(disk.target)
    chains = {disk.target: read_chain(disk.bitmaps) for disk in selection.disks}
    bases = await asyncio.to_thread(
        lambda: choose_bases(selection.disks, chains, stored_points(repository, name, emit), request.full)
    )
    tracked = any(not disk.untracked for disk in selection.disks)
    checkpoint = checkpoint_name(repository.id, datetime.now(UTC), secrets.token_hex(2)) if tracked else None
    return Prepared(name, facts, selection, bases, checkpoint, request.prove)


def _tell(prepared: Prepared, emit: Emit) -> None:
    for target, reason in prepared.selection.skipped:
        emit(Note(f"Leaving out {target}: {reason}."))
    for disk in prepared.selection.disks:
        base = prepared.bases[disk.target]
        if isinstance(base, Incremental):
            emit(DiskPlanned(disk.target, "incremental", f"since {base.checkpoint}", disk.virtual_size))
        else:
            emit(DiskPlanned(disk.target, "full", base.reason, disk.virtual_size))
    if prepared.prove:
        some = "all unchanged ones" if prepared.prove == "all" else f"{SAMPLE:,} random unchanged ones of each disk"
        emit(Note(f"To prove the backup, all changed chunks and {some} are read back and compared."))


def _snapshot_request(request: BackupRequest, prepared: Prepared) -> SnapshotRequest:
    return SnapshotRequest(
        disks=tuple(disk.target for disk in prepared.selection.disks),
        checkpoint=prepared.checkpoint,
        freeze=request.freeze,
        scratch=request.scratch,
        method=request.method,
        private=True,
    )


async def _transfer(domain: Domain, prepared: Prepared, snapshot: Snapshot, storing: Storing, emit: Emit) -> None:
    """Bring the frozen disks here: pulled over QEMU's NBD server, or pushed where that must not or cannot be.

    What was pulled is proved here, too, if it is to be: the export ends with this.
    """
    facts = await domain.facts()
    exact = facts.version >= FROZEN_VIEW_EXACT
    with work_directory(DEFAULT_BASE, domain.session.peer) as place:
        socket = str(place / "nbd")
        if choose_transport(facts, prepared.selection.disks) == "pull":
            running = current_server(facts)
            address = UnixAddress(running.place if running else socket)
            try:
                await domain.offer(snapshot, _export_request(prepared, snapshot, address, saved=not exact), facts)
            except DomainBusy:
                if prepared.prove:
                    raise
                emit(Note("Another program uses QEMU's NBD server: having the disks pushed instead."))
            else:
                names = {target: _export_name(snapshot, target) for target in snapshot.targets}
                await _watched(storing, asyncio.to_thread(storing.run_pull, address, names, exact), emit)
                if prepared.prove:
                    await _watched(storing, asyncio.to_thread(storing.prove), emit)
                return
        from pullback.engine.pushing import push_disks

        await _watched(storing, push_disks(domain, prepared, snapshot, storing, socket), emit)


def _export_name(snapshot: Snapshot, target: str) -> str:
    """Nobody else's: the server may be one that exports other snapshots too."""
    return f"{snapshot.id}-{target}"


def _export_request(prepared: Prepared, snapshot: Snapshot, address: UnixAddress, *, saved: bool) -> ExportRequest:
    return ExportRequest(
        address,
        since={
            target: (base.checkpoint,) if isinstance(base, Incremental) else ()
            for target, base in prepared.bases.items()
        },
        names={target: _export_name(snapshot, target) for target in snapshot.targets},
        # For trims, which let ranges go; the frozen view itself refuses writes.
        writable=True,
        saved=saved,
        direct=True,
    )


async def _watched(storing: Storing, work: Coroutine[Any, Any, None], emit: Emit) -> None:
    """Carry ``work`` out, telling how far it is; being cancelled stops it first."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_PROGRESS_EVERY))[0]:
            if storing.progress.total:
                emit(storing.progress)
    except asyncio.CancelledError:
        storing.stop()
        await asyncio.wait({task})
        task.exception()  # whatever came of it, it was cut off
        raise
    task.result()
    total = storing.progress.total
    emit(replace(storing.progress, done=total))


async def _commit(storing: Storing, snapshot: Snapshot) -> None:
    """Make the backup exist; from then on its checkpoint stays, whatever happens."""
    await asyncio.to_thread(storing.commit)
    snapshot.keep_checkpoint = True


async def _forget_checkpoints(domain: Domain, repository_id: str, prepared: Prepared, keep: int, emit: Emit) -> None:
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
