# SPDX-License-Identifier: Apache-2.0
"""Pack files: sealed blobs one after the other, then a sealed header that lists them (restic's "Pack Format").

    blob 1 | … | blob n | sealed header | length of the sealed header (4 bytes, little endian)

    header entry, plain        kind 0 or 1 | sealed length (4) | SHA-256 of the plain blob (32)
    header entry, compressed   kind 2 or 3 | sealed length (4) | plain length (4) | SHA-256 (32)

A pack holds blobs of one kind only: prune and caches treat tree packs differently.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterable, Iterator, MutableSequence
from dataclasses import dataclass
from typing import NamedTuple

from pullback.repository.blob import MAX_BLOB, BlobId, BlobKind, PackId
from pullback.repository.crypto import OVERHEAD, Key, SealBroken
from pullback.repository.store import Bytes

# A pack is finished when it reaches this; restic's own default is the same.
PACK_SIZE = 16 << 20

# restic refuses headers above 16 MiB; that would be 400,000 tiny blobs in one pack.
MAX_HEADER = 16 << 20
MAX_BLOBS = 50_000

_PLAIN = struct.Struct("<BI32s")
_COMPRESSED = struct.Struct("<BII32s")
_LENGTH = struct.Struct("<I")
_COMPRESSED_BIT = 2

#: Bytes of a pack without blobs.
EMPTY_PACK = OVERHEAD + _LENGTH.size


class PackBroken(Exception):
    """A pack's header is not one.  Never leaves this package."""


class PackedBlob(NamedTuple):
    """One blob of a pack: `length` sealed bytes at `offset`; `uncompressed_length` is None if it is not compressed.

    A tuple, because reading an index makes millions: a frozen dataclass takes four times as long.
    """

    id: BlobId
    kind: BlobKind
    offset: int
    length: int
    uncompressed_length: int | None


@dataclass(frozen=True, slots=True)
class Pack:
    """A finished pack: its name, its bytes (until the builder's next add) and what is in it."""

    id: PackId
    content: memoryview
    blobs: tuple[PackedBlob, ...]


def add_entries(
    sizes: MutableSequence[int], packs: Iterable[int], lengths: Iterable[int], plains: Iterable[int]
) -> None:
    """Add blobs to the sizes of their packs, counted by number: sealed length, and the entry in the header.

    `plains` are plain lengths with the top bit set where the blob is compressed.  All in one go: there are millions.
    """
    plain, more = _PLAIN.size, _COMPRESSED.size - _PLAIN.size
    for pack, length, stated in zip(packs, lengths, plains, strict=True):
        sizes[pack] += length + plain + (more if stated >> 31 else 0)


class PackBuilder:
    """Collects sealed blobs of one kind in one buffer; for one thread."""

    def __init__(self, key: Key, kind: BlobKind) -> None:
        self._key = key
        self._kind = kind
        # Whole pages: such memory can be written past the page cache.
        self._buffer = mmap.mmap(-1, PACK_SIZE + (1 << 20), mmap.MAP_PRIVATE)
        self._handed_out: memoryview | None = None
        self._used = 0
        self._hash = hashlib.sha256()
        self._blobs: list[PackedBlob] = []

    @property
    def full(self) -> bool:
        """Whether the pack should be finished."""
        return self._used >= PACK_SIZE or len(self._blobs) >= MAX_BLOBS

    def add(self, blob: BlobId, stored: Bytes, uncompressed_length: int | None) -> int:
        """Seal `stored` (compressed if a length is given) behind what is there; returns the sealed length."""
        length = memoryview(stored).nbytes + OVERHEAD
        if self._handed_out is not None:
            # Whoever still held the last pack's bytes would see this one's: now he gets a ValueError.
            self._handed_out.release()
            self._handed_out = None
        self._make_room(length)
        with memoryview(self._buffer) as whole, whole[self._used : self._used + length] as place:
            self._key.seal_into(stored, place)
            self._hash.update(place)  # while it is in the processor's cache
        self._blobs.append(PackedBlob(blob, self._kind, self._used, length, uncompressed_length))
        self._used += length
        return length

    def _make_room(self, more: int) -> None:
        if self._used + more > len(self._buffer):
            larger = mmap.mmap(-1, self._used + more, mmap.MAP_PRIVATE)
            larger[: self._used] = self._buffer[: self._used]
            self._buffer = larger

    def finish(self) -> Pack | None:
        """Close the pack, None if it is empty; the builder starts an empty one in the same buffer."""
        if not self._blobs:
            return None
        header = encode_header(self._blobs)
        self._make_room(len(header) + OVERHEAD + _LENGTH.size)
        with memoryview(self._buffer) as view:
            sealed = self._key.seal_into(header, view[self._used :])
            end = self._used + sealed + _LENGTH.size
            view[self._used + sealed : end] = _LENGTH.pack(sealed)
            self._hash.update(view[self._used : end])
            self._handed_out = content = view[:end]
        name = PackId(self._hash.digest())
        return Pack(name, content, tuple(self.discard()))

    def discard(self) -> list[PackedBlob]:
        """Start over; returns what was in the pack so far."""
        blobs, self._blobs = self._blobs, []
        self._hash = hashlib.sha256()
        self._used = 0
        return blobs


def encode_header(blobs: list[PackedBlob]) -> bytes:
    """The plain header of a pack with these blobs, in this order."""
    parts = []
    for blob in blobs:
        if blob.uncompressed_length is None:
            parts.append(_PLAIN.pack(blob.kind, blob.length, blob.id))
        else:
            parts.append(_COMPRESSED.pack(blob.kind | _COMPRESSED_BIT, blob.length, blob.uncompressed_length, blob.id))
    return b"".join(parts)


def decode_header(header: bytes, room: int) -> Iterator[PackedBlob]:
    """The blobs that a plain header lists; they fill `room` bytes exactly, or PackBroken is raised."""
    position = offset = 0
    while position < len(header):
        compressed = header[position] & _COMPRESSED_BIT
        entry = _COMPRESSED if compressed else _PLAIN
        if header[position] > 3 or position + entry.size > len(header):
            raise PackBroken(f"its header makes no sense at byte {position}")
        fields = entry.unpack_from(header, position)
        length, plain = fields[1], fields[2] if compressed else None
        if length < OVERHEAD or offset + length > room or (plain or 0) > MAX_BLOB:
            raise PackBroken(f"its header claims a blob of {length} bytes at offset {offset}")
        yield PackedBlob(BlobId(fields[-1]), BlobKind(fields[0] & 1), offset, length, plain)
        offset += length
        position += entry.size
    if offset != room:
        raise PackBroken(f"its header lists {offset} bytes of blobs, there are {room}")


def parse_pack(content: Bytes, key: Key) -> list[PackedBlob]:
    """What a whole pack file holds according to its own header; raises PackBroken."""
    view = memoryview(content)
    if view.nbytes < _LENGTH.size + OVERHEAD:
        raise PackBroken("it is too short")
    (sealed,) = _LENGTH.unpack(view[-_LENGTH.size :])
    room = view.nbytes - _LENGTH.size - sealed
    if sealed > MAX_HEADER or room < 0:
        raise PackBroken(f"it claims a header of {sealed} bytes")
    try:
        header = key.open(view[room : room + sealed])
    except SealBroken as error:
        raise PackBroken(f"its header was changed ({error})") from None
    return list(decode_header(header, room))
