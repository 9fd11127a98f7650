# SPDX-License-Identifier: Apache-2.0
"""Offering snapshots, and own disks for writing, over NBD; and finding such exports again."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pullback.engine.freezing import Snapshot
from pullback.engine.listening import check_address, dead_socket, keep_to_owner
from pullback.engine.session import Bound, Session, session_of
from pullback.errors import CommandFailed, DomainBusy, DomainError, Refused, UsageError
from pullback.model.chain import Chain, Edge, Unknown, read_chain
from pullback.model.facts import Disk, Facts
from pullback.model.snapshots import (
    WRITABLE,
    ExportState,
    Names,
    ServerMark,
    current_server,
    read_exports,
    read_snapshots,
)
from pullback.nbd.address import Address, TcpAddress, UnixAddress
from pullback.plan.cleanup import stop_exports
from pullback.plan.command import Plan
from pullback.plan.export import ExportPart, disown_server, idle_server, need_server, saved_part, start_export
from pullback.plan.method import refuse_export
from pullback.plan.selection import select_disks
from pullback.qemu.cancelling import uncancelled

#: Bytes in an export's name (NBD protocol, "values").
_LONGEST_NAME = 4096

#: Checkpoints from which changes are offered: these, or all that the disk has.
Since = Sequence[str] | Literal["all"]


def since_given(since: Since | Mapping[str, Since] | None) -> Since | Mapping[str, Since]:
    """What a caller says of checkpoints, made sure of; UsageError for one bare name, which is a sequence of letters."""
    if isinstance(since, Mapping):
        return {target: _points_given(one) for target, one in since.items()}
    return () if since is None else _points_given(since)


def _points_given(since: Since) -> Since:
    if not isinstance(since, str):
        return tuple(since)
    if since != "all":
        raise UsageError(f"since is {since!r}, and no list of checkpoints", todo=f'Write [{since!r}], or "all".')
    return "all"


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What to export where.

    ``since`` are checkpoints, or "all" those that the snapshot's disks have; the same for all disks, or by target.
    ``address`` may be a TCP one with port 0 (a free one is taken).  ``tls`` is a directory with ca-cert.pem,
    server-cert.pem and server-key.pem; TCP without it needs ``insecure``.  ``names`` are export names by target; the
    target itself where nothing is said.  ``direct`` gives QEMU's plain frozen view, for a reader that knows its limits,
    and ``saved`` the scratch beside it (if ``writable``, with the map of what was saved to it, where there is one).
    """

    address: Address
    disks: tuple[str, ...] = ()
    since: Since | Mapping[str, Since] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    tls: str | None = None
    insecure: bool = False
    writable: bool = False
    direct: bool = False
    saved: bool = False

    def since_of(self, target: str) -> Since:
        """From which checkpoints changes of one disk are offered."""
        return self.since.get(target, ()) if isinstance(self.since, Mapping) else self.since


@dataclass(frozen=True, slots=True)
class Export(Bound):
    """A disk that any NBD client can read at ``uri``; ``checkpoints`` are its contexts qemu:dirty-bitmap:NAME.

    ``disk`` is its target, ``snapshot`` the id of the snapshot it shows; None for a domain's own disk.
    """

    id: str
    name: str
    disk: str
    snapshot: str | None
    uri: str
    checkpoints: tuple[str, ...]

    async def stop(self) -> None:
        """End it, whoever is connected; the last one ends the NBD server.  Harmless when it is gone.

        UsageError after the end of the session that it came from.
        """
        session = session_of(self)
        session.announce("export.stop", name=self.name)
        await end_exports(session, (self,))


async def end_exports(session: Session, exports: Collection[Export]) -> None:
    """End exports in one plan, whoever is connected; the last one ends the NBD server."""
    plan = stop_exports(await session.observe(), {export.id for export in exports})
    await uncancelled(session.run(plan))


def _uri(server: ServerMark | None, name: str) -> str:
    if server is None:
        return ""
    if server.kind == "unix":
        return UnixAddress(server.place).uri(name, tls=server.tls is not None)
    host, _, port = server.place.rpartition(":")
    return TcpAddress(host, int(port)).uri(name, tls=server.tls is not None)


def exports_in(facts: Facts) -> tuple[Export, ...]:
    """All exports of ours."""
    return tuple(_found(facts, state) for state in read_exports(facts))


def _found(facts: Facts, state: ExportState) -> Export:
    server = state.server or current_server(facts)
    snapshot = None if state.snapshot.startswith(WRITABLE) else state.snapshot
    return Export(state.id, state.name, _target(facts, state), snapshot, _uri(server, state.name), state.checkpoints)


def _target(facts: Facts, state: ExportState) -> str:
    """The disk that an export shows: as its snapshot's mark says, or whose own node it is."""
    names = Names(state.snapshot, state.number)
    parts = (part for snapshot in read_snapshots(facts) for part in snapshot.parts)
    frozen = next((part.target for part in parts if part.names == names), "")
    own = (device.target for device in facts.devices if device.root and facts.disk(device).node == state.node)
    return frozen or next(own, "")


def check_request(request: ExportRequest) -> None:
    """UsageError for an address and names that cannot be, of whatever domain."""
    check_address(request.address, request.tls, request.insecure)
    for name in request.names.values():
        _check_name(name)


def _server(request: ExportRequest, running: ServerMark | None) -> ServerMark:
    """Where the NBD server is to listen; UsageError for an address that is unsafe or impossible.

    Any port will do where none is named: also that of the server that is ``running``.
    """
    address = request.address
    check_address(address, request.tls, request.insecure)
    # QEMU works in another directory than we do.
    tls = None if request.tls is None else str(Path(request.tls).absolute())
    if isinstance(address, UnixAddress):
        return ServerMark("unix", address.path, tls)
    if running is not None and not address.port:
        used = running.place.rpartition(":")[2]
        if running == ServerMark("inet", f"{address.host}:{used}", tls):
            return running
    port = address.port or _free_port(address.host)
    return ServerMark("inet", f"{address.host}:{port}", tls)


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


async def start_snapshot_export(
    session: Session, snapshot: Snapshot, request: ExportRequest, facts: Facts | None = None
) -> tuple[Export, ...]:
    """Offer a snapshot's disks over NBD.  After a failure nothing is exported."""
    facts = facts or await session.observe()
    for target in request.disks:
        if target not in snapshot.targets:
            raise UsageError(
                f"snapshot {snapshot.name} has no disk {target}", todo=f"It has {', '.join(snapshot.targets)}."
            )
    _check_named(request, snapshot.targets)
    disks = [
        disk
        for disk in select_disks(facts, snapshot.targets).disks
        if not request.disks or disk.target in request.disks
    ]
    refuse_export(facts, disks)
    parts = [
        ExportPart(
            snapshot.names(disk.target),
            disk.target,
            _view(facts, snapshot, disk.target, request.direct),
            disk.node,
            request.names.get(disk.target, disk.target),
            tuple(
                changes_of(snapshot, disk, request.since_of(disk.target), planned=_planned(session, facts, snapshot))
            ),
        )
        for disk in disks
    ]
    _refuse_trims(request, parts)
    if request.saved:
        parts += [saved_part(facts, part, request.writable) for part in parts]
    return await start_parts(session, facts, parts, request, writable=request.writable)


def _planned(session: Session, facts: Facts, snapshot: Snapshot) -> bool:
    """Whether a dry run only told of this snapshot."""
    return session.dry and snapshot.names(snapshot.targets[0]).node("access") not in facts.nodes


def _check_named(request: ExportRequest, targets: Sequence[str]) -> None:
    for target in request.names:
        if target not in targets:
            raise UsageError(f"there is no disk {target} to name an export of", todo=f"There is {', '.join(targets)}.")


def _view(facts: Facts, snapshot: Snapshot, target: str, direct: bool) -> str:
    names = snapshot.names(target)
    believable = names.node("view")
    return believable if believable in facts.nodes and not direct else names.node("access")


def _refuse_trims(request: ExportRequest, parts: Sequence[ExportPart]) -> None:
    """The nodes of a view that can be believed only read; QEMU would speak of permissions."""
    if request.writable and any(part.node == part.names.node("view") for part in parts):
        raise Refused(
            "clients cannot trim this snapshot: before QEMU 8.0 one that others read is offered read-only",
            means="Nothing was exported; its scratch keeps old data until the snapshot is deleted.",
            todo="Leave --writable out, every client can read it; or run the domain with QEMU 8.0 or newer.",
        )


def changes_of(
    snapshot: Snapshot, disk: Disk, since: Since, *, planned: bool = False
) -> list[tuple[str, tuple[Edge, ...]]]:
    """For each checkpoint in ``since`` the edges that lead from it to the snapshot; Refused where that is not known.

    Of a snapshot that is only ``planned`` the checkpoint would come after all that are there.
    """
    chain = read_chain(disk.bitmaps)
    if since == "all":
        before = chain.points[: chain.points.index(snapshot.checkpoint)] if snapshot.checkpoint in chain.points else ()
        since = before
    return [(name, _edges(snapshot, disk, chain, name, planned)) for name in since]


def _edges(snapshot: Snapshot, disk: Disk, chain: Chain, since: str, planned: bool) -> tuple[Edge, ...]:
    if disk.untracked:
        raise Refused(f"changes of {disk.target} are not known: {disk.untracked}", means="Nothing was exported.")
    if snapshot.checkpoint is None:
        raise Refused(
            f"changes up to snapshot {snapshot.name} are not known: no checkpoint was made at its instant",
            means="Its data is of that instant, every map of changes is of another; nothing was exported.",
            todo="Make the snapshot with a checkpoint, or export it without --since.",
        )
    edges = chain.since(since)
    if isinstance(edges, Unknown):
        raise Refused(
            f"changes of {disk.target} since {since} are not known: {edges.reason}", means="Nothing was exported."
        )
    points = [edge.checkpoint for edge in edges]
    if planned:
        return edges
    if snapshot.checkpoint not in points:
        raise Refused(
            f"changes from {since} to snapshot {snapshot.name} cannot be told: its checkpoint {snapshot.checkpoint} is"
            " older, or was deleted",
            means="The data of an older instant is gone: only changes up to a snapshot's own checkpoint can be used.",
        )
    return edges[: points.index(snapshot.checkpoint)]


async def start_writable_export(session: Session, request: ExportRequest) -> tuple[Export, ...]:
    """Offer a domain's own disks for writing.  After a failure nothing is exported."""
    facts = await session.observe()
    disks = select_disks(facts, request.disks).disks
    _check_named(request, [disk.target for disk in disks])
    refuse_export(facts, disks)
    owner = WRITABLE + secrets.token_hex(4)
    parts = [
        ExportPart(Names(owner, number), disk.target, disk.node, disk.node, request.names.get(disk.target, disk.target))
        for number, disk in enumerate(disks)
    ]
    try:
        return await start_parts(session, facts, parts, request, writable=True)
    except CommandFailed as error:
        if error.command != "block-export-add":
            raise
        raise Refused(
            f"QEMU does not let another writer at the disks of domain {facts.name} while it uses them: {error.desc}",
            means="Nothing was exported.",
            todo="Stop the domain, delete its snapshots, and name its images (disk:PATH); or start it with -incoming"
            " defer, or give the device share-rw=on.",
        ) from error


async def start_parts(
    session: Session, facts: Facts, parts: Sequence[ExportPart], request: ExportRequest, *, writable: bool
) -> tuple[Export, ...]:
    """Export these; after a failure none of them is there."""
    if idle_server(facts):
        await session.run(stop_exports(facts, ()))
        facts = facts if session.dry else await session.observe()
    server = _server(request, current_server(facts))
    _refuse_shared(facts, parts)
    names = [part.name for part in parts]
    for name in names:
        _check_name(name)
    taken = {state.name for state in read_exports(facts)}
    for name in names:
        if names.count(name) > 1 or name in taken:
            raise UsageError(f"there is an export {name} already", todo="Give another name with --export-name.")
    start_server = need_server(facts, server)
    if start_server and server.kind == "unix" and current_server(facts) != server:
        dead_socket(Path(server.place))
    plan = start_export(facts, parts, server, start_server=start_server, writable=writable)
    try:
        await _carry_out(session, plan, server)
    except BaseException as error:
        if not session.dry:
            await uncancelled(_stop_again(session, parts, server, error))
        if isinstance(error, CommandFailed) and error.command == "nbd-server-start":
            raise _no_server(error, server) from error
        raise
    return tuple(
        Export(
            part.id,
            part.name,
            part.target,
            None if part.names.snapshot.startswith(WRITABLE) else part.names.snapshot,
            _uri(server, part.name),
            tuple(name for name, _ in part.since),
        )
        for part in parts
    )


async def _carry_out(session: Session, plan: Plan, server: ServerMark) -> None:
    """Carry it out; before there is an export, only its owner can connect to a new server's socket."""
    commands = [step.execute for step in plan.commands()]
    opened = commands.index("nbd-server-start") + 1 if "nbd-server-start" in commands else 0
    await session.run(Plan(plan.actions[:opened]))
    if opened and server.kind == "unix" and not session.dry:
        keep_to_owner(server.place, encrypted=server.tls is not None)
    await session.run(Plan(plan.actions[opened:]))


def _check_name(name: str) -> None:
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise UsageError(f"{name!r} cannot name an export: it is not UTF-8") from error
    if not 0 < length <= _LONGEST_NAME:
        raise UsageError(f"an export's name has at most {_LONGEST_NAME} bytes, and at least one")


def _refuse_shared(facts: Facts, parts: Sequence[ExportPart]) -> None:
    """QEMU lends a bitmap to one export at a time, and a context is called as its bitmap."""
    for part in parts:
        node = facts.nodes.get(part.node)
        lent = {bitmap.name for bitmap in node.bitmaps if bitmap.busy} if node else set()
        for checkpoint, _ in part.since:
            if checkpoint in lent:
                raise Refused(
                    f"changes of {part.target} since {checkpoint} are offered by another export of this snapshot"
                    " already, and QEMU can offer them only once",
                    means="Nothing was exported.",
                    todo="Use that export (several clients can), or stop it first.",
                )


def _no_server(error: CommandFailed, server: ServerMark) -> DomainError:
    if "already running" in error.desc:
        return DomainBusy(
            "QEMU's one NBD server is in use by another program",
            means="Nothing was exported.",
            todo="Wait until that program has ended, or stop its export.",
        )
    return DomainError(f"QEMU cannot listen at {server.place}: {error.desc}", means="Nothing was exported.")


async def _stop_again(session: Session, parts: Sequence[ExportPart], server: ServerMark, error: BaseException) -> None:
    try:
        await session.reconnect()
        if isinstance(error, CommandFailed) and error.command in ("object-add", "nbd-server-start"):
            # The server that runs is somebody else's; without the marks nobody takes it for ours.
            await session.run(disown_server(parts, server))
        await session.run(stop_exports(await session.observe(), {part.id for part in parts}))
    except DomainError:
        return
