# SPDX-License-Identifier: Apache-2.0
"""Backing up without QEMU's NBD server: QEMU as client pushes frozen disks into a server of ours.

It is for disks whose export could end QEMU (on an I/O thread, before 9.0), and for a QEMU whose one NBD server is in
somebody else's hands.

    snapshot-access ──blockdev-backup──► nbd (client) ──unix socket──► our server
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pullback.model.chain import Edge
from pullback.model.extents import Span
from pullback.model.facts import Disk, Facts
from pullback.model.snapshots import Names, current_server, foreign_exports
from pullback.model.units import CHUNK
from pullback.plan.command import Plan, Step
from pullback.plan.method import on_unsafe_iothread

Transport = Literal["pull", "push"]

#: The bitmap on a frozen view that says what to push.
PUSH_BITMAP = "push"


def choose_transport(facts: Facts, disks: Sequence[Disk]) -> Transport:
    """Whether these disks are pulled over QEMU's NBD server, or pushed into ours."""
    if any(on_unsafe_iothread(facts, disk) for disk in disks) or foreign_exports(facts):
        return "push"
    server = current_server(facts)
    # Our own client speaks no TLS.
    return "push" if server is not None and (server.kind != "unix" or server.tls is not None) else "pull"


@dataclass(frozen=True, slots=True)
class PushPart:
    """One disk to push; ``edges`` lead from its base to the frozen instant, None pushes it whole.

    ``view`` is the role of the node that is read: "view" where the plain one cannot be believed.
    """

    names: Names
    target: str
    disk_node: str
    edges: tuple[Edge, ...] | None
    view: str = "access"


def _changes(part: PushPart, edges: Sequence[Edge]) -> list[Step]:
    access = part.names.node(part.view)
    sources: list[Any] = [{"node": part.disk_node, "name": edge.name} for edge in edges]
    return [
        Step(
            "block-dirty-bitmap-add",
            # As coarse as the chunks of the repository, so that every chunk with a change is pushed whole.
            {"node": access, "name": PUSH_BITMAP, "disabled": True, "persistent": False, "granularity": CHUNK},
            f"what of {part.target} is to be pushed, in whole chunks",
        ),
        Step(
            "block-dirty-bitmap-merge",
            {"node": access, "target": PUSH_BITMAP, "bitmaps": sources},
            f"all that changed in {part.target} since its base",
        ),
    ]


def start_push(parts: Sequence[PushPart], socket: str) -> Plan:
    """Start a job for each disk that pushes it, or its changes, to the export of its target's name at ``socket``."""
    steps: list[Step] = []
    for part in parts:
        how: dict[str, Any] = {"sync": "full"}
        if part.edges is not None:
            steps += _changes(part, part.edges)
            how = {"sync": "bitmap", "bitmap": PUSH_BITMAP, "bitmap-mode": "never"}
        steps += _push(part, part.names.node(part.view), socket, how)
    return Plan(tuple(steps))


def push_window(part: PushPart, window: Span, socket: str) -> Plan:
    """Push some bytes of a disk alone, to an export of just their length at ``socket``; both bounds are sectors'."""
    name = part.names.node("window")
    node = {
        "driver": "raw",
        "node-name": name,
        "file": part.names.node(part.view),
        "offset": window.offset,
        "size": window.length,
        "read-only": True,
    }
    steps = [Step("blockdev-add", node, f"{window.length} bytes of the frozen {part.target}")]
    return Plan((*steps, *_push(part, name, socket, {"sync": "full"})))


def _push(part: PushPart, source: str, socket: str, how: dict[str, Any]) -> list[Step]:
    target = part.names.node("target")
    server = {"type": "unix", "path": socket}
    node = {"driver": "nbd", "node-name": target, "server": server, "export": part.target}
    job = {"job-id": part.names.id("push"), "device": source, "target": target, "auto-dismiss": False, **how}
    return [
        Step("blockdev-add", node, f"connect to our server, for {part.target}"),
        Step("blockdev-backup", job, f"push the frozen {part.target} to us"),
    ]


def end_push(part: PushPart, *, window: bool = False) -> Plan:
    """Clear away a push that has concluded, of a disk or of a ``window`` of it, so that there can be another."""
    job = part.names.id("push")
    steps = [
        Step("job-dismiss", {"id": job}, f"{part.target} is here"),
        Step("blockdev-del", {"node-name": part.names.node("target")}, "leave our server"),
    ]
    if window:
        steps.append(Step("blockdev-del", {"node-name": part.names.node("window")}, "nobody reads it any more"))
    return Plan(tuple(steps))
