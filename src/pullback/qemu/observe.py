# SPDX-License-Identifier: Apache-2.0
"""Reading a domain's state out of QEMU: replies in, one ``Facts`` value out.

Nothing is cached: what pullback knows of a domain is what QEMU says now.
"""

from __future__ import annotations

from collections.abc import Mapping

from pullback.errors import CommandFailed
from pullback.model.facts import DISK_NODE, ON_CBW_ERROR, Bitmap, Device, Export, Facts, Job, Node
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


async def _qom(monitor: Monitor, path: str, name: str) -> str | None:
    try:
        value = await monitor.execute("qom-get", {"path": path, "property": name})
    except CommandFailed:
        return None
    return value if isinstance(value, str) else None


async def _iothread(monitor: Monitor, qdev: str) -> str:
    """The I/O thread of a device: its own property, or that of the controller its bus belongs to."""
    path = qdev
    for _ in range(4):
        if thread := await _qom(monitor, path, "iothread"):
            return thread
        bus = await _qom(monitor, path, "parent_bus")
        if not bus:
            return ""
        path = bus.rsplit("/", 1)[0]
    return ""


async def _devices(monitor: Monitor) -> tuple[Device, ...]:
    threads = await monitor.execute("query-iothreads")
    devices: list[Device] = []
    for entry in replies(await monitor.execute("query-block"), "query-block"):
        qdev = _qdev_path(entry.text("qdev", ""))
        root = entry.member("inserted").text("node-name", "")
        target = target_name(qdev, entry.text("device"), root)
        while any(other.target == target for other in devices):
            target += "x"
        devices.append(
            Device(
                target=target,
                qdev=qdev,
                type=(await _qom(monitor, qdev, "type") or "") if qdev else "",
                root=root,
                removable=entry.flag("removable"),
                iothread=(await _iothread(monitor, qdev) if qdev else None) if threads else "",
            )
        )
    return tuple(devices)


async def _nodes(monitor: Monitor) -> dict[str, Node]:
    children = _children(Reply(await monitor.execute("x-debug-query-block-graph"), "the block graph"))
    named = replies(await monitor.execute("query-named-block-nodes", {"flat": True}), "query-named-block-nodes")
    return {name: _node(entry, children.get(name, {})) for entry in named for name in [entry.text("node-name")]}


async def _exports(monitor: Monitor) -> tuple[Export, ...]:
    listed = replies(await monitor.execute("query-block-exports"), "query-block-exports")
    return tuple(Export(entry.text("id"), entry.text("node-name"), entry.text("type")) for entry in listed)


async def _jobs(monitor: Monitor) -> tuple[Job, ...]:
    listed = replies(await monitor.execute("query-jobs"), "query-jobs")
    return tuple(Job(entry.text("id"), entry.text("type"), entry.text("status")) for entry in listed)


async def observe(monitor: Monitor) -> Facts:
    """Everything pullback decides on, as QEMU has it now.

    DomainUnreachable when QEMU goes away meanwhile, DomainError when what it says makes no sense.
    """
    uuid = Reply(await monitor.execute("query-uuid"), "query-uuid").text("UUID")
    name = Reply(await monitor.execute("query-name"), "query-name").text("name", "")
    run_state = Reply(await monitor.execute("query-status"), "query-status").text("status")
    devices, nodes = await _devices(monitor), await _nodes(monitor)
    _check_graph(devices, nodes)
    return Facts(
        name=name,
        uuid=uuid if uuid.strip("0-") else "",
        version=monitor.version,
        run_state=run_state,
        devices=devices,
        nodes=nodes,
        exports=await _exports(monitor),
        jobs=await _jobs(monitor),
        features=await _features(monitor),
    )


async def observe_daemon(monitor: Monitor, name: str) -> Facts:
    """The same of a storage daemon on the images of stopped domain ``name``; its devices are the images' nodes."""
    nodes = await _nodes(monitor)
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
        exports=await _exports(monitor),
        jobs=await _jobs(monitor),
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
