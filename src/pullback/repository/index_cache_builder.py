# SPDX-License-Identifier: Apache-2.0
"""Making the index cache: from nothing, or by folding new index files into an old one.

    index files ──► records ──► spool, by the first byte of the pseudonym
                                  │        256 parts of an unlinked file
    old cache, bucket by bucket ──┴──► new cache, part by part

Memory holds one part of the spool at a time (some MiB for 10 million blobs) and a number for each pack.
"""

from __future__ import annotations

import os
import secrets as random
import struct
import tempfile
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from pullback.repository.blob import BlobKind, PackId
from pullback.repository.cache_folder import CacheFolder
from pullback.repository.crypto import OVERHEAD
from pullback.repository.index_cache import (
    COMPRESSED,
    CRC,
    HEADER,
    ID,
    MAGIC,
    PSEUDONYM,
    RECORD,
    CacheBroken,
    IndexCache,
    Secrets,
)
from pullback.repository.pack import PackedBlob

FILE = "index"

_PARTS = 256
_FLUSH = 32 << 10
# A bucket has 24 records when it is made; beyond 64 there are more buckets at the next fold.
_FRESH_BUCKET = 24
_FULL_BUCKET = 64
# Pseudonym and pack number: two records that begin alike are one, from two index files.
_SAME = PSEUDONYM + 4


class _Spool:
    """Records in a file without a name, in 256 parts by their first byte."""

    def __init__(self, folder: CacheFolder) -> None:
        self._file = tempfile.TemporaryFile(dir=folder.path, buffering=0)  # noqa: SIM115  (closed by close)
        self._open = [bytearray() for _ in range(_PARTS)]
        self._written: list[list[tuple[int, int]]] = [[] for _ in range(_PARTS)]
        self._end = 0
        self.count = 0

    def close(self) -> None:
        self._file.close()

    def add(self, records: Iterable[bytes]) -> None:
        """Take records in any order; what has come together is written when all are taken."""
        parts, before = self._open, sum(map(len, self._open))
        for record in records:
            parts[record[0]] += record
        self.count += (sum(map(len, parts)) - before) // RECORD.size
        for number, part in enumerate(parts):
            if len(part) >= _FLUSH:
                self._flush(number)

    def _flush(self, number: int) -> None:
        content = self._open[number]
        done = 0
        while done < len(content):
            done += os.pwrite(self._file.fileno(), memoryview(content)[done:], self._end + done)
        self._written[number].append((self._end, len(content)))
        self._end += len(content)
        self._open[number] = bytearray()

    def part(self, number: int) -> list[bytes]:
        """Its records, sorted, each once."""
        pieces = [os.pread(self._file.fileno(), size, at) for at, size in self._written[number]]
        whole = b"".join([*pieces, self._open[number]])
        if len(whole) != sum(size for _, size in self._written[number]) + len(self._open[number]):
            raise CacheBroken("the spool is too short")
        return _each_once(sorted(_split(whole)))


def _records(pseudonyms: bytes, numbers: list[int], blobs: list[PackedBlob]) -> Iterator[bytes]:
    pack_record = RECORD.pack
    for at, number, (_, _, offset, length, plain) in zip(
        range(PSEUDONYM, len(pseudonyms), ID), numbers, blobs, strict=True
    ):
        stated = length - OVERHEAD if plain is None else plain | COMPRESSED
        yield pack_record(pseudonyms[at : at + PSEUDONYM], number, offset, length, stated)


def _split(records: bytes) -> list[bytes]:
    return [record for (record,) in struct.iter_unpack(f"{RECORD.size}s", records)]


def _each_once(records: list[bytes]) -> list[bytes]:
    if len({record[:_SAME] for record in records}) == len(records):
        return records
    kept, last = [], b""
    for record in records:
        if record[:_SAME] != last:
            last = record[:_SAME]
            kept.append(record)
    return kept


class IndexCacheBuilder:
    """Takes what new index files hold, then writes the cache; to be closed.

    Methods raise OSError when the folder cannot take it and CacheBroken when `base` turns out to be broken; what was
    in the folder is as it was then.
    """

    def __init__(self, folder: CacheFolder, secrets: Secrets, repository_id: str, base: IndexCache | None) -> None:
        self._folder = folder
        self._secrets = secrets
        self._repository_id = repository_id
        self._base = base
        self._numbers: dict[PackId, int] = {} if base is None else {pack: n for n, pack in enumerate(base.packs())}
        self._spool = _Spool(folder)

    def close(self) -> None:
        """Give up what is not written yet."""
        self._spool.close()

    def add(self, packs: Iterable[tuple[PackId, Sequence[PackedBlob]]]) -> None:
        """Take the contents of one index file."""
        for kind in BlobKind:
            numbers: list[int] = []
            chosen: list[PackedBlob] = []
            for pack, blobs in packs:
                number = self._numbers.setdefault(pack, len(self._numbers))
                of_kind = [blob for blob in blobs if blob[1] is kind]
                chosen += of_kind
                numbers += [number] * len(of_kind)
            pseudonyms = self._secrets.pseudonyms(kind, b"".join([blob[0] for blob in chosen]))
            self._spool.add(_records(pseudonyms, numbers, chosen))

    def finish(self, names: Iterable[str]) -> IndexCache:
        """Write the cache, which then speaks for the index files `names`, and open it."""
        with self._folder.replacing(FILE) as file:
            _Writer(file, self._secrets, self._base, self._spool).write(
                self._repository_id, b"".join(bytes.fromhex(name) for name in sorted(names)), b"".join(self._numbers)
            )
            file.flush()
            # Not by its name afterwards: another process may have deleted or replaced the file by then.
            return IndexCache(file.fileno(), self._secrets, self._repository_id)


class _Writer:
    """Writes one cache."""

    def __init__(self, file: BinaryIO, secrets: Secrets, base: IndexCache | None, spool: _Spool) -> None:
        self._file = file
        self._secrets = secrets
        self._base = base
        self._spool = spool
        self._salt = random.randbits(32)
        total = spool.count + (0 if base is None else base.records)
        self._per_part = max(1, total // (_PARTS * _FRESH_BUCKET))
        if base is not None and total <= base.buckets * _FULL_BUCKET:
            self._per_part = base.buckets // _PARTS
        self._starts = array("I", [0])

    def write(self, repository_id: str, names: bytes, packs: bytes) -> None:
        self._file.write(bytes(HEADER.size))
        for part in range(_PARTS):
            self._write_part(part)
        directory = names + packs + self._starts.tobytes()
        self._file.write(directory)
        buckets = len(self._starts) - 1
        counts = (len(names) // ID, len(packs) // ID, buckets, self._starts[-1], self._salt)
        header = HEADER.pack(MAGIC, bytes.fromhex(repository_id), *counts, bytes(16))[:-16]
        self._file.seek(0)
        self._file.write(header + self._secrets.hash(header, directory))

    def _write_part(self, part: int) -> None:
        new, old = self._spool.part(part), self._old_buckets(part)
        if len(old) != self._per_part:
            new, old = sorted([*_split(b"".join(old)), *new]), []
            new = _each_once(new)
        first = 0
        written = []
        for bucket in range(part * self._per_part, (part + 1) * self._per_part):
            last = bucket + 1 == (part + 1) * self._per_part
            end = len(new) if last else bisect_left(new, self._border(bucket + 1), first)
            mine, first = new[first:end], end
            if old:
                there = old[bucket - part * self._per_part]
                mine = [there, *(record for record in mine if not _holds(there, record))]
            written.append(content := b"".join(mine))
            written.append(CRC.pack(zlib.crc32(content, self._salt ^ bucket)))
            self._starts.append(self._starts[-1] + len(content) // RECORD.size)
        self._file.write(b"".join(written))

    def _border(self, bucket: int) -> bytes:
        """The smallest pseudonym of a bucket, as far as 8 bytes tell."""
        return (-(-(bucket << 64) // (_PARTS * self._per_part))).to_bytes(8, "big")

    def _old_buckets(self, part: int) -> list[bytes]:
        if self._base is None:
            return []
        count = self._base.buckets // _PARTS
        return self._base.bucket_contents(part * count, (part + 1) * count)


def _holds(bucket: bytes, record: bytes) -> bool:
    same = record[:_SAME]
    at = bucket.find(same)
    while at >= 0 and at % RECORD.size:
        at = bucket.find(same, at + 1)
    return at >= 0
