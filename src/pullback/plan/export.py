# SPDX-License-Identifier: Apache-2.0
"""Offering frozen disks over NBD, with the changed blocks since checkpoints; and own disks, for writing.

QEMU has one NBD server for all exports.  It cannot be asked where it listens, so each frozen view that is exported
carries a mark that says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pullback.errors import DomainBusy, Refused
from pullback.model.chain import Edge
from pullback.model.facts import Facts
from pullback.model.snapshots import (
    FROZEN_VIEW_EXACT,
    SAVED_MAP,
    Names,
    ServerMark,
    current_server,
    foreign_exports,
    server_mark,
)
from pullback.plan.command import ExportDeleted, Plan, Step, transaction
from pullback.plan.freeze import add_mark

TLS_OBJECT = "pullback-tls"


@dataclass(frozen=True, slots=True)
class ExportPart:
    """One disk to export.

    ``node`` is its frozen view (or, for writing, its own node) and ``disk_node`` the node its bitmaps are on.  Each of
    ``since`` is a checkpoint with the edges that lead from it to the frozen instant; ``maps`` are bitmaps that ``node``
    has already.
    """

    names: Names
    target: str
    node: str
    disk_node: str
    name: str
    since: tuple[tuple[str, tuple[Edge, ...]], ...] = ()
    maps: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return self.names.export(self.name, [checkpoint for checkpoint, _ in self.since])


def saved_name(export: str) -> str:
    """The name of the export of a disk's scratch; no disk's own name holds a slash."""
    return f"{export}/saved"


def saved_part(facts: Facts, part: ExportPart, writable: bool) -> ExportPart:
    """The scratch of a disk beside its frozen view, with the map of what is saved to it where there is one.

    QEMU shows a bitmap that records only through an export that is ``writable``.
    """
    node = part.names.node("scratch")
    there = facts.nodes.get(node)  # not of a snapshot that is only planned
    mapped = there is None or any(bitmap.name == SAVED_MAP for bitmap in there.bitmaps)
    maps = (SAVED_MAP,) if writable and mapped and facts.version < FROZEN_VIEW_EXACT else ()
    return ExportPart(part.names, part.target, node, part.disk_node, saved_name(part.name), maps=maps)


def _gather(part: ExportPart, checkpoint: str, edges: Sequence[Edge]) -> Step:
    """Gather the changes in one transaction: a map that is there is whole, whenever we die."""
    sources: list[Any] = [{"node": part.disk_node, "name": edge.name} for edge in edges]
    place = {"node": part.node, "name": checkpoint, "disabled": True, "persistent": False}
    merge = {"node": part.node, "target": checkpoint, "bitmaps": sources}
    actions = [{"type": "block-dirty-bitmap-add", "data": place}]
    if sources:
        # QEMU dies of a transaction that merges nothing (seen on 7.2.22).
        actions.append({"type": "block-dirty-bitmap-merge", "data": merge})
    return transaction(
        actions, f"gather {part.target}'s changes from {checkpoint} to the snapshot; gone with the frozen view"
    )


def _address(server: ServerMark) -> Mapping[str, Any]:
    if server.kind == "unix":
        return {"type": "unix", "data": {"path": server.place}}
    host, _, port = server.place.rpartition(":")
    return {"type": "inet", "data": {"host": host, "port": port}}


def _start_server(server: ServerMark) -> list[Step]:
    steps: list[Step] = []
    arguments: dict[str, Any] = {"addr": _address(server)}
    if server.tls is not None:
        steps.append(
            Step(
                "object-add",
                {"qom-type": "tls-creds-x509", "id": TLS_OBJECT, "dir": server.tls, "endpoint": "server"},
                "the certificates; clients must show one signed by the same authority",
            )
        )
        arguments["tls-creds"] = TLS_OBJECT
    steps.append(Step("nbd-server-start", arguments, "QEMU's one NBD server"))
    return steps


def need_server(facts: Facts, server: ServerMark) -> bool:
    """Whether the NBD server has to be started for an export at ``server``, or runs there already.

    DomainBusy when somebody else's exports use QEMU's one server; Refused when ours listens elsewhere.
    """
    if foreign_exports(facts):
        raise DomainBusy(
            f"another program exports disks of domain {facts.name}, and QEMU has only one NBD server",
            means="Nothing was exported.",
            todo="Wait until that program has ended, or stop its export.",
        )
    running = current_server(facts)
    if running is None or idle_server(facts):
        return True
    if running != server:
        raise Refused(
            f"QEMU's one NBD server listens at {running.place} already, for another export of ours",
            means="Nothing was exported.",
            todo=f"Export at {running.place} too, or stop the other export first; pullback recover stops one that was"
            " left by a killed backup.",
        )
    return False


def idle_server(facts: Facts) -> bool:
    """Whether our NBD server runs for nobody, or was only about to: whoever started it died."""
    return current_server(facts) is not None and not any(export.type == "nbd" for export in facts.exports)


def start_export(
    facts: Facts, parts: Sequence[ExportPart], server: ServerMark, *, start_server: bool, writable: bool
) -> Plan:
    """Export disks over NBD, with a context ``qemu:dirty-bitmap:CHECKPOINT`` for each of their ``since``.

    ``writable`` on a frozen view lets the client trim, which lets ranges go; a write is refused by the node all the
    same.
    Changes that another export of the same view shows already are not gathered again.
    """
    steps: list[Step] = []
    for part in parts:
        there = {bitmap.name for bitmap in facts.nodes[part.node].bitmaps} if part.node in facts.nodes else set()
        for checkpoint, edges in part.since:
            if checkpoint not in there:
                steps.append(_gather(part, checkpoint, edges))
        if part.node not in facts.nodes or server_mark(facts.nodes[part.node]) is None:
            steps.append(add_mark(part.node, server.bitmap_name(), "write down that the NBD server is ours, and where"))
    if start_server:
        steps += _start_server(server)
    steps += [
        Step(
            "block-export-add",
            {
                "id": part.id,
                "type": "nbd",
                "node-name": part.node,
                "name": part.name,
                "writable": writable,
                "bitmaps": [*(name for name, _ in part.since), *part.maps],
            },
            f"offer {part.target} as {part.name}",
        )
        for part in parts
    ]
    return Plan(tuple(steps))


def disown_server(parts: Sequence[ExportPart], server: ServerMark) -> Plan:
    """The NBD server that runs is somebody else's, or none could be started: take back what was to say it is ours.

    Certificates that were loaded for it go too: with the marks gone nobody would know of them.
    """
    steps = [
        Step(
            "block-dirty-bitmap-remove",
            {"node": part.node, "name": server.bitmap_name()},
            "the NBD server is not ours",
            optional=True,
        )
        for part in parts
    ]
    return Plan((*_drop_certificates(server), *steps))


def _drop_certificates(server: ServerMark) -> list[Step]:
    if server.tls is None:
        return []
    return [Step("object-del", {"id": TLS_OBJECT}, "the certificates go with the server", optional=True)]


def delete_export(export_id: str) -> Step:
    """End one export, whoever is connected."""
    return Step(
        "block-export-del",
        {"id": export_id, "mode": "hard"},
        "end the export, clients or not",
        wait=ExportDeleted(export_id),
    )


def stop_server(server: ServerMark | None) -> list[Step]:
    """Stop our NBD server and drop its certificates."""
    steps = [Step("nbd-server-stop", {}, "nobody exports any more", optional=True)]
    return steps + (_drop_certificates(server) if server is not None else [])
