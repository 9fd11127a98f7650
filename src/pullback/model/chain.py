# SPDX-License-Identifier: Apache-2.0
"""The checkpoint chain of one disk, read from the names of its dirty bitmaps.

Checkpoints are points in time, bitmaps are the edges between neighbours, "now" is the last point:

    points   A ──────── B ──────── C ──────── now
    bitmaps    A           B^A        C^B          (C^B recording, the others disabled)

The bitmap of checkpoint N whose parent is P is called ``pullback-N^P``, that of the first one ``pullback-N``, so the
order stands in the image itself.  Changes since a checkpoint are the OR of its own bitmap and of all later ones.

While a checkpoint is created there are two recording bitmaps at the end for a moment; dying there leaves a chain
that is right and a little imprecise.  Whatever else is out of order makes changes *unknown*, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pullback.model.facts import ID_PREFIX, Bitmap

#: A bitmap's name has at most this many bytes (QEMU's BDRV_BITMAP_MAX_NAME_SIZE).
NAME_MAX = 1023

_CHECKPOINT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+@-]{0,399}")


def is_checkpoint_name(name: str) -> bool:
    """Whether ``name`` can name a checkpoint: letters, digits and ``._:+@-``, at most 400, so two fit one bitmap."""
    return _CHECKPOINT.fullmatch(name) is not None


def bitmap_name(checkpoint: str, parent: str | None) -> str:
    """The name of the bitmap that records from ``checkpoint``, whose predecessor is ``parent``."""
    return f"{ID_PREFIX}{checkpoint}" if parent is None else f"{ID_PREFIX}{checkpoint}^{parent}"


@dataclass(frozen=True, slots=True)
class Edge:
    """The bitmap of one checkpoint: it covers the time from ``checkpoint`` to the next one."""

    checkpoint: str
    parent: str | None
    bitmap: Bitmap

    @property
    def name(self) -> str:
        return self.bitmap.name


@dataclass(frozen=True, slots=True)
class Unknown:
    """Changes are not known, and why; the answer to it is reading the whole disk."""

    reason: str


@dataclass(frozen=True, slots=True)
class Chain:
    """The usable checkpoints of a disk, oldest first, and bitmaps of ours that are of no use, each with the reason."""

    edges: tuple[Edge, ...] = ()
    broken: tuple[tuple[Bitmap, str], ...] = ()

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(edge.checkpoint for edge in self.edges)

    @property
    def last(self) -> str | None:
        return self.edges[-1].checkpoint if self.edges else None

    def since(self, checkpoint: str) -> tuple[Edge, ...] | Unknown:
        """The edges whose OR is what changed from ``checkpoint`` until now."""
        for position, edge in enumerate(self.edges):
            if edge.checkpoint == checkpoint:
                return self.edges[position:]
        for bitmap, reason in self.broken:
            edge_of = _parse(bitmap)
            if edge_of is not None and edge_of.checkpoint == checkpoint:
                return Unknown(reason)
        return Unknown(f"checkpoint {checkpoint} is not in this disk's chain")


def _parse(bitmap: Bitmap) -> Edge | None:
    if not bitmap.name.startswith(ID_PREFIX):
        return None
    checkpoint, caret, parent = bitmap.name.removeprefix(ID_PREFIX).partition("^")
    if not is_checkpoint_name(checkpoint) or (caret and not is_checkpoint_name(parent)):
        return None
    return Edge(checkpoint, parent if caret else None, bitmap)


def read_chain(bitmaps: Iterable[Bitmap]) -> Chain:
    """The chain that the bitmaps of a disk make; bitmaps of others are left out.

    It is walked from its recording end backwards, and ends at the first bitmap that is inconsistent or missing:
    what came before can no longer be told.
    """
    edges = [edge for bitmap in bitmaps if (edge := _parse(bitmap)) is not None]
    by_checkpoint: dict[str, list[Edge]] = {}
    for edge in edges:
        by_checkpoint.setdefault(edge.checkpoint, []).append(edge)
    parents = {edge.parent for edge in edges}
    ends = [edge for edge in edges if edge.checkpoint not in parents and edge.bitmap.recording]
    if len(ends) != 1:
        reason = "no bitmap of the chain is recording" if not ends else "two chains record on one disk"
        return Chain((), _broken(edges, (), reason))
    walk = _walk_back(ends[0], by_checkpoint)
    return Chain(walk, _broken(edges, walk, "a bitmap between this checkpoint and now is missing or inconsistent"))


def _walk_back(end: Edge, by_checkpoint: dict[str, list[Edge]]) -> tuple[Edge, ...]:
    walk: list[Edge] = []
    seen: set[str] = set()
    edge: Edge | None = end
    while edge is not None and not edge.bitmap.inconsistent and edge.checkpoint not in seen:
        if len(by_checkpoint[edge.checkpoint]) != 1:
            break
        seen.add(edge.checkpoint)
        walk.append(edge)
        candidates = by_checkpoint.get(edge.parent, []) if edge.parent is not None else []
        edge = candidates[0] if len(candidates) == 1 else None
    return tuple(reversed(walk))


def _broken(edges: Iterable[Edge], usable: Sequence[Edge], reason: str) -> tuple[tuple[Bitmap, str], ...]:
    names = {edge.name for edge in usable}
    return tuple(
        (
            edge.bitmap,
            "its bitmap is inconsistent: QEMU ended without storing it" if edge.bitmap.inconsistent else reason,
        )
        for edge in edges
        if edge.name not in names
    )
