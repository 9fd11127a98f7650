# SPDX-License-Identifier: Apache-2.0
"""Case 7: what a domain's writes of 4 KiB lose while an incremental backup of it runs.

Ours is `pullback backup`, held back by --limit-rate so that it lasts as long as the writer.  The classical fleece is
what QEMU's manual describes: a backup job into a scratch whose backing file is the disk, and a reader of what changed,
as fast as ours; nothing is let go.  1 % of the blocks, anywhere, changed since the last backup.
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

from bench.harness import Bench, BenchError, Case, Peer, Race, Run
from bench.rivals import OURS, Pullback, prepared
from bench.written import Writer, Written, disk_node, room_of, written
from lab.monitor import Monitor
from pullback.engine.rate import Rate
from pullback.errors import NbdDisconnected
from pullback.nbd.address import Address, parse_uri
from pullback.nbd.blocking import NbdConnection

BLOCK = 64 << 10
SECONDS = 5
#: How long ours would need for what changed: longer than the writer, whatever the start takes.
LASTS = 12
THROUGHPUT, SCRATCH = 1 / 0.9, 1 / 3
_MIB = 1 << 20


class Sides:
    """One domain, and who works on it while it writes."""

    def __init__(self, bench: Bench, domain: Written, at_random: bool) -> None:
        self._bench, self._domain, self._random = bench, domain, at_random
        self._chance = random.Random("changes")
        self._blocks = bench.size // BLOCK // 100
        self._rate = max(64 << 10, self._blocks * BLOCK // LASTS)
        self._scratch = bench.place / "scratch"
        self._scratch.mkdir()
        self.seen: dict[str, list[float]] = {}

    def ours(self) -> Run:
        """While a backup runs."""
        self._settle(change=True)
        command = [OURS, "backup", self._domain.address, "--scratch", str(self._scratch), "--json"]
        command += ["--limit-rate", str(self._rate)]
        with subprocess.Popen(
            command, env=self._domain.env, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
        ) as backup:
            try:
                assert backup.stdout is not None
                while (line := backup.stdout.readline()) and json.loads(line)["event"] != "progress":
                    pass
                run = self._write("pullback")
                if backup.poll() is not None:
                    raise BenchError("the backup ended before the writer did")
            finally:
                backup.send_signal(signal.SIGINT)
                backup.communicate()
        return run

    def alone(self) -> Run:
        """While nothing else happens."""
        self._settle(change=False)
        return self._write("no backup")

    def classical(self) -> Run:
        """While the classical fleece stands and is read."""
        blocks = self._settle(change=True)
        prepared(["qemu-img", "create", "-q", "-f", "qcow2", str(self._scratch / "fleece"), str(self._bench.size)])
        with self._domain.monitor() as monitor:
            self._fleece(monitor)
            try:
                where = parse_uri(self._domain.uris[0])
                stop = threading.Event()
                reader = threading.Thread(target=self._read, args=(where.address, blocks, stop))
                reader.start()
                try:
                    return self._write("classical fleece")
                finally:
                    stop.set()
                    reader.join()
            finally:
                self._end_fleece(monitor)

    # -- the parts ----------------------------------------------------------------------------------------------------

    def _settle(self, change: bool) -> list[int]:
        """A backup of all that was written so far; then what changes, the numbers of its blocks."""
        for left in self._scratch.iterdir():
            left.unlink()
        self._domain.pullback("backup", self._domain.address, "--scratch", str(self._scratch))
        if not change:
            return []
        where = parse_uri(self._domain.uris[0])
        blocks = sorted(self._chance.sample(range(self._bench.size // BLOCK), self._blocks))
        with NbdConnection.connect(where.address, where.export) as connection:
            for block in blocks:
                connection.write(block * BLOCK, self._chance.randbytes(BLOCK))
            connection.flush()
        return blocks

    def _write(self, side: str) -> Run:
        """Write, and look how large the scratch gets."""
        largest, begin = 0, time.monotonic()
        with Writer(self._domain.uris, self._bench.place / "fio", SECONDS, random=self._random) as writer:
            while writer.running():
                largest = max(largest, room_of(self._domain.pid, self._scratch))
                time.sleep(0.02)
            wrote = writer.end()
        self.seen.setdefault(f"{side}, writes a second", []).append(wrote.per_second)
        self.seen.setdefault(f"{side}, 99 % within us", []).append(wrote.p99)
        self.seen.setdefault(f"{side}, scratch MiB", []).append(largest / _MIB)
        figures = {"us_per_write": 1e6 / wrote.per_second, "p99_us": wrote.p99, "scratch_mib": largest / _MIB}
        return Run(time.monotonic() - begin, figures=figures)

    def _fleece(self, monitor: Monitor) -> None:
        file = {"driver": "file", "filename": str(self._scratch / "fleece")}
        scratch = {"driver": "qcow2", "node-name": "fleece", "file": file, "backing": disk_node()}
        monitor.command("blockdev-add", scratch)
        job = {"job-id": "fleece", "device": disk_node(), "target": "fleece", "sync": "none"}
        monitor.command("blockdev-backup", job)
        monitor.command("block-export-add", {"type": "nbd", "id": "fleece", "node-name": "fleece", "name": "fleece"})

    def _end_fleece(self, monitor: Monitor) -> None:
        monitor.command("block-export-del", {"id": "fleece", "mode": "hard"})
        monitor.wait_event("BLOCK_EXPORT_DELETED", id="fleece")
        monitor.command("job-cancel", {"id": "fleece"})
        while monitor.command("query-jobs"):
            time.sleep(0.01)
        monitor.command("blockdev-del", {"node-name": "fleece"})

    def _read(self, address: Address, blocks: list[int], stop: threading.Event) -> None:
        rate = Rate(self._rate)
        with suppress(NbdDisconnected), NbdConnection.connect(address, "fleece") as connection:
            for block in blocks:
                if stop.is_set():
                    return
                rate.take(BLOCK)
                connection.read(block * BLOCK, BLOCK)


@contextmanager
def writing(bench: Bench, at_random: bool) -> Iterator[Race]:
    """Case 7."""
    (program := Pullback(bench)).reset()
    with written(bench, bench.size, program.env) as domain:
        sides = Sides(bench, domain, at_random)
        race = Race(
            ours=sides.ours,
            peers=(
                Peer("no backup", sides.alone, THROUGHPUT, "us_per_write"),
                Peer("classical fleece", sides.classical, 1.0, "us_per_write"),
                Peer("classical fleece", sides.classical, 1.0, "p99_us"),
                Peer("classical fleece", sides.classical, SCRATCH, "scratch_mib"),
            ),
        )
        yield race
        race.more["medians"] = {name: round(statistics.median(values), 1) for name, values in sides.seen.items()}


CASES = [
    Case("7", "writes, anywhere", partial(writing, at_random=True), (2,)),
    Case("7", "writes, in a row", partial(writing, at_random=False), (2,)),
]
