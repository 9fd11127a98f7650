# SPDX-License-Identifier: Apache-2.0
"""Blobs: what they are called, where they lie, and how they are compressed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from typing import NewType

import zstandard

from pullback.repository.store import Bytes

# The SHA-256 of a blob's plain bytes; 32 bytes.
BlobId = NewType("BlobId", bytes)

# The SHA-256 of a pack file; 32 bytes.
PackId = NewType("PackId", bytes)

# Far above the largest blob anybody writes (restic's chunks end at 8 MiB, a tree of 100,000 files takes 40): a length
# beyond it is damage, and is never allocated.
MAX_BLOB = 1 << 29

# Index files are the largest, a few MiB (restic aims below 8 MiB, sealed).  Python's objects take up to 25 times as
# much as the JSON they are made from.
MAX_DOCUMENT = 64 << 20


class CompressionBroken(Exception):
    """A zstd frame does not expand to what it should.  Never leaves this package."""


class BlobKind(IntEnum):
    """What a blob holds; the numbers are those of pack headers."""

    DATA = 0
    TREE = 1

    @property
    def word(self) -> str:
        """The kind as index files name it."""
        return "tree" if self is BlobKind.TREE else "data"


@dataclass(frozen=True, slots=True)
class BlobLocation:
    """Where a blob lies: `length` sealed bytes at `offset` of a pack; `uncompressed_length` is its plain size."""

    pack_id: PackId
    kind: BlobKind
    offset: int
    length: int
    uncompressed_length: int
    compressed: bool


def blob_id(data: Bytes) -> BlobId:
    """The name of a blob with these plain bytes; releases the interpreter's lock."""
    return BlobId(hashlib.sha256(data).digest())


def decompress(frame: Bytes, size: int) -> bytes:
    """Expand one zstd frame to exactly `size` bytes; raises CompressionBroken, never allocates more than `size`."""
    if size > MAX_BLOB:
        raise CompressionBroken(f"it claims {size} bytes")
    plain = _expand(frame, size)
    if len(plain) != size:
        raise CompressionBroken(f"it expands to {len(plain)} bytes, not {size}")
    return plain


def decompress_document(frame: Bytes) -> bytes:
    """Expand one zstd frame of unknown size, MAX_DOCUMENT bytes at most; raises CompressionBroken."""
    return _expand(frame, MAX_DOCUMENT)


def _expand(frame: Bytes, limit: int) -> bytes:
    # A frame may state its size: zstandard then believes the frame, whatever limit it was given.
    try:
        stated = zstandard.frame_content_size(frame)
        if stated > limit:
            raise CompressionBroken(f"its frame claims {stated} bytes")
        if stated == 0:
            return b""
        if stated > 0:
            return zstandard.ZstdDecompressor().decompress(frame)
        return _expand_unknown(frame, limit)
    except zstandard.ZstdError as error:
        raise CompressionBroken(str(error)) from None
    except MemoryError:
        raise CompressionBroken("it needs more memory than there is") from None


def _expand_unknown(frame: Bytes, limit: int) -> bytes:
    parts, total = [], 0
    with zstandard.ZstdDecompressor().stream_reader(frame) as reader:
        while part := reader.read(1 << 20):
            parts.append(part)
            total += len(part)
            if total > limit:
                raise CompressionBroken(f"it expands to more than {limit} bytes")
    return b"".join(parts)
