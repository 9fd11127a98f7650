# SPDX-License-Identifier: Apache-2.0
"""Verifying backups: what they are made of is there, and with ``data`` every byte of it is as it was written.

    1  manifest and trees: read, and the sizes added up; every blob is in the index, every pack there and long enough.
       A segment's tree is read once, however many backups share it
    2  data: each pack that the backups need is read once, whole, by several threads; SHA-256 of the file, then MAC and
       SHA-256 of each blob
    3  only if something is wrong: what it touches, in all backups of the repository (engine.damage)

Besides the index, memory holds 4 bytes for each blob of a segment and one pack per thread.
"""

from __future__ import annotations

import hashlib
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pullback.engine.cores import cores
from pullback.engine.damage import Damage, DamageMap
from pullback.engine.events import Emit, Note, Progress
from pullback.engine.forgetting import TAG
from pullback.engine.listing import refuse_foreign
from pullback.engine.walking import Piece, walk
from pullback.errors import BackupNotFound, Damaged, RepositoryError, RepositoryUnsupported
from pullback.model.manifest import Manifest, parse_manifest
from pullback.repository.blob import BlobId, BlobKind, BlobLocation, PackId
from pullback.repository.crypto import OVERHEAD
from pullback.repository.locks import RepositoryLock
from pullback.repository.pack import PackBroken, PackedBlob
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot, SnapshotFiles
from pullback.repository.store import Bytes, FileKind

_PROGRESS_EVERY = 0.2
_MOST_THREADS = 4


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What to verify: the backups called so, or all that pullback stored (of a domain); ``data`` reads all of it."""

    backups: tuple[str, ...] = ()
    domain: str | None = None
    data: bool = False
    lock_retry: float = 0.0


@dataclass(frozen=True, slots=True)
class Verified:
    """How it went: counts, damaged files, and backups that are wrong though no file is damaged: id and reason."""

    backups: int
    disks: int
    packs: int
    bytes_read: int
    damages: tuple[Damage, ...]
    wrong: tuple[tuple[str, str], ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages and not self.wrong


@dataclass(slots=True)
class _Survey:
    """What step 1 found."""

    sizes: dict[BlobId, int] = field(default_factory=dict)  # of segments, by their tree
    needed: dict[PackId, array[int]] = field(default_factory=lambda: defaultdict(lambda: array("I")))
    suspects: dict[PackId, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    unlisted: bool = False
    disks: int = 0


class Verification:
    """One run; :meth:`run` blocks, :meth:`stop` ends it early from another thread."""

    def __init__(self, request: VerifyRequest, open_repository: Callable[[], Repository], emit: Emit) -> None:
        self._request = request
        self._open = open_repository
        self._emit = emit
        self._stopped = threading.Event()
        self._lock: RepositoryLock | None = None
        self._survey = _Survey()
        self._pack_sizes: dict[PackId, int] = {}
        self._progress = threading.Lock()
        self._bytes_read = 0
        self._told = 0.0

    def stop(self) -> None:
        """Make ``run`` fail soon."""
        self._stopped.set()
        if self._lock is not None:
            self._lock.give_up()

    def run(self) -> Verified:
        """Verify; what is damaged is in the result.

        Raises BackupNotFound, and Damaged where so much is that nothing can be said: config, keys, index files, or
        the snapshot file that may be the one that was named.
        """
        self._repository = self._open()
        self._lock = self._repository.lock(retry=self._request.lock_retry, waiting=lambda note: self._emit(Note(note)))
        if self._stopped.is_set():
            self._lock.give_up()
        with self._lock:
            files = self._repository.snapshot_files()
            chosen = self._choose(files.of(self._request.domain))
            self._repository.load_index()
            for name, size in self._repository.store.list(FileKind.DATA):
                self._pack_sizes[PackId(bytes.fromhex(name))] = size
            for snapshot in chosen:
                self._survey_backup(snapshot)
            if self._request.data:
                self._read_packs()
            broken = [_broken_snapshot(error) for error in files.broken.values()]
            damages = broken + self._find_damage([one for one in files.readable if TAG in one.tags or one in chosen])
        return self._result(chosen, damages)

    def _result(self, chosen: Sequence[Snapshot], damages: list[Damage]) -> Verified:
        explained = {one.backup for damage in damages for one in damage.touched if one.lost}
        wrong = tuple((backup, why) for backup, why in self._survey.wrong.items() if backup not in explained)
        survey = self._survey
        packs = len(survey.needed.keys() | survey.suspects.keys())
        return Verified(len(chosen), survey.disks, packs, self._bytes_read, tuple(damages), wrong)

    def _choose(self, files: SnapshotFiles) -> list[Snapshot]:
        if self._request.backups:
            found = [files.find(spec) for spec in self._request.backups]
            for one in found:
                refuse_foreign(self._repository, one)
            return list({one.id: one for one in found}.values())
        chosen = [one for one in files.readable if TAG in one.tags]
        if not chosen and not files.broken and self._request.domain is not None:
            raise BackupNotFound(f"there is no backup of a domain {self._request.domain!r} here")
        return chosen

    def _check_stop(self) -> None:
        if self._stopped.is_set():
            raise RepositoryError("verifying was interrupted")

    # -- 1: manifest, trees, index ------------------------------------------------------------------------------------

    def _survey_backup(self, snapshot: Snapshot) -> None:
        manifest: Manifest | None = None
        disks: dict[str, dict[int, int]] = {}
        for piece in walk(self._repository, snapshot, self._survey.sizes):
            self._check_stop()
            self._survey_tree(piece)
            if piece.wrong:
                self._survey.wrong.setdefault(snapshot.id, piece.wrong)
                continue
            try:
                if piece.disk is None and piece.content:
                    self._survey_content(piece)
                    manifest = self._load_manifest(piece.content)
                elif piece.number is not None and piece.disk is not None:
                    disks[piece.disk][piece.number] = self._segment_size(piece)
                elif piece.disk is not None:
                    disks[piece.disk] = {}
            except (Damaged, RepositoryUnsupported) as error:
                self._survey.wrong.setdefault(snapshot.id, error.what)
        self._survey.disks += len(disks)
        for why in _size_errors(manifest, disks):
            self._survey.wrong.setdefault(snapshot.id, why)

    def _load_manifest(self, content: Iterable[BlobId]) -> Manifest:
        return parse_manifest(b"".join(self._repository.load_blob(BlobKind.DATA, blob) for blob in content))

    def _survey_tree(self, piece: Piece) -> None:
        if piece.content is None:
            return
        self._survey_blob(BlobKind.TREE, piece.tree)
        if piece.lost:
            for place in self._repository.index.lookup_all(BlobKind.TREE, piece.tree):
                self._survey.suspects.setdefault(place.pack_id, "a tree in it cannot be read")

    def _segment_size(self, piece: Piece) -> int:
        """The size of a segment whose blobs are all there; raises Damaged."""
        if piece.content is None:
            return self._survey.sizes[piece.tree]
        total = self._survey_content(piece)
        if total != piece.size:
            raise Damaged(f"segment {piece.number} of {piece.disk} has {total} bytes of blobs instead of {piece.size}")
        self._survey.sizes[piece.tree] = piece.size
        return piece.size

    def _survey_content(self, piece: Piece) -> int:
        """The bytes of a file by the index; each of its blobs is looked up once."""
        lengths = {blob: self._survey_blob(BlobKind.DATA, blob) for blob in set(piece.content or ())}
        return sum(lengths[blob] for blob in piece.content or ())

    def _survey_blob(self, kind: BlobKind, blob: BlobId) -> int:
        """Note every place a blob lies at; its plain length, 0 if no index file knows it."""
        length, survey = 0, self._survey
        listed = False
        for place in self._repository.index.lookup_all(kind, blob):
            listed = True
            length = place.uncompressed_length
            size = self._pack_sizes.get(place.pack_id)
            if size is None:
                survey.suspects.setdefault(place.pack_id, "it is missing")
            elif place.offset + place.length > size:
                survey.suspects.setdefault(place.pack_id, f"it is too short: {size} bytes")
            else:
                survey.needed[place.pack_id].append(place.offset)
        survey.unlisted |= not listed
        return length

    # -- 2: data ------------------------------------------------------------------------------------------------------

    def _read_packs(self) -> None:
        survey = self._survey
        packs = sorted(survey.needed.keys() - survey.suspects.keys())
        total = sum(self._pack_sizes[pack] for pack in packs)
        self._total = total
        with ThreadPoolExecutor(min(_MOST_THREADS, cores())) as threads:
            for pack, why in zip(packs, threads.map(self._read_pack, packs), strict=True):
                if why:
                    survey.suspects[pack] = why
        self._emit(Progress("verify", self._bytes_read, total))

    def _read_pack(self, pack: PackId) -> str:
        """Why a pack is not as it was written; empty if it is."""
        self._check_stop()
        try:
            content = self._repository.store.load(FileKind.DATA, pack.hex())
        except Damaged as error:
            return error.what
        with self._progress:
            self._bytes_read += len(content)
            if time.monotonic() - self._told > _PROGRESS_EVERY:
                self._told = time.monotonic()
                self._emit(Progress("verify", self._bytes_read, self._total))
        if hashlib.sha256(content).digest() != pack:
            return "its SHA-256 is not its name"
        try:
            blobs = {blob.offset: blob for blob in self._repository.packed_blobs(content)}
            for offset in sorted(set(self._survey.needed[pack])):
                self._open_packed(pack, blobs.get(offset), content)
        except PackBroken as error:
            return str(error)
        except Damaged as error:
            return error.what
        return ""

    def _open_packed(self, pack: PackId, blob: PackedBlob | None, content: Bytes) -> None:
        """Open a blob as the pack's own header describes it; Damaged if that, or the index, is wrong."""
        if blob is None:
            raise Damaged("its header does not list what the index says of it")
        plain = blob.uncompressed_length
        length = blob.length - OVERHEAD if plain is None else plain
        place = BlobLocation(pack, blob.kind, blob.offset, blob.length, length, plain is not None)
        if place not in self._repository.index.lookup_all(blob.kind, blob.id):
            raise Damaged("its header lists what the index does not know of it")
        sealed = memoryview(content)[blob.offset : blob.offset + blob.length]
        self._repository.open_blob(blob.id, place, sealed)

    # -- 3: what it touches -------------------------------------------------------------------------------------------

    def _find_damage(self, backups: list[Snapshot]) -> list[Damage]:
        if not self._survey.suspects and not self._survey.unlisted:
            return []
        self._emit(Note("something is damaged; looking for what it touches in all backups"))
        return DamageMap(self._repository, self._survey.suspects, self._pack_sizes, self._check_stop).read(backups)


def _broken_snapshot(error: Damaged) -> Damage:
    """A snapshot file says which one it is in its name alone, and that is in the message."""
    return Damage(FileKind.SNAPSHOTS.value, error.what)


def _size_errors(manifest: Manifest | None, disks: dict[str, dict[int, int]]) -> Iterable[str]:
    """Where the segments are not what the manifest says of the disks."""
    for disk in manifest.disks if manifest is not None else ():
        segments = disks.get(disk.target)
        if segments is None:
            yield f"the disk {disk.target} is not there"
        elif sorted(segments) != list(range(len(segments))):
            yield f"segments of the disk {disk.target} are missing"
        elif sum(segments.values()) != disk.virtual_size:
            yield f"the disk {disk.target} has {sum(segments.values())} bytes instead of {disk.virtual_size}"
