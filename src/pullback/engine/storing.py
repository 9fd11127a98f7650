# SPDX-License-Identifier: Apache-2.0
"""The repository's side of a backup: what is read or pushed becomes blobs, segments, a manifest, a snapshot file.

Everything here blocks and runs on threads; :class:`Storing` is used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pullback
from pullback.engine.cores import cores
from pullback.engine.events import Emit, Note, Progress
from pullback.engine.freezing import Snapshot
from pullback.engine.prove import Proving
from pullback.engine.pull import DiskCount, Pull
from pullback.engine.push import PushedDisk, Writers
from pullback.engine.rate import Rate
from pullback.engine.reading import FrozenDisk
from pullback.engine.survey import Offered, Survey, grids_like, read_segment, survey
from pullback.errors import BackupNotFound, Damaged, RepositoryUnsupported
from pullback.model.facts import Disk, Facts
from pullback.model.manifest import BaseRef, DiskEntry, Manifest, parse_manifest
from pullback.model.units import MIB, SEGMENT
from pullback.nbd.address import Address
from pullback.plan.base import Base, Full, Incremental, StoredPoint
from pullback.plan.grid import Grid, cold_grid
from pullback.plan.prove import Proof, Prove, Proved
from pullback.plan.pull import segment_size
from pullback.plan.selection import Selection
from pullback.repository.layout import BackupBuilder, StoredBackup
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot as SnapshotFile
from pullback.repository.writer import PackWriter

#: Backups that pullback made carry this tag; only they are bases.
TAG = "pullback"
#: A further thread is worth its packs for every so many bytes to read.
_BYTES_PER_THREAD = 64 * MIB
#: Lost packs that a message names.
_NAMED = 3

REBUILD_INDEX = "restic rebuild-index (from restic 0.16 on: restic repair index)"


def stored_points(repository: Repository, domain: str, emit: Emit) -> Iterator[StoredPoint]:
    """The backups of a domain that an incremental one may build on, newest first; damaged ones are passed over."""

    def broken(error: Damaged) -> None:
        # Were it the newest backup's, an older one would be the base: more to read, and right all the same.
        emit(Note(f"Passing over a backup as a base: {error.what}."))

    for snapshot in reversed(repository.snapshots(domain, broken)):
        if TAG not in snapshot.tags:
            continue
        try:
            manifest = parse_manifest(StoredBackup(repository, snapshot).manifest_bytes())
        except (Damaged, RepositoryUnsupported) as error:
            emit(Note(f"Passing over backup {snapshot.short_id} as a base, it cannot be read: {error.what}."))
            continue
        yield StoredPoint(snapshot.id, manifest)


def lost_packs_told(packs: Sequence[str], *, partly: bool) -> str:
    """What to say of lost packs after a backup that was read whole, or ``partly`` not."""
    named = ", ".join(f"data/{pack}" for pack in packs[:_NAMED])
    more = f" and {len(packs) - _NAMED} more" if len(packs) > _NAMED else ""
    rest = " What did not change may be lost with them: run the backup with --full." if partly else ""
    return (
        f"The repository has lost pack files that its index names, or parts of them: {named}{more}. What was read now"
        f" is stored again.{rest} Which backups they touch tells pullback verify --all. Run {REBUILD_INDEX}, so that"
        " restic knows, too."
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that is decided before anything is touched; ``bases`` are by target.

    ``prove`` says how much is compared with the frozen disks before the backup counts as one; None: nothing.
    """

    name: str
    facts: Facts
    selection: Selection
    bases: dict[str, Base]
    checkpoint: str | None
    prove: Prove | None = None


class Storing:
    """One backup on its way into the repository; ``snapshot`` is set as soon as there is one.

    ``reopen`` opens the repository once more, for a proof: as another process sees it.
    """

    def __init__(
        self,
        repository: Repository,
        prepared: Prepared,
        threads: int,
        emit: Emit,
        reopen: Callable[[], Repository],
        rate: Rate,
    ) -> None:
        self.rate = rate
        self._reopen = reopen
        self._repository = repository
        self._emit = emit
        self._prepared = prepared
        # One more than cores: while one waits for the store to have a pack, the others go on.
        self._threads = threads or cores() + 1
        self._writers: list[PackWriter] = []
        self._counts: Mapping[str, DiskCount] = {}
        self._stored = {
            base.backup: StoredBackup(repository, repository.snapshot(base.backup))
            for base in prepared.bases.values()
            if isinstance(base, Incremental)
        }
        self._likes: dict[str, StoredBackup] = {}
        self._builder: BackupBuilder | None = None
        self._stopped = False
        self._proofs: list[tuple[FrozenDisk, Proof]] = []
        self._proving: Proving | None = None
        self._unsaved: tuple[Manifest, SnapshotFile] | None = None
        self.total = 0
        self.pull: Pull | None = None
        self.snapshot: Snapshot | None = None
        self.committed: tuple[Manifest, str] | None = None

    @property
    def progress(self) -> Progress:
        """How far it is: in reading the disks, later in proving the backup."""
        if self._proving is not None:
            return Progress("prove", self._proving.done, self._proving.total)
        done = self.pull.done if self.pull is not None else sum(count.read for count in self._counts.values())
        return Progress("backup", done, self.total)

    def stop(self) -> None:
        """End the pull soon, from any thread."""
        self._stopped = True
        self.rate.stop()
        if self.pull is not None:
            self.pull.stop()
        if self._proving is not None:
            self._proving.stop()

    @property
    def paused_seconds(self) -> float:
        """For how long the domain stood still."""
        return self.snapshot.paused_seconds if self.snapshot else 0.0

    @property
    def result(self) -> tuple[Manifest, str]:
        """The manifest and the id of the backup, once it is committed."""
        assert self.committed is not None
        return self.committed

    def _frozen(self) -> Snapshot:
        assert self.snapshot is not None
        return self.snapshot

    def base(self, target: str) -> tuple[StoredBackup, str] | None:
        """The backup that a disk builds on, and the checkpoint it was made at."""
        base = self._prepared.bases[target]
        return (self._stored[base.backup], base.checkpoint) if isinstance(base, Incremental) else None

    def _like(self, target: str) -> StoredBackup | None:
        """The backup whose chunks a disk that is read whole is cut like."""
        base = self._prepared.bases[target]
        if not isinstance(base, Full) or base.like is None:
            return None
        try:
            if base.like not in self._likes:
                self._likes[base.like] = StoredBackup(self._repository, self._repository.snapshot(base.like))
        except (BackupNotFound, Damaged):
            return None  # forgotten meanwhile, or broken: cut otherwise, the backup only takes more room
        return self._likes[base.like]

    def _begin(self, threads: int) -> BackupBuilder:
        # What a full backup reads may be in the repository already; only the index tells.
        self._repository.load_index()
        self._look_for_lost_packs()
        self._writers = [self._repository.new_writer() for _ in range(max(1, min(self._threads, threads)))]
        return BackupBuilder(self._repository, self._writers[0], self._prepared.name, self._frozen().time)

    def _look_for_lost_packs(self) -> None:
        # A full backup is what mends a repository.  An incremental one must not cost what the repository holds.
        if any(isinstance(base, Full) for base in self._prepared.bases.values()):
            self._repository.look_for_lost_packs()

    # -- pull -----------------------------------------------------------------------------------------------------

    def run_pull(self, address: Address, exports: Mapping[str, str], exact: bool) -> None:
        """Survey the exports (names by target), read and store them; only the writers are still open afterwards.

        Unless ``exact``, QEMU's frozen views need care (``plan.method.FROZEN_VIEW_EXACT``).
        """
        disks = self._prepared.selection.disks
        surveys = [self._survey(address, exports[disk.target], disk, exact) for disk in disks]
        self.total = sum(one.to_read for one in surveys)
        self._proofs = [(one.source.frozen, one.proof) for one in surveys if one.proof]
        builder = self._builder = self._begin(1 + self.total // _BYTES_PER_THREAD)
        for one in surveys:
            builder.add_disk(one.source.target)
            for segment in one.kept:
                builder.keep_segment(one.source.target, segment.number, segment.subtree_id)
        self.pull = Pull(builder, [one.source for one in surveys], not self._prepared.prove, self.rate)
        if not self._stopped:
            self.pull.run(self._writers)
        self._counts = self.pull.counts

    def _survey(self, address: Address, export: str, disk: Disk, exact: bool) -> Survey:
        offered = Offered(address, export, disk.target, disk.virtual_size, exact)
        try:
            found = survey(offered, self.base(disk.target), self._like(disk.target), self._prepared.prove)
        except Damaged as error:
            raise Damaged(
                f"the last backup cannot be built on: {error.what}",
                means="No backup was stored.",
                todo="Run the backup with --full, and look into the repository with restic check.",
            ) from error
        if found.distrust:
            self.distrust(disk.target, found.distrust)
        return found

    def distrust(self, target: str, reason: str) -> None:
        """Do not build on a disk's base after all: it is read whole."""
        self._prepared.bases[target] = Full(reason)
        if self._builder is not None:
            self._look_for_lost_packs()
        self._emit(Note(f"Reading {target} whole after all: {reason}."))

    # -- push -----------------------------------------------------------------------------------------------------

    def begin_push(self) -> list[PushedDisk]:
        """The exports that QEMU is to push its disks to."""
        self._builder = self._begin(self._threads)
        writers = Writers(self._writers)
        pushed = [
            PushedDisk(disk.target, disk.virtual_size, writers, self._cut(disk), self.rate)
            for disk in self._prepared.selection.disks
        ]
        self._counts = {disk.target: disk.count for disk in pushed}
        return pushed

    def _cut(self, disk: Disk) -> Callable[[int], Grid]:
        """How each segment of a pushed disk is cut: as in the backup it builds on, or is like."""
        base = self.base(disk.target)
        if base is None:
            likes = grids_like(self._like(disk.target), disk.target, disk.virtual_size)
            return lambda number: likes.get(number) or cold_grid(segment_size(number, disk.virtual_size))
        backup = base[0]
        segments = {segment.number: segment for segment in backup.segments(disk.target)}

        def cut(number: int) -> Grid:
            size = segment_size(number, disk.virtual_size)
            found = read_segment(backup, segments[number], size) if number in segments else None
            return found.grid if found else cold_grid(size)

        return cut

    def finish_push(self, pushed: Sequence[PushedDisk]) -> None:
        """Build the segments of what was pushed."""
        assert self._builder is not None
        for disk in pushed:
            base = self.base(disk.target)
            disk.finish(self._repository, self._builder, self._writers[0], base[0] if base else None)

    # -- prove ----------------------------------------------------------------------------------------------------

    def prove(self) -> None:
        """Store all but the snapshot file, read it back and compare it with the disks, which are still frozen.

        ProofFailed when they differ.
        """
        self._store()
        assert self._unsaved is not None
        manifest, unsaved = self._unsaved
        try:
            repository = self._reopen()
            stored = StoredBackup(repository, replace(unsaved, id="(new)"))
            if parse_manifest(stored.manifest_bytes()) != manifest:
                raise Damaged("its manifest is another")
            proving = self._proving = Proving(repository, stored, self._proofs, self.rate)
            if self._stopped:
                proving.stop()
            proving.run(self._threads)
        except Damaged as error:
            raise Damaged(
                f"the backup cannot be read back: {error.what}",
                means="No backup was stored. Earlier ones may share what is damaged.",
                todo="See what pullback verify --all --data says. Where packs are missing or too short, run"
                f" {REBUILD_INDEX}, then the backup with --full. Else run pullback prune, which removes what was just"
                " written, and back up again.",
            ) from error

    @property
    def proved(self) -> Proved | None:
        """How much was compared; None when nothing was to be."""
        if not self._prepared.prove:
            return None
        return sum((proof.proved for _, proof in self._proofs), Proved())

    # -- commit ---------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Packs, then index, then the snapshot file; when this returns the backup exists."""
        if self._unsaved is None:
            self._store()
        assert self._unsaved is not None
        manifest, unsaved = self._unsaved
        self.committed = manifest, self._repository.save_snapshot(unsaved)

    def _store(self) -> None:
        """All but the snapshot file: what restic calls unused, until there is one."""
        assert self._builder is not None
        manifest = self._manifest()
        tree = self._builder.finish(manifest.to_bytes())
        with ThreadPoolExecutor(len(self._writers), thread_name_prefix="pullback-store") as pool:
            list(pool.map(PackWriter.flush, self._writers))
        self._repository.save_index()
        self._tell_lost_packs()
        parents = [stored.snapshot for stored in self._stored.values()]
        parent = max(parents, key=lambda snapshot: snapshot.time, default=None)
        self._unsaved = (
            manifest,
            SnapshotFile(
                time=self._frozen().time,
                tree=tree,
                paths=(self._builder.path,),
                hostname=self._prepared.name,
                tags=(TAG,),
                parent=parent.id if parent else None,
                program_version=f"pullback {pullback.__version__}",
            ),
        )

    def _tell_lost_packs(self) -> None:
        if lost := sorted(pack.hex() for pack in self._repository.lost_packs):
            partly = any(isinstance(base, Incremental) for base in self._prepared.bases.values())
            self._emit(Note(lost_packs_told(lost, partly=partly)))

    def abandon(self) -> None:
        """Give up what is not stored; no thread is at work any more."""
        for writer in self._writers:
            writer.abandon()

    def _manifest(self) -> Manifest:
        return Manifest(
            domain=self._prepared.name,
            uuid=self._prepared.facts.uuid,
            time=self._frozen().time,
            consistency=self._frozen().consistency,
            qemu=".".join(map(str, self._prepared.facts.version)),
            pullback=pullback.__version__,
            segment_size=SEGMENT,
            disks=tuple(self._entry(disk) for disk in self._prepared.selection.disks),
            skipped=self._prepared.selection.skipped,
        )

    def _entry(self, disk: Disk) -> DiskEntry:
        base, count = self._prepared.bases[disk.target], self._counts[disk.target]
        incremental = isinstance(base, Incremental)
        return DiskEntry(
            target=disk.target,
            virtual_size=disk.virtual_size,
            checkpoint=None if disk.untracked else self._frozen().checkpoint,
            mode="incremental" if incremental else "full",
            reason="" if isinstance(base, Incremental) else base.reason,
            base=BaseRef(base.backup, base.checkpoint) if isinstance(base, Incremental) else None,
            source_format=disk.driver,
            bytes_read=count.read,
            bytes_new=count.new,
            bytes_zero=count.zero,
        )
