# SPDX-License-Identifier: Apache-2.0
"""The measurement behind the chunk sizes: its simulation is what the product plans, and what it promises holds."""

from __future__ import annotations

import random

import pytest

from bench.chunk_loads import Load, changed_blocks, clustered, eighty_twenty, once_scattered, sparse, thin, uniform
from bench.chunk_strategies import BLOCK, OURS, Simulation
from pullback.model.extents import Span, merged
from pullback.model.units import CHUNK, HOT_CHUNK, MIB, SEGMENT
from pullback.plan.grid import FEWEST, WIDELY, Grid, cold_grid
from pullback.plan.pull import fetch_spans, next_grids

SIZE = 2 * SEGMENT
FULL = set(range(SIZE // BLOCK))


def planned(grids: dict[int, Grid], blocks: set[int]) -> tuple[dict[int, Grid], int]:
    """The grids after these blocks changed, and the bytes that the product reads for it."""
    dirty = merged(Span(block * BLOCK, BLOCK) for block in sorted(blocks))
    after = next_grids(dirty, grids)
    return grids | after, sum(span.length for span in fetch_spans(dirty, SIZE, grids, after))


def test_it_measures_what_the_product_does() -> None:
    assert (OURS.cold, OURS.hot, OURS.segment) == (CHUNK, HOT_CHUNK, SEGMENT)
    assert (OURS.widely, OURS.fewest) == (WIDELY, FEWEST)


@pytest.mark.parametrize("load", [uniform, thin, eighty_twenty, sparse, clustered, once_scattered])
def test_the_simulation_stores_what_the_product_plans(load: Load) -> None:
    grids, simulation = {number: cold_grid(SEGMENT) for number in range(2)}, Simulation(OURS, len(FULL), FULL)
    for number in range(4):
        blocks = changed_blocks(load(random.Random(number), SIZE, number))
        grids, read = planned(grids, blocks)
        assert simulation.increment(blocks, FULL).data == read
    assert simulation.chunks == sum(grid.numbers()[-1] for grid in grids.values())


@pytest.mark.parametrize("load", [uniform, thin, eighty_twenty])
def test_a_database_stores_what_changed_from_the_third_increment_on(load: Load) -> None:
    simulation = Simulation(OURS, len(FULL), FULL)
    for number in range(4):
        blocks = changed_blocks(load(random.Random(number), SIZE, number))
        data = simulation.increment(blocks, FULL).data
    assert data <= 1.5 * len(blocks) * BLOCK
    assert (1 << 40) / CHUNK < 5_000_000, "blobs of a cold TiB"


def test_zeroes_are_stored_by_nobody_and_cut_nothing() -> None:
    simulation = Simulation(OURS, 16 * MIB // BLOCK, ())
    assert simulation.increment({0, 5}, {0}).data == CHUNK
    assert simulation.chunks == 16 * MIB // CHUNK
