# SPDX-License-Identifier: Apache-2.0
"""Observing: captured replies of QEMU 7.2 give the facts they should, and the QEMU that is installed gives such too."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lab import images
from lab.disks import DiskSpec
from lab.qemu import BareQemu
from pullback.model.chain import read_chain
from pullback.model.facts import Facts
from pullback.model.snapshots import ServerMark, read_exports, read_snapshots, server_mark
from pullback.plan.method import choose_method, refuse_export
from pullback.plan.selection import select_disks
from pullback.qemu.observe import observe
from tests.golden.capture import session
from tests.golden.plans import SNAPSHOT, disks
from tests.golden.replay import CAPTURES, check_golden, observed


@pytest.mark.parametrize("name", ["idle", "frozen"])
def test_captured_replies_give_these_facts(name: str) -> None:
    facts = asdict(observed(name))
    check_golden(f"facts-{name}", facts | {"features": sorted(facts["features"])})


def test_the_idle_domain() -> None:
    facts = observed("idle")
    assert (facts.name, facts.version[:2], facts.running) == ("web", (7, 2), True)
    found = disks(facts)
    assert list(found) == ["vda", "vdb", "vdc"]
    assert read_chain(found["vda"].bitmaps).points == ("A", "B", "C")
    assert read_chain(found["vdb"].bitmaps).points == ("B", "C")
    assert [bool(disk.untracked) for disk in found.values()] == [False, False, True]
    assert all(disk.root == disk.node for disk in found.values())
    # The capture wrote 1 MiB after each checkpoint, the last one after C.
    assert {one.name: (one.count, one.recording) for one in found["vda"].bitmaps} == {
        "pullback-A": (1 << 20, False),
        "pullback-B^A": (1 << 20, False),
        "pullback-C^B": (1 << 20, True),
    }
    selection = select_disks(facts)
    assert dict(selection.skipped) == {"cd0": "the drive is empty"}
    assert choose_method(facts, selection.disks) == "filter"
    refuse_export(facts, selection.disks)


def test_the_frozen_domain() -> None:
    facts = observed("frozen")
    for number, (target, disk) in enumerate(disks(facts).items()):
        names = {role: f"pb-{SNAPSHOT}-{number}-{role}" for role in ("scratch", "filter", "access")}
        assert (disk.target, disk.node, disk.root) == (target, f"node-{target}", names["filter"])
        assert facts.nodes[names["filter"]].children == {"file": f"node-{target}", "target": names["scratch"]}
        assert facts.nodes[names["access"]].children == {"file": names["filter"]}
    marks = {name: mark for name, node in facts.nodes.items() if (mark := server_mark(node)) is not None}
    assert marks == {f"pb-{SNAPSHOT}-{n}-access": ServerMark("unix", "/var/lib/vms/nbd") for n in range(3)}
    (snapshot,) = read_snapshots(facts)
    assert (snapshot.id, snapshot.name, snapshot.checkpoint, snapshot.whole) == (SNAPSHOT, "night", "D", True)
    assert [part.target for part in snapshot.parts] == ["vda", "vdb", "vdc"]
    found = read_exports(facts)
    assert {(one.name, one.snapshot, one.checkpoints) for one in found} == {
        ("vda", SNAPSHOT, ("B",)),
        ("vdb", SNAPSHOT, ("B",)),
        ("vdc", SNAPSHOT, ()),
    }
    assert read_chain(disks(facts)["vda"].bitmaps).points == ("A", "B", "C", "D")


def shape(value: Any) -> Any:
    """The types in a value, whatever it says."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return sorted({json.dumps(shape(item), sort_keys=True) for item in value})
    return type(value).__name__


def test_the_installed_qemu_answers_in_the_same_shape(bare_qemu: Callable[..., BareQemu], tmp_path: Path) -> None:
    """Same questions, and values of the same types in what is made of the answers."""
    made = [DiskSpec(images.create(tmp_path / f"{one}.qcow2", 1 << 20), id=one) for one in ("vda", "vdb")]
    qemu = bare_qemu(made, name="web", running=True, extra_args=["-device", "ide-cd,id=cd0"])
    seen: list[dict[str, Any]] = []

    async def look() -> Facts:
        async with session(qemu, seen) as monitor:
            return await observe(monitor)

    facts, captured = asyncio.run(look()), observed("idle")
    assert facts.name == captured.name
    for target in ("vda", "vdb"):
        live, then = disks(facts)[target], disks(captured)[target]
        assert shape(asdict(live) | {"bitmaps": ()}) == shape(asdict(then) | {"bitmaps": ()})
        assert (live.qdev, live.device_type, live.node) == (then.qdev, then.device_type, then.node)
    asked = {item["execute"] for item in json.loads((CAPTURES / "idle.json").read_text())["replies"]}
    assert {item["execute"] for item in seen} == asked | {"query-qmp-schema"}
