# SPDX-License-Identifier: Apache-2.0
"""What a backup costs at real sizes: a disk of 1 TiB with 50 GiB of data, in a repository of 10 million blobs.

`python -m bench.real_sizes [--data GIB] [--blobs N] [--quick] [--directory DIR]`

The data is simulated: computed, and compressed in the images.  No two blocks are alike, but each compresses to almost
nothing; so it takes no room, and zstd is faster here than on real data.  It lies in pieces of 64 MiB all over the
disk.  A disk of 100 GiB has the same data closer together, and gets the same changes: what grows with the disk shows.
Every figure is of a `pullback` process of its own: time by the clock from start to end (QEMU's work in it), its own
processor time, and its highest memory.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import functools
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.index import PASSWORD, make_files
from pullback.errors import NbdDisconnected
from pullback.nbd.address import UnixAddress
from pullback.nbd.blocking import NbdConnection
from pullback.nbd.protocol import AllocationFlag
from pullback.nbd.server import NbdServer

GIB = 1 << 30
BLOCK = 64 << 10
PIECE = 64 << 20
BLOCKS = PIECE // BLOCK
DISKS = {"big": 1024 * GIB, "small": 100 * GIB}
HOLE = int(AllocationFlag.HOLE | AllocationFlag.ZERO)
MEMORY_TARGET = 400
START_SECONDS = 30


class SimulatedDisk:
    """A disk of `size` bytes with `data` bytes of content, no two blocks of it alike, in pieces all over it."""

    def __init__(self, size: int, data: int) -> None:
        self.size = size
        self.pieces = data // PIECE
        self.stride = size // self.pieces // PIECE * PIECE

    def place(self, block: int) -> int:
        """Where on the disk a block of the data lies."""
        piece, inside = divmod(block, BLOCKS)
        return piece * self.stride + inside * BLOCK

    def read(self, offset: int, length: int) -> bytes:
        """What an NBD client reads; requests are whole blocks or less than one."""
        first, end = offset // BLOCK, -(-(offset + length) // BLOCK)
        whole = b"".join(map(self._block, range(first, end)))
        return whole[offset - first * BLOCK : offset - first * BLOCK + length]

    def _block(self, number: int) -> bytes:
        piece, inside = divmod(number * BLOCK, self.stride)
        if piece >= self.pieces or inside >= PIECE:
            return bytes(BLOCK)
        return content(f"{piece * BLOCKS + inside // BLOCK}")

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Pieces are data, the rest are holes."""
        found, end = [], offset + length
        while offset < end and len(found) < 1000:
            piece, inside = divmod(offset, self.stride)
            data = piece < self.pieces and inside < PIECE
            bound = piece * self.stride + (PIECE if data else self.stride)
            step = (end if piece >= self.pieces else min(bound, end)) - offset
            found.append((step, 0 if data else HOLE))
            offset += step
        return found


def content(seed: str) -> bytes:
    """A block that no other seed has."""
    return hashlib.sha256(seed.encode()).digest() * (BLOCK // 32)


async def serve(path: str, data: int) -> None:
    """Serve the disks until the one who started this closes our input."""
    async with NbdServer({name: SimulatedDisk(size, data) for name, size in DISKS.items()}) as server:
        await server.listen(UnixAddress(path))
        await asyncio.to_thread(sys.stdin.read)


def connected(path: Path, export: str = "") -> NbdConnection:
    """A connection to a server that has just been started."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return NbdConnection.connect(UnixAddress(str(path)), export)
        except NbdDisconnected:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.02)


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes], close: bool) -> Iterator[None]:
    """End a process with the block."""
    try:
        yield
    finally:
        if close:
            process.communicate()
        else:
            process.terminate()
            process.wait()


class Bench:
    """The images, the repository and the table of figures."""

    def __init__(self, place: Path, data: int) -> None:
        self.place = place
        self.data = data
        self.images = {name: place / f"{name}.qcow2" for name in DISKS}
        self.environment = os.environ | {
            "RESTIC_PASSWORD": PASSWORD,
            "RESTIC_REPOSITORY": str(place / "repository"),
            "PULLBACK_CACHE_DIR": str(place / "cache"),
        }
        self.missed = 0

    @property
    def blocks(self) -> int:
        """How many blocks of data a disk has."""
        return self.data // BLOCK

    def row(self, what: str, *arguments: str) -> None:
        """Run pullback and print a row."""
        peak = self.place / "peak"
        start = time.perf_counter()
        command = [sys.executable, "-m", "bench.real_sizes", "--pullback", str(peak), *arguments]
        done = subprocess.run(command, env=self.environment, stdout=subprocess.PIPE)
        if done.returncode:
            sys.exit(done.stdout.decode())
        seconds = time.perf_counter() - start
        memory, processor = (int(number) for number in peak.read_text().split())
        memory >>= 10
        last = json.loads(done.stdout.splitlines()[-1])
        read = stored = ""
        if last["event"] == "backup":
            read, stored = f"{last['bytes_read'] >> 20} MiB", f"{last['bytes_stored'] / (1 << 20):.1f} MiB"
        verdict = "" if memory <= MEMORY_TARGET else f" (target: {MEMORY_TARGET})"
        self.missed += memory > MEMORY_TARGET
        print(
            f"| {what} | {seconds:.1f} s | {processor / 1000:.1f} s | {memory} MiB{verdict} | {read} | {stored} |",
            flush=True,
        )

    def backup(self, what: str, disk: str, *options: str) -> None:
        """A backup of a disk."""
        size = f"{DISKS[disk] >> 30} GiB"
        self.row(f"{what}, {size}", "backup", f"disk:{self.images[disk]}", "--name", disk, "--json", *options)

    def change(self, name: str, blocks: Sequence[int]) -> None:
        """Write these blocks of the data anew, on each disk."""
        for disk, image in self.images.items():
            simulated, path = SimulatedDisk(DISKS[disk], self.data), self.place / "write"
            command = ["qemu-nbd", "--persistent", "--format", "qcow2", "--socket", str(path), str(image)]
            with ended(subprocess.Popen(command), close=False), connected(path) as connection:
                for block in blocks:
                    connection.submit_write(simulated.place(block), content(f"{name} {block}"))
                    if connection.pending >= 8:
                        connection.wait()
                while connection.pending:
                    connection.wait()
            path.unlink(missing_ok=True)


def run(place: Path, data: int, blobs: int) -> int:
    """All of it; returns how many figures missed the target."""
    bench = Bench(place, data)
    socket = place / "data"
    command = [sys.executable, "-m", "bench.real_sizes", "--serve", str(socket), "--data", str(data >> 30)]
    with ended(subprocess.Popen(command, stdin=subprocess.PIPE), close=True):
        connected(socket, "big").close()
        for disk, image in bench.images.items():
            convert = ["qemu-img", "convert", "-c", "-W", "-m", "8", "-f", "raw", "-O", "qcow2"]
            subprocess.run(
                [*convert, "-o", "compression_type=zstd", f"nbd+unix:///{disk}?socket={socket}", str(image)], check=True
            )
    steps(bench, blobs)
    return bench.missed


def steps(bench: Bench, blobs: int) -> None:
    """The rows, in their order."""
    print(f"{bench.data >> 30} GiB of data, {blobs} blobs\n")
    print("| step | time | of its processor | peak memory | read | stored |\n|---|---|---|---|---|---|", flush=True)
    bench.row("init", "init", "--json")
    for disk in DISKS:
        bench.backup("the first backup", disk)
    # As if the repository held other disks, too.
    make_files(bench.place / "repository", 0, blobs)
    bench.row("list, no cache yet", "list", "--json")
    bench.row("list", "list", "--json")
    for disk in DISKS:
        bench.backup("find the base (--dry-run)", disk, "--dry-run")
    for disk in DISKS:
        bench.backup("nothing changed", disk)
    chance = random.Random(1)
    for share, text in ((1000, "0.1 %"), (100, "1 %")):
        count = bench.blocks // share
        changes = {
            f"{text} changed, in one place": range(bench.blocks // 3, bench.blocks // 3 + count),
            f"{text} changed, scattered": sorted(chance.sample(range(bench.blocks), count)),
            f"{text} changed, scattered again": sorted(chance.sample(range(bench.blocks), count)),
        }
        for what, blocks in changes.items():
            bench.change(what, blocks)
            for disk in DISKS:
                bench.backup(what, disk)


def note_peak(path: Path) -> None:
    """Write down the highest memory of this process, in KiB, and its processor time, in ms."""
    status = Path("/proc/self/status").read_text()
    path.write_text(f"{status.split('VmHWM:')[1].split()[0]} {time.process_time() * 1000:.0f}")


def main() -> None:
    """The command."""
    if sys.argv[1:2] == ["--pullback"]:
        # RUSAGE_SELF would count what the parent had when it started us.
        atexit.register(functools.partial(note_peak, Path(sys.argv[2])))
        sys.argv[1:3] = []
        from pullback.cli.main import main as pullback

        pullback()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=int, help="GiB of data [50]")
    parser.add_argument("--blobs", type=int, help="blobs that the repository holds besides [10,000,000]")
    parser.add_argument("--quick", action="store_true", help="2 GiB of data and 200,000 blobs, unless said otherwise")
    parser.add_argument("--directory", help="where there is room for 3 GiB [a temporary directory]")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    data = (given.data or (2 if given.quick else 50)) * GIB
    if given.serve:
        asyncio.run(serve(given.serve, data))
        return
    with tempfile.TemporaryDirectory(prefix="pullback-bench-", dir=given.directory) as place:
        missed = run(Path(place), data, given.blobs or (200_000 if given.quick else 10_000_000))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
