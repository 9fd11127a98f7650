# SPDX-License-Identifier: Apache-2.0
"""What the trees of a 1 TiB disk cost an increment, by the size of a segment: the product's own, packed."""

from __future__ import annotations

import os

import zstandard

from bench.chunk_strategies import BLOCK, KIB, MIB
from pullback.repository.blob import BlobId
from pullback.repository.tree import EPOCH, directory_node, encode_tree, file_node
from pullback.repository.writer import COMPRESSION_LEVEL

TIB = 1 << 40
SIZES = (64 * MIB, 256 * MIB, 1024 * MIB)
PLACES = (100, 1_000, 10_000, 100_000)


def _packed(tree: bytes) -> int:
    return len(zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress(tree))


def _segment(size: int, chunk: int) -> int:
    ids = [BlobId(os.urandom(32)) for _ in range(size // chunk)]
    return _packed(encode_tree([file_node("0000.raw", size, ids, EPOCH)]))


def _directory(size: int) -> int:
    nodes = [directory_node(f"{number:05d}", BlobId(os.urandom(32)), EPOCH) for number in range(TIB // size)]
    return _packed(encode_tree(nodes))


def touched(segments: int, places: int) -> float:
    """How many segments hold at least one of so many places, anywhere."""
    return segments * (1 - (1 - 1 / segments) ** places)


def segment_sizes() -> None:
    """The table."""
    print("\n### Trees of an increment of a 1 TiB disk, MiB: cold, hot\n")
    print("| segment | its tree | the disk's directory | " + " | ".join(f"{count:,} places" for count in PLACES) + " |")
    print("|---|---|---|" + "---|" * len(PLACES))
    for size in SIZES:
        cold, hot, directory = _segment(size, 256 * KIB), _segment(size, BLOCK), _directory(size)
        cells = [f"{size // MIB} MiB", f"{cold / KIB:.0f}, {hot / KIB:.0f} KiB", f"{directory / KIB:.0f} KiB"]
        for count in PLACES:
            many = touched(TIB // size, count)
            cells.append(", ".join(f"{(many * each + directory) / MIB:.1f}" for each in (cold, hot)))
        print("| " + " | ".join(cells) + " |", flush=True)
