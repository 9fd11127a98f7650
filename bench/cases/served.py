# SPDX-License-Identifier: Apache-2.0
"""Case 10: a backup read through `pullback serve` beside qemu-nbd on the raw disk, and booted beside QEMU on it.

The work is that of bench/serve.py and bench/boot.py.  No targets were set for it: those here are
bounds that a defect would break.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from bench import boot, serve
from bench.harness import Bench, Case, Peer, Race, Run
from tests.support.product import Stage

MIB = 1 << 20
SEQUENTIAL, RANDOM, BOOT = 8.0, 20.0, 2.5


@contextmanager
def cached_in(bench: Bench) -> Iterator[Stage]:
    """A repository below the case's place, and the cache there, too."""
    before = os.environ.get("PULLBACK_CACHE_DIR")
    os.environ["PULLBACK_CACHE_DIR"] = str(bench.place / "cache")
    try:
        yield Stage(bench.place)
    finally:
        del os.environ["PULLBACK_CACHE_DIR"]
        if before is not None:
            os.environ["PULLBACK_CACHE_DIR"] = before


@contextmanager
def reading(bench: Bench, work: Callable[[str, int], float], target: float) -> Iterator[Race]:
    """``work`` on a URI and the disk's size; a new server for every round."""
    with cached_in(bench) as stage:
        raw = serve.make(stage, bench.size // MIB)

        def timed(server: Callable[[], AbstractContextManager[str]]) -> Run:
            with server() as uri:
                begin = time.perf_counter()
                work(uri, bench.size)
                return Run(time.perf_counter() - begin)

        yield Race(
            ours=partial(timed, partial(serve.ours, stage)),
            peers=(Peer("qemu-nbd", partial(timed, partial(serve.theirs, raw)), target),),
        )


@contextmanager
def booting(bench: Bench) -> Iterator[Race]:
    """From the start of the command; the first output is the kernel's."""
    with cached_in(bench) as stage:
        raw = boot.make(stage, bench.size // MIB)
        ways, environment = boot.ways(stage, raw)

        def one(way: str) -> Run:
            found = boot.timed(ways[way](), environment)
            figures = {"first_output": found["first output"], "known_read": found["16 MiB read"]}
            return Run(found["end"], figures=figures)

        yield Race(
            ours=lambda: one("boot"),
            peers=(
                Peer("QEMU on the image", lambda: one("QEMU on the image"), BOOT, "first_output"),
                Peer("QEMU on the image", lambda: one("QEMU on the image"), BOOT, "known_read"),
                Peer("boot --to", lambda: one("boot --to"), 1.1, "first_output"),
            ),
        )


CASES = [
    Case("10", "serve, sequential", partial(reading, work=serve.sequential, target=SEQUENTIAL), (1,)),
    Case("10", "serve, random", partial(reading, work=serve.scattered, target=RANDOM), (1,)),
    Case("10", "boot", booting, (1,)),
]
