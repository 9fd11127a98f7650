# SPDX-License-Identifier: Apache-2.0
"""What index files say, in one file on this machine, looked up where it lies: opening it does not read the entries.

    header      magic | repository id | numbers of: index files, packs, buckets, records | salt | keyed hash of all
                this and the directory
    buckets     each: its records, then a CRC-32 of them that starts from salt XOR number of the bucket
    directory   ids of the index files it speaks for, 32 bytes each | ids of the packs, 32 bytes each |
                u32: number of the first record of each bucket, and the number of all

    record      pseudonym of (kind, blob id), 16 bytes | u32: pack number, offset, sealed length, plain length (top
                bit: compressed)

A blob's pseudonym tells its bucket: its first 64 bits as a fraction of the number of buckets.  So the buckets are in
the order of the pseudonyms, whatever their number, and a fold of new entries goes through them once.

A pseudonym is a MAC of the blob id under a key that follows from the repository's (CBC-MAC with AES-256 over the
fixed two blocks of an id): who reads the file learns no SHA-256 of anybody's data.  Numbers are in the machine's own
byte order; the magic tells it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import sys
import threading
import weakref
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from pullback.repository.blob import BlobId, BlobKind, BlobLocation, PackId
from pullback.repository.crypto import Key
from pullback.repository.pack import EMPTY_PACK, add_entries

COMPRESSED = 1 << 31
RECORD = struct.Struct("=16s4I")
PSEUDONYM = 16
CRC = struct.Struct("<I")
HEADER = struct.Struct("=24s32s3IQI16s")
MAGIC = f"pullback index 1 {sys.byteorder}".encode().ljust(24, b"\0")
ID = 32

# Whoever asks for one record in so many reads the whole file first: with 10 million blobs that none of the system's
# caches holds, 1 second in all in place of 0.1 ms for each (measured).
_MANY = 1024
_PIECE = 1 << 20
# So many buckets are looked through at a time: some hundred KiB.
_BUCKETS = 1024

_numbers = struct.Struct("=4I").unpack_from
_fraction = struct.Struct(">Q").unpack_from


class CacheBroken(Exception):
    """The cache is not what was written, or not of this repository.  Never leaves this package."""


class Secrets:
    """What keeps the cache unreadable to others: the keys of pseudonyms and of the header's hash."""

    def __init__(self, key: Key) -> None:
        def derived(purpose: bytes) -> bytes:
            return hashlib.blake2b(b"pullback index cache: " + purpose, key=key.encrypt, digest_size=32).digest()

        self._ciphers = {kind: Cipher(algorithms.AES(derived(kind.word.encode())), modes.ECB()) for kind in BlobKind}
        self._hash_key = derived(b"header")
        self._of_thread = threading.local()

    def _encryptor(self, kind: BlobKind) -> CipherContext:
        # Ten microseconds to make, and not for two threads at once.  Whole blocks leave nothing behind in it.
        found: dict[BlobKind, CipherContext] | None = getattr(self._of_thread, "encryptors", None)
        if found is None:
            found = self._of_thread.encryptors = {one: cipher.encryptor() for one, cipher in self._ciphers.items()}
        return found[kind]

    def pseudonym(self, kind: BlobKind, blob: bytes) -> bytes:
        """The pseudonym of one blob."""
        encipher = self._encryptor(kind).update
        first = int.from_bytes(encipher(blob[:PSEUDONYM]), "big")
        return encipher((first ^ int.from_bytes(blob[PSEUDONYM:], "big")).to_bytes(PSEUDONYM, "big"))

    def pseudonyms(self, kind: BlobKind, blobs: bytes) -> bytes:
        """For 32-byte ids one after the other: bytes 16 to 32 of each place are its pseudonym, the others mean nothing.

        Every first half is enciphered, added to the second half beside it, and that is enciphered: all in two calls.
        """
        encipher = self._encryptor(kind).update
        first = encipher(blobs)
        shifted = int.from_bytes(first, "big") >> 128 if len(first) else 0
        mixed = (shifted ^ int.from_bytes(blobs, "big")).to_bytes(len(blobs), "big")
        return encipher(mixed)

    def hash(self, *parts: bytes | memoryview) -> bytes:
        """The keyed hash of header and directory."""
        state = hashlib.blake2b(key=self._hash_key, digest_size=16)
        for part in parts:
            state.update(part)
        return state.digest()


class IndexCache:
    """An open cache, by its path or an open descriptor; lookups from any thread.

    It stays as it is when another process replaces the file.  Every method raises CacheBroken when what it reads is
    not what was written.
    """

    def __init__(self, file: Path | int, secrets: Secrets, repository_id: str) -> None:
        try:
            self._file = os.dup(file) if isinstance(file, int) else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise CacheBroken(str(error)) from None
        weakref.finalize(self, os.close, self._file)
        self._asked = 0
        self._read_through = False
        self._secrets = secrets
        self.buckets: int
        self.records: int
        header = self._read(0, HEADER.size)
        magic, repository, files, packs, self.buckets, self.records, self.salt, digest = HEADER.unpack(header)
        if magic != MAGIC or repository.hex() != repository_id:
            raise CacheBroken("of another repository, version or machine")
        start = HEADER.size + self.records * RECORD.size + self.buckets * CRC.size
        size = (files + packs) * ID + (self.buckets + 1) * 4
        self.size = start + size
        if os.fstat(self._file).st_size != self.size:
            raise CacheBroken("its size is wrong")
        directory = self._read(start, size)
        if secrets.hash(header[: -len(digest)], directory) != digest:
            raise CacheBroken("its header or directory is wrong")
        self.names = frozenset(directory[at : at + ID].hex() for at in range(0, files * ID, ID))
        self.pack_table = directory[files * ID : (files + packs) * ID]
        self._starts = array("I", directory[(files + packs) * ID :])

    def _read(self, offset: int, length: int) -> bytes:
        try:
            content = os.pread(self._file, length, offset)
            while len(content) < length and (
                more := os.pread(self._file, length - len(content), offset + len(content))
            ):
                content += more
        except OSError as error:
            raise CacheBroken(str(error)) from None
        if len(content) != length:
            raise CacheBroken("it is too short")
        return content

    def _warm(self) -> None:
        """Have the system hold the file in its memory, as far as it likes."""
        piece = bytearray(_PIECE)
        # A read that fails here fails again where it matters.
        with contextlib.suppress(OSError):
            for offset in range(0, self.size, _PIECE):
                os.preadv(self._file, [piece], offset)

    def __len__(self) -> int:
        return self.records

    def packs(self) -> Iterator[PackId]:
        """The packs it knows of, by number."""
        return (PackId(self.pack_table[at : at + ID]) for at in range(0, len(self.pack_table), ID))

    def bucket_contents(self, first: int, end: int) -> list[bytes]:
        """The records of buckets `first` up to `end`, bucket by bucket."""
        starts = self._starts[first : end + 1]
        at = HEADER.size + starts[0] * RECORD.size + first * CRC.size
        whole = self._read(at, (starts[-1] - starts[0]) * RECORD.size + (end - first) * CRC.size)
        contents, position = [], 0
        for number in range(first, end):
            size = (starts[number - first + 1] - starts[number - first]) * RECORD.size
            contents.append(whole[position : position + size])
            position += size + CRC.size
            if zlib.crc32(contents[-1], self.salt ^ number) != CRC.unpack_from(whole, position - CRC.size)[0]:
                raise CacheBroken(f"bucket {number} is wrong")
        return contents

    def pack_sizes(self) -> dict[PackId, int]:
        """How many bytes each pack file must have; reads the whole file, in about a second for a million blobs."""
        sizes = [EMPTY_PACK] * (len(self.pack_table) // ID)
        for first in range(0, self.buckets, _BUCKETS):
            numbers = array("I", b"".join(self.bucket_contents(first, min(first + _BUCKETS, self.buckets))))
            step = RECORD.size // numbers.itemsize
            pack, _, length, plain = range(PSEUDONYM // numbers.itemsize, step)
            add_entries(sizes, numbers[pack::step], numbers[length::step], numbers[plain::step])
        return dict(zip(self.packs(), sizes, strict=True))

    def _find(self, pseudonym: bytes) -> Iterator[tuple[int, int, int, int]]:
        (fraction,) = _fraction(pseudonym)
        number = fraction * self.buckets >> 64
        first, end = self._starts[number], self._starts[number + 1]
        size = (end - first) * RECORD.size
        # The short way: a survey asks for hundreds of thousands.
        try:
            content = os.pread(self._file, size + CRC.size, HEADER.size + first * RECORD.size + number * CRC.size)
        except OSError as error:
            raise CacheBroken(str(error)) from None
        at = content.find(pseudonym, 0, size)
        if len(content) != size + CRC.size or zlib.crc32(content, self.salt ^ number) != _RESIDUE:
            raise CacheBroken(f"bucket {number} is wrong")
        while at >= 0:
            if at % RECORD.size == 0:
                yield _numbers(content, at + PSEUDONYM)
            at = content.find(pseudonym, at + 1, size)

    def lookup_all(self, kind: BlobKind, blob: BlobId) -> Iterator[BlobLocation]:
        """Every place a blob lies at."""
        for pack, offset, length, plain in self._find(self._secrets.pseudonym(kind, blob)):
            name = PackId(self.pack_table[pack * ID : pack * ID + ID])
            yield BlobLocation(name, kind, offset, length, plain & ~COMPRESSED, bool(plain & COMPRESSED))

    def has(self, kind: BlobKind, blob: BlobId) -> bool:
        """Whether the blob is known."""
        return next(self._find(self._secrets.pseudonym(kind, blob)), None) is not None

    def lengths(self, kind: BlobKind, blobs: Sequence[BlobId]) -> list[int | None]:
        """The plain length of each blob, None where it is not known."""
        self._asked += len(blobs)
        if not self._read_through and self._asked * _MANY > self.records:
            self._read_through = True
            self._warm()
        pseudonyms = self._secrets.pseudonyms(kind, b"".join(blobs))
        found: list[int | None] = []
        for at in range(PSEUDONYM, len(pseudonyms), ID):
            numbers = next(self._find(pseudonyms[at : at + PSEUDONYM]), None)
            found.append(None if numbers is None else numbers[3] & ~COMPRESSED)
        return found


# The CRC-32 of anything followed by its own CRC-32, whatever it started from: one pass tells both.
_RESIDUE = zlib.crc32(CRC.pack(zlib.crc32(b"")))
