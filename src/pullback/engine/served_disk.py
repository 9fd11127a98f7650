# SPDX-License-Identifier: Apache-2.0
"""A disk of a backup as an NBD server's backend: which chunk holds a byte, and what is a hole.

Where a chunk begins is looked up, never computed: a content list mixes chunks of any length, up to restic's 8 MiB.
What cannot be read of a disk fails the requests that touch it, and no others.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Final, NamedTuple

from pullback.engine.chunk_cache import ChunkCache
from pullback.errors import Damaged, RepositoryError
from pullback.model.units import CHUNK, KIB, MIB
from pullback.nbd.backend import Buffer
from pullback.nbd.protocol import AllocationFlag
from pullback.repository.blob import BlobId, BlobKind, blob_id
from pullback.repository.repository import Repository

#: Chunks whose places are held, about 45 bytes each: 256 GiB of cold disk.
_MOST_PLACES: Final = 1 << 20
#: Extents told at a time; most clients use only the first one.
_MOST_EXTENTS: Final = 1024
#: How far ahead of a sequential reader chunks are loaded.
_WINDOW: Final = 8 * MIB
#: Bytes of one request that are loaded together.
_BATCH: Final = 4 * MIB
#: Places of 256 KiB that count as just read: some dozen readers, each with requests that overtake one another.  With
#: many more, random reads of a small disk would look like steps forward.
_MOST_RECENT: Final = 64
#: Failures told; then a store that is gone has been heard of.
_MOST_NOTES: Final = 1000

_HOLE: Final = int(AllocationFlag.HOLE | AllocationFlag.ZERO)
_DATA: Final = 0
_ID: Final = 32
_ZEROES: Final = memoryview(bytes(MIB))

#: Told of bytes that cannot be read: offset, length and why.
Told = Callable[[int, int, RepositoryError], None]


@lru_cache(4096)
def _zero_id(length: int) -> BlobId:
    return blob_id(bytes(length))


def _is_zero(blob: bytes, length: int) -> bool:
    """Whether a chunk is all zero; one of an odd length counts as data, which is never wrong.

    The hash of so many zeroes has to be made once for each length, and where files are cut by their content nearly
    every chunk has a length of its own.  A run of zeroes is cut into 512 KiB there.
    """
    return (length <= 64 * KIB or length % (4 * KIB) == 0) and blob == _zero_id(length)


class Piece(NamedTuple):
    """``size`` bytes from byte ``first`` on of a chunk of ``length``, which begins at ``start`` of the disk.

    ``blob`` is None where they are zero.
    """

    blob: BlobId | None
    first: int
    size: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class _Segment:
    """Where the chunks of a segment begin, and where its runs of holes and data end; ``failure``: it has none."""

    starts: array[int]
    ids: bytes
    run_ends: array[int]
    run_flags: bytes
    failure: RepositoryError | None = None

    def chunk(self, number: int) -> BlobId:
        return BlobId(self.ids[number * _ID : (number + 1) * _ID])


class ServedDisk:
    """A disk of ``size`` bytes, of these segments (their trees' ids) of ``segment_size`` bytes each but the last.

    ``told`` hears of bytes that cannot be read, of each once.  Every method may be called from any thread.
    """

    def __init__(
        self,
        repository: Repository,
        cache: ChunkCache,
        size: int,
        segment_size: int,
        segments: Sequence[BlobId],
        told: Told,
    ) -> None:
        if len(segments) != -(-size // segment_size):
            raise Damaged(f"A disk of {size} bytes has {len(segments)} segments of {segment_size}")
        self._repository = repository
        self._cache = cache
        self._size = size
        self._segment_size = segment_size
        self._trees = segments
        self._told = told
        self._lock = threading.Lock()
        self._segments: OrderedDict[tuple[BlobId, int], _Segment] = OrderedDict()
        self._places = 0
        self._loading = [threading.Lock() for _ in range(16)]
        self._recent: OrderedDict[int, None] = OrderedDict()
        self._noted: set[tuple[int, str]] = set()

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._size

    # -- what the server calls ------------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> Buffer:
        """The bytes of a range; raises Damaged where they cannot be had, RepositoryError where the store fails."""
        if offset + length > self._size:
            raise ValueError(f"bytes {offset} to {offset + length} of a disk of {self._size}")
        if self._sequential(offset, length):
            self._look_ahead(offset + length)
        parts: list[Buffer] = []
        batch: list[Piece] = []
        held = 0
        for piece in self._pieces(offset, length):
            batch.append(piece)
            held += piece.length if piece.blob is not None else 0
            if held >= min(_BATCH, self._cache.capacity // 8):
                parts += self._load(batch)
                batch, held = [], 0
        parts += self._load(batch)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Holes where chunks are zero, data elsewhere; no chunk is read.

        Ends before the range does where more would be long: at the end of a segment, or after so many extents.
        """
        found: list[tuple[int, int]] = []
        end = offset + length
        while offset < end and (len(found) < 2 or offset % self._segment_size):
            number, within = divmod(offset, self._segment_size)
            segment = self._segment(number)
            run = bisect_right(segment.run_ends, within)
            if run == len(segment.run_ends) or len(found) > _MOST_EXTENTS:
                break
            count = min(segment.run_ends[run] - within, end - offset)
            flags = segment.run_flags[run]
            if found and found[-1][1] == flags:
                found[-1] = (found[-1][0] + count, flags)
            else:
                found.append((count, flags))
            offset += count
        return found

    # -- data -----------------------------------------------------------------------------------------------------

    def _load(self, batch: Sequence[Piece]) -> Iterator[Buffer]:
        wanted = [piece.blob for piece in batch if piece.blob is not None]
        if len(wanted) > 1:
            self._cache.fetch(wanted)
        for piece in batch:
            if piece.blob is None:
                yield from _zeroes(piece.size)
            else:
                yield memoryview(self._chunk(piece.blob, piece))[piece.first : piece.first + piece.size]

    def _chunk(self, blob: BlobId, piece: Piece) -> bytes:
        try:
            data = self._cache.get(blob)
            if len(data) != piece.length:
                raise Damaged(f"The data blob {blob.hex()} has {len(data)} bytes, and its place {piece.length}")
        except RepositoryError as error:
            self._note(piece.start, piece.length, error)
            raise
        return data

    def _note(self, offset: int, length: int, error: RepositoryError) -> None:
        with self._lock:
            key = offset, error.what
            if key in self._noted or len(self._noted) >= _MOST_NOTES:
                return
            self._noted.add(key)
        self._told(offset, length, error)

    def _sequential(self, offset: int, length: int) -> bool:
        """Whether the two places before this range were read lately, and this was not."""
        first, last = offset // CHUNK, (offset + length - 1) // CHUNK
        with self._lock:
            fresh = last not in self._recent
            before = first - 1 in self._recent and (first - 2 in self._recent or last - first >= 2)
            for place in range(max(first, last - 1), last + 1):
                self._recent[place] = None
                self._recent.move_to_end(place)
            while len(self._recent) > _MOST_RECENT:
                self._recent.popitem(last=False)
        return fresh and before

    def _look_ahead(self, offset: int) -> None:
        window = min(_WINDOW, self._cache.capacity // 8, self._size - offset)
        try:
            pieces = self._pieces(offset, window)
            self._cache.fetch_ahead([(piece.blob, piece.length) for piece in pieces if piece.blob is not None])
        except RepositoryError:
            return  # whoever reads there is told

    # -- places ---------------------------------------------------------------------------------------------------

    def _pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """The pieces of chunks that make up a range, in order; those that are zero without their blobs."""
        end = offset + length
        while offset < end:
            number, within = divmod(offset, self._segment_size)
            segment, base = self._segment(number), number * self._segment_size
            size = self._size_of(number)
            if segment.failure is not None:
                self._note(base, size, segment.failure)
                raise segment.failure
            chunk = bisect_right(segment.starts, within) - 1
            while offset < end and chunk < len(segment.starts):
                start = segment.starts[chunk]
                stop = segment.starts[chunk + 1] if chunk + 1 < len(segment.starts) else size
                blob, first = segment.chunk(chunk), offset - base - start
                count = min(stop - start - first, end - offset)
                yield Piece(None if _is_zero(blob, stop - start) else blob, first, count, base + start, stop - start)
                offset, chunk = offset + count, chunk + 1

    def _size_of(self, number: int) -> int:
        return min(self._segment_size, self._size - number * self._segment_size)

    def _segment(self, number: int) -> _Segment:
        """A segment's places; one that is all zero is the same for all that are."""
        key = self._trees[number], self._size_of(number)
        if (found := self._known(key)) is not None:
            return found
        with self._loading[key[0][0] % len(self._loading)]:
            if (found := self._known(key)) is not None:
                return found
            try:
                loaded = _load_segment(self._repository, *key)
            except Damaged as error:
                # Data, so that only who reads there meets the failure.
                loaded = _Segment(array("Q"), b"", array("Q", [key[1]]), bytes([_DATA]), error)
            with self._lock:
                self._segments[key] = loaded
                self._places += len(loaded.starts)
                while self._places > _MOST_PLACES and len(self._segments) > 1:
                    self._places -= len(self._segments.popitem(last=False)[1].starts)
            return loaded

    def _known(self, key: tuple[BlobId, int]) -> _Segment | None:
        with self._lock:
            if (found := self._segments.get(key)) is not None:
                self._segments.move_to_end(key)
            return found


def _zeroes(count: int) -> Iterator[Buffer]:
    while count > 0:
        yield _ZEROES[: min(count, len(_ZEROES))]
        count -= len(_ZEROES)


def _load_segment(repository: Repository, tree: BlobId, size: int) -> _Segment:
    """Read a segment's tree; raises Damaged if it cannot be, or does not hold ``size`` bytes."""
    nodes = repository.load_tree(tree).nodes
    if len(nodes) != 1 or nodes[0].content is None:
        raise Damaged(f"The segment {tree.hex()} does not hold one file")
    content = nodes[0].content
    distinct = list(dict.fromkeys(content))
    lengths = dict(zip(distinct, repository.index.lengths(BlobKind.DATA, distinct), strict=True))
    chunks = _joined([(blob, lengths[blob]) for blob in content], size)
    total = sum(length for _, length in chunks)
    if total != size or nodes[0].size != size:
        raise Damaged(f"The segment {tree.hex()} has {total} bytes instead of {size}")
    starts = array("Q", accumulate((length for _, length in chunks[:-1]), initial=0))
    flags = [_HOLE if _is_zero(blob, length) else _DATA for blob, length in chunks]
    ends = [*starts[1:], size]
    last = [number for number, flag in enumerate(flags) if number + 1 == len(flags) or flags[number + 1] != flag]
    return _Segment(
        starts,
        b"".join(blob for blob, _ in chunks),
        array("Q", [ends[number] for number in last]),
        bytes(flags[number] for number in last),
    )


def _joined(content: Sequence[tuple[BlobId, int | None]], size: int) -> list[tuple[BlobId, int]]:
    """Chunks with their lengths; all from the first to the last that no index file knows are one that cannot be read.

    Nothing says where between them one ends.
    """
    unknown = [number for number, (_, length) in enumerate(content) if length is None]
    known = [(blob, length) for blob, length in content if length is not None]
    if not unknown:
        return known
    head, tail = unknown[0], len(content) - unknown[-1] - 1
    tail_known = known[len(known) - tail :]
    around = sum(length for _, length in (*known[:head], *tail_known))
    if around > size:
        raise Damaged(f"The segment has {around} bytes instead of {size}")
    return [*known[:head], (content[head][0], size - around), *tail_known]
