# SPDX-License-Identifier: Apache-2.0
"""What is written to a disk between two backups: places, and what comes there.

Half of a disk is noise, half are letters about as frequent as in English (zstd leaves 55 % of them), a MiB each.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.chunk_strategies import BLOCK, KIB, MIB
from pullback.nbd.address import UnixAddress
from pullback.nbd.blocking import NbdConnection
from pullback.qemu.storage_daemon import StorageDaemon

PAGE = 4 * KIB
#: The counts below are for a disk of this size and grow with it.
USUAL = 1536 * MIB
_FREQUENT = (" " * 47 + "e" * 26 + "t" * 19 + "aaaaoooo" * 4 + "iinnsshhrr" * 3 + "ddllccuummwwffggyyppbbvk").encode()
_LETTERS = (_FREQUENT * 2)[:256]

Place = tuple[int, int]


def content(offset: int, length: int, chance: random.Random) -> bytes:
    """Fresh content for a place that lies within one MiB."""
    noise = chance.randbytes(length)
    return noise if offset // MIB % 2 else noise.translate(_LETTERS)


class Load(Protocol):
    """Places (offset, length) that are written before increment ``number`` (from 0) of a disk of ``size`` bytes."""

    def __call__(self, chance: random.Random, size: int, number: int) -> list[Place]: ...


def _pages(chance: random.Random, size: int, count: int) -> list[Place]:
    return [(page * PAGE, PAGE) for page in chance.sample(range(size // PAGE), count * size // USUAL)]


def uniform(chance: random.Random, size: int, number: int) -> list[Place]:
    """5,600 pages of 4 KiB anywhere: 22 MiB, in one of five 64 KiB blocks."""
    return _pages(chance, size, 5_600)


def thin(chance: random.Random, size: int, number: int) -> list[Place]:
    """1,850 pages anywhere: in 7 % of the blocks."""
    return _pages(chance, size, 1_850)


def eighty_twenty(chance: random.Random, size: int, number: int) -> list[Place]:
    """5,600 pages, 80 % of them in the same 20 % of the disk's MiB."""
    groups = size // MIB
    favoured = random.Random(7).sample(range(groups), groups // 5)
    per_group, places = MIB // PAGE, set[Place]()
    while len(places) < 5_600 * size // USUAL:
        group = chance.choice(favoured) if chance.random() < 0.8 else chance.randrange(groups)
        places.add(((group * per_group + chance.randrange(per_group)) * PAGE, PAGE))
    return sorted(places)


def sparse(chance: random.Random, size: int, number: int) -> list[Place]:
    """A page in each of 0.5 % of the blocks, anywhere."""
    return _blocks(chance, size, 0.005)


def _blocks(chance: random.Random, size: int, share: float) -> list[Place]:
    blocks = size // BLOCK
    return [(block * BLOCK, PAGE) for block in chance.sample(range(blocks), int(blocks * share))]


def clustered(chance: random.Random, size: int, number: int) -> list[Place]:
    """64 runs of 0.5 to 4 MiB."""
    places = []
    for _ in range(64 * size // USUAL):
        length = chance.randrange(MIB // 2, 4 * MIB, PAGE)
        start = chance.randrange(0, size - length, PAGE)
        places += [(at, min(MIB - at % MIB, start + length - at)) for at in _bounds(start, start + length)]
    return places


def _bounds(start: int, end: int) -> list[int]:
    return [start, *range((start // MIB + 1) * MIB, end, MIB)]


def once_scattered(chance: random.Random, size: int, number: int) -> list[Place]:
    """A page in each of 10 % of the blocks, once; then as clustered."""
    return clustered(chance, size, number) if number else _blocks(chance, size, 0.1)


def changed_blocks(places: Iterable[Place]) -> set[int]:
    """The 64 KiB blocks that are written."""
    return {block for start, length in places for block in range(start // BLOCK, (start + length - 1) // BLOCK + 1)}


@dataclass(frozen=True, slots=True)
class Disk:
    """A stopped domain's qcow2 image, written through QEMU, which so marks its persistent bitmaps."""

    image: Path

    def opened(self, directory: Path) -> StorageDaemon:
        """A storage daemon that exports it writable as ``vda``."""
        file = {"driver": "file", "filename": str(self.image), "cache": {"direct": False}}
        node = {"driver": "qcow2", "node-name": "disk", "file": file, "discard": "unmap"}
        export = {"type": "nbd", "id": "vda", "node-name": "disk", "name": "vda", "writable": True}
        return StorageDaemon([node], [export], directory)

    def write(self, writes: Iterable[tuple[int, bytes]], directory: Path) -> None:
        """Write it all and close the image."""
        directory.mkdir(exist_ok=True)
        with self.opened(directory) as daemon, NbdConnection.connect(UnixAddress(daemon.socket), "vda") as connection:
            for offset, data in writes:
                connection.submit_write(offset, data)
                if connection.pending >= 16:
                    connection.wait()
            while connection.pending:
                connection.wait()
            connection.flush()


def everything(size: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """The first content of a whole disk."""
    chance = random.Random(seed)
    for offset in range(0, size, MIB):
        yield offset, content(offset, min(MIB, size - offset), chance)
