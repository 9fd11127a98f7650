# SPDX-License-Identifier: Apache-2.0
"""Facts, disks, chains and manifests in one line each, for tests of decisions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pullback.model.chain import Chain, bitmap_name, read_chain
from pullback.model.facts import Bitmap, Device, Disk, Export, Facts, Job, Node
from pullback.model.manifest import DiskEntry, Manifest
from pullback.model.snapshots import Names, SnapshotMark
from pullback.model.units import MIB, SEGMENT
from pullback.plan.freeze import FreezePart

SIZE = 64 * MIB
MOMENT = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)


def bitmap(
    name: str, recording: bool = False, *, inconsistent: bool = False, count: int = 0, persistent: bool = True
) -> Bitmap:
    return Bitmap(name, 65536, count, recording, persistent, inconsistent=inconsistent)


def bitmaps(*points: str) -> tuple[Bitmap, ...]:
    """The bitmaps of a sound chain through ``points``, oldest first; the last one records."""
    parents = (None, *points)
    return tuple(
        bitmap(bitmap_name(point, parent), recording=point == points[-1])
        for point, parent in zip(points, parents, strict=False)
    )


def chain(*points: str) -> Chain:
    return read_chain(bitmaps(*points))


def node(name: str, driver: str = "qcow2", **more: Any) -> Node:
    compat = "1.1" if driver == "qcow2" else ""
    return Node(**{"name": name, "driver": driver, "virtual_size": SIZE, "compat": compat, **more})


def device(target: str = "vda", root: str | None = None, **more: Any) -> Device:
    qdev = f"/machine/peripheral/{target}/virtio-backend"
    root = f"node-{target}" if root is None else root
    return Device(**{"target": target, "qdev": qdev, "type": "virtio-blk-device", "root": root, **more})


def facts(
    devices: Sequence[Device] | None = None,
    nodes: Iterable[Node] | None = None,
    *,
    version: tuple[int, int, int] = (7, 2, 22),
    run_state: str = "running",
    exports: Iterable[Export] = (),
    jobs: Iterable[Job] = (),
    features: Iterable[str] = (),
    daemon: bool = False,
) -> Facts:
    """A domain called web; without ``devices`` it has vda, without ``nodes`` a qcow2 under each device."""
    devices = (device(),) if devices is None else tuple(devices)
    nodes = [node(one.root) for one in devices if one.root] if nodes is None else nodes
    by_name = {one.name: one for one in nodes}
    return Facts(
        "web", "", version, run_state, devices, by_name, tuple(exports), tuple(jobs), frozenset(features), daemon
    )


def disk(target: str = "vda", points: Sequence[str] = (), **more: Any) -> Disk:
    """A disk on a qcow2 node, with a sound chain through ``points``."""
    made = facts([device(target)], [node(f"node-{target}", bitmaps=bitmaps(*points))])
    return replace(made.disk(made.devices[0]), **more)


def mark(target: str = "vda", *, name: str = "night", checkpoint: str | None = None) -> SnapshotMark:
    return SnapshotMark(name, target, f"node-{target}", MOMENT.isoformat(), checkpoint)


def part(number: int = 0, *, snapshot: str = "b00000001", of: Disk | None = None) -> FreezePart:
    """The ``number``-th disk of a snapshot: vda, vdb, ..."""
    of = disk(f"vd{chr(ord('a') + number)}") if of is None else of
    return FreezePart(of, Names(snapshot, number), f"/var/tmp/scratch-{number}", mark(of.target))


def entry(target: str = "vda", checkpoint: str | None = "A", *, size: int = SIZE) -> DiskEntry:
    return DiskEntry(target, size, checkpoint, "full", "the first one", None, "qcow2", 10, 5, 5)


def manifest(*disks: DiskEntry, **more: Any) -> Manifest:
    values: Mapping[str, Any] = {
        "domain": "web",
        "uuid": "",
        "time": MOMENT,
        "consistency": "crash",
        "qemu": "7.2.22",
        "pullback": "0",
        "segment_size": SEGMENT,
        "disks": disks,
    }
    return Manifest(**{**values, **more})
