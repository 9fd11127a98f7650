# SPDX-License-Identifier: Apache-2.0
"""Case 5: restore to a new qcow2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bench.cases.backups import Ours, domain
from bench.harness import Bench, Case, Peer, Race, Run, timed
from bench.rivals import Restic, prepared, served


@contextmanager
def restoring(bench: Bench) -> Iterator[Race]:
    """A backup by each; the target of qemu-img is a qemu-nbd on an empty qcow2, as ours is."""
    raw, restic = bench.raw(), Restic(bench)
    with domain(bench) as qemu:
        ours = Ours(bench, qemu)
        ours.first()
    bench.fresh("disk.qcow2")
    restic.reset()
    restic.run("backup", raw)

    def restored() -> Run:
        try:
            return ours.program.run("restore", "latest", "--to", bench.place / "images")
        finally:
            bench.fresh("images")

    def by_restic() -> Run:
        try:
            return restic.run("restore", "latest", "--target", bench.place / "files")
        finally:
            bench.fresh("files")

    def by_convert() -> Run:
        image = bench.fresh("target.qcow2")
        prepared(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(bench.size)])
        try:
            with served(image, "qcow2") as (uri, server):
                options = ["-n", "-W", "-m", "8", "-t", "writeback", "--target-is-zero"]
                return timed(["qemu-img", "convert", *options, "-f", "raw", "-O", "raw", raw, uri], qemu=server)
        finally:
            image.unlink()

    yield Race(
        ours=restored,
        peers=(Peer("restic restore", by_restic, 0.5), Peer("qemu-img convert to NBD", by_convert, 1.0)),
    )


CASES = [Case("5", "restore", restoring)]
