# SPDX-License-Identifier: Apache-2.0
"""Writing blobs: hash → known already? → compress → seal → pack → store, all on the caller's thread.

Several threads write at once with a PackWriter each; what they share is the PendingIndex, which also keeps two
threads from storing the same blob (the zero chunk, above all).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self

import zstandard

from pullback.repository.blob import BlobId, BlobKind, PackId, blob_id
from pullback.repository.crypto import Key
from pullback.repository.index import MAX_INDEX_BLOBS, Index
from pullback.repository.pack import Pack, PackBuilder, PackedBlob
from pullback.repository.presence import PackPresence
from pullback.repository.store import Bytes, FileKind, Store

# zstd's fastest regular level: the line is bound by it already (0.4 GB/s and core on text).
COMPRESSION_LEVEL = 1

_Packs = dict[PackId, tuple[PackedBlob, ...]]


class PendingIndex:
    """What was stored and stands in no index file yet; thread-safe.

    `save` writes one index file.  It is called for every MAX_INDEX_BLOBS blobs on the way, so that memory stays
    bounded and a crash leaves little behind that prune cannot attribute.
    """

    def __init__(self, index: Index, presence: PackPresence, save: Callable[[_Packs], None]) -> None:
        self._index = index
        self._presence = presence
        self._save = save
        self._lock = threading.Lock()
        self._in_flight: set[tuple[BlobKind, BlobId]] = set()
        self._packs: _Packs = {}
        self._count = 0
        self.bytes_stored = 0
        self.blobs_stored = 0

    def reset(self) -> None:
        """Know nothing any more; for a moment when no writer is at work."""
        with self._lock:
            self._in_flight.clear()
            self._packs, self._count = {}, 0
            self._index.clear()
            self._presence.reset()

    def claim(self, kind: BlobKind, blob: BlobId) -> bool:
        """Whether the caller is the one to store this blob; False if it is known, or another thread has it.

        Raises RepositoryError when the store cannot tell whether the pack that should hold it is there.
        """
        self._presence.look_at(kind, blob)
        with self._lock:
            if (kind, blob) in self._in_flight or self._index.has(kind, blob):
                return False
            self._in_flight.add((kind, blob))
            return True

    def abandon(self, blobs: list[tuple[BlobKind, BlobId]]) -> None:
        """Give claims back that were not stored: whoever meets these blobs again must store them."""
        with self._lock:
            self._in_flight.difference_update(blobs)

    @property
    def open_claims(self) -> int:
        """How many blobs writers have promised and not stored yet."""
        with self._lock:
            return len(self._in_flight)

    def stored(self, pack: Pack) -> None:
        """Enter a pack that is durably stored; may write an index file."""
        full: _Packs = {}
        with self._lock:
            self._presence.stored(pack.id)
            self._index.add_pack(pack.id, pack.blobs)
            self._in_flight.difference_update((blob.kind, blob.id) for blob in pack.blobs)
            self._packs[pack.id] = pack.blobs
            self._count += len(pack.blobs)
            self.bytes_stored += pack.content.nbytes
            self.blobs_stored += len(pack.blobs)
            if self._count + len(pack.blobs) > MAX_INDEX_BLOBS:
                full, self._packs, self._count = self._packs, {}, 0
        if full:
            self._save_or_keep(full)

    def flush(self) -> None:
        """Write all that is left to an index file; raises RepositoryError and keeps it if that fails."""
        with self._lock:
            left, self._packs, self._count = self._packs, {}, 0
        if left:
            self._save_or_keep(left)

    def _save_or_keep(self, packs: _Packs) -> None:
        saved = False
        try:
            self._save(packs)
            saved = True
        finally:
            if not saved:
                with self._lock:
                    self._packs |= packs
                    self._count += sum(map(len, packs.values()))


class PackWriter:
    """Stores blobs in packs; for one thread, never shared.

    Use it as a context manager: leaving it stores what is open, leaving it by an exception gives that up.  After an
    error it must not be used again; what it had not stored is neither in the repository nor in the index.
    """

    def __init__(
        self,
        store: Store,
        key: Key,
        pending: PendingIndex,
        *,
        version: int,
        level: int = COMPRESSION_LEVEL,
        before_saving: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._before_saving = before_saving
        self._pending = pending
        self._builders = {kind: PackBuilder(key, kind) for kind in BlobKind}
        self._compressor = zstandard.ZstdCompressor(level=level) if version >= 2 else None
        self.bytes_stored = 0
        self.bytes_added = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()
        else:
            self.abandon()

    def add(self, kind: BlobKind, data: Bytes, blob: BlobId | None = None) -> BlobId:
        """Store a blob unless it is there already, and return its id; `blob` saves hashing if the caller did.

        `data` is not kept after the call.  On return the blob may still be in memory: it is durable after flush().
        """
        blob = blob_id(data) if blob is None else blob
        if self._pending.claim(kind, blob):
            added = False
            try:
                stored, plain = self._compress(kind, data)
                self._builders[kind].add(blob, stored, plain)
                added = True
            finally:
                if not added:
                    self._pending.abandon([(kind, blob)])
            self.bytes_added += memoryview(data).nbytes
            if self._builders[kind].full:
                self._finish(kind)
        return blob

    def _compress(self, kind: BlobKind, data: Bytes) -> tuple[Bytes, int | None]:
        """What to store, and the plain length if that is compressed (a length of 0 would mean: not compressed)."""
        size = memoryview(data).nbytes
        if self._compressor is None or size == 0:
            return data, None
        packed = self._compressor.compress(data)
        # restic's prune stores a plain tree anew to have it compressed, whatever that gains.
        if len(packed) < size or kind is BlobKind.TREE:
            return packed, size
        return data, None

    def flush(self) -> None:
        """Finish and store the open packs; all that was added is durable then, but only an index makes it found."""
        for kind in BlobKind:
            self._finish(kind)

    def abandon(self) -> None:
        """Forget what is not stored, so that other writers store those blobs when they meet them."""
        for builder in self._builders.values():
            self._pending.abandon([(one.kind, one.id) for one in builder.discard()])

    def _finish(self, kind: BlobKind) -> None:
        pack = self._builders[kind].finish()
        if pack is None:
            return
        size = pack.content.nbytes
        saved = False
        try:
            self._before_saving()
            self._store.save(FileKind.DATA, pack.id.hex(), pack.content)
            saved = True
        finally:
            if not saved:
                self._pending.abandon([(one.kind, one.id) for one in pack.blobs])
        self.bytes_stored += size
        self._pending.stored(pack)
