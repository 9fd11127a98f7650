# SPDX-License-Identifier: Apache-2.0
"""The little of QEMU that plans act on: a block graph with its permissions, dirty bitmaps, exports, jobs.

It refuses what QEMU refuses (seen on 7.2.22), so a plan that works here in every state is worth trying there;
tests/golden/test_way_back.py does, with the same states.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pullback.model.facts import DISK_NODE, Bitmap, Device, Export, Facts, Job, Node
from pullback.plan.command import ExportDeleted, JobConcluded, JobGone, Plan, Step

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
    """``held`` are filters whose own bitmaps are in this node: it was below them when they were made."""

    driver: str
    children: dict[str, str] = field(default_factory=dict)
    bitmaps: dict[str, FakeBitmap] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)


@dataclass(slots=True)
class FakeJob:
    """A job; ``nodes`` are those it has in use, ``filter`` the one it put in, if it freezes."""

    type: str
    status: str
    nodes: tuple[str, ...] = ()
    filter: str = ""
    bitmap: str = ""
    dismisses_itself: bool = False


@dataclass(slots=True)
class FakeExport:
    node: str
    bitmaps: tuple[str, ...] = ()


class FakeQemu:
    """A domain with qcow2 disks on nodes ``node-TARGET``; or, as ``daemon``, one on ``disk-TARGET`` without devices."""

    def __init__(self, *targets: str, daemon: bool = False) -> None:
        self.daemon = daemon
        prefix = DISK_NODE if daemon else "node-"
        self.nodes = {f"{prefix}{target}": FakeNode("qcow2") for target in targets}
        self.roots = {} if daemon else {target: f"node-{target}" for target in targets}
        self.exports: dict[str, FakeExport] = {}
        self.jobs: dict[str, FakeJob] = {}
        self.objects: set[str] = set()
        self.server = False
        self.log: list[str] = []

    # What is there

    def facts(self) -> Facts:
        return Facts(
            "fake",
            "",
            (7, 2, 22),
            "shutdown" if self.daemon else "running",
            self._devices(),
            {name: self._node(name, node) for name, node in self.nodes.items()},
            tuple(Export(name, export.node, "nbd") for name, export in self.exports.items()),
            tuple(Job(name, job.type, job.status) for name, job in self.jobs.items()),
            daemon=self.daemon,
        )

    def _devices(self) -> tuple[Device, ...]:
        if self.daemon:
            images = [name for name in self.nodes if name.startswith(DISK_NODE)]
            return tuple(Device(name.removeprefix(DISK_NODE), "", "", name) for name in images)
        return tuple(
            Device(target, self._qdev(target), "virtio-blk-device", root) for target, root in self.roots.items()
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
                Bitmap(
                    bitmap,
                    65536,
                    len(one.blocks) * 65536,
                    one.recording,
                    one.persistent,
                    busy=self._busy(name, bitmap),
                )
                for bitmap, one in node.bitmaps.items()
            ),
            children=dict(node.children),
        )

    def graph(self) -> tuple[Any, ...]:
        """All of the state but the contents, to be compared."""
        nodes = {name: (node.driver, node.children, sorted(node.bitmaps)) for name, node in self.nodes.items()}
        return copy.deepcopy((nodes, self.roots, self.exports, self.jobs, self.objects, self.server))

    # What happens

    def write(self, target: str, block: int) -> None:
        """The domain writes; every recording bitmap of the disk's own node sees it."""
        name = self.roots.get(target, f"{DISK_NODE}{target}")
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
        before = copy.deepcopy((self.nodes, self.roots, self.jobs))
        try:
            handler(step.arguments)
            self._check_permissions()
        except QemuError:
            self.nodes, self.roots, self.jobs = before
            raise
        match step.wait:
            case JobConcluded(job) if wait:
                del self.jobs[job]
            case JobGone(job) if wait and job in self.jobs:
                assert self.jobs[job].status == "concluded"
                del self.jobs[job]
            case ExportDeleted(export):
                assert export not in self.exports

    def _do_stop(self, _: Json) -> None: ...

    _do_cont = _do_stop

    def _do_human_monitor_command(self, arguments: Json) -> None:
        node = re.fullmatch(r'qemu-io (\S+) "(?:flush|discard \d+ \d+)"', arguments["command-line"])
        if self.daemon or node is None:
            raise QemuError(f"unknown command {arguments}")
        self._get(self.nodes, node[1])

    def _do_object_add(self, arguments: Json) -> None:
        if arguments["id"] in self.objects:
            raise QemuError(f"duplicate object {arguments['id']}")
        self.objects.add(arguments["id"])

    def _do_object_del(self, arguments: Json) -> None:
        if arguments["id"] not in self.objects:
            raise QemuError(f"there is no object {arguments['id']}")
        self.objects.discard(arguments["id"])

    # Jobs

    def _do_blockdev_create(self, arguments: Json) -> None:
        self._new_job(arguments["job-id"], FakeJob("create", "concluded"))

    def _new_job(self, name: str, job: FakeJob) -> None:
        if name in self.jobs:
            raise QemuError(f"job id {name} is in use")
        self.jobs[name] = job

    def _do_blockdev_backup(self, arguments: Json) -> None:
        source, target = arguments["device"], arguments["target"]
        self._get(self.nodes, source)
        if self._get(self.nodes, target).children or self._in_use(target):
            raise QemuError(f"{target} cannot be written to")
        made = arguments.get("filter-node-name", "")
        if arguments["sync"] == "bitmap":
            self._usable(source, arguments["bitmap"])
        job = FakeJob(
            "backup",
            "running",
            (source, target),
            made,
            arguments.get("bitmap", ""),
            dismisses_itself=arguments.get("auto-dismiss", True),
        )
        self._new_job(arguments["job-id"], job)
        if made:
            self._insert(made, source, target)

    def _insert(self, name: str, node: str, target: str) -> None:
        """A job's filter takes the place of the node for everything above it."""
        if name in self.nodes:
            raise QemuError(f"duplicate node {name}")
        for other in self.nodes.values():
            other.children = {role: name if one == node else one for role, one in other.children.items()}
        self.roots = {one: name if root == node else root for one, root in self.roots.items()}
        self.nodes[name] = FakeNode("copy-before-write", {"file": node, "target": target})
        self.nodes[node].held.add(name)

    def _do_job_dismiss(self, arguments: Json) -> None:
        if self._get(self.jobs, arguments["id"]).status != "concluded":
            raise QemuError(f"job {arguments['id']} has not concluded")
        del self.jobs[arguments["id"]]

    def _do_job_cancel(self, arguments: Json) -> None:
        name = arguments["id"]
        job: FakeJob = self._get(self.jobs, name)
        if job.status == "concluded":
            raise QemuError(f"job {name} in state concluded cannot accept cancel")
        self.end_job(name)

    def end_job(self, name: str) -> None:
        """A job comes to its end, of itself or not; its filter goes, and what was above it sits on what was below."""
        job = self.jobs[name]
        if job.filter:
            gone = self.nodes.pop(job.filter)
            if gone.held:
                raise QemuAborted(f"{job.filter} goes with bitmaps of {gone.held} (bdrv_close, 7.2.22)")
            below = gone.children["file"]
            for node in self.nodes.values():
                node.children = {role: below if one == job.filter else one for role, one in node.children.items()}
                node.held.discard(job.filter)
            self.roots = {one: below if root == job.filter else root for one, root in self.roots.items()}
        if job.dismisses_itself:
            del self.jobs[name]
        else:
            self.jobs[name] = FakeJob(job.type, "concluded")

    # Nodes

    def _do_blockdev_add(self, arguments: Json) -> None:
        name, driver = arguments["node-name"], arguments["driver"]
        if name in self.nodes:
            raise QemuError(f"duplicate node {name}")
        children = {
            role: arguments[role]
            for role in ("file", "target", "image")
            if role in arguments and driver not in ("file", "nbd")
        }
        children |= {f"children.{number}": one for number, one in enumerate(arguments.get("children", ()))}
        for child in children.values():
            self._get(self.nodes, child)
        self.nodes[name] = FakeNode(driver, children)
        if driver == "copy-before-write":
            self.nodes[children["file"]].held.add(name)

    def _in_use(self, name: str) -> bool:
        return (
            bool(self._parents(name))
            or name in self.roots.values()
            or any(name == export.node for export in self.exports.values())
            or any(name in (*job.nodes, job.filter) for job in self.jobs.values())
        )

    def _do_blockdev_del(self, arguments: Json) -> None:
        name = arguments["node-name"]
        self._get(self.nodes, name)
        if self._in_use(name):
            raise QemuError(f"node {name} is in use")
        gone = self.nodes.pop(name)
        if gone.held:
            raise QemuAborted(f"{name} goes with bitmaps of {gone.held} (bdrv_close, 7.2.22)")
        for node in self.nodes.values():
            node.held.discard(name)

    def _do_qom_set(self, arguments: Json) -> None:
        target = arguments["path"].split("/")[3]
        self._get(self.nodes, arguments["value"])
        if self._get(self.roots, target) == arguments["value"]:
            raise QemuAborted(f"{target} sits on {arguments['value']} already (bdrv_replace_child_noperm, 7.2.22)")
        self.roots[target] = arguments["value"]

    def _do_nbd_server_start(self, arguments: Json) -> None:
        if self.server:
            raise QemuError("NBD server already running")
        if arguments.get("tls-creds", "") not in {"", *self.objects}:
            raise QemuError(f"no TLS credentials {arguments['tls-creds']}")
        self.server = True

    def _do_nbd_server_stop(self, _: Json) -> None:
        if not self.server:
            raise QemuError("NBD server not running")
        self.server = False
        self.exports.clear()

    def _do_block_export_add(self, arguments: Json) -> None:
        if not self.server:
            raise QemuError("NBD server not running")
        node, name = arguments["node-name"], arguments["id"]
        self._get(self.nodes, node)
        if name in self.exports:
            raise QemuError(f"duplicate export {name}")
        for bitmap in arguments["bitmaps"]:
            self._usable(node, bitmap)
        if arguments["writable"] and any(self.nodes[one].driver == "blkdebug" for one in self._parents(node)):
            raise QemuError(f"permission conflict on node {node}")
        if arguments["writable"] and not self.daemon and (node in self.roots.values() or self._writes(node)):
            raise QemuError(f"{node} is written to by the domain")
        self.exports[name] = FakeExport(node, tuple(arguments["bitmaps"]))

    def _do_block_export_del(self, arguments: Json) -> None:
        self._get(self.exports, arguments["id"])
        del self.exports[arguments["id"]]

    # Dirty bitmaps: qapi/transaction.json, all or nothing, in order; removals take effect at the end

    def _do_transaction(self, arguments: Json) -> None:
        for action in arguments["actions"]:
            if action["type"] == "blockdev-backup":
                self._do_blockdev_backup(action["data"])
            else:
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
            target = self._usable(data["node"], data["target"])
            for source in data["bitmaps"]:
                place, name = (data["node"], source) if isinstance(source, str) else (source["node"], source["name"])
                target.blocks |= self._usable(place, name).blocks
            return
        bitmap = self._usable(data["node"], data["name"])
        if kind == "block-dirty-bitmap-remove":
            bitmap.removed = True
        elif kind in ("block-dirty-bitmap-enable", "block-dirty-bitmap-disable"):
            bitmap.recording = kind.endswith("enable")
        else:
            raise QemuError(f"unknown action {kind}")

    def _busy(self, node: str, name: str) -> bool:
        """Whether an export shows this bitmap, or a job works by it."""
        shown = any(export.node == node and name in export.bitmaps for export in self.exports.values())
        return shown or any(job.bitmap == name and node in job.nodes for job in self.jobs.values())

    def _usable(self, node: str, name: str) -> FakeBitmap:
        bitmap: FakeBitmap = self._get(self._get(self.nodes, node).bitmaps, name)
        if bitmap.removed or self._busy(node, name):
            raise QemuError(f"bitmap {name} is in use")
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
            guarding = [
                one
                for one in filters
                if self._parents(one) or one in self.roots.values() or any(one == j.filter for j in self.jobs.values())
            ]
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


def blocks_since(qemu: FakeQemu, node: str, names: Iterable[str]) -> set[int]:
    """What the bitmaps ``names`` say together."""
    return set().union(*(qemu.nodes[node].bitmaps[name].blocks for name in names))


def recording(qemu: FakeQemu, node: str) -> Sequence[str]:
    return [name for name, bitmap in qemu.nodes[node].bitmaps.items() if bitmap.recording]
