# SPDX-License-Identifier: Apache-2.0
"""What reading a backup through `pullback serve` costs, beside qemu-nbd on the raw disk.

`python -m bench.serve [MIB] [DIRECTORY]`

Half of the disk is random, half text-like.  Sequential: `nbdcopy` to nowhere.  Random: 4 KiB at random places, one
connection per core, one request at a time each.  Each figure is the best of three; a new server for each.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pullback.nbd.address import Address, parse_uri
from pullback.nbd.blocking import NbdConnection
from tests.support.backups import open_repository
from tests.support.product import Stage
from tests.support.serving import Model, serving, store_models

CHUNK = 256 << 10
READS = 400
SEGMENT = 256 << 20


def make(stage: Stage, mib: int) -> Path:
    """A backup of a disk of this size, and the disk itself."""
    rng = random.Random(1)
    words = [rng.randbytes(rng.randint(2, 9)).hex().encode() for _ in range(3000)]
    text = b" ".join(rng.choice(words) for _ in range(CHUNK // 6))
    chunks = []
    for number in range(mib << 20 >> 18):
        cut = rng.randrange(len(text) - CHUNK)
        chunks.append(rng.randbytes(CHUNK) if number % 2 else (b"%12d" % number + text[cut : cut + CHUNK])[:CHUNK])
    store_models(open_repository(stage.repo), {"vda": Model(tuple(chunks))}, segment=SEGMENT)
    (raw := stage.place / "raw").write_bytes(b"".join(chunks))
    return raw


@contextmanager
def ours(stage: Stage) -> Iterator[str]:
    with serving(stage, "latest") as server:
        yield server.uris["vda"]
        told = server.end()
        assert told.code == 0


@contextmanager
def theirs(raw: Path) -> Iterator[str]:
    path, pid = raw.with_name("q"), raw.with_name("pid")
    pid.unlink(missing_ok=True)
    command = ["qemu-nbd", "-t", "-r", "-e", "8", "-f", "raw", "-k", str(path), f"--pid-file={pid}", str(raw)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        while not (pid.exists() and pid.read_text().strip()):
            assert process.poll() is None
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.terminate()
        process.wait()


def sequential(uri: str, size: int) -> float:
    """MiB per second."""
    begin = time.perf_counter()
    subprocess.run(["nbdcopy", uri, "null:"], check=True)
    return size / (time.perf_counter() - begin) / (1 << 20)


def scattered(uri: str, size: int) -> float:
    """Requests per second."""
    where = parse_uri(uri)

    def one(seed: int) -> None:
        rng = random.Random(seed)
        address: Address = where.address
        with NbdConnection.connect(address, where.export) as connection:
            for _ in range(READS):
                connection.read(rng.randrange(size // 4096) * 4096, 4096)

    threads = os.cpu_count() or 1
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(threads)))
    return READS * threads / (time.perf_counter() - begin)


def main() -> None:
    """Print a JSON line per figure."""
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as place:
        os.environ["PULLBACK_CACHE_DIR"] = f"{place}/cache"
        stage = Stage(Path(place))
        raw = make(stage, mib)
        works: dict[str, Callable[[str, int], float]] = {"MiB/s, sequential": sequential, "reads/s, random": scattered}
        for what, work in works.items():
            best = {"serve": 0.0, "qemu-nbd": 0.0}
            for _ in range(3):
                with ours(stage) as uri:
                    best["serve"] = max(best["serve"], work(uri, mib << 20))
                with theirs(raw) as uri:
                    best["qemu-nbd"] = max(best["qemu-nbd"], work(uri, mib << 20))
            print(json.dumps({"what": what, **{name: round(value) for name, value in best.items()}}), flush=True)


if __name__ == "__main__":
    main()
