# SPDX-License-Identifier: Apache-2.0
"""Ways to cut a disk into chunks, and what each would store, computed on numbers of 64 KiB blocks.

The simulation shares no code with ``pullback.plan.grid``: the real runs of ``bench.chunks`` are held against it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

KIB, MIB = 1 << 10, 1 << 20
#: What a dirty bitmap tells apart.
BLOCK = 64 * KIB


@dataclass(frozen=True, slots=True)
class Strategy:
    """Chunks of ``cold`` bytes that become chunks of ``hot`` bytes when they change in part.

    A segment is cut as a whole when one in ``widely`` of its chunks was hot and as many become so; 0: never.
    """

    name: str
    cold: int
    hot: int
    widely: int = 0
    segment: int = 256 * MIB
    fewest: int = 16

    @property
    def label(self) -> str:
        """How many chunks are left of a TiB that is cold."""
        return f"{(1 << 40) // self.cold / 1e6:.1f} million"


OURS = Strategy("pullback", 256 * KIB, BLOCK, 16)
SPLIT_ONLY = Strategy("split only", 256 * KIB, BLOCK)
FIXED = [Strategy(f"always {name}", size, size) for name, size in (("64 KiB", 64 * KIB), ("256 KiB", 256 * KIB))]
FIXED.append(Strategy("always 1 MiB", MIB, MIB))
SMALL_SEGMENTS = Strategy("segments of 64 MiB", 256 * KIB, BLOCK, 16, 64 * MIB)
#: Carried out for real; the others are simulated.
REAL = [OURS, SPLIT_ONLY, *FIXED, SMALL_SEGMENTS]
VARIANTS = [
    *(Strategy(f"widely {share}", 256 * KIB, BLOCK, share) for share in (4, 8, 32, 64)),
    Strategy("cold 1 MiB", MIB, BLOCK, 16),
    Strategy("cold 512 KiB", 512 * KIB, BLOCK, 16),
]


@dataclass(slots=True)
class Stored:
    """What one increment stores: ``data`` bytes before compression, new ``chunks``, ``listed`` ones in new trees."""

    data: int = 0
    chunks: int = 0
    listed: int = 0
    segments: int = 0


class Simulation:
    """One disk of ``blocks`` 64 KiB blocks under a strategy; ``full`` are those that are not zero."""

    def __init__(self, strategy: Strategy, blocks: int, full: Collection[int]) -> None:
        self._strategy = strategy
        self._blocks = blocks
        self._full = set(full)
        self._per_slot = max(1, strategy.cold // BLOCK)
        self._slots = strategy.segment // strategy.cold
        self._hot: set[int] = set()

    def increment(self, changed: Collection[int], full: Collection[int]) -> Stored:
        """What an increment stores when these blocks changed, and ``full`` are not zero afterwards."""
        changes: dict[int, set[int]] = {}
        for block in changed:
            changes.setdefault(block // self._per_slot, set()).add(block)
        empty = {slot for slot in self._all_slots() if self._full.isdisjoint(self._of(slot))}
        self._full = set(full)
        fresh = self._split(changes, empty)
        stored = Stored()
        for slot in changes.keys() | fresh:
            whole = slot in fresh or slot not in self._hot
            self._store(slot, self._of(slot) if whole else changes[slot], stored)
        for segment in {slot // self._slots for slot in changes}:
            stored.segments += 1
            inside = self._inside(segment)
            stored.listed += sum(self._per_slot if self._cut(slot) else 1 for slot in inside)
        return stored

    @property
    def chunks(self) -> int:
        """How many chunks the disk consists of now."""
        return sum(self._per_slot if self._cut(slot) else 1 for slot in self._all_slots())

    def _split(self, changes: dict[int, set[int]], empty: set[int]) -> set[int]:
        """The slots that become hot; those that were before are in ``_hot``."""
        if self._strategy.hot == self._strategy.cold:
            return set()
        splits = {
            slot
            for slot, blocks in changes.items()
            if slot not in self._hot and slot not in empty and len(blocks) < len(self._of(slot))
        }
        fresh = set(splits)
        for segment in {slot // self._slots for slot in splits} if self._strategy.widely else ():
            inside = self._inside(segment)
            least = max(-(-len(inside) // self._strategy.widely), self._strategy.fewest)
            if sum(slot in self._hot for slot in inside) >= least and sum(slot in splits for slot in inside) >= least:
                fresh |= {slot for slot in inside if slot not in self._hot and slot not in empty}
        self._hot |= fresh
        return fresh

    def _store(self, slot: int, blocks: Collection[int], stored: Stored) -> None:
        if self._cut(slot):
            count = len(self._full.intersection(blocks))
            stored.data += count * BLOCK
            stored.chunks += count
        elif not self._full.isdisjoint(self._of(slot)):
            stored.data += len(self._of(slot)) * BLOCK
            stored.chunks += 1

    def _cut(self, slot: int) -> bool:
        return slot in self._hot

    def _all_slots(self) -> range:
        return range(-(-self._blocks // self._per_slot))

    def _inside(self, segment: int) -> range:
        return range(segment * self._slots, min((segment + 1) * self._slots, len(self._all_slots())))

    def _of(self, slot: int) -> range:
        return range(slot * self._per_slot, min((slot + 1) * self._per_slot, self._blocks))
