# SPDX-License-Identifier: Apache-2.0
"""What opening a repository of many blobs costs, with a cache and without.

`python -m bench.index [BLOBS] [DIRECTORY]`

The repository is made of real index files: sealed and compressed as ours are, 50,000 blobs each, 64 blobs a pack.
Each figure is of a process of its own, with its peak memory; what it did to the cache stays for the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pullback.repository.blob import BlobId, BlobKind, PackId
from pullback.repository.crypto import ScryptCost
from pullback.repository.documents import save_document
from pullback.repository.index import MAX_INDEX_BLOBS, encode_index
from pullback.repository.local_store import LocalStore
from pullback.repository.pack import PackedBlob
from pullback.repository.repository import Repository
from pullback.repository.store import FileKind

PASSWORD = "bench"
BLOBS = 10_000_000
PER_PACK = 64
CHUNK = 256 << 10
SAMPLE = 200_000
SEGMENT_CHUNKS = 1024


def blob_number(number: int) -> BlobId:
    """The id of blob `number`."""
    return BlobId(hashlib.sha256(number.to_bytes(8)).digest())


def make_files(place: Path, first: int, end: int) -> None:
    """Index files of the blobs from `first` to `end`."""
    repository = Repository.open(LocalStore(place), PASSWORD)
    key = repository._key
    for start in range(first, end, MAX_INDEX_BLOBS):
        stop = min(start + MAX_INDEX_BLOBS, end)
        packs = {}
        for pack in range(start, stop, PER_PACK):
            name = PackId(hashlib.sha256(b"pack %d" % pack).digest())
            packs[name] = [
                PackedBlob(blob_number(number), BlobKind.DATA, (number - pack) * 200_000, 199_000 + number % 999, CHUNK)
                for number in range(pack, min(pack + PER_PACK, stop))
            ]
        save_document(repository.store, key, 2, FileKind.INDEX, encode_index(packs))


def make(place: Path, blobs: int) -> None:
    """A repository of this many blobs; one that is there is taken."""
    if not (place / "config").exists():
        Repository.init(LocalStore(place), PASSWORD, cost=ScryptCost(n=16, r=1, p=1))
        make_files(place, 0, blobs)


def opened(place: Path, cached: bool) -> Repository:
    """The repository with its index ready."""
    repository = Repository.open(LocalStore(place), PASSWORD, cache=place / "cache" if cached else None)
    repository.load_index()
    return repository


def scattered(blobs: int) -> list[BlobId]:
    """Ids all over the repository."""
    return [blob_number(number * 7919 % blobs) for number in range(SAMPLE)]


def measured(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def step(name: str, place: Path, blobs: int) -> dict[str, float | int]:
    """One step, in this process: seconds, and for lookups how many."""
    if name.startswith(("open", "rebuild", "fold")):
        return {"seconds": measured(lambda: opened(place, cached=name != "open without a cache"))}
    index, ids = opened(place, cached=True).index, scattered(blobs)
    if name == "lengths, a segment at a time":
        pieces = [ids[at : at + SEGMENT_CHUNKS] for at in range(0, len(ids), SEGMENT_CHUNKS)]
        assert None not in index.lengths(BlobKind.DATA, pieces[0])
        work: Callable[[], object] = lambda: [index.lengths(BlobKind.DATA, piece) for piece in pieces]  # noqa: E731
    elif name == "has, unknown blobs":
        ids = [BlobId(hashlib.sha256(blob).digest()) for blob in ids]
        work = lambda: [index.has(BlobKind.DATA, blob) for blob in ids]  # noqa: E731
    else:
        work = lambda: [index.lookup(BlobKind.DATA, blob) for blob in ids]  # noqa: E731
    return {"seconds": measured(work), "lookups": len(ids)}


def in_a_child(name: str, place: Path, blobs: int) -> None:
    """Run a step in a process of its own and print its row."""
    command = [sys.executable, "-m", "bench.index", "--step", name, str(place), str(blobs)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result = json.loads(done.stdout)
    each = f"{result['seconds'] / result['lookups'] * 1e6:.1f} us each" if "lookups" in result else ""
    print(f"| {name} | {result['seconds']:.2f} s {each} | {result['peak'] >> 10} MiB |", flush=True)


def run(place: Path, blobs: int) -> None:
    """All steps, in their order."""
    make(place, blobs)
    files = [path.stat().st_size for path in (place / "index").iterdir()]
    print(f"{blobs} blobs in {len(files)} index files of {sum(files) >> 20} MiB\n")
    print("| step | time | peak memory |\n|---|---|---|", flush=True)
    in_a_child("rebuild of the cache", place, blobs)
    for name in ("open", "lengths, a segment at a time", "lookup", "has, unknown blobs"):
        in_a_child(name, place, blobs)
    one_percent = blobs // 100
    make_files(place, blobs, blobs + one_percent)
    in_a_child("open, 1 % more blobs since", place, blobs)
    make_files(place, blobs + one_percent, blobs + blobs // 10)
    in_a_child("fold of 10 % more blobs", place, blobs)
    in_a_child("open after it", place, blobs)
    in_a_child("open without a cache", place, blobs)
    print(
        f"\nthe cache: {sum(path.stat().st_size for path in (place / 'cache').rglob('*') if path.is_file()) >> 20} MiB"
    )


def main(arguments: list[str]) -> None:
    """The command."""
    if arguments[:1] == ["--step"]:
        result = step(arguments[1], Path(arguments[2]), int(arguments[3]))
        result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(result))
        return
    blobs = int(arguments[0]) if arguments else BLOBS
    if len(arguments) > 1:
        run(Path(arguments[1]), blobs)
        return
    with tempfile.TemporaryDirectory(prefix="pullback-bench-") as place:
        os.chmod(place, 0o700)  # noqa: PTH101
        run(Path(place), blobs)


if __name__ == "__main__":
    main(sys.argv[1:])
