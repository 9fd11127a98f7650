# SPDX-License-Identifier: Apache-2.0
"""A restic repository, opened: what the engine uses.

    repo = Repository.open(open_store(location), password)
    with repo.lock():
        with repo.new_writer() as writer: …        packs
        repo.save_index()                          then the index
        repo.save_snapshot(snapshot)               then the snapshot file: now the backup exists

Every method may be called from any thread.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from pullback.errors import (
    BackupNotFound,
    Damaged,
    RepositoryExists,
    RepositoryMissing,
    RepositoryUnsupported,
    UsageError,
)
from pullback.repository.blob import BlobId, BlobKind, BlobLocation, PackId
from pullback.repository.cache_folder import CacheFolder
from pullback.repository.cached_store import CachedStore
from pullback.repository.crypto import Key, make_key_file
from pullback.repository.damage import damaged
from pullback.repository.documents import load_document, save_document
from pullback.repository.index import Index, encode_index
from pullback.repository.index_cache import IndexCache
from pullback.repository.index_loader import IndexLoader
from pullback.repository.key_file import ScryptCost
from pullback.repository.keys import find_key
from pullback.repository.loader import BlobLoader
from pullback.repository.local_store import LocalStore
from pullback.repository.locks import RepositoryLock, current_account
from pullback.repository.pack import PackedBlob, parse_pack
from pullback.repository.polynomial import random_polynomial
from pullback.repository.presence import PackPresence
from pullback.repository.snapshots import Snapshot, SnapshotBroken, SnapshotFiles, decode_snapshot, encode_snapshot
from pullback.repository.store import ID_NAME, Bytes, FileKind, Store
from pullback.repository.tree import Tree, TreeBroken, decode_tree, go_time
from pullback.repository.writer import COMPRESSION_LEVEL, PackWriter, PendingIndex

VERSION = 2
READABLE_VERSIONS = (1, 2)
CONFIG = "config"


class Repository:
    """An open repository; made by init or open."""

    def __init__(
        self, store: Store, key: Key, repository_id: str, version: int, cache: CacheFolder | None = None
    ) -> None:
        # Snapshot files in a directory here need no copy.
        self.store = store if cache is None or isinstance(store, LocalStore) else CachedStore(store, cache)
        self.id = repository_id
        self.version = version
        self._key = key
        self._index = Index(renew=self._renew_index)
        self._index_loader = IndexLoader(self.store, key, repository_id, cache, self._renew_index)
        self._index_loaded = False
        self._index_lock = threading.Lock()
        self._presence = PackPresence(self.store, self._index)
        self._pending = PendingIndex(self._index, self._presence, self._save_packs)
        self._loader = BlobLoader(self.store, key, self.load_index)
        self._lock: RepositoryLock | None = None

    # -- making and opening ---------------------------------------------------------------------------------------

    @classmethod
    def init(cls, store: Store, password: str, *, version: int = VERSION, cost: ScryptCost | None = None) -> Repository:
        """Make a new repository; raises RepositoryExists if there is one, or UsageError for an empty password.

        The config is written last: before it, there is no repository, and what an init that was killed has left is
        replaced.  `cost` is for tests.
        """
        if not password:
            raise UsageError("The repository's password is empty", todo="Set RESTIC_PASSWORD or RESTIC_PASSWORD_FILE.")
        if version not in READABLE_VERSIONS:
            raise RepositoryUnsupported(f"Repositories of version {version} cannot be made")
        left = _keys_of_a_killed_init(store)
        key, who = Key.generate(), current_account()
        name, content = make_key_file(
            key,
            password,
            created=go_time(datetime.now(UTC)),
            username=who.username,
            hostname=who.hostname,
            cost=cost or ScryptCost(),
        )
        config = {
            "version": version,
            "id": secrets.token_hex(32),
            "chunker_polynomial": f"{random_polynomial():x}",
        }
        store.create()
        store.save(FileKind.KEYS, name, content)
        save_document(store, key, version, FileKind.CONFIG, json.dumps(config, separators=(",", ":")).encode())
        for stray in left:
            # With the same password it would open, and then the config would not.
            store.remove(FileKind.KEYS, stray)
        return cls(store, key, str(config["id"]), version)

    @classmethod
    def open(
        cls,
        store: Store,
        password: str,
        *,
        cache: Path | None = None,
        warn: Callable[[str], None] | None = None,
        key: Callable[[], Key] | None = None,
    ) -> Repository:
        """Open a repository with any of its passwords, or with the ``key`` that one of them stands for.

        `cache` is a directory for copies of what opening would read again each time, None to do without; when it
        cannot be used, `warn` gets a sentence, once, and all works without it.

        Raises RepositoryMissing, WrongPassword, Damaged for a broken key file or config, RepositoryUnsupported for
        a version that is neither 1 nor 2.
        """
        if not store.exists(FileKind.CONFIG, CONFIG):
            raise RepositoryMissing(
                f"There is no repository at {store.location}",
                todo="Check the location, or make one there with pullback init.",
            )
        found = key() if key is not None else find_key(store, password)
        repository_id, version = _read_config(store, found)
        return cls(store, found, repository_id, version, CacheFolder(cache, repository_id, warn) if cache else None)

    def check_writable(self) -> None:
        """Raise RepositoryUnsupported for a version that is only read."""
        if self.version < VERSION:
            raise RepositoryUnsupported(
                f"The repository {self.store.location} has format version {self.version}, which is only read",
                means="No backup was made, and nothing was written; list, restore and verify work.",
                todo="Bring it to version 2 with restic migrate upgrade_repo_v2, or back up into another one.",
            )

    # -- the index ------------------------------------------------------------------------------------------------

    @property
    def index(self) -> Index:
        """Which pack holds which blob; read from the store at the first use."""
        return self.load_index()

    def load_index(self) -> Index:
        """Read the index files that the cache does not hold, unless that was done; what this process wrote is in too.

        Take the lock first: without one, a prune may delete what the index names.
        """
        with self._index_lock:
            if not self._index_loaded:
                self._index.adopt(self._index_loader.load())
                self._index_loaded = True
            return self._index

    def look_for_lost_packs(self) -> None:
        """List all packs: blobs of those that are missing or too short count as not stored from now on.

        Without it a writer looks at packs one by one, as it meets blobs that should be in them.
        """
        self.load_index()
        self._presence.list_all()

    @property
    def lost_packs(self) -> frozenset[PackId]:
        """Packs that the index names and that were seen to be missing or too short."""
        return self._index.lost

    def _renew_index(self, broken: IndexCache) -> None:
        with self._index_lock:
            if self._index.cached is broken:  # else another thread was here first
                self._index_loader.drop_cache()
                self._index.adopt(self._index_loader.load())

    def save_index(self) -> None:
        """Write what was stored since the last time to index files, durably; call it when all writers are flushed."""
        self._pending.flush()

    def _save_packs(self, packs: Mapping[PackId, Iterable[PackedBlob]]) -> None:
        save_document(self.store, self._key, self.version, FileKind.INDEX, encode_index(packs))

    # -- blobs and trees ------------------------------------------------------------------------------------------

    def load_blob(self, kind: BlobKind, blob: BlobId) -> bytes:
        """The verified plain bytes of a blob; raises Damaged, naming pack and blob."""
        return self._loader.load(kind, blob)

    def load_blobs_of_pack(self, pack: PackId, blobs: Iterable[BlobId]) -> Iterator[tuple[BlobId, bytes]]:
        """Data blobs of one pack, verified, in the order they lie there, read in as few pieces as is sensible."""
        return self._loader.load_from_pack(pack, blobs)

    def open_blob(self, blob: BlobId, place: BlobLocation, sealed: Bytes) -> bytes:
        """The plain bytes of a blob sealed at this one place; raises Damaged, naming pack and blob."""
        return self._loader.open(blob, place, sealed)

    def packed_blobs(self, content: Bytes) -> list[PackedBlob]:
        """What a whole pack file holds by its own header; raises PackBroken."""
        return parse_pack(content, self._key)

    def load_tree(self, tree: BlobId) -> Tree:
        """A directory's nodes; raises Damaged."""
        try:
            return decode_tree(self.load_blob(BlobKind.TREE, tree))
        except TreeBroken as error:
            raise Damaged(f"The tree {tree.hex()} of the repository cannot be understood: {error}") from None

    def new_writer(self, level: int = COMPRESSION_LEVEL) -> PackWriter:
        """A writer for the calling thread; hold a lock while there is one.  It raises RepositoryLocked if that is lost.

        Blobs that the loaded index knows are not stored again; without load_index, only those of this process.
        """
        return PackWriter(
            self.store, self._key, self._pending, version=self.version, level=level, before_saving=self._check_lock
        )

    def _check_lock(self) -> None:
        if self._lock is not None and self._lock.held:
            self._lock.check()

    @property
    def bytes_stored(self) -> int:
        """Bytes of packs this process stored."""
        return self._pending.bytes_stored

    @property
    def blobs_stored(self) -> int:
        """Blobs this process stored."""
        return self._pending.blobs_stored

    # -- backups --------------------------------------------------------------------------------------------------

    def save_snapshot(self, snapshot: Snapshot) -> str:
        """Store the snapshot file; when this returns the backup exists; returns its id.

        Raises RepositoryLocked if our lock was lost meanwhile.  Index entries not written yet are written first.
        """
        if self._pending.open_claims:
            raise RuntimeError("a writer was neither flushed nor abandoned")
        self.save_index()
        if self._lock is not None:
            self._lock.check()
        return save_document(self.store, self._key, self.version, FileKind.SNAPSHOTS, encode_snapshot(snapshot))

    def snapshots(self, domain: str | None = None, broken: Callable[[Damaged], None] | None = None) -> list[Snapshot]:
        """All backups, or those of one domain, the oldest first.

        A broken snapshot file is told to `broken` and passed over; raises Damaged where nobody is to be told.
        """
        files = self.snapshot_files().of(domain)
        for error in files.broken.values():
            if broken is None:
                raise error
            broken(error)
        return list(files.readable)

    def snapshot_files(self) -> SnapshotFiles:
        """All backups that can be read, and what is wrong with the other snapshot files."""
        found, broken = [], {}
        for name, _ in self.store.list(FileKind.SNAPSHOTS):
            try:
                snapshot = self._load_snapshot(name)
            except Damaged as error:
                broken[name] = error
                continue
            if snapshot is not None:
                found.append(snapshot)
        return SnapshotFiles(tuple(sorted(found, key=lambda snapshot: (snapshot.time, snapshot.id))), broken)

    def _load_snapshot(self, name: str) -> Snapshot | None:
        """The snapshot in this file; None if somebody has forgotten it since it was listed."""
        try:
            document = load_document(self.store, self._key, FileKind.SNAPSHOTS, name)
        except Damaged:
            if self.store.exists(FileKind.SNAPSHOTS, name):
                raise
            return None
        try:
            return decode_snapshot(document, name)
        except SnapshotBroken as error:
            raise damaged(FileKind.SNAPSHOTS, name, str(error)) from None

    def snapshot(self, backup: str) -> Snapshot:
        """The backup with this whole id; raises BackupNotFound if it was forgotten, Damaged if its file is broken."""
        found = self._load_snapshot(backup)
        if found is None:
            raise BackupNotFound(f"The backup {backup[:8]} was forgotten meanwhile", todo="Run it again.")
        return found

    def find(self, spec: str, tell: Callable[[Damaged], None] | None = None) -> Snapshot:
        """The backup named so, as SnapshotFiles.find; `tell` hears of broken snapshot files that were passed over."""
        files = self.snapshot_files()
        found = files.find(spec)
        if tell is not None:
            for damage in files.broken.values():
                tell(damage)
        return found

    def lock(
        self, exclusive: bool = False, *, retry: float = 0.0, waiting: Callable[[str], None] | None = None
    ) -> RepositoryLock:
        """A lock to enter: shared for reading and writing, exclusive for deleting.

        Waits up to `retry` seconds, calling `waiting` with a sentence, then raises RepositoryLocked.
        """
        self._lock = RepositoryLock(
            self.store,
            self._key,
            self.version,
            exclusive=exclusive,
            retry=retry,
            waiting=waiting,
            acquired=None if self._lock is not None and self._lock.held else self._forget_index,
        )
        return self._lock

    def _forget_index(self) -> None:
        # While we held no lock a prune may have deleted anything we knew of: a chunk believed to be stored would
        # be left out of the next backup.
        self._pending.reset()
        with self._index_lock:
            self._index_loaded = False


def _keys_of_a_killed_init(store: Store) -> list[str]:
    """The keys at a place where a repository can be made; RepositoryExists where there is one, or what it held."""
    kinds = (FileKind.DATA, FileKind.INDEX, FileKind.SNAPSHOTS)
    if store.exists(FileKind.CONFIG, CONFIG) or any(True for kind in kinds for _ in store.list(kind)):
        raise RepositoryExists(
            f"There is a repository at {store.location} already",
            means="It was left as it is.",
            todo="Use it with its password, or choose another place.",
        )
    return [name for name, _ in store.list(FileKind.KEYS)]


def _read_config(store: Store, key: Key) -> tuple[str, int]:
    document = load_document(store, key, FileKind.CONFIG, CONFIG)
    try:
        fields = json.loads(document)
        version, repository_id = int(fields["version"]), str(fields["id"])
        if not ID_NAME.fullmatch(repository_id):  # it names a folder of the cache
            raise ValueError("the repository's id is not 32 bytes")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise damaged(FileKind.CONFIG, CONFIG, type(error).__name__) from None
    if version not in READABLE_VERSIONS:
        raise RepositoryUnsupported(
            f"The repository {store.location} has format version {version}; versions 1 and 2 are known",
            todo="A newer pullback may read it.",
        )
    return repository_id, version
