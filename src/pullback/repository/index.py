# SPDX-License-Identifier: Apache-2.0
"""Which pack holds which blob: in memory, and as index files (restic's "Indexing").

In memory a blob costs 54 to 60 bytes (measured: 56 of a million): its id and four numbers in flat arrays, found by
a hash table of slots.  A dictionary would take more than 200.  SHA-256 is its own hash function.

    slots     u32, a power of two of them, at most 2/3 used      id[0:8] picks the first to look at, 0 is free
    ids       32 bytes per entry
    numbers   4 × u32 per entry: pack number, offset, sealed length, plain length (top bit: compressed)

Behind these may stand an IndexCache, a file that takes no memory; then only what is newer is in memory.
"""

from __future__ import annotations

import gc
import json
import struct
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from pullback.repository.blob import MAX_BLOB, BlobId, BlobKind, BlobLocation, PackId
from pullback.repository.crypto import OVERHEAD
from pullback.repository.index_cache import CacheBroken, IndexCache
from pullback.repository.pack import EMPTY_PACK, PackedBlob, add_entries

# One index file holds at most this many blobs, which keeps it near restic's 8 MiB.
MAX_INDEX_BLOBS = 50_000

# One blob lies in a few packs, and ids are hashes: 300 is the longest search in a table of 16 million.  A list of ids
# that were chosen to collide would take hours.
MAX_SEARCH = 4096

_COMPRESSED = 1 << 31
_first_slot = struct.Struct("<Q").unpack_from
_T = TypeVar("_T")
# PackedBlob(*fields), but without a Python function in between.
_packed_blob: Callable[[Iterable[Any]], PackedBlob] = partial(tuple.__new__, PackedBlob)
_KINDS = {"data": BlobKind.DATA, "tree": BlobKind.TREE}


class IndexBroken(Exception):
    """An index file's document is not one.  Never leaves this package."""


class _Table:
    """An open-addressing hash table that keeps every place a blob was found at."""

    __slots__ = ("ids", "numbers", "packs", "slots")

    def __init__(self, packs: list[PackId]) -> None:
        self.packs = packs
        self.slots = array("I", bytes(4 * 1024))
        self.ids = bytearray()
        self.numbers = array("I")

    def first(self, blob: bytes) -> int | None:
        """The oldest entry number of a blob, None if it is unknown; 0.7 of the time that `find` takes for it."""
        slots, ids = self.slots, self.ids
        mask = len(slots) - 1
        slot: int = _first_slot(blob)[0] & mask
        while entry := slots[slot]:
            if ids.startswith(blob, (entry - 1) * 32):
                return entry - 1
            slot = (slot + 1) & mask
        return None

    def find(self, blob: bytes) -> Iterator[int]:
        """Entry numbers of a blob, oldest first."""
        slots, ids = self.slots, self.ids
        mask = len(slots) - 1
        slot = _first_slot(blob)[0] & mask
        while entry := slots[slot]:
            if ids.startswith(blob, (entry - 1) * 32):
                yield entry - 1
            slot = (slot + 1) & mask

    def insert(self, pack: int, blobs: list[PackedBlob]) -> None:
        """Enter blobs of the pack with this number; written for speed: an index of 1 TiB has 4 million.

        Raises IndexBroken where too many ids are alike.
        """
        count = len(self.ids) // 32
        if (count + len(blobs)) * 3 > len(self.slots) * 2:
            self._grow(count + len(blobs))
        slots, mask, ids, numbers = self.slots, len(self.slots) - 1, self.ids, self.numbers
        for blob, _, offset, length, plain in blobs:
            # The slot is written last: a reader in another thread sees the entry whole or not at all.
            ids += blob
            numbers.extend((pack, offset, length, length - OVERHEAD if plain is None else plain | _COMPRESSED))
            count += 1
            slot = first = _first_slot(blob)[0] & mask
            while slots[slot]:
                slot = (slot + 1) & mask
            if (slot - first) & mask > MAX_SEARCH:
                raise IndexBroken(f"{MAX_SEARCH} ids are alike")
            slots[slot] = count

    def _grow(self, count: int) -> None:
        size = len(self.slots)
        while count * 3 > size * 2:
            size *= 2
        slots, mask = array("I", bytes(4 * size)), size - 1
        for entry, (first,) in enumerate(struct.iter_unpack("<Q24x", self.ids), 1):
            slot = first & mask
            while slots[slot]:
                slot = (slot + 1) & mask
            slots[slot] = entry
        self.slots = slots


class Index:
    """All known blobs; lookups from any thread, also while others add.

    `cached` is what is known besides.  When it turns out to be broken, `renew` is called, once per thread that met
    it; it must see to it that this index uses it no more.
    """

    def __init__(self, cached: IndexCache | None = None, renew: Callable[[IndexCache], None] | None = None) -> None:
        self._lock = threading.Lock()
        self._renew = renew
        self.cached: IndexCache | None
        self.clear()
        self.cached = cached

    def clear(self) -> None:
        """Know nothing."""
        self.cached = None
        self.lost: frozenset[PackId] = frozenset()
        self._packs: list[PackId] = []
        self._pack_numbers: dict[PackId, int] = {}
        self._tables = {kind: _Table(self._packs) for kind in BlobKind}

    def adopt(self, other: Index) -> None:
        """Know what `other` knows besides what is known already in memory; `other` must not be used any more."""
        with self._lock:
            for kind, table in self._tables.items():
                for entry in range(len(table.ids) // 32):
                    blob = BlobId(bytes(table.ids[32 * entry : 32 * entry + 32]))
                    place = self._place(kind, table, entry)
                    plain = place.uncompressed_length if place.compressed else None
                    other.add_pack(place.pack_id, [PackedBlob(blob, kind, place.offset, place.length, plain)])
            # One assignment each: a lookup in another thread uses the old tables or the new ones, never a mixture.
            self.cached = other.cached
            self._packs, self._pack_numbers, self._tables = other._packs, other._pack_numbers, other._tables

    def _ask(self, question: Callable[[IndexCache], _T], otherwise: _T) -> _T:
        """What the cache answers, `otherwise` without one."""
        while (cached := self.cached) is not None:
            try:
                return question(cached)
            except CacheBroken:
                if self._renew is None:
                    raise
                self._renew(cached)
        return otherwise

    def __len__(self) -> int:
        """How many places are known; one may count twice if it is in memory and in the cache."""
        cached = self.cached
        return sum(len(table.ids) // 32 for table in self._tables.values()) + (0 if cached is None else len(cached))

    @property
    def packs(self) -> frozenset[PackId]:
        """The packs that hold anything known."""
        cached = self.cached
        return frozenset(self._pack_numbers).union(() if cached is None else cached.packs())

    def lose(self, packs: Iterable[PackId]) -> None:
        """These packs are not there, or are cut off: what only they hold is not stored, wherever it is looked up."""
        with self._lock:
            self.lost = self.lost.union(packs)

    def pack_sizes(self) -> dict[PackId, int]:
        """How many bytes each known pack file must have."""
        nothing: dict[PackId, int] = {}
        sizes = self._ask(lambda cached: cached.pack_sizes(), nothing)
        with self._lock:
            mine = [EMPTY_PACK] * len(self._packs)
            for table in self._tables.values():
                add_entries(mine, table.numbers[0::4], table.numbers[2::4], table.numbers[3::4])
            # A pack in both is in two index files, each of which names all of its blobs.
            for pack, size in zip(self._packs, mine, strict=True):
                sizes[pack] = max(size, sizes.get(pack, 0))
        return sizes

    def add_pack(self, pack: PackId, blobs: Iterable[PackedBlob]) -> None:
        """Enter the blobs of a pack; what is known of it already (from another index file) is not entered twice.

        Raises IndexBroken for ids that no hash has; the index is of no more use then.
        """
        with self._lock:
            number = self._pack_numbers.get(pack, len(self._packs))
            known = number < len(self._packs)
            if not known:
                self._packs.append(pack)
            new = [blob for blob in blobs if not (known and self._has_in(pack, blob))]
            for kind, table in self._tables.items():
                table.insert(number, [blob for blob in new if blob.kind is kind])
            self._pack_numbers[pack] = number

    def _has_in(self, pack: PackId, blob: PackedBlob) -> bool:
        return any(place.pack_id == pack for place in self._in_memory(blob.kind, blob.id))

    def _in_memory(self, kind: BlobKind, blob: BlobId) -> Iterator[BlobLocation]:
        table = self._tables[kind]
        for entry in table.find(blob):
            yield self._place(kind, table, entry)

    def lookup(self, kind: BlobKind, blob: BlobId) -> BlobLocation | None:
        """Where a blob lies (one of the places), None if unknown."""
        return next(self.lookup_all(kind, blob), None)

    def lookup_all(self, kind: BlobKind, blob: BlobId) -> Iterator[BlobLocation]:
        """Every place a blob lies at: a blob may stand in several packs until a prune folds them."""
        # The cache first: if it has to be renewed without one, what it knew is in memory afterwards.
        packs: set[PackId] = set()
        nowhere: list[BlobLocation] = []
        for place in self._ask(lambda cached: list(cached.lookup_all(kind, blob)), nowhere):
            packs.add(place.pack_id)
            yield place
        for place in self._in_memory(kind, blob):
            if place.pack_id not in packs:
                yield place

    def lengths(self, kind: BlobKind, blobs: Sequence[BlobId]) -> list[int | None]:
        """The plain length in bytes of each blob, None where it is unknown; for many at once, faster than lookup."""
        nothing: list[int | None] = [None] * len(blobs)
        found = self._ask(lambda cached: cached.lengths(kind, blobs), nothing) if blobs else nothing
        table = self._tables[kind]
        for number, blob in enumerate(blobs):
            if found[number] is None and (entry := table.first(blob)) is not None:
                found[number] = table.numbers[4 * entry + 3] & ~_COMPRESSED
        return found

    @staticmethod
    def _place(kind: BlobKind, table: _Table, entry: int) -> BlobLocation:
        pack, offset, length, plain = table.numbers[4 * entry : 4 * entry + 4]
        return BlobLocation(table.packs[pack], kind, offset, length, plain & ~_COMPRESSED, bool(plain & _COMPRESSED))

    def has(self, kind: BlobKind, blob: BlobId) -> bool:
        """Whether the blob is known, and not only in packs that are lost."""
        if self.lost:
            return any(place.pack_id not in self.lost for place in self.lookup_all(kind, blob))
        return self._ask(lambda cached: cached.has(kind, blob), False) or self._tables[kind].first(blob) is not None

    def memory(self) -> int:
        """Bytes taken by the arrays (not by the few bytes per pack)."""
        return sum(
            len(table.ids) + (len(table.numbers) + len(table.slots)) * table.slots.itemsize
            for table in self._tables.values()
        )


def encode_index(packs: Mapping[PackId, Iterable[PackedBlob]], supersedes: Iterable[str] = ()) -> bytes:
    """The JSON document of an index file."""
    document: dict[str, Any] = {}
    if replaced := list(supersedes):
        document["supersedes"] = replaced
    document["packs"] = [
        {"id": pack.hex(), "blobs": [_encode_blob(blob) for blob in blobs]} for pack, blobs in packs.items()
    ]
    return json.dumps(document, separators=(",", ":")).encode()


def _encode_blob(blob: PackedBlob) -> dict[str, str | int]:
    entry: dict[str, str | int] = {
        "id": blob.id.hex(),
        "type": blob.kind.word,
        "offset": blob.offset,
        "length": blob.length,
    }
    if blob.uncompressed_length is not None:
        entry["uncompressed_length"] = blob.uncompressed_length
    return entry


def decode_index(document: bytes) -> tuple[list[tuple[PackId, list[PackedBlob]]], list[str]]:
    """Packs with their blobs, and the names of index files this one replaces; raises IndexBroken.

    Fields we do not know are passed over.  The oldest form, a bare list of packs, is read too.
    """
    # None of the hundred thousand objects that a file becomes is garbage; the collector would look through them again
    # and again, for half of the time that parsing takes.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _decode(json.loads(document))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IndexBroken(f"{type(error).__name__}: {error}") from None
    finally:
        if collecting:
            gc.enable()


def _decode(parsed: Any) -> tuple[list[tuple[PackId, list[PackedBlob]]], list[str]]:
    listed = parsed if isinstance(parsed, list) else parsed.get("packs") or []
    replaced = [] if isinstance(parsed, list) else parsed.get("supersedes") or []
    packs = [(PackId(_id(pack["id"])), _decode_blobs(pack.get("blobs") or [])) for pack in listed]
    return packs, [_id(name).hex() for name in replaced]


def _decode_blobs(entries: list[dict[str, Any]]) -> list[PackedBlob]:
    """The blobs of a pack, checked column by column: an index of 10 million is read in half of the time."""
    if not entries:
        return []
    names = [entry["id"] for entry in entries]
    kinds = [_KINDS[entry["type"]] for entry in entries]
    offsets, lengths = [entry["offset"] for entry in entries], [entry["length"] for entry in entries]
    plains = [entry.get("uncompressed_length", 0) for entry in entries]
    if {*map(type, offsets), *map(type, lengths), *map(type, plains)} != {int}:
        raise TypeError("a number is not one")
    if min(offsets) < 0 or max(offsets) >= 1 << 32:
        raise ValueError("a blob at such an offset cannot be")
    if min(lengths) < OVERHEAD or min(plains) < 0 or max(max(lengths), max(plains)) > MAX_BLOB:
        raise ValueError("a blob of such a length cannot be")
    ids = bytes.fromhex("".join(names))
    # fromhex passes over spaces, so that a short id could make up for a long one.
    if {*map(len, names)} != {64} or len(ids) != 32 * len(names):
        raise ValueError("an id is not 32 bytes")
    each = [ids[at : at + 32] for at in range(0, len(ids), 32)]
    stated = [plain or None for plain in plains]
    return list(map(_packed_blob, zip(each, kinds, offsets, lengths, stated, strict=True)))


def _id(text: Any) -> bytes:
    raw = bytes.fromhex(text)
    if len(raw) != 32:
        raise ValueError("an id is not 32 bytes")
    return raw
