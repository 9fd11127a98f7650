# SPDX-License-Identifier: Apache-2.0
"""The disk that all cases use: 60 % data, of which half is random and half is like text; the rest are holes.

`python -m bench.data PATH BYTES`

The same bytes for the same size on every machine.  No two blocks are alike: what a deduplicating program would save
is no merit here.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PIECE = 1 << 20
#: Pieces in a row that have one kind, at most.
RUN = 16
KINDS = ("random", "random", "random", "text", "text", "text", "hole", "hole", "hole", "hole")


class Content:
    """Bytes of both kinds."""

    def __init__(self, seed: str) -> None:
        self._chance = random.Random(seed)
        letters, common = b"etaoinshrdlucmfwypvbgk", self._chance
        vocabulary = [bytes(common.choices(letters, k=common.randint(2, 9))) for _ in range(20_000)]
        # As in a language: the word of rank n is n times rarer than the first.  In pairs: it is quicker.
        weights = [1 / (rank + 3) for rank in range(len(vocabulary))]
        words = common.choices(vocabulary, weights, k=1 << 17)
        self._pairs = [b"%b %b " % pair for pair in zip(words[::2], words[1::2], strict=True)]

    def random(self, length: int) -> bytes:
        """Bytes that nothing makes smaller."""
        return self._chance.randbytes(length)

    def text(self, length: int) -> bytes:
        """Words; zstd makes about a third of them."""
        pairs = memoryview(self._chance.randbytes(length // 3 & -2)).cast("H")
        return b"".join(map(self._pairs.__getitem__, pairs))[:length]


def kinds(size: int) -> Iterator[tuple[int, int, str]]:
    """What lies where: (offset, length, kind), in runs of 1 to 16 MiB."""
    chance = random.Random(f"layout {size}")
    # As many of each as there should be; the order is chance.
    counts = [(kind, size * KINDS.count(kind) // len(KINDS) // PIECE) for kind in sorted(set(KINDS))]
    runs = []
    for kind, left in counts:
        while left:
            runs.append((kind, length := min(left, chance.randint(1, RUN))))
            left -= length
    chance.shuffle(runs)
    offset = 0
    for kind, length in runs:
        yield offset, length * PIECE, kind
        offset += length * PIECE


def write(file: BinaryIO, size: int) -> None:
    """Make the disk."""
    file.truncate(size)
    content = Content(f"content {size}")
    for offset, length, kind in kinds(size):
        if kind == "hole":
            continue
        for at in range(offset, offset + length, PIECE):
            os.pwrite(file.fileno(), content.random(PIECE) if kind == "random" else content.text(PIECE), at)


def data_blocks(size: int, block: int) -> list[int]:
    """The numbers of the blocks of this size that hold data."""
    return [
        at // block
        for start, length, kind in kinds(size)
        if kind != "hole"
        for at in range(start, start + length, block)
    ]


if __name__ == "__main__":
    with Path(sys.argv[1]).open("wb") as made:
        write(made, int(sys.argv[2]))
