# SPDX-License-Identifier: Apache-2.0
"""Case 6: the changed-block map of a disk of 1 TiB with 160,000 scattered dirty blocks."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.harness import Bench, Case, Limit, Peer, Race, started, timed
from lab.monitor import Monitor
from pullback.nbd.address import UnixAddress
from pullback.nbd.blocking import NbdConnection

SIZE = 1 << 40
BLOCK = 64 << 10
BLOCKS = 160_000
BITMAP = "since"


@contextmanager
def daemon(place: Path) -> Iterator[tuple[Path, int]]:
    """A storage daemon that exports a disk of nothing with its map, and its process."""
    nbd, qmp, pid = place / "nbd", place / "qmp", place / "pid"
    command = ["qemu-storage-daemon", "--blockdev", f"null-co,node-name=disk,size={SIZE},read-zeroes=on"]
    command += ["--chardev", f"socket,id=qmp,path={qmp},server=on,wait=off", "--monitor", "chardev=qmp"]
    command += ["--nbd-server", f"addr.type=unix,addr.path={nbd}", "--pidfile", str(pid)]
    with started(command, pid.exists) as process:
        monitor = Monitor(qmp)
        try:
            bitmap = {"node": "disk", "name": BITMAP}
            monitor.command("block-dirty-bitmap-add", {**bitmap, "granularity": BLOCK})
            export = {"type": "nbd", "id": "x", "node-name": "disk", "name": "disk"}
            monitor.command("block-export-add", {**export, "writable": True})
            scatter(nbd)
            monitor.command("block-export-del", {"id": "x"})
            monitor.wait_event("BLOCK_EXPORT_DELETED", id="x")
            monitor.command("block-dirty-bitmap-disable", bitmap)
            monitor.command("block-export-add", {**export, "bitmaps": [BITMAP]})
            yield nbd, process.pid
        finally:
            monitor.close()


def scatter(nbd: Path) -> None:
    """Write the blocks; the device keeps nothing of them."""
    data = bytes(BLOCK)
    with NbdConnection.connect(UnixAddress(str(nbd)), "disk") as connection:
        for block in random.Random("scattered").sample(range(SIZE // BLOCK), BLOCKS):
            connection.submit_write(block * BLOCK, data)
            if connection.pending >= 16:
                connection.wait()
        while connection.pending:
            connection.wait()


@contextmanager
def scattered(bench: Bench) -> Iterator[Race]:
    """Case 6."""
    with daemon(bench.place) as (nbd, server):
        image = {
            "driver": "nbd",
            "server": {"type": "unix", "path": str(nbd)},
            "export": "disk",
            "x-dirty-bitmap": f"qemu:dirty-bitmap:{BITMAP}",
        }
        peer = ["qemu-img", "map", "--output=json", f"json:{json.dumps({**image, 'read-only': True})}"]
        yield Race(
            ours=lambda: timed([sys.executable, "-m", "bench.changes", nbd, BITMAP], qemu=server),
            peers=(Peer("qemu-img map", lambda: timed(peer, qemu=server), 0.1),),
            limits=(
                Limit("1 s, fetched and planned", 1.0, "fetched_and_planned"),
                Limit("100 MiB", 100.0, "peak_mib"),
            ),
        )


CASES = [Case("6", "changes of 1 TiB", scattered, ())]
