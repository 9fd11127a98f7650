# SPDX-License-Identifier: Apache-2.0
"""Restoring a backup into a domain's own disks, by difference.

    stopped     session: check, mark ─► the daemon ends, so the marks are stored ─► session: write, unmark
    running     one session, before the domain has started or while it is paused: check, export, mark, write, unmark

Every write goes through the node that holds the dirty bitmaps, so the next backup is incremental and right.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from pullback.engine.domain import Domain, DomainAddress, open_domain
from pullback.engine.events import Emit, Note
from pullback.engine.exporting import Export, ExportRequest, end_exports, start_parts
from pullback.engine.listing import manifest_of
from pullback.engine.overwriting import Overwriting, Sampling, changed_spans, draw_sample, map_export
from pullback.engine.rate import Rate
from pullback.engine.reader_lock import acquire_for_reading, release_after_reading
from pullback.engine.rereading import Rereading
from pullback.engine.source import DiskSource
from pullback.engine.workdir import DEFAULT_BASE, work_directory
from pullback.engine.workers import Item, Work
from pullback.errors import (
    CommandFailed,
    DomainError,
    DomainUnreachable,
    NbdDisconnected,
    PullbackError,
    Refused,
    RestoreError,
)
from pullback.model.chain import read_chain
from pullback.model.extents import Span
from pullback.model.facts import Disk, Facts
from pullback.model.manifest import DiskEntry
from pullback.model.snapshots import RESTORING, Names, UnfinishedMark, unfinished_marks
from pullback.nbd.address import UnixAddress
from pullback.plan.export import ExportPart
from pullback.plan.in_place import (
    ByChanges,
    ByComparison,
    Way,
    choose_way,
    mark_disks,
    match_disks,
    most_written,
    refuse_another,
    refuse_in_place,
    unmark_disks,
)
from pullback.plan.method import refuse_export
from pullback.plan.restore import choose_disks
from pullback.plan.selection import select_disks
from pullback.qemu.cancelling import uncancelled
from pullback.qemu.monitor import Trace
from pullback.repository.layout import StoredBackup
from pullback.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class InPlaceRequest:
    """Which backup to restore into which domain; all disks of the backup if none is named.

    ``dry`` only looks, ``verify`` reads the disks again and compares them with the backup.  ``limit_rate`` is bytes a
    second to write, at most; 0 for no limit, UsageError below 64 KiB.
    """

    backup: str
    domain: DomainAddress
    disks: tuple[str, ...] = ()
    lock_retry: float = 0.0
    verify: bool = False
    dry: bool = False
    limit_rate: int = 0


@dataclass(frozen=True, slots=True)
class DiskInPlace:
    """One disk: ``way`` is "changes" or "compare", ``reason`` since which checkpoint, or why it was compared.

    ``most`` is how many bytes might have had to be written, ``bytes_written`` how many were, zeroes included.
    """

    target: str
    virtual_size: int
    way: str
    reason: str
    most: int
    bytes_written: int = 0


@dataclass(frozen=True, slots=True)
class InPlaceResult:
    """Which backup the domain's disks hold now (of a ``dry`` run: would hold)."""

    backup: str
    domain: str
    disks: tuple[DiskInPlace, ...]
    dry: bool
    verified: bool
    seconds: float


async def restore_in_place(
    request: InPlaceRequest, open_repository: Callable[[], Repository], emit: Emit, trace: Trace | None = None
) -> InPlaceResult:
    """Make a domain's disks what they were at a backup; they are that, to the byte, when this returns.

    UsageError, Refused and BackupNotFound before anything is touched.  Later DomainError, Damaged, TransferError or
    RestoreError: then the disks stay marked, no backup is made of them, and the same request completes it.
    """
    begin = time.monotonic()
    repository = await asyncio.to_thread(open_repository)
    async with _locked(repository, request, emit):
        work = _InPlace(request, repository, emit)
        await asyncio.to_thread(work.read_backup)
        await work.run(trace)
    seconds = time.monotonic() - begin
    return InPlaceResult(work.id, work.domain_name, work.results(), request.dry, request.verify, seconds)


@asynccontextmanager
async def _locked(repository: Repository, request: InPlaceRequest, emit: Emit) -> AsyncIterator[None]:
    lock = repository.lock(retry=request.lock_retry, waiting=lambda message: emit(Note(message)))
    acquiring = asyncio.ensure_future(asyncio.to_thread(acquire_for_reading, lock, "Restoring", emit))
    try:
        await asyncio.shield(acquiring)
    except asyncio.CancelledError:
        lock.give_up()
        await asyncio.wait({acquiring})
        if acquiring.exception() is None:
            await asyncio.to_thread(release_after_reading, lock, emit)
        raise
    try:
        yield
    finally:
        await asyncio.to_thread(release_after_reading, lock, emit)


class _InPlace:
    def __init__(self, request: InPlaceRequest, repository: Repository, emit: Emit) -> None:
        self._request = request
        self._rate = Rate(request.limit_rate)
        self._repository = repository
        self._emit = emit
        self._ways: dict[str, Way] = {}
        self._most: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._fresh: set[str] = set()
        self._writing = False
        self.domain_name = ""

    def read_backup(self) -> None:
        """Find the backup and the disks of it that are meant."""
        snapshot = self._repository.find(self._request.backup, lambda damage: self._emit(Note(f"{damage.what}.")))
        self.id = snapshot.id
        self._manifest = manifest_of(self._repository, snapshot)
        self._stored = StoredBackup(self._repository, snapshot)
        self._entries = choose_disks(self._manifest, self._request.disks)
        self._mark = UnfinishedMark(self._repository.id, snapshot.id)

    def results(self) -> tuple[DiskInPlace, ...]:
        """What was done to each disk."""
        return tuple(self._result(entry) for entry in self._entries)

    def _result(self, entry: DiskEntry) -> DiskInPlace:
        way, most = self._ways[entry.target], self._most[entry.target]
        told = ("changes", way.checkpoint) if isinstance(way, ByChanges) else ("compare", way.reason)
        return DiskInPlace(entry.target, entry.virtual_size, *told, most, self._written.get(entry.target, 0))

    async def run(self, trace: Trace | None) -> None:
        """Restore, or look."""
        address = self._request.domain
        if self._request.dry:
            async with open_domain(address, tell=lambda plan: None, trace=trace) as domain:
                self._choose_ways(await self._check(domain))
            return
        async with open_domain(address, trace=trace) as domain:
            for cleared in await domain.clear_stale():
                self._emit(Note(f"Cleared what a client that died had left: {cleared}."))
            disks = await self._check(domain)
            if not (await domain.facts()).daemon:
                await self._in_session(domain)
                return
            await self._put_marks(domain, disks)
        # The daemon has stored the marks: from here on they outlive it, however it ends.
        async with open_domain(address, trace=trace) as domain:
            await self._in_session(domain)

    async def _check(self, domain: Domain) -> list[Disk]:
        facts = await domain.facts()
        self.domain_name = domain.name_of(facts)
        refuse_in_place(facts)
        pairs = match_disks(facts, select_disks(facts).disks, self._entries)
        # The name of images that were named by their paths says nothing.
        name = self._request.domain.name or ("" if facts.daemon else facts.name)
        refuse_another(name, self._manifest, pairs, self._mark)
        disks = [disk for disk, _ in pairs]
        refuse_export(facts, disks)
        return disks

    def _choose_ways(self, disks: Sequence[Disk]) -> None:
        entries = {entry.target: entry for entry in self._entries}
        for disk in disks:
            self._take(disk, choose_way(disk, entries[disk.target], read_chain(disk.bitmaps)))

    def _take(self, disk: Disk, way: Way) -> None:
        self._ways[disk.target] = way
        self._most[disk.target] = most_written(disk, way)

    async def _put_marks(self, domain: Domain, disks: Sequence[Disk]) -> None:
        for disk in disks:
            if disk.untracked:
                self._emit(Note(f"{disk.target} cannot be marked while it is restored: {disk.untracked}."))
        self._fresh |= {disk.target for disk in disks if not unfinished_marks(disk.bitmaps)}
        await uncancelled(domain.session.run(mark_disks(disks, self._mark)))

    # -- the session that writes ----------------------------------------------------------------------------------

    async def _in_session(self, domain: Domain) -> None:
        try:
            with work_directory(DEFAULT_BASE, domain.session.peer) as place:
                await self._exported(domain, UnixAddress(str(place / "nbd")))
        except BaseException as error:
            await uncancelled(self._tell_state(domain))
            if isinstance(error, NbdDisconnected):
                await self._was_it_qemu(domain, error)
            raise

    async def _exported(self, domain: Domain, address: UnixAddress) -> None:
        disks = await self._check(domain)
        owner = RESTORING + secrets.token_hex(4)
        exports = await self._export(domain, disks, owner, address)
        try:
            # QEMU reads the bitmaps of a domain that waits for a migration only now.
            disks = await self._disks(domain)
            self._choose_ways(disks)
            await self._put_marks(domain, disks)
            await self._restore(domain, disks, owner, address)
            await self._still_there(domain)
            await uncancelled(domain.session.run(unmark_disks(await self._disks(domain))))
            if (await domain.facts()).run_state == "paused":
                self._emit(Note("The paused domain remembers what its disks held: reset it before it goes on."))
        finally:
            with suppress(DomainUnreachable):
                await uncancelled(end_exports(domain.session, exports))

    async def _disks(self, domain: Domain) -> list[Disk]:
        facts = await domain.facts()
        return [disk for disk, _ in match_disks(facts, select_disks(facts).disks, self._entries)]

    async def _export(
        self, domain: Domain, disks: Sequence[Disk], owner: str, address: UnixAddress
    ) -> tuple[Export, ...]:
        parts = [
            ExportPart(Names(owner, number), disk.target, disk.node, disk.node, disk.target)
            for number, disk in enumerate(disks)
        ]
        try:
            return await self._start(domain, await domain.facts(), parts, address)
        except CommandFailed as error:
            if error.command != "block-export-add":
                raise
            raise Refused(
                f"QEMU does not let another writer at the disks of domain {self.domain_name} while it uses them:"
                f" {error.desc}",
                means="Nothing was written.",
                todo="Stop the domain and name its images (disk:PATH), or start it with -incoming defer, or give the"
                " device share-rw=on.",
            ) from error

    async def _start(
        self, domain: Domain, facts: Facts, parts: Sequence[ExportPart], address: UnixAddress
    ) -> tuple[Export, ...]:
        return await start_parts(domain.session, facts, parts, ExportRequest(address), writable=True)

    async def _restore(self, domain: Domain, disks: Sequence[Disk], owner: str, address: UnixAddress) -> None:
        source = DiskSource(self._repository, self._stored, self._entries, keep_going=False)
        spans = await self._by_changes(domain, disks, owner, address)
        spans = await self._believed(source, spans, disks, address)
        compared = [target for target, way in self._ways.items() if isinstance(way, ByComparison)]
        if compared:
            comparing = Rereading(source.only(compared), address)
            await self._carry(comparing)
            spans |= {target: comparing.wrong(target) for target in compared}
        self._writing = True
        writing = Overwriting(source, spans, address, self._rate)
        await self._carry(writing)
        await asyncio.to_thread(writing.flush)
        self._written = writing.written
        if self._request.verify:
            await self._verify(source, address)

    async def _by_changes(
        self, domain: Domain, disks: Sequence[Disk], owner: str, address: UnixAddress
    ) -> dict[str, tuple[Span, ...]]:
        """For each disk whose chain knows it, what changed since the backup: the OR of its bitmaps."""
        names: dict[str, list[str]] = {}
        parts = []
        for number, disk in enumerate(disks):
            if isinstance(way := self._ways[disk.target], ByChanges):
                names[disk.target] = [edge.name for edge in way.edges]
                since = tuple((name, ()) for name in names[disk.target])
                name = map_export(disk.target)
                parts.append(ExportPart(Names(owner, number), disk.target, disk.node, disk.node, name, since))
        if not parts:
            return {}
        exports = await self._start(domain, await domain.facts(), parts, address)
        try:
            sizes = {disk.target: disk.virtual_size for disk in disks}
            return {
                target: await asyncio.to_thread(changed_spans, address, target, sizes[target], bitmaps)
                for target, bitmaps in names.items()
            }
        finally:
            await uncancelled(end_exports(domain.session, exports))

    async def _believed(
        self, source: DiskSource, spans: dict[str, tuple[Span, ...]], disks: Sequence[Disk], address: UnixAddress
    ) -> dict[str, tuple[Span, ...]]:
        """The same without the disks that differ from the backup where no bitmap says so: those are compared."""
        believed = dict(spans)
        for disk in disks:
            if disk.target not in spans:
                continue
            only = source.only([disk.target])
            sample = await asyncio.to_thread(draw_sample, only, spans[disk.target])
            sampling = Sampling(only, sample, address)
            await self._carry(sampling)
            if sampling.wrong(disk.target):
                self._emit(Note(f"{disk.target} differs from the backup where no dirty bitmap says so: comparing all."))
                self._take(disk, ByComparison("it differs from the backup where no dirty bitmap says so"))
                del believed[disk.target]
        return believed

    async def _verify(self, source: DiskSource, address: UnixAddress) -> None:
        rereading = Rereading(source, address)
        await self._carry(rereading)
        wrong = [entry.target for entry in self._entries if rereading.wrong(entry.target)]
        if wrong:
            raise RestoreError(
                f"the disks do not read as they were written: {', '.join(wrong)}",
                means="They stay marked, and no backup is made of them.",
                todo="Suspect the disk or the memory of this machine. The same command writes what differs again.",
            )

    async def _carry(self, work: Work[Item]) -> None:
        task = asyncio.ensure_future(asyncio.to_thread(work.run, self._emit))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            work.stop()
            await asyncio.wait({task})
            task.exception()  # whatever came of it, it was cut off
            raise

    async def _still_there(self, domain: Domain) -> None:
        facts = await domain.facts()
        if facts.running:
            raise RestoreError(
                f"domain {self.domain_name} was started while its disks were restored",
                means="What it wrote and what it read is a mixture.",
                todo="Stop it, and run the same command again.",
            )

    # -- when it fails --------------------------------------------------------------------------------------------

    async def _tell_state(self, domain: Domain) -> None:
        """Say in which state the disks are; marks of a restore that wrote nothing go again."""
        if not self._writing:
            with suppress(PullbackError):
                await domain.session.reconnect()
                disks = [disk for disk in await self._disks(domain) if disk.target in self._fresh]
                await domain.session.run(unmark_disks(disks))
            return
        names = ", ".join(entry.target for entry in self._entries)
        self._emit(
            Note(
                f"Between two states now: {names}. Running the same command again completes the restore; until then no"
                " backup is made of it."
            )
        )

    async def _was_it_qemu(self, domain: Domain, error: NbdDisconnected) -> None:
        try:
            await domain.facts()
        except DomainError:
            raise DomainUnreachable(
                "QEMU ended during the restore",
                means="The disks are between two states, and the backup is whole.",
                todo="Run the same command again.",
            ) from error
