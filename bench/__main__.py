# SPDX-License-Identifier: Apache-2.0
"""`python -m bench [--case N] [--size GIB[,GIB]] [--rounds N]`: pullback against other programs; `make bench`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import all_cases
from bench.harness import GIB, Bench, BenchError, Case, race, workplace

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
#: Room that a case takes at most: the raw disk, QEMU's, and two copies of what is stored of it.
ROOM = 3
PROGRAMS = {
    "QEMU": ["qemu-system-x86_64", "--version"],
    "restic": ["restic", "version"],
    "borg": ["borg", "--version"],
    "nbdcopy": ["nbdcopy", "--version"],
}


def machine() -> dict[str, Any]:
    """What these figures are of."""
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "processor": processor[0].split(":", 1)[1].strip() if processor else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / (1 << 20), 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        **{name: _version(command) for name, command in PROGRAMS.items()},
    }


def _version(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except FileNotFoundError:
        return "not installed"


def chosen(wanted: str | None, size: str | None) -> list[tuple[float, Case]]:
    """Cases with their sizes in GiB, all of one size after another: they share its data."""
    cases = [case for case in all_cases() if wanted in (None, case.number, case.name)]
    if not cases:
        names = ", ".join(f"{case.number} ({case.name})" for case in all_cases())
        raise BenchError(f"there is no case {wanted}; there are {names}")
    given = [float(one) for one in size.split(",")] if size else None
    pairs = [(gib, case) for case in cases for gib in ((given or case.sizes) if case.sizes else (0.0,))]
    return sorted(pairs, key=lambda pair: (pair[0], int(pair[1].number)))


def run(pairs: Sequence[tuple[float, Case]], rounds: int, directory: Path) -> list[dict[str, Any]]:
    """Run the cases; one that cannot run is told, and the others go on."""
    rows: list[dict[str, Any]] = []
    need = int(max(gib for gib, _ in pairs) * ROOM * GIB) + GIB
    with workplace(directory, need) as root:
        before = 0
        for gib, case in pairs:
            bench = Bench(root, int(gib * GIB) >> 20 << 20)
            if before != bench.size:
                (root / f"{before}.raw").unlink(missing_ok=True)
            before = bench.size
            try:
                rows += race(case, bench, rounds, tell)
            except BenchError as error:
                tell(f"{case.number} {case.name} {bench.sizes()} failed: {error}")
                rows.append({"case": f"{case.number} {case.name} {bench.sizes()}".strip(), "failed": str(error)})
    return rows


def tell(line: str) -> None:
    """What is going on."""
    print(line, file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people; a ratio above its target is a miss."""
    head = f"{'case':32} {'ours':>9} {'peer':>9}  {'ratio':>6} {'target':>6}"
    lines = [f"{head}  {'':5} {'cpu':>7} {'QEMU':>6} {'MiB':>5}  peer"]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['case']:32} failed")
            continue
        verdict = "miss" if row["ratio"] is not None and row["ratio"] > row["target"] else ""
        lines.append(
            f"{row['case']:32} {row['ours_s']:9.3f} {row['peer_s']:9.3f}  {row['ratio'] or 0:6.2f} {row['target']:6.2f}"
            f"  {verdict:5} {row['cpu_s']:7.2f} {row['qemu_cpu_s']:6.2f} {row['peak_mib']:5.0f}  {row['peer']}"
        )
    return "\n".join(lines)


def save(rows: Sequence[dict[str, Any]], where: Path) -> None:
    """Write the results; those of cases that did not run now stay."""
    known = json.loads(where.read_text())["cases"] if where.exists() else []
    now = {row["case"] for row in rows}
    cases = sorted([row for row in known if row["case"] not in now] + list(rows), key=_number)
    where.write_text(json.dumps({"machine": machine(), "cases": cases}, indent=1) + "\n")


def _number(row: dict[str, Any]) -> int:
    return int(row["case"].split()[0])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--case", help="only this one, by number or name")
    parser.add_argument("--size", help="GiB of the disk, instead of those that the cases say")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=HERE.parent / ".cache/bench", help="where there is room")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    try:
        rows = run(chosen(given.case, given.size), given.rounds, given.directory)
    except BenchError as error:
        sys.exit(f"bench: {error}")
    save(rows, given.results)
    print(table(rows))
    sys.exit(any("failed" in row for row in rows))


if __name__ == "__main__":
    main()
