# SPDX-License-Identifier: Apache-2.0
"""What increments store, by how a disk is cut into chunks: real backups beside a simulation, and restic's own costs.

`python -m bench.chunks [--quick] [--size MIB] [--increments N] [--load NAME]... [--everything | --simulated]`

Every backup is the product's, of a stopped domain, in a process of its own; the disk is written through QEMU between
them.  All strategies back up the same disk, each into a repository of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import chunk_loads as loads
from bench.chunk_backup import PASSWORD
from bench.chunk_postgres import Database, missing
from bench.chunk_restic import index_memory, restic_costs
from bench.chunk_segments import segment_sizes
from bench.chunk_strategies import BLOCK, FIXED, MIB, OURS, REAL, VARIANTS, Simulation, Stored, Strategy
from lab import images
from pullback.repository.key_file import ScryptCost
from pullback.repository.local_store import LocalStore
from pullback.repository.repository import Repository

LOADS: dict[str, loads.Load] = {
    "uniform": loads.uniform,
    "thin": loads.thin,
    "80/20": loads.eighty_twenty,
    "sparse": loads.sparse,
    "clustered": loads.clustered,
    "once scattered": loads.once_scattered,
}
SCALE, TRANSACTIONS = 50, 2_000
#: What is carried out for real: a load that writes much takes its time with every strategy.  The rest is simulated.
CARRIED_OUT = {"uniform": [OURS, *FIXED[:2]], "sparse": REAL, "postgres": [OURS, *FIXED[:2]]}

Change = tuple[set[int], set[int], int]


@dataclass(slots=True)
class Round:
    """One increment: what changed, what each strategy stored for real, and what the simulation says."""

    changed: int
    pages: int
    real: dict[str, dict[str, Any]] = field(default_factory=dict)
    simulated: dict[str, Stored] = field(default_factory=dict)


def repository_of(place: Path, strategy: Strategy) -> Path:
    """Where a strategy's repository is."""
    return place / strategy.name.replace(" ", "-")


def back_up(strategy: Strategy, image: Path, place: Path) -> dict[str, Any]:
    """A backup by the product, in a process of its own."""
    repository = repository_of(place, strategy)
    if not repository.exists():
        Repository.init(LocalStore(repository), PASSWORD, cost=ScryptCost(n=16, r=1, p=1))
    sizes = map(str, (strategy.cold, strategy.hot, strategy.widely, strategy.segment))
    command = [sys.executable, "-m", "bench.chunk_backup", *sizes, str(image), str(repository)]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return answer


def run_rounds(disk: loads.Disk, place: Path, strategies: list[Strategy], full: set[int], size: int) -> Rounds:
    """First the whole backups, then an increment for each change that is sent in."""
    for strategy in strategies:
        back_up(strategy, disk.image, place)
    simulations = {one.name: Simulation(one, size // BLOCK, full) for one in [*REAL, *VARIANTS]}
    return Rounds(disk, place, strategies, simulations)


@dataclass(slots=True)
class Rounds:
    disk: loads.Disk
    place: Path
    strategies: list[Strategy]
    simulations: dict[str, Simulation]
    done: list[Round] = field(default_factory=list)

    def add(self, change: Change) -> None:
        """An increment in every strategy, now that the disk was written."""
        changed, full, pages = change
        one = Round(len(changed), pages)
        for strategy in self.strategies:
            one.real[strategy.name] = back_up(strategy, self.disk.image, self.place)
            assert one.real[strategy.name]["mode"] == "incremental"
        for name, simulation in self.simulations.items():
            one.simulated[name] = simulation.increment(changed, full)
        self.done.append(one)


def new_disk(place: Path, size: int) -> loads.Disk:
    """An empty image."""
    return loads.Disk(images.create(place / "disk.qcow2", size, options={"lazy_refcounts": "off"}))


def synthetic(load: loads.Load, place: Path, size: int, increments: int, strategies: list[Strategy]) -> Rounds:
    """A load that is made up, on a disk that is full."""
    disk = new_disk(place, size)
    if strategies:
        disk.write(loads.everything(size, 1), place / "daemon")
    full = set(range(size // BLOCK))
    rounds = run_rounds(disk, place, strategies, full, size)
    for number in range(increments):
        chance = random.Random(100 + number)
        places = load(chance, size, number)
        if strategies:
            disk.write(((start, loads.content(start, length, chance)) for start, length in places), place / "daemon")
        rounds.add((loads.changed_blocks(places), full, sum(-(-length // loads.PAGE) for _, length in places)))
    return rounds


def postgres(place: Path, size: int, increments: int, strategies: list[Strategy]) -> Rounds:
    """pgbench on PostgreSQL."""
    disk = new_disk(place, size)
    database = Database(place, size)
    part = size / loads.USUAL
    with database.running(max(1, int(SCALE * part))):
        _, full, _ = database.copy_to(disk, place / "daemon")
        rounds = run_rounds(disk, place, strategies, full, size)
        for _ in range(increments):
            database.work(int(TRANSACTIONS * part))
            rounds.add(database.copy_to(disk, place / "daemon"))
    return rounds


def mean(values: Iterator[float]) -> float:
    """The mean, 0 of nothing."""
    return statistics.mean([*values] or [0.0])


def print_rounds(name: str, rounds: Rounds, size: int) -> None:
    """The table of one load: MiB stored and their ratio to the changed blocks."""
    done = rounds.done
    share = mean(one.changed for one in done) / (size // BLOCK)
    print(f"\n### {name}: {mean(one.pages for one in done):.0f} pages in {share:.1%} of the 64 KiB blocks\n")
    late = done[3:] or done[-1:]
    print("| | 1st | 2nd | 3rd | later | stored | packed | trees, index | chunks | time | peak |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for strategy in [*REAL, *VARIANTS]:
        simulated = [one.simulated[strategy.name] for one in done]
        cells = [strategy.name]
        firsts = [stored.data / BLOCK / one.changed for one, stored in zip(done, simulated, strict=True)][:3]
        cells += [f"{ratio:.2f}" for ratio in firsts] + [""] * (3 - len(firsts))
        cells.append(f"{mean(one.simulated[strategy.name].data / BLOCK / one.changed for one in late):.2f}")
        cells.append(f"{sum(stored.data for stored in simulated) / MIB:.0f} MiB")
        cells += real_cells(strategy, done) if strategy in rounds.strategies else ["", "", "", "", ""]
        cells[-3] = f"{rounds.simulations[strategy.name].chunks}"
        print("| " + " | ".join(cells) + " |")
    print_difference(rounds)


def real_cells(strategy: Strategy, done: list[Round]) -> list[str]:
    """What only the real backups tell."""
    real = [one.real[strategy.name] for one in done]
    meta = mean(one["trees"] + one["index"] for one in real)
    return [
        f"{sum(one['data'] for one in real) / MIB:.0f} MiB",
        f"{meta / 1024:.0f} KiB",
        "",
        f"{statistics.median(one['seconds'] for one in real):.2f} s",
        f"{max(one['peak'] for one in real) / MIB:.0f} MiB",
    ]


def print_difference(rounds: Rounds) -> None:
    """How far the simulation is from the real backups, and what metadata costs by the piece."""
    if not rounds.strategies:
        return
    furthest, listed, trees, entries, index = 0.0, 0, 0, 0, 0
    for one in rounds.done:
        for name, real in one.real.items():
            furthest = max(furthest, abs(one.simulated[name].data / real["new"] - 1))
            listed, trees = listed + one.simulated[name].listed, trees + real["trees"]
            entries, index = entries + real["chunks"] + real["tree_blobs"], index + real["index"]
    each = f"{trees / listed:.1f} bytes of tree a chunk listed, {index / entries:.1f} bytes of index a blob"
    print(f"\nSimulated and real bytes differ by {furthest:.2%} at most; {each}.", flush=True)


def run_load(name: str, place: Path, size: int, increments: int, everything: bool | None) -> None:
    """One load in a directory that is there only for it."""
    with tempfile.TemporaryDirectory(prefix="load-", dir=place) as inside:
        os.chmod(inside, 0o711)  # noqa: PTH101
        here = Path(inside)
        strategies = CARRIED_OUT.get(name, [OURS]) if everything is None else REAL if everything else []
        if name == "postgres":
            if why := missing():
                print(f"\nNo PostgreSQL: {why}.")
                return
            rounds = postgres(here, size, increments, strategies)
        else:
            rounds = synthetic(LOADS[name], here, size, increments, strategies)
        print_rounds(name, rounds, size)
        if strategies and name in ("uniform", "sparse"):
            places = {one.name: repository_of(here, one) for one in strategies if one in [OURS, *FIXED]}
            restic_costs(places, PASSWORD)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.chunks")
    parser.add_argument("--quick", action="store_true", help="a small disk and few increments: a minute")
    parser.add_argument("--size", type=int, metavar="MIB", help="MiB of the disk")
    parser.add_argument("--increments", type=int)
    parser.add_argument("--load", action="append", choices=[*LOADS, "postgres"], help="only these loads")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--everything", action="store_true", default=None, help="every strategy for real, with every load")
    how.add_argument("--simulated", action="store_false", dest="everything", default=None, help="none: a minute")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, help="the index in memory, or not")
    return parser.parse_args()


def main() -> None:
    """The command."""
    # What is mounted and running goes with an exception; the default would leave it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    asked = arguments()
    size = (asked.size or (384 if asked.quick else 768)) * MIB
    increments = asked.increments or (4 if asked.quick else 10)
    chosen = asked.load or (["uniform", "clustered"] if asked.quick else [*LOADS, "postgres"])
    with tempfile.TemporaryDirectory(prefix="pullback-bench-") as place:
        os.chmod(place, 0o711)  # noqa: PTH101
        for name in chosen:
            run_load(name, Path(place), size, increments, asked.everything)
        if not asked.load:
            segment_sizes()
        if asked.memory if asked.memory is not None else not asked.load and asked.everything is not False:
            index_memory(Path(place), 100_000 if asked.quick else 400_000)


if __name__ == "__main__":
    main()
