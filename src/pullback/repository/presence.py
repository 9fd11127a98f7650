# SPDX-License-Identifier: Apache-2.0
"""Which packs are there: an index goes on listing one that was deleted or cut off.

A blob that is believed to be stored is left out of the next backup, so where the index says that one is, its pack is
looked at: for a full read all at once, in one listing; else one by one as they are met, each with a request for the
last byte that counts.
"""

from __future__ import annotations

import threading

from pullback.errors import Damaged
from pullback.repository.blob import BlobId, BlobKind, BlobLocation, PackId
from pullback.repository.index import Index
from pullback.repository.store import FileKind, Store


class PackPresence:
    """Tells `index` which packs are lost; methods may be called from any thread."""

    def __init__(self, store: Store, index: Index) -> None:
        self._store = store
        self._index = index
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Know nothing: all that was seen may be otherwise now."""
        self._listed = False
        self._seen: dict[PackId, int] = {}
        self._ours: set[PackId] = set()

    def stored(self, pack: PackId) -> None:
        """This process has just stored the pack."""
        self._ours.add(pack)

    def list_all(self) -> None:
        """Look at all packs in one listing; those that are missing, or shorter than the index says, are lost.

        Shorter by its header, too: without that `restic rebuild-index` knows nothing of the pack.
        """
        with self._lock:
            if self._listed:
                return
            # In this order: what is stored in between is in the listing at most.
            wanted = self._index.pack_sizes()
            there = dict(self._store.list(FileKind.DATA))
            self._index.lose(pack for pack, size in wanted.items() if there.get(pack.hex(), -1) < size)
            self._listed = True

    def look_at(self, kind: BlobKind, blob: BlobId) -> None:
        """See that the blob's packs reach as far as the index says, until one does; those that do not are lost."""
        if self._listed:
            return
        for place in self._index.lookup_all(kind, blob):
            if self._good(place):
                return
            self._index.lose([place.pack_id])

    def _good(self, place: BlobLocation) -> bool:
        pack, end = place.pack_id, place.offset + place.length
        if pack in self._ours or self._seen.get(pack, 0) >= end:
            return True
        if pack in self._index.lost:
            return False
        try:
            self._store.load(FileKind.DATA, pack.hex(), end - 1, 1)
        except Damaged:
            return False
        self._seen[pack] = max(end, self._seen.get(pack, 0))
        return True
