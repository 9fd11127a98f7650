# SPDX-License-Identifier: Apache-2.0
"""What is known of a domain: the values that observing QEMU gives and that every decision starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Names of everything pullback adds to QEMU's block graph; a node name has at most 31 bytes.
NODE_PREFIX = "pb-"
#: Names of the nodes that hold the images of a stopped domain in its storage daemon.
DISK_NODE = "disk-"
#: Ids of the jobs and exports pullback creates.
ID_PREFIX = "pullback-"
#: A feature: ``blockdev-backup`` can break the snapshot rather than the domain's write (QEMU 10.1).
ON_CBW_ERROR = "blockdev-backup/on-cbw-error"


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap as ``query-named-block-nodes`` lists it; ``count`` is the dirty bytes."""

    name: str
    granularity: int
    count: int
    recording: bool
    persistent: bool
    busy: bool = False
    inconsistent: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A block node with its children by role (``file``, ``backing``, ``target``)."""

    name: str
    driver: str
    virtual_size: int
    read_only: bool = False
    filename: str = ""
    actual_size: int = 0
    compat: str = ""
    bitmaps: tuple[Bitmap, ...] = ()
    children: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(NODE_PREFIX)


@dataclass(frozen=True, slots=True)
class Device:
    """A device with a drive, as ``query-block`` lists it.

    ``root`` is the node it has its data from ("" when it is empty), ``iothread`` the QOM path of the I/O thread it
    runs on ("" for the main thread, None where QEMU could not say).
    """

    target: str
    qdev: str
    type: str
    root: str
    removable: bool = False
    iothread: str | None = ""


@dataclass(frozen=True, slots=True)
class Export:
    """A block export as ``query-block-exports`` lists it."""

    id: str
    node: str
    type: str


@dataclass(frozen=True, slots=True)
class Job:
    """A job as ``query-jobs`` lists it."""

    id: str
    type: str
    status: str


@dataclass(frozen=True, slots=True)
class Disk:
    """A device together with the node that holds its content, below any filter of ours.

    ``root`` is the node the device sits on: that same one, or the topmost of our filters.
    """

    target: str
    qdev: str
    device_type: str
    root: str
    node: str
    driver: str
    virtual_size: int
    read_only: bool
    filename: str
    bitmaps: tuple[Bitmap, ...]
    untracked: str
    iothread: str | None


@dataclass(frozen=True, slots=True)
class Facts:
    """One observation of a QEMU process.

    ``version`` is (major, minor, micro); ``run_state`` is ``query-status``'s word; ``features`` are abilities
    that QEMU's schema tells of.  ``daemon`` says that it is a storage daemon on the images of a stopped domain: its
    devices are the images themselves.
    """

    name: str
    uuid: str
    version: tuple[int, int, int]
    run_state: str
    devices: tuple[Device, ...]
    nodes: Mapping[str, Node]
    exports: tuple[Export, ...] = ()
    jobs: tuple[Job, ...] = ()
    features: frozenset[str] = frozenset()
    daemon: bool = False

    @property
    def running(self) -> bool:
        return self.run_state == "running"

    def below_filters(self, name: str) -> Node:
        """The first node at or below ``name`` that is not a filter of pullback's own."""
        node = self.nodes[name]
        while node.is_ours and "file" in node.children:
            node = self.nodes[node.children["file"]]
        return node

    def disk(self, device: Device) -> Disk:
        """The disk behind a device that is not empty."""
        node = self.below_filters(device.root)
        return Disk(
            target=device.target,
            qdev=device.qdev,
            device_type=device.type,
            root=device.root,
            node=node.name,
            driver=node.driver,
            virtual_size=node.virtual_size,
            read_only=node.read_only,
            filename=node.filename,
            bitmaps=node.bitmaps,
            untracked=untracked_reason(node),
            iothread=device.iothread,
        )


def untracked_reason(node: Node) -> str:
    """Why no persistent dirty bitmap can be kept on this node; empty when one can."""
    if node.driver != "qcow2":
        return f"a {node.driver} image cannot store dirty bitmaps (only qcow2 can)"
    if node.compat == "0.10":
        return (
            "a qcow2 image of version 2 (compat 0.10) cannot store dirty bitmaps; qemu-img amend can make it version 3"
        )
    return ""
