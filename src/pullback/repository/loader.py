# SPDX-License-Identifier: Apache-2.0
"""Reading blobs out of packs; every byte is verified before it is handed out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pullback.errors import Damaged
from pullback.repository.blob import MAX_BLOB, BlobId, BlobKind, BlobLocation, CompressionBroken, PackId, decompress
from pullback.repository.blob import blob_id as hash_of
from pullback.repository.crypto import Key, SealBroken
from pullback.repository.damage import DAMAGE_MEANS, DAMAGE_TODO, damaged
from pullback.repository.index import Index
from pullback.repository.store import Bytes, FileKind, Store

# Neighbouring blobs are read in one go, gaps up to this thrown away: cheaper than another request to S3.
MAX_GAP = 256 << 10
MAX_READ = 16 << 20


@dataclass(frozen=True, slots=True)
class _Wanted:
    id: BlobId
    place: BlobLocation


class BlobLoader:
    """Blobs by id, from any thread."""

    def __init__(self, store: Store, key: Key, index: Callable[[], Index]) -> None:
        self._store = store
        self._key = key
        self._index = index

    def load(self, kind: BlobKind, blob: BlobId) -> bytes:
        """The plain bytes of a blob, from the first place it lies at that is good.

        Raises Damaged, naming pack and blob, if none is, each read twice: what was damaged may have been the answer.
        """
        failure = None
        places = list(self._index().lookup_all(kind, blob))
        for place in [*places, *places]:
            try:
                sealed = self._store.load(FileKind.DATA, place.pack_id.hex(), place.offset, place.length)
                return self.open(blob, place, sealed)
            except Damaged as error:
                failure = error
        raise failure or Damaged(
            f"The {kind.word} blob {blob.hex()} is in no index file of the repository",
            means=DAMAGE_MEANS,
            todo=DAMAGE_TODO,
        )

    def open(self, blob: BlobId, place: BlobLocation, sealed: Bytes) -> bytes:
        """The plain bytes of a sealed blob; raises Damaged unless MAC, length and SHA-256 are right."""
        if place.uncompressed_length > MAX_BLOB:
            raise self._broken(blob, place, f"it claims {place.uncompressed_length} bytes")
        try:
            plain = self._key.open(sealed)
            if place.compressed:
                plain = decompress(plain, place.uncompressed_length)
        except (SealBroken, CompressionBroken) as error:
            raise self._broken(blob, place, str(error)) from None
        if hash_of(plain) != blob:
            raise self._broken(blob, place, "its SHA-256 is another")
        return plain

    def _broken(self, blob: BlobId, place: BlobLocation, why: str) -> Damaged:
        return damaged(
            FileKind.DATA, place.pack_id.hex(), f"{place.kind.word} blob {blob.hex()} at {place.offset}: {why}"
        )

    def load_from_pack(
        self, pack: PackId, blobs: Iterable[BlobId], kind: BlobKind = BlobKind.DATA
    ) -> Iterator[tuple[BlobId, bytes]]:
        """Blobs of one pack in the order they lie there, each once, read in as few pieces as is sensible.

        A blob that is broken there, or not there at all, is looked for in other packs; raises Damaged if there is none.
        """
        wanted, elsewhere = [], []
        for blob in dict.fromkeys(blobs):
            places = self._index().lookup_all(kind, blob)
            place = next((place for place in places if place.pack_id == pack), None)
            if place is None:
                elsewhere.append(blob)
            else:
                wanted.append(_Wanted(blob, place))
        wanted.sort(key=lambda one: one.place.offset)
        for group in _groups(wanted):
            yield from self._load_group(pack, kind, group)
        for blob in elsewhere:
            yield blob, self.load(kind, blob)

    def _load_group(self, pack: PackId, kind: BlobKind, group: list[_Wanted]) -> Iterator[tuple[BlobId, bytes]]:
        start = group[0].place.offset
        end = max(one.place.offset + one.place.length for one in group)
        try:
            content = memoryview(self._store.load(FileKind.DATA, pack.hex(), start, end - start))
        except Damaged:
            for one in group:
                yield one.id, self.load(kind, one.id)
            return
        for one in group:
            first = one.place.offset - start
            try:
                plain = self.open(one.id, one.place, content[first : first + one.place.length])
            except Damaged:
                plain = self.load(kind, one.id)
            yield one.id, plain


def _groups(wanted: list[_Wanted]) -> Iterator[list[_Wanted]]:
    """Runs of neighbours: gaps of MAX_GAP at most, MAX_READ bytes at most unless a single blob is larger."""
    group: list[_Wanted] = []
    for one in wanted:
        if group:
            last = group[-1].place
            near = one.place.offset - (last.offset + last.length) <= MAX_GAP
            if not near or one.place.offset + one.place.length - group[0].place.offset > MAX_READ:
                yield group
                group = []
        group.append(one)
    if group:
        yield group
