# SPDX-License-Identifier: Apache-2.0
"""Races: pullback and what a user would pick instead, on the same work, in turns.

A module of ``bench/cases`` adds cases by having a list ``CASES``:

    @contextmanager
    def copying(bench: Bench) -> Iterator[Race]:
        raw = bench.raw()                             # the data of bench/data.py, made once, of bench.size bytes
        with started(["some-server", str(raw)]):      # what both sides need stands until the case is over
            yield Race(
                ours=lambda: timed(["pullback", "…"]),             # one round; what comes before timed() is not timed
                peers=(Peer("cp", lambda: timed(["cp", "…"]), target=0.8),),
                limits=(Limit("half a second", 0.5),),
            )

    CASES = [Case("11", "a copy", copying)]           # `make bench CASE=11`; sizes=() for a case without a disk size

Every round runs ours, then each peer; medians count.  ``bench.place`` is empty, the case's own, and removed with it.
What is not a time goes into ``Run.figures``, and a Peer or a Limit names it with ``figure``; ratios are always ours to
peer, at most ``target``.  What a chart wants beside goes into ``Race.more``, which stands in the results as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIB = 1 << 30
START_SECONDS = 30
#: Bytes of what a program prints that are looked at, from the end.
_TOLD = 4096
_TICKS = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """A program that failed, or a machine that cannot do this."""


@dataclass(frozen=True)
class Run:
    """One round of one side: seconds by the clock; processor seconds of the process and of QEMU; its highest memory.

    ``began`` is when it did, by time.perf_counter().
    """

    seconds: float
    cpu: float = 0.0
    qemu_cpu: float = 0.0
    peak_mib: float = 0.0
    began: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)

    def figure(self, name: str) -> float:
        """A figure by name: one of its own fields, or one of ``figures``."""
        return float(self.figures[name] if name in self.figures else getattr(self, name))


@dataclass(frozen=True)
class Peer:
    """What a user would pick instead; ours is to take at most ``target`` of its ``figure``."""

    name: str
    run: Callable[[], Run]
    target: float
    figure: str = "seconds"


@dataclass(frozen=True)
class Limit:
    """What ours is to stay below by itself."""

    name: str
    most: float
    figure: str = "seconds"


@dataclass
class Race:
    """Who runs in a case."""

    ours: Callable[[], Run]
    peers: Sequence[Peer] = ()
    limits: Sequence[Limit] = ()
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A case: its number, its name, what makes it ready; ``sizes`` are those of the disk, in GiB."""

    number: str
    name: str
    prepare: Callable[[Bench], AbstractContextManager[Race]]
    sizes: Sequence[float] = (2, 8)


class Bench:
    """What a case is given: an empty directory of its own, and the size of the disk in bytes (0: it has none)."""

    def __init__(self, root: Path, size: int) -> None:
        self.root = root
        self.size = size
        self.place = root / "case"

    def raw(self) -> Path:
        """The disk as a raw image with holes; cases share it and do not change it."""
        path = self.root / f"{self.size}.raw"
        if not path.exists():
            made = path.with_suffix(".made")
            # Elsewhere: what a process has had in memory, its children seem to have had, too.
            subprocess.run([sys.executable, "-m", "bench.data", str(made), str(self.size)], check=True)
            made.rename(path)
        return path

    def fresh(self, name: str) -> Path:
        """A path of the case's own where there is nothing (any more)."""
        remove(path := self.place / name)
        return path

    def sizes(self) -> str:
        """The disk's size, for people."""
        return f"{self.size / GIB:g} GiB" if self.size else ""


# -- processes --------------------------------------------------------------------------------------------------------


def timed(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, qemu: int = 0, cwd: Path | None = None
) -> Run:
    """Run a program to its end; ``qemu`` is the id of a process whose processor time counts beside its own."""
    os.sync()
    before = processor_time(qemu) if qemu else 0.0
    begin = time.perf_counter()
    # Into a file: what we have had in memory, those that we start later seem to have had, too.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            list(map(str, command)),
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        with _killed_with_us(process):
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - begin
            process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(max(0, output.seek(0, os.SEEK_END) - _TOLD))
        said = output.read()
    if process.returncode:
        raise BenchError(
            f"{' '.join(map(str, command))} ended with {process.returncode}: {said.decode(errors='replace')[-2000:]}"
        )
    after = processor_time(qemu) if qemu else 0.0
    return Run(seconds, usage.ru_utime + usage.ru_stime, after - before, usage.ru_maxrss / 1024, begin, _told(said))


def _told(said: bytes) -> dict[str, float]:
    """The figures that a program of ours printed as its last line."""
    last = said.splitlines()[-1:]
    if not last or not last[0].startswith(b'{"figures":'):
        return {}
    return dict(json.loads(last[0])["figures"])


@contextmanager
def _killed_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        process.kill()
        process.wait()
        raise


@contextmanager
def started(command: Sequence[str | Path], ready: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
    """A server that stands while the block runs; ``ready`` is asked until it is true."""
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{command[0]} did not start")
            time.sleep(0.01)
        yield process
    finally:
        process.terminate()
        process.wait()


def processor_time(pid: int) -> float:
    """Processor seconds of a running process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def remove(path: Path) -> None:
    """Whatever there is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- running ----------------------------------------------------------------------------------------------------------


def race(case: Case, bench: Bench, rounds: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run a case; its rows for the results."""
    bench.place.mkdir()
    try:
        with case.prepare(bench) as running:
            sides = {"pullback": running.ours} | {peer.name: peer.run for peer in running.peers}
            runs: dict[str, list[Run]] = {name: [] for name in sides}
            for number in range(rounds):
                for name, run in sides.items():
                    runs[name].append(done := run())
                    tell(f"{case.number} {case.name} {bench.sizes()}, round {number + 1}, {name}: {done.seconds:.2f} s")
    finally:
        remove(bench.place)
    return _rows(case, bench, running, runs)


def _rows(case: Case, bench: Bench, running: Race, runs: Mapping[str, list[Run]]) -> list[dict[str, Any]]:
    def median(name: str, figure: str) -> float:
        return statistics.median(run.figure(figure) for run in runs[name])

    rows = []
    rivals: list[Peer | Limit] = [*running.peers, *running.limits]
    for rival in rivals:
        ours = median("pullback", rival.figure)
        theirs = rival.most if isinstance(rival, Limit) else median(rival.name, rival.figure)
        target = 1.0 if isinstance(rival, Limit) else rival.target
        rows.append(
            {
                "case": " ".join(filter(None, (case.number, case.name, bench.sizes()))),
                "ours_s": round(ours, 4),
                "peer": rival.name,
                "peer_s": round(theirs, 4),
                "ratio": round(ours / theirs, 3) if theirs else None,
                "target": target,
                "cpu_s": round(median("pullback", "cpu"), 3),
                "qemu_cpu_s": round(median("pullback", "qemu_cpu"), 3),
                "peak_mib": round(median("pullback", "peak_mib"), 1),
                "limit": isinstance(rival, Limit),
                "figure": rival.figure,
            }
        )
    if running.more and rows:
        rows[0]["more"] = running.more
    return rows


@contextmanager
def workplace(directory: Path, need: int) -> Iterator[Path]:
    """An empty directory with room for ``need`` bytes, gone afterwards, also when we are told to end.

    Always the same one, so that what a killed bench left goes with the next one.
    """
    remove(directory)
    directory.mkdir(parents=True)
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        free = shutil.disk_usage(directory).free
        if free < need:
            raise BenchError(f"{directory} has {free / GIB:.0f} GiB free, and this takes {need / GIB:.0f} GiB")
        yield directory
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)
        signal.signal(signal.SIGTERM, previous)
