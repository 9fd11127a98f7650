# SPDX-License-Identifier: Apache-2.0
"""Case 1: read a disk whole over NBD and throw it away."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench.harness import Bench, Case, Peer, Race, Run, timed
from bench.rivals import served

DEFAULT, TUNED = 0.75, 0.95
#: The best settings found on the way to ours; each counts as its best.
SETTINGS = (
    ("256 KiB", "--connections=2", "--threads=2", "--requests=4", "--request-size=262144"),
    ("1 MiB", "--connections=2", "--threads=2", "--requests=4", "--request-size=1048576"),
    ("1 MiB, 1 request", "--connections=2", "--threads=2", "--requests=1", "--request-size=1048576"),
    ("256 KiB, 4 connections", "--connections=4", "--threads=4", "--requests=4", "--request-size=262144"),
)


@contextmanager
def reading(bench: Bench) -> Iterator[Race]:
    """A qemu-nbd on the raw image, which is in the system's memory."""
    (image := bench.place / "disk").symlink_to(bench.raw())
    with served(image, "raw", "-r") as (uri, server):
        path = str(bench.place / "nbd")
        timed(["nbdcopy", uri, "null:"])

        def copy(*options: str) -> Callable[[], Run]:
            return lambda: timed(["nbdcopy", *options, uri, "null:"], qemu=server)

        yield Race(
            ours=lambda: timed([sys.executable, "-m", "bench.reader", path], qemu=server),
            peers=(
                Peer("nbdcopy", copy(), DEFAULT),
                *(Peer(f"nbdcopy, {name}", copy(*options), TUNED) for name, *options in SETTINGS),
            ),
        )


CASES = [Case("1", "reading", reading)]
