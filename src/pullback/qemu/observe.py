# SPDX-License-Identifier: Apache-2.0
"""Reading a domain's state out of QEMU: replies in, one ``Facts`` value out.

Nothing is cached: what pullback knows of a domain is what QEMU says now.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any

from pullback.errors import CommandFailed
from pullback.model.facts import DISK_NODE, ON_CBW_ERROR, Bitmap, Device, Export, Facts, Job, Node
from pullback.qemu.cancelling import together
from pullback.qemu.monitor import Monitor
from pullback.qemu.replies import Reply, replies, senseless


def _bitmap(reply: Reply) -> Bitmap:
    return Bitmap(
        name=reply.text("name"),
        granularity=reply.size("granularity"),
        count=reply.size("count"),
        recording=reply.flag("recording", False),
        persistent=reply.flag("persistent", False),
        busy=reply.flag("busy", False),
        inconsistent=reply.flag("inconsistent", False),
    )


def _node(reply: Reply, children: Mapping[str, str]) -> Node:
    image = reply.member("image")
    return Node(
        name=reply.text("node-name"),
        driver=reply.text("drv"),
        virtual_size=image.size("virtual-size"),
        read_only=reply.flag("ro"),
        filename=image.text("filename", ""),
        actual_size=image.size("actual-size", 0),
        compat=image.member("format-specific").member("data").text("compat", ""),
        # QEMU's own bitmaps (of jobs, of filters) have no name.
        bitmaps=tuple(_bitmap(entry) for entry in reply.members("dirty-bitmaps") if entry.text("name", "")),
        children=children,
    )


def _children(graph: Reply) -> dict[str, dict[str, str]]:
    nodes = [node for node in graph.members("nodes") if node.text("type") == "block-driver"]
    names = {node.size("id"): node.text("name") for node in nodes}
    children: dict[str, dict[str, str]] = {}
    for edge in graph.members("edges"):
        parent, child = names.get(edge.size("parent")), names.get(edge.size("child"))
        if parent is not None and child is not None:
            children.setdefault(parent, {})[edge.text("name")] = child
    return children


def _check_graph(devices: tuple[Device, ...], nodes: Mapping[str, Node]) -> None:
    """Whoever walks down from a device finds a node at each step, and an end: these were several questions."""
    for device in devices:
        if device.root and device.root not in nodes:
            raise senseless(f"{device.target} is on the node {device.root}, which is not listed")
    above: dict[str, int] = dict.fromkeys(nodes, 0)
    for node in nodes.values():
        for child in node.children.values():
            if child not in nodes:
                raise senseless(f"{node.name} is on the node {child}, which is not listed")
            above[child] += 1
    free = [name for name, count in above.items() if not count]
    for name in free:
        for child in nodes[name].children.values():
            above[child] -= 1
            if not above[child]:
                free.append(child)  # the loop goes on over it
    if len(free) < len(nodes):
        raise senseless("a node is on itself")


def target_name(qdev: str, device: str, node: str) -> str:
    """What a disk is called: its device's id, else its drive's id, else its node's name.

    It must be the same at every start of the domain, since it names the disk in the repository.
    """
    parts = qdev.split("/")
    if len(parts) > 3 and parts[2] == "peripheral":
        return parts[3]
    return device or (node if not node.startswith("#") else "") or qdev.strip("/").replace("/", "-")


def _qdev_path(qdev: str) -> str:
    """The QOM path of what ``query-block`` calls a device: a path already, or an id alone (scsi-hd, ide-hd)."""
    return f"/machine/peripheral/{qdev}" if qdev and not qdev.startswith("/") else qdev


async def _qom(monitor: Monitor, path: str, name: str) -> str:
    """A property that is text; empty where there is none."""
    if not path:
        return ""
    try:
        value = await monitor.execute("qom-get", {"path": path, "property": name})
    except CommandFailed:
        return ""
    return value if isinstance(value, str) else ""


async def _iothread(monitor: Monitor, qdev: str, *, any_threads: bool) -> str | None:
    """The I/O thread of a device: its own property, or that of the controller its bus belongs to.

    None where there are threads, and nothing tells which one a disk uses.
    """
    if not (any_threads and qdev):
        return None if any_threads else ""
    path = qdev
    for _ in range(4):
        if thread := await _qom(monitor, path, "iothread"):
            return thread
        bus = await _qom(monitor, path, "parent_bus")
        if not bus:
            return ""
        path = bus.rsplit("/", 1)[0]
    return ""


async def _device(monitor: Monitor, entry: Reply, target: str, *, any_threads: bool) -> Device:
    qdev = _qdev_path(entry.text("qdev", ""))
    kind, iothread = await together(_qom(monitor, qdev, "type"), _iothread(monitor, qdev, any_threads=any_threads))
    return Device(
        target=target,
        qdev=qdev,
        type=kind,
        root=entry.member("inserted").text("node-name", ""),
        removable=entry.flag("removable"),
        iothread=iothread,
    )


async def _devices(monitor: Monitor, drives: list[Reply], *, any_threads: bool) -> tuple[Device, ...]:
    named: dict[str, Reply] = {}
    for entry in drives:
        root = entry.member("inserted").text("node-name", "")
        target = target_name(_qdev_path(entry.text("qdev", "")), entry.text("device"), root)
        while target in named:
            target += "x"
        named[target] = entry
    made = (_device(monitor, entry, target, any_threads=any_threads) for target, entry in named.items())
    return tuple(await together(*made))


def _block_questions(monitor: Monitor) -> list[Coroutine[Any, Any, Any]]:
    """What :func:`_block` reads the answers to."""
    return [
        monitor.execute("x-debug-query-block-graph"),
        monitor.execute("query-named-block-nodes", {"flat": True}),
        monitor.execute("query-block-exports"),
        monitor.execute("query-jobs"),
    ]


def _block(
    graph: Any, named: Any, exports: Any, jobs: Any
) -> tuple[dict[str, Node], tuple[Export, ...], tuple[Job, ...]]:
    children = _children(Reply(graph, "the block graph"))
    nodes = {
        name: _node(entry, children.get(name, {}))
        for entry in replies(named, "query-named-block-nodes")
        for name in [entry.text("node-name")]
    }
    return (
        nodes,
        tuple(
            Export(entry.text("id"), entry.text("node-name"), entry.text("type"))
            for entry in replies(exports, "query-block-exports")
        ),
        tuple(Job(entry.text("id"), entry.text("type"), entry.text("status")) for entry in replies(jobs, "query-jobs")),
    )


async def observe(monitor: Monitor) -> Facts:
    """Everything pullback decides on, as QEMU has it now.

    DomainUnreachable when QEMU goes away meanwhile, DomainError when what it says makes no sense.
    """
    uuid, name, status, threads, drives, *block = await together(
        monitor.execute("query-uuid"),
        monitor.execute("query-name"),
        monitor.execute("query-status"),
        monitor.execute("query-iothreads"),
        monitor.execute("query-block"),
        *_block_questions(monitor),
    )
    nodes, exports, jobs = _block(*block)
    devices = await _devices(monitor, replies(drives, "query-block"), any_threads=bool(threads))
    _check_graph(devices, nodes)
    number = Reply(uuid, "query-uuid").text("UUID")
    return Facts(
        name=Reply(name, "query-name").text("name", ""),
        uuid=number if number.strip("0-") else "",
        version=monitor.version,
        run_state=Reply(status, "query-status").text("status"),
        devices=devices,
        nodes=nodes,
        exports=exports,
        jobs=jobs,
        features=await _features(monitor),
    )


async def observe_daemon(monitor: Monitor, name: str) -> Facts:
    """The same of a storage daemon on the images of stopped domain ``name``; its devices are the images' nodes."""
    nodes, exports, jobs = _block(*await together(*_block_questions(monitor)))
    devices = tuple(
        Device(target=node.removeprefix(DISK_NODE), qdev="", type="", root=node)
        for node in sorted(nodes)
        if node.startswith(DISK_NODE)
    )
    _check_graph(devices, nodes)
    return Facts(
        name=name,
        uuid="",
        version=monitor.version,
        run_state="shutdown",
        devices=devices,
        nodes=nodes,
        exports=exports,
        jobs=jobs,
        features=await _features(monitor),
        daemon=True,
    )


async def _features(monitor: Monitor) -> frozenset[str]:
    """What the schema says of abilities that came later; asked only where the version leaves it open.

    Distributions carry patches back, so from 7.1 on it is the schema that counts; reading its 200 KB costs some 10 ms.
    """
    if monitor.features is None:
        listed = replies(await monitor.execute("query-qmp-schema"), "the schema")
        schema = {entry.text("name"): entry for entry in listed}
        command = schema.get("blockdev-backup")
        arguments = schema.get(command.text("arg-type")) if command is not None else None
        members = arguments.members("members") if arguments is not None else []
        found = {ON_CBW_ERROR} if any(member.text("name") == "on-cbw-error" for member in members) else set()
        monitor.features = frozenset(found)
    return monitor.features
