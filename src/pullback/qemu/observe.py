# SPDX-License-Identifier: Apache-2.0
"""Reading a domain's state out of QEMU: replies in, one ``Facts`` value out.

Nothing is cached: what pullback knows of a domain is what QEMU says now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pullback.errors import CommandFailed
from pullback.model.facts import DISK_NODE, ON_CBW_ERROR, Bitmap, Device, Export, Facts, Job, Node
from pullback.qemu.monitor import Monitor

_Json = Mapping[str, Any]


def _bitmap(reply: _Json) -> Bitmap:
    return Bitmap(
        name=reply["name"],
        granularity=reply["granularity"],
        count=reply["count"],
        recording=reply.get("recording", False),
        persistent=reply.get("persistent", False),
        busy=reply.get("busy", False),
        inconsistent=reply.get("inconsistent", False),
    )


def _node(reply: _Json, children: Mapping[str, str]) -> Node:
    image = reply["image"]
    specific = image.get("format-specific", {}).get("data", {})
    return Node(
        name=reply["node-name"],
        driver=reply["drv"],
        virtual_size=image["virtual-size"],
        read_only=reply["ro"],
        filename=image.get("filename", ""),
        actual_size=image.get("actual-size", 0),
        compat=specific.get("compat", "") if isinstance(specific, Mapping) else "",
        # QEMU's own bitmaps (of jobs, of filters) have no name.
        bitmaps=tuple(_bitmap(entry) for entry in reply.get("dirty-bitmaps", ()) if entry.get("name")),
        children=children,
    )


def _children(graph: _Json) -> dict[str, dict[str, str]]:
    names = {node["id"]: node["name"] for node in graph["nodes"] if node["type"] == "block-driver"}
    children: dict[str, dict[str, str]] = {}
    for edge in graph["edges"]:
        if edge["parent"] in names and edge["child"] in names:
            children.setdefault(names[edge["parent"]], {})[edge["name"]] = names[edge["child"]]
    return children


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
    for entry in await monitor.execute("query-block"):
        qdev = _qdev_path(entry.get("qdev", ""))
        root = entry.get("inserted", {}).get("node-name", "")
        target = target_name(qdev, entry["device"], root)
        while any(other.target == target for other in devices):
            target += "x"
        devices.append(
            Device(
                target=target,
                qdev=qdev,
                type=(await _qom(monitor, qdev, "type") or "") if qdev else "",
                root=root,
                removable=entry["removable"],
                iothread=(await _iothread(monitor, qdev) if qdev else None) if threads else "",
            )
        )
    return tuple(devices)


async def _nodes(monitor: Monitor) -> dict[str, Node]:
    graph = await monitor.execute("x-debug-query-block-graph")
    children = _children(graph)
    named = await monitor.execute("query-named-block-nodes", {"flat": True})
    return {entry["node-name"]: _node(entry, children.get(entry["node-name"], {})) for entry in named}


async def _exports(monitor: Monitor) -> tuple[Export, ...]:
    listed = await monitor.execute("query-block-exports")
    return tuple(Export(entry["id"], entry["node-name"], entry["type"]) for entry in listed)


async def _jobs(monitor: Monitor) -> tuple[Job, ...]:
    return tuple(Job(entry["id"], entry["type"], entry["status"]) for entry in await monitor.execute("query-jobs"))


async def observe(monitor: Monitor) -> Facts:
    """Everything pullback decides on, as QEMU has it now.  DomainUnreachable when QEMU goes away meanwhile."""
    uuid = await monitor.execute("query-uuid")
    return Facts(
        name=(await monitor.execute("query-name")).get("name", ""),
        uuid=uuid["UUID"] if uuid["UUID"].strip("0-") else "",
        version=monitor.version,
        run_state=(await monitor.execute("query-status"))["status"],
        devices=await _devices(monitor),
        nodes=await _nodes(monitor),
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
        schema = {entry["name"]: entry for entry in await monitor.execute("query-qmp-schema")}
        command = next(
            (
                entry
                for entry in schema.values()
                if entry["meta-type"] == "command" and entry["name"] == "blockdev-backup"
            ),
            None,
        )
        members = schema[command["arg-type"]]["members"] if command else []
        found = {ON_CBW_ERROR} if any(member["name"] == "on-cbw-error" for member in members) else set()
        monitor.features = frozenset(found)
    return monitor.features
