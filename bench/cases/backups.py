# SPDX-License-Identifier: Apache-2.0
"""Cases 2 to 4: a whole backup of a running domain, one of what changed, and one where nothing did.

Ours is of a domain that runs; the others read the raw file that the disk was made from.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.harness import GIB, Bench, Case, Limit, Peer, Race, Run, timed
from bench.rivals import Borg, Proxy, Pullback, Restic, prepared
from lab.disks import DiskSpec
from lab.qemu import BareQemu

BLOCK = 64 << 10
CONVERT = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd", "-W", "-m", "8"]


@contextmanager
def domain(bench: Bench) -> Iterator[BareQemu]:
    """A running domain whose disk holds what the raw image does."""
    image = bench.place / "disk.qcow2"
    prepared(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(bench.raw()), str(image)])
    with BareQemu([DiskSpec(image)], name="web", running=True) as qemu:
        yield qemu


class Ours:
    """Backups of the domain into one repository."""

    def __init__(self, bench: Bench, qemu: BareQemu, purpose: str = "") -> None:
        self.program = Pullback(bench, purpose)
        self._qemu = qemu
        self._scratch = str(bench.place)

    def backup(self, qmp: Path | None = None) -> Run:
        """One backup, from the start of the process to its end."""
        where = f"qmp:{qmp or self._qemu.qmp_path}"
        return self.program.run("backup", where, "--name", "web", "--scratch", self._scratch, qemu=self._qemu.pid)

    def first(self) -> Run:
        """A whole one, into an empty repository."""
        self.program.reset()
        return self.backup()


@contextmanager
def whole(bench: Bench) -> Iterator[Race]:
    """Case 2."""
    raw, packed = bench.raw(), "packed.qcow2"
    restic, borg = Restic(bench), Borg(bench)

    def alone(work: Callable[[], Run], *left: str) -> Run:
        """What a side has written goes before the next one comes."""
        try:
            return work()
        finally:
            for name in left:
                bench.fresh(name)

    def by_restic() -> Run:
        restic.reset()
        return restic.run("backup", raw)

    def by_borg() -> Run:
        borg.reset()
        return borg.create(raw)

    with domain(bench) as qemu:
        ours = Ours(bench, qemu)
        yield Race(
            ours=lambda: alone(ours.first, "pullback", "pullback-cache"),
            peers=(
                Peer("restic backup", lambda: alone(by_restic, "restic", "restic-cache"), 0.35),
                Peer("borg create", lambda: alone(by_borg, "borg", "borg-cache"), 0.7),
                Peer(
                    "qemu-img convert -c",
                    lambda: alone(lambda: timed([*CONVERT, raw, bench.place / packed]), packed),
                    0.8,
                ),
            ),
        )


def change(bench: Bench, qemu: BareQemu, chance: random.Random) -> None:
    """Write 1 % of the blocks anew, anywhere."""
    count = bench.size // BLOCK
    for block in sorted(chance.sample(range(count), max(1, count // 100))):
        qemu.device_write("vda", block * BLOCK, BLOCK, chance.randbytes(BLOCK))


@contextmanager
def changed(bench: Bench) -> Iterator[Race]:
    """Case 3."""
    chance = random.Random("changes")
    with domain(bench) as qemu, Proxy(qemu.directory / "proxy", qemu.qmp_path) as proxy:
        ours, again = Ours(bench, qemu), Ours(bench, qemu, "-whole")
        ours.first()

        def incremental() -> Run:
            change(bench, qemu, chance)
            run = ours.backup(proxy.path)
            return dataclasses.replace(run, figures={"first_command": proxy.first - run.began})

        half = (Limit("half a second", 0.5),) if bench.size <= 2 * GIB else ()
        yield Race(
            ours=incremental,
            peers=(Peer("the whole backup", again.first, 0.15),),
            limits=(*half, Limit("0.2 s to the first QMP command", 0.2, "first_command")),
        )


@contextmanager
def unchanged(bench: Bench) -> Iterator[Race]:
    """Case 4."""
    with domain(bench) as qemu:
        ours = Ours(bench, qemu)
        ours.first()
        ours.backup()
        yield Race(ours=ours.backup, limits=(Limit("0.4 s", 0.4),))


CASES = [
    Case("2", "whole backup", whole),
    Case("3", "1 % changed", changed),
    Case("4", "nothing changed", unchanged, (2,)),
]
