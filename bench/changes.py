# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.changes SOCKET CONTEXT`: fetch the map of what changed, and plan what to read.

Every segment is known.  The last line says what was seen, for bench.harness.
"""

from __future__ import annotations

import gc
import json
import sys
import time

from pullback.model.extents import FLAG_DIRTY, merged
from pullback.model.units import SEGMENT
from pullback.nbd.address import UnixAddress
from pullback.nbd.blocking import NbdConnection
from pullback.plan.grid import DiskGrid, cold_grid
from pullback.plan.pull import clean_spans, fetch_spans, next_grids, plan_segments


def main() -> None:
    """The command."""
    gc.set_threshold(50_000, 20, 20)  # as cli.main does
    context = f"qemu:dirty-bitmap:{sys.argv[2]}"
    begin = time.perf_counter()
    with NbdConnection.connect(UnixAddress(sys.argv[1]), "disk", contexts=[context]) as connection:
        size = connection.info.size
        dirty = merged(connection.marked(context, 0, size, FLAG_DIRTY))
    fetched = time.perf_counter()
    base = {number: cold_grid(SEGMENT) for number in range(size // SEGMENT)}
    grids = next_grids(dirty, base)
    fetch = fetch_spans(dirty, size, base, grids)
    changed = len(dirty)
    del dirty
    segments = sum(1 for _ in plan_segments(fetch, fetch, DiskGrid(size, grids)))
    clean = sum(1 for _ in clean_spans(fetch, size))
    done = time.perf_counter()
    figures = {"fetched": fetched - begin, "fetched_and_planned": done - begin}
    counts = {"dirty": changed, "clean": clean, "segments": segments}
    print(json.dumps({"figures": {**figures, **counts}}))


if __name__ == "__main__":
    main()
