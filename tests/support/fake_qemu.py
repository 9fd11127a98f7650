# SPDX-License-Identifier: Apache-2.0
"""The little of QEMU that plans act on: a block graph with its permissions, dirty bitmaps, exports, jobs.

It refuses what QEMU refuses (seen on 7.2.22), so a plan that works here in every state is worth trying there;
tests/golden/test_way_back.py does, with the same states.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pullback.model.facts import Bitmap, Device, Export, Facts, Job, Node
from pullback.plan.command import ExportDeleted, JobConcluded, Plan, Step

Json = Mapping[str, Any]
SIZE = 1 << 22


class QemuError(Exception):
    """What QEMU would answer with an error."""


class QemuAborted(Exception):
    """What would end QEMU, and the domain with it: no plan may ever do it."""


@dataclass(slots=True)
class FakeBitmap:
    """``blocks`` are the dirty ones; ``removed`` within a transaction: the name stays taken until it commits."""

    recording: bool
    persistent: bool
    blocks: set[int] = field(default_factory=set)
    removed: bool = False


@dataclass(slots=True)
class FakeNode:
    driver: str
    children: dict[str, str] = field(default_factory=dict)
    bitmaps: dict[str, FakeBitmap] = field(default_factory=dict)


class FakeQemu:
    """A domain with qcow2 disks on nodes ``node-TARGET``."""

    def __init__(self, *targets: str) -> None:
        self.nodes = {f"node-{target}": FakeNode("qcow2") for target in targets}
        self.roots = {target: f"node-{target}" for target in targets}
        self.exports: dict[str, str] = {}
        self.jobs: dict[str, str] = {}
        self.server = False
        self.log: list[str] = []

    # What is there

    def facts(self) -> Facts:
        return Facts(
            "fake",
            "",
            (7, 2, 22),
            "running",
            tuple(Device(target, self._qdev(target), "virtio-blk-device", root) for target, root in self.roots.items()),
            {name: self._node(name, node) for name, node in self.nodes.items()},
            tuple(Export(name, node, "nbd") for name, node in self.exports.items()),
            tuple(Job(name, "create", status) for name, status in self.jobs.items()),
        )

    def _qdev(self, target: str) -> str:
        return f"/machine/peripheral/{target}/virtio-backend"

    def _node(self, name: str, node: FakeNode) -> Node:
        return Node(
            name,
            node.driver,
            SIZE,
            compat="1.1" if node.driver == "qcow2" else "",
            bitmaps=tuple(
                Bitmap(bitmap, 65536, len(one.blocks) * 65536, one.recording, one.persistent)
                for bitmap, one in node.bitmaps.items()
            ),
            children=dict(node.children),
        )

    def graph(self) -> tuple[Any, ...]:
        """All of the state but the contents, to be compared."""
        nodes = {name: (node.driver, node.children, sorted(node.bitmaps)) for name, node in self.nodes.items()}
        return copy.deepcopy((nodes, self.roots, self.exports, self.jobs, self.server))

    # What happens

    def write(self, target: str, block: int) -> None:
        """The domain writes; every recording bitmap of the disk's own node sees it."""
        name = self.roots[target]
        while "file" in self.nodes[name].children:
            name = self.nodes[name].children["file"]
        for bitmap in self.nodes[name].bitmaps.values():
            if bitmap.recording:
                bitmap.blocks.add(block)

    def run(self, plan: Plan, *, upto: int | None = None, wait: bool = True) -> None:
        """Carry out a plan, or its first ``upto`` commands; without ``wait`` the last one is not waited for."""
        steps = list(plan.commands())[:upto]
        for step in steps:
            try:
                self.execute(step, wait=wait or step is not steps[-1])
            except QemuError:
                if not step.optional:
                    raise

    def execute(self, step: Step, wait: bool = True) -> None:
        self.log.append(step.execute)
        handler = getattr(self, "_do_" + step.execute.replace("-", "_"))
        before = copy.deepcopy((self.nodes, self.roots))
        try:
            handler(step.arguments)
            self._check_permissions()
        except QemuError:
            self.nodes, self.roots = before
            raise
        match step.wait:
            case JobConcluded(job) if wait:
                del self.jobs[job]
            case ExportDeleted(export):
                assert export not in self.exports

    def _do_stop(self, _: Json) -> None: ...

    _do_cont = _do_human_monitor_command = _do_stop

    def _do_blockdev_create(self, arguments: Json) -> None:
        self.jobs[arguments["job-id"]] = "concluded"

    def _do_job_dismiss(self, arguments: Json) -> None:
        self._take(self.jobs, arguments["id"])

    def _do_blockdev_add(self, arguments: Json) -> None:
        name, driver = arguments["node-name"], arguments["driver"]
        if name in self.nodes:
            raise QemuError(f"duplicate node {name}")
        children = (
            {} if driver == "file" else {role: arguments[role] for role in ("file", "target") if role in arguments}
        )
        for child in children.values():
            self._get(self.nodes, child)
        self.nodes[name] = FakeNode(driver, children)

    def _do_blockdev_del(self, arguments: Json) -> None:
        name = arguments["node-name"]
        self._get(self.nodes, name)
        if self._parents(name) or name in self.roots.values() or name in self.exports.values():
            raise QemuError(f"node {name} is in use")
        del self.nodes[name]

    def _do_qom_set(self, arguments: Json) -> None:
        target = arguments["path"].split("/")[3]
        self._get(self.nodes, arguments["value"])
        if self._get(self.roots, target) == arguments["value"]:
            raise QemuAborted(f"{target} sits on {arguments['value']} already (bdrv_replace_child_noperm, 7.2.22)")
        self.roots[target] = arguments["value"]

    def _do_nbd_server_start(self, _: Json) -> None:
        if self.server:
            raise QemuError("NBD server already running")
        self.server = True

    def _do_nbd_server_stop(self, _: Json) -> None:
        if not self.server:
            raise QemuError("NBD server not running")
        self.server = False
        self.exports.clear()

    def _do_block_export_add(self, arguments: Json) -> None:
        if not self.server:
            raise QemuError("NBD server not running")
        for name in arguments["bitmaps"]:
            self._get(self._get(self.nodes, arguments["node-name"]).bitmaps, name)
        self.exports[arguments["id"]] = arguments["node-name"]

    def _do_block_export_del(self, arguments: Json) -> None:
        self._take(self.exports, arguments["id"])

    # Dirty bitmaps: qapi/transaction.json, all or nothing, in order; removals take effect at the end

    def _do_transaction(self, arguments: Json) -> None:
        for action in arguments["actions"]:
            self._bitmap_action(action["type"], action["data"])
        for node in self.nodes.values():
            node.bitmaps = {name: bitmap for name, bitmap in node.bitmaps.items() if not bitmap.removed}

    def _do_block_dirty_bitmap_add(self, arguments: Json) -> None:
        self._bitmap_action("block-dirty-bitmap-add", arguments)

    def _do_block_dirty_bitmap_merge(self, arguments: Json) -> None:
        self._bitmap_action("block-dirty-bitmap-merge", arguments)

    def _do_block_dirty_bitmap_remove(self, arguments: Json) -> None:
        self._do_transaction({"actions": [{"type": "block-dirty-bitmap-remove", "data": arguments}]})

    def _bitmap_action(self, kind: str, data: Json) -> None:
        bitmaps = self._get(self.nodes, data["node"]).bitmaps
        if kind == "block-dirty-bitmap-add":
            if data["name"] in bitmaps:
                raise QemuError(f"bitmap already exists: {data['name']}")
            bitmaps[data["name"]] = FakeBitmap(not data.get("disabled", False), data.get("persistent", False))
            return
        if kind == "block-dirty-bitmap-merge":
            target = self._usable(bitmaps, data["target"])
            for source in data["bitmaps"]:
                inside = bitmaps if isinstance(source, str) else self._get(self.nodes, source["node"]).bitmaps
                target.blocks |= self._usable(inside, source if isinstance(source, str) else source["name"]).blocks
            return
        bitmap = self._usable(bitmaps, data["name"])
        if kind == "block-dirty-bitmap-remove":
            bitmap.removed = True
        elif kind in ("block-dirty-bitmap-enable", "block-dirty-bitmap-disable"):
            bitmap.recording = kind.endswith("enable")
        else:
            raise QemuError(f"unknown action {kind}")

    def _usable(self, bitmaps: dict[str, FakeBitmap], name: str) -> FakeBitmap:
        bitmap: FakeBitmap = self._get(bitmaps, name)
        if bitmap.removed:
            raise QemuError(f"bitmap {name} is busy")
        return bitmap

    # Permissions (block/copy-before-write.c: with a parent, a filter lets nobody else write below it)

    def _parents(self, name: str) -> list[str]:
        return [parent for parent, node in self.nodes.items() if name in node.children.values()]

    def _writes(self, name: str) -> bool:
        """Whether something above writes through this node."""
        if name in self.roots.values():
            return True
        return any(
            self.nodes[parent].driver == "copy-before-write" and self._writes(parent) for parent in self._parents(name)
        )

    def _check_permissions(self) -> None:
        for name in self.nodes:
            filters = [one for one in self._parents(name) if self.nodes[one].driver == "copy-before-write"]
            filters = [one for one in filters if self.nodes[one].children["file"] == name]
            guarding = [one for one in filters if self._parents(one) or one in self.roots.values()]
            writing = [one for one in filters if self._writes(one)] + (
                ["device"] if name in self.roots.values() else []
            )
            if any(one != other for one in guarding for other in writing):
                raise QemuError(f"permission conflict on node {name}")

    @staticmethod
    def _get(where: Mapping[str, Any], name: str) -> Any:
        if name not in where:
            raise QemuError(f"there is no {name}")
        return where[name]

    def _take(self, where: dict[str, Any], name: str) -> None:
        self._get(where, name)
        del where[name]


def blocks_since(qemu: FakeQemu, node: str, names: Iterable[str]) -> set[int]:
    """What the bitmaps ``names`` say together."""
    return set().union(*(qemu.nodes[node].bitmaps[name].blocks for name in names))


def recording(qemu: FakeQemu, node: str) -> Sequence[str]:
    return [name for name, bitmap in qemu.nodes[node].bitmaps.items() if bitmap.recording]
