# SPDX-License-Identifier: Apache-2.0
"""Case 9: how long the domain's writes wait while a snapshot of 1, 2 or 8 disks is made.

Two ways: on a domain in a storage daemon (one transaction, no pause) a writer on every disk tells its longest write; of
a running QEMU, whose disks no program outside can write to, the pause is what `snapshot create` says.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from bench.harness import Bench, Case, Limit, Race, Run
from bench.rivals import OURS, Pullback, prepared
from bench.written import Writer, Written, told, written
from lab.disks import DiskSpec
from lab.qemu import BareQemu

SIZE = 1 << 30
SECONDS = 4
#: Writes a second to each disk, so that none waits for its turn.
RATE = 100
#: Seconds that no write and no domain should wait longer than.
STALL, PAUSE = 0.1, 0.05


class Stalls:
    """The longest write with a snapshot made meanwhile, and without."""

    def __init__(self, bench: Bench, domain: Written) -> None:
        self._bench, self._domain = bench, domain
        self.without: list[float] = []

    def ours(self) -> Run:
        """A writer without a snapshot, then one with; the first is for ``more``."""
        self.without.append(self._longest(make=False))
        return Run(SECONDS, figures={"stall": self._longest(make=True)})

    def _longest(self, make: bool) -> float:
        with Writer(self._domain.uris, self._bench.place / "fio", SECONDS, rate=RATE) as writer:
            if make:
                time.sleep(1)  # the writers write by now
                scratch = ["--scratch", str(self._bench.place)]
                self._domain.pullback("snapshot", "create", self._domain.address, "bench", *scratch)
            longest = writer.end().longest / 1e6
        if make:
            self._domain.pullback("snapshot", "delete", self._domain.address, "bench")
        return longest


@contextmanager
def stalled(bench: Bench, disks: int) -> Iterator[Race]:
    """Case 9, through the job method."""
    with written(bench, SIZE, Pullback(bench).env, disks) as domain:
        stalls = Stalls(bench, domain)
        race = Race(stalls.ours, limits=(Limit("longest write, 0.1 s", STALL, "stall"),))
        yield race
        race.more["longest_write_without_s"] = round(statistics.median(stalls.without), 4)


@contextmanager
def paused(bench: Bench, disks: int) -> Iterator[Race]:
    """Case 9, through this QEMU's own method, with the processor running."""
    images = [bench.place / f"disk-{number}.qcow2" for number in range(disks)]
    for image in images:
        prepared(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(SIZE)])
    env = Pullback(bench).env
    specs = [DiskSpec(image, f"vd{chr(97 + number)}") for number, image in enumerate(images)]
    with BareQemu(specs, name="web", running=True) as qemu:

        def ours() -> Run:
            address, begin = f"qmp:{qemu.qmp_path}", time.monotonic()
            scratch = ["--scratch", str(bench.place)]
            said = told([OURS, "snapshot", "create", address, "bench", *scratch, "--json"], env)
            seconds = time.monotonic() - begin
            told([OURS, "snapshot", "delete", address, "bench", "--json"], env)
            return Run(seconds, figures={"pause": said["paused_ms"] / 1000})

        yield Race(ours, limits=(Limit("pause, 0.05 s", PAUSE, "pause"),))


CASES = [
    *(Case("9", f"stall, disks: {disks}", partial(stalled, disks=disks), ()) for disks in (1, 2, 8)),
    *(Case("9", f"pause, disks: {disks}", partial(paused, disks=disks), ()) for disks in (1, 2, 8)),
]
