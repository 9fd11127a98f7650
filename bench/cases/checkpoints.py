# SPDX-License-Identifier: Apache-2.0
"""Case 8: what checkpoints cost the domain's writes: one bitmap recording, as here, or all of them.

The disk is one of nothing: a real one would hide the price behind its own.  Every round goes through all numbers of
checkpoints, both ways in turns.  `python -m bench.checkpoint_chart` draws the results.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from bench.harness import Bench, Case, Peer, Race, Run, processor_time, started
from bench.written import Writer
from lab.monitor import Monitor

SIZE = 1 << 40
NUMBERS = (0, 1, 2, 5, 10, 20, 50, 100)
OURS, ALL = "one recording", "all recording"
SECONDS = 2
GRANULARITY = 64 << 10


class Sweep:
    """A storage daemon with a disk that takes everything, and bitmaps on it."""

    def __init__(self, bench: Bench, monitor: Monitor, pid: int, uri: str, block: int) -> None:
        self._bench, self._monitor, self._pid, self._uri, self._block = bench, monitor, pid, uri, block
        self._last: dict[tuple[str, int], Run] = {}
        #: For each way, by the number of checkpoints: processor microseconds of QEMU for a write, of every round.
        self.cpu: dict[str, dict[int, list[float]]] = {way: {one: [] for one in NUMBERS} for way in (OURS, ALL)}
        self.rate: dict[str, dict[int, list[float]]] = {way: {one: [] for one in NUMBERS} for way in (OURS, ALL)}

    def ours(self) -> Run:
        """One round of everything; what it was with most checkpoints."""
        for number in NUMBERS:
            for way in (OURS, ALL):
                run = self._last[way, number] = self._measure(way, number)
                self.cpu[way][number].append(run.figures["us_per_write"])
                self.rate[way][number].append(run.figures["per_second"])
        return self._last[OURS, NUMBERS[-1]]

    def last(self, way: str, number: int) -> Run:
        """What the last round had."""
        return self._last[way, number]

    def _measure(self, way: str, number: int) -> Run:
        bitmaps = [{"node": "disk", "name": f"b{one}"} for one in range(number)]
        for one in bitmaps:
            disabled = way == OURS and one is not bitmaps[-1]
            self._monitor.command("block-dirty-bitmap-add", {**one, "granularity": GRANULARITY, "disabled": disabled})
        try:
            before, begin = processor_time(self._pid), time.monotonic()
            with Writer([self._uri], self._bench.place / "fio", SECONDS, self._block) as writer:
                wrote = writer.end()
            seconds, used = time.monotonic() - begin, processor_time(self._pid) - before
        finally:
            for one in bitmaps:
                self._monitor.command("block-dirty-bitmap-remove", one)
        figures = {"us_per_write": used / wrote.total * 1e6, "per_second": wrote.per_second}
        return Run(seconds, qemu_cpu=used, figures=figures)


def medians(series: dict[str, dict[int, list[float]]]) -> dict[str, list[tuple[int, float]]]:
    """For each way (checkpoints, median)."""
    return {
        way: [(number, round(statistics.median(values), 2)) for number, values in points.items() if values]
        for way, points in series.items()
    }


def _command(place: Sequence[str]) -> list[str]:
    qmp, nbd, pid = place
    command = ["qemu-storage-daemon", "--blockdev", f"null-co,node-name=disk,size={SIZE},read-zeroes=on"]
    command += ["--chardev", f"socket,id=qmp,path={qmp},server=on,wait=off", "--monitor", "chardev=qmp"]
    command += ["--nbd-server", f"addr.type=unix,addr.path={nbd}", "--pidfile", pid]
    return [*command, "--export", "nbd,id=x,node-name=disk,name=disk,writable=on"]


@contextmanager
def recording(bench: Bench, block: int) -> Iterator[Race]:
    """Case 8, with writes of ``block`` bytes."""
    place = [str(bench.place / name) for name in ("qmp", "nbd", "pid")]
    with started(_command(place), (bench.place / "pid").exists) as process:
        monitor = Monitor(bench.place / "qmp")
        try:
            sweep = Sweep(bench, monitor, process.pid, f"nbd+unix:///disk?socket={place[1]}", block)
            most = NUMBERS[-1]
            race = Race(
                ours=sweep.ours,
                peers=(
                    Peer("no checkpoint", partial(sweep.last, OURS, 0), 1.2, "us_per_write"),
                    Peer("all recording", partial(sweep.last, ALL, most), 0.5, "us_per_write"),
                ),
            )
            yield race
            race.more |= {"us_per_write": medians(sweep.cpu), "writes_per_second": medians(sweep.rate)}
        finally:
            monitor.close()


CASES = [
    Case("8", "100 checkpoints, 4 KiB", partial(recording, block=4096), ()),
    Case("8", "100 checkpoints, 64 KiB", partial(recording, block=64 << 10), ()),
]
