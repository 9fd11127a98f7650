# SPDX-License-Identifier: Apache-2.0
"""Index files, read: what the cache on this machine speaks for is not read again.

listing of index files ──┬── all that the cache speaks for are there ──► only the others are read: into memory, or
                         │                                              into the cache when they are many
                         └── one is gone (a prune replaced it) ────────► all are read, into a new cache
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing

from pullback.errors import Damaged
from pullback.repository.blob import PackId
from pullback.repository.cache_folder import CacheFolder
from pullback.repository.crypto import Key
from pullback.repository.damage import damaged
from pullback.repository.documents import load_document
from pullback.repository.index import Index, IndexBroken, decode_index
from pullback.repository.index_cache import CacheBroken, IndexCache, Secrets
from pullback.repository.index_cache_builder import FILE, IndexCacheBuilder
from pullback.repository.pack import PackedBlob
from pullback.repository.store import FileKind, Store

_LISTINGS = 3
# Beyond these the cache is written anew, which costs little more than to read what is not in it, once: 64 KiB of index
# files are 1,300 blobs, 10 ms of every command. A file counts as 8 KiB beside what it holds; to a remote store it is a
# request.
_TAIL_BYTES = 1 << 16
_TAIL_SHARE = 16
_TAIL_FILES = 32
_BYTES_OF_A_FILE = 8 << 10
_BREAKDOWNS = 3

_Take = Callable[[Iterable[tuple[PackId, Sequence[PackedBlob]]]], None]


class IndexLoader:
    """Loads the index of one repository, with a cache in `folder` or without one; for one thread at a time."""

    def __init__(
        self,
        store: Store,
        key: Key,
        repository_id: str,
        folder: CacheFolder | None = None,
        renew: Callable[[IndexCache], None] | None = None,
    ) -> None:
        self._store = store
        self._key = key
        self._repository_id = repository_id
        self._folder = folder
        self._renew = renew
        self._secrets = Secrets(key) if folder else None
        self._breakdowns = 0

    def load(self) -> Index:
        """What all index files say; raises Damaged for a broken one.

        A file that vanishes after it was listed was replaced by another program: the listing starts anew.
        """
        skip: set[str] = set()
        attempt, from_scratch = 0, False
        while True:
            attempt += 1
            listed = dict(self._store.list(FileKind.INDEX))
            reading = _Reading(self._store, self._key, listed, skip)
            cached = None if from_scratch else self._usable_cache(listed)
            new = {name: size for name, size in listed.items() if cached is None or name not in cached.names}
            try:
                index = self._read(reading, cached, new, last=attempt >= _LISTINGS)
            except CacheBroken:
                self.drop_cache()
                continue
            if index is not None:
                return index
            if cached is not None and cached.names & reading.replaced:
                # What a replaced file replaced itself is known only from reading all of them.
                from_scratch, attempt = True, 0
            else:
                skip |= reading.replaced

    def _usable_cache(self, listed: Iterable[str]) -> IndexCache | None:
        """The cache, if all that it speaks for is still true."""
        if self._folder is None or self._secrets is None or not self._folder.usable:
            return None
        try:
            cached = IndexCache(self._folder.path / FILE, self._secrets, self._repository_id)
        except FileNotFoundError:
            return None
        except CacheBroken:
            self.drop_cache()
            return None
        return cached if cached.names.issubset(listed) else None

    def _read(self, reading: _Reading, cached: IndexCache | None, new: dict[str, int], last: bool) -> Index | None:
        """The index, None if another listing is needed; raises CacheBroken."""
        size = 0 if cached is None else cached.size
        weight = sum(new.values()) + len(new) * _BYTES_OF_A_FILE
        many = weight > max(_TAIL_BYTES, size // _TAIL_SHARE) or len(new) > _TAIL_FILES
        if many and self._folder is not None and self._folder.usable:
            try:
                return self._read_into_cache(reading, cached, new, last)
            except OSError as error:
                self._folder.give_up(error.strerror or str(error))
                reading = reading.again()
        index = Index(cached, self._renew)

        def enter(packs: Iterable[tuple[PackId, Sequence[PackedBlob]]]) -> None:
            for pack, blobs in packs:
                index.add_pack(pack, blobs)

        return index if reading.read(new, enter) or last else None

    def _read_into_cache(
        self, reading: _Reading, cached: IndexCache | None, new: Iterable[str], last: bool
    ) -> Index | None:
        assert self._folder is not None and self._secrets is not None
        with closing(IndexCacheBuilder(self._folder, self._secrets, self._repository_id, cached)) as builder:
            if not reading.read(new, builder.add) and not last:
                return None
            names = reading.done.union(() if cached is None else cached.names)
            return Index(builder.finish(names), self._renew)

    def drop_cache(self) -> None:
        """Delete a broken cache; a cache that breaks again and again is used no more."""
        self._breakdowns += 1
        if self._folder is not None and self._folder.usable:
            self._folder.remove(FILE)
            if self._breakdowns >= _BREAKDOWNS:
                self._folder.give_up("what is written there cannot be read back")


class _Reading:
    """One pass over listed index files; `skip` are replaced by others."""

    def __init__(self, store: Store, key: Key, listed: Iterable[str], skip: set[str]) -> None:
        self._store = store
        self._key = key
        self._listed = frozenset(listed)
        self._skip = frozenset(skip)
        self.replaced: set[str] = set()
        self.done: set[str] = set()

    def again(self) -> _Reading:
        """The same, from the start."""
        return _Reading(self._store, self._key, self._listed, set(self._skip))

    def read(self, names: Iterable[str], take: _Take) -> bool:
        """Hand over the contents of these files; false if one was gone, or one replaces another that was taken."""
        complete = True
        for name in sorted(names):
            if name in self._skip:
                self.done.add(name)
                continue
            try:
                document = load_document(self._store, self._key, FileKind.INDEX, name)
            except Damaged:
                if self._store.exists(FileKind.INDEX, name):
                    raise
                complete = False
                continue
            try:
                packs, superseded = decode_index(document)
                take(packs)
            except IndexBroken as error:
                raise damaged(FileKind.INDEX, name, str(error)) from None
            self.done.add(name)
            self.replaced |= self._listed.intersection(superseded)
        return complete and not self.replaced - self._skip
