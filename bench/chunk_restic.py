# SPDX-License-Identifier: Apache-2.0
"""What chunks cost restic, and both programs in memory for the index."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.chunk_strategies import MIB
from bench.index import PASSWORD as INDEX_PASSWORD
from bench.index import blob_number, make

TIB = 1 << 40
KEEP = "3"


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds and peak memory, in bytes, of a process; ``code`` is how it ended."""

    seconds: float
    peak: int
    code: int


#: The kernel counts what a process was before it became another program: so a small one starts it, not the bench.
_STARTER = """
import json, os, sys, time
begin = time.perf_counter()
null = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=null)
_, status, usage = os.wait4(pid, 0)
print(json.dumps([time.perf_counter() - begin, usage.ru_maxrss << 10, os.waitstatus_to_exitcode(status)]))
"""


def cost_of(command: Sequence[str], environment: Mapping[str, str]) -> Cost:
    """Run a command to its end; its output is not looked at."""
    starter = [sys.executable, "-S", "-E", "-c", _STARTER, *command]
    done = subprocess.run(starter, env=environment, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    return Cost(*json.loads(done.stdout))


def restic(place: Path, password: str, *command: str) -> Cost:
    """restic on a repository, without a cache."""
    known = {"RESTIC_REPOSITORY": str(place), "RESTIC_PASSWORD": password, "HOME": str(place.parent)}
    return cost_of(["restic", "--no-cache", "--quiet", *command], {"PATH": os.environ["PATH"], **known})


def restic_costs(places: Mapping[str, Path], password: str) -> None:
    """check, check --read-data, forget and prune on repositories that are not needed any more."""
    if not shutil.which("restic"):
        print("\nrestic is not installed.")
        return
    print("\n### restic on these repositories\n")
    print("| | packs | index | check | --read-data | prune to 3 backups |\n|---|---|---|---|---|---|")
    for name, place in places.items():
        sizes = [sum(path.stat().st_size for path in (place / kind).rglob("*")) for kind in ("data", "index")]
        cells = [name, f"{sizes[0] / MIB:.0f} MiB", f"{sizes[1] / 1024:.0f} KiB"]
        for command in (["check"], ["check", "--read-data"], ["forget", "--keep-last", KEEP], ["prune"]):
            cost = restic(place, password, *command)
            assert cost.code == 0, f"restic {command} ended with {cost.code}"
            if command[0] != "forget":
                cells.append(f"{cost.seconds:.1f} s, {cost.peak / MIB:.0f} MiB")
        print("| " + " | ".join(cells) + " |", flush=True)


def index_memory(place: Path, blobs: int) -> None:
    """Memory for the index, as the difference between two repositories of index files alone, and what a TiB needs."""
    small, large = place / "small", place / "large"
    make(small, blobs // 10)
    make(large, blobs)
    between = blobs - blobs // 10
    files = sum(path.stat().st_size for path in (large / "index").iterdir()) / blobs
    each: dict[str, float] = {"index files": files}
    for name, cached in (("pullback, without its cache", False), ("pullback, with its cache", True)):
        peaks = [_opening(where, cached).peak for where in (small, large)]
        each[name] = (peaks[1] - peaks[0]) / between
    if shutil.which("restic"):
        # There is no backup to find it in: restic reads the index, and no more.
        find = ("find", "--blob", blob_number(1).hex())
        peaks = [restic(where, INDEX_PASSWORD, *find).peak for where in (small, large)]
        each["restic"] = (peaks[1] - peaks[0]) / between
    print(f"\n### The index, from {blobs} blobs\n")
    sizes = (64, 256, 1024)
    print("| | a blob | " + " | ".join(f"a TiB at {size} KiB" for size in sizes) + " |\n|---|---|---|---|---|")
    print("| blobs | | " + " | ".join(f"{TIB / (size << 10) / 1e6:.1f} million" for size in sizes) + " |")
    for name, cost in each.items():
        cells = [f"{cost * TIB / (size << 10) / MIB:.0f} MiB" for size in sizes]
        print(f"| {name} | {cost:.0f} bytes | {' | '.join(cells)} |", flush=True)


def _opening(place: Path, cached: bool) -> Cost:
    """Opening a repository in a process of its own, by the steps of ``bench.index``."""
    steps = ["rebuild of the cache", "open"] if cached else ["open without a cache"]
    for name in steps:
        cost = cost_of([sys.executable, "-m", "bench.index", "--step", name, str(place), "0"], os.environ)
    return cost
