# SPDX-License-Identifier: Apache-2.0
"""Snapshots and exports as a user has them: through the command, judged by other programs' NBD clients."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from lab.processes import run
from lab.qemu import BareQemu, Qemu
from pullback.cli.main import main
from pullback.nbd.address import parse_uri
from pullback.nbd.blocking import NbdConnection
from tests.support.product import Done, Stage, leftovers

BLOCK = 64 << 10
_seed = itertools.count(1)


class Api:
    """The commands on one domain."""

    def __init__(self, stage: Stage, qemu: Qemu) -> None:
        self.stage = stage
        self.qemu = qemu
        self.domain = f"qmp:{qemu.qmp_path}"

    def attempt(self, group: str, command: str, *arguments: str | Path, **more: Any) -> Done:
        """``pullback GROUP COMMAND DOMAIN ARGUMENTS``, whatever comes of it; in this process, or with ``env`` in
        one of its own."""
        words = [*([group, command] if command else [group]), self.domain, *map(str, arguments)]
        return self.stage.cli(*words, **more) if more else inside(words, self.stage.environment())

    def do(self, group: str, command: str, *arguments: str | Path, **more: Any) -> dict[str, Any]:
        """The same with ``--json``; it has to succeed.  What it answers."""
        done = self.attempt(group, command, *arguments, "--json", **more)
        assert done.code == 0, (group, command, arguments, done.out, done.err)
        return done.events[-1]

    def refused(self, code: int, sentence: str, group: str, command: str, *arguments: str | Path) -> Done:
        """It has to end with this exit code and say this."""
        done = self.attempt(group, command, *arguments)
        assert done.code == code, (arguments, done.code, done.out, done.err)
        assert sentence in done.err, done.err
        return done

    def snapshot(self, name: str, *arguments: str | Path) -> dict[str, Any]:
        """Make a snapshot with this stage's scratch."""
        return self.do("snapshot", "create", name, "--scratch", self.stage.scratch, *arguments)

    def export(self, snapshot: str, *arguments: str | Path, at: str = "nbd") -> dict[str, str]:
        """Export it on a unix socket of the stage's; the URIs by export name."""
        place = self.stage.place / at
        answer = self.do("export", "start", "--snapshot", snapshot, "--socket", place, *arguments)
        return {export["name"]: export["uri"] for export in answer["exports"]}

    def show(self) -> dict[str, Any]:
        """What ``domain show`` tells."""
        return self.do("domain", "show")

    def clean(self) -> list[str]:
        """What there should not be once all snapshots are deleted."""
        files = [str(path) for path in self.stage.scratch.rglob("*")]
        nodes = self.qemu.qmp("query-named-block-nodes", flat=True)
        marks = [
            f"bitmap {bitmap['name']} on {node['node-name']}"
            for node in nodes
            for bitmap in node.get("dirty-bitmaps", ())
            if not bitmap.get("persistent")
        ]
        return leftovers(self.qemu) + files + marks


def inside(words: Sequence[str], environment: Mapping[str, str]) -> Done:
    """Run ``pullback`` in this process, which takes a tenth of the time."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["pullback", *words]),
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
    assert "a defect of pullback" not in out.getvalue() + err.getvalue(), err.getvalue() + out.getvalue()
    return Done(code, out.getvalue(), err.getvalue())


def state_of(qemu: Qemu) -> Any:
    """Everything that a command may change in QEMU: nodes with bitmaps, devices, exports, jobs, run state."""
    nodes = {
        node["node-name"]: sorted((one.get("name", ""), one["recording"]) for one in node.get("dirty-bitmaps", ()))
        for node in qemu.qmp("query-named-block-nodes", flat=True)
    }
    blocks = [(block.get("qdev"), block.get("inserted", {}).get("node-name")) for block in qemu.qmp("query-block")]
    listed = [sorted(one["id"] for one in qemu.qmp(query)) for query in ("query-block-exports", "query-jobs")]
    return nodes, blocks, listed, qemu.qmp("query-status")["status"]


def difference(left: Any, right: Any) -> list[str]:
    """In which nodes, devices, exports or jobs two states differ."""
    nodes = [
        f"{name}: {left[0].get(name)} and {right[0].get(name)}"
        for name in sorted(left[0].keys() | right[0].keys())
        if left[0].get(name) != right[0].get(name)
    ]
    return nodes + [f"{a} and {b}" for a, b in zip(left[1:], right[1:], strict=True) if a != b]


# -- a domain that writes -----------------------------------------------------------------------------------------


def scribble(qemu: BareQemu, disk: str, blocks: Iterable[int]) -> set[int]:
    """Write something else, a few sectors at an odd place, into each of these 64 KiB blocks; which ones."""
    written = set(blocks)
    for block in sorted(written):
        number = next(_seed)
        qemu.device_write(disk, block * BLOCK + number % 100 * 512, 1024, 1 + number % 250)
    return written


def some_blocks(size: int, count: int, seed: int) -> set[int]:
    """Some blocks of a disk of this size."""
    return set(random.Random(seed).sample(range(size // BLOCK), count))


# -- judges -------------------------------------------------------------------------------------------------------


def by_nbdcopy(uri: str) -> bytes:
    """All of an export, as libnbd's client reads it."""
    return run(["nbdcopy", uri, "-"])


def by_qemu_img(uri: str, place: Path) -> bytes:
    """All of an export, as QEMU's client reads it."""
    target = place / "converted"
    run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, target])
    try:
        return target.read_bytes()
    finally:
        target.unlink()


def by_us(uri: str) -> bytes:
    """All of an export, in requests of 1 MiB at odd places, by our own client."""
    where = parse_uri(uri)
    with NbdConnection.connect(where.address, where.export) as connection:
        size = connection.info.size
        cuts = [0, *range(5 * 512, size, 1 << 20), size]
        return b"".join(connection.read(start, end - start) for start, end in itertools.pairwise(cuts))


def by_everybody(uri: str, place: Path) -> bytes:
    """All of an export; every client has to read the same."""
    first, *others = by_nbdcopy(uri), by_qemu_img(uri, place), by_us(uri)
    assert all(first == other for other in others), "clients read different data"
    return first


def dirty_map(uri: str, checkpoint: str) -> set[int]:
    """The 64 KiB blocks that an export says changed since a checkpoint, as nbdinfo sees it."""
    context = f"qemu:dirty-bitmap:{checkpoint}"
    extents = json.loads(run(["nbdinfo", "--json", f"--map={context}", uri]))
    blocks: set[int] = set()
    for extent in extents:
        if extent["type"] & 1:
            end = extent["offset"] + extent["length"]
            blocks |= set(range(extent["offset"] // BLOCK, -(-end // BLOCK)))
    return blocks


def contexts(uri: str) -> set[str]:
    """The checkpoints whose changes an export offers, as nbdinfo sees them."""
    listed = json.loads(run(["nbdinfo", "--json", uri]))["exports"][0]["contexts"]
    prefix = "qemu:dirty-bitmap:"
    return {name.removeprefix(prefix) for name in listed if name.startswith(prefix)}


def reads(uri: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Read all of an export into nothing, whatever comes of it."""
    return subprocess.run(["nbdcopy", uri, "null:"], capture_output=True, timeout=60, check=False)
