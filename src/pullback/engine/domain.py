# SPDX-License-Identifier: Apache-2.0
"""The public API: a domain, its checkpoints, and the snapshots and exports made of it.

    async with open_domain(DomainAddress(socket="/run/qemu/web.qmp")) as domain:
        snapshot = await domain.create_snapshot(["vda"], checkpoint="monday")
        (export,) = await domain.start_export(snapshot, since=["sunday"], address=UnixAddress("/run/web-nbd"))
        …                                       any NBD client pulls export.uri
        await export.stop()
        await snapshot.delete()

Nothing is kept outside QEMU: snapshots and exports outlive this process, and are found again by name.  Every operation
observes, plans, executes.  What fails in between is cleared by observing again and planning the way back, so the
domain is left without anything half made and with the chain it had.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pullback.engine.exporting import (
    Export,
    ExportRequest,
    Since,
    end_exports,
    exports_in,
    since_given,
    start_snapshot_export,
    start_writable_export,
)
from pullback.engine.freezing import Freeze, Snapshot, SnapshotRequest, freeze_disks, snapshots_in, take_back
from pullback.engine.offline import parse_images
from pullback.engine.session import (
    Session,
    Tell,
    bind,
    open_offline_session,
    open_session,
    still_open,
)
from pullback.errors import UsageError
from pullback.model.chain import Unknown, read_chain
from pullback.model.facts import Disk, Facts
from pullback.model.snapshots import SnapshotPart, current_server, read_snapshots
from pullback.nbd.address import Address
from pullback.plan.checkpoint import NodeChain, remove_broken, remove_checkpoints
from pullback.plan.cleanup import clearable, remove_snapshots, stale_snapshots, stop_exports
from pullback.plan.export import idle_server
from pullback.plan.method import Method
from pullback.plan.probe import clear_probe, end_probe, start_probe
from pullback.plan.selection import select_disks
from pullback.qemu.cancelling import uncancelled
from pullback.qemu.monitor import Trace

#: How often, in seconds, a probe is looked at.
_LOOK_EVERY = 0.02


@dataclass(frozen=True, slots=True)
class DomainAddress:
    """How to reach a domain: a running one by its QMP ``socket``, a stopped one by its ``images``.

    ``images`` is ``[TARGET=]PATH[,TARGET=PATH…]``.  ``name`` is what it is called, whatever QEMU says; ``agent`` the
    unix socket of its guest agent.
    """

    socket: str = ""
    images: str = ""
    name: str = ""
    agent: str = ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A point in time from which changes can be asked; ``disks`` are the targets it stands on.

    ``changed`` are, by target, the bytes written since it: exact where one bitmap covers it, else at most.
    """

    name: str
    disks: tuple[str, ...]
    changed: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Changes:
    """What is known of one disk's changes since a checkpoint: at most ``most`` bytes, or why it is not known."""

    target: str
    most: int
    unknown: str = ""


class Domain:
    """One domain, ours alone until the session ends.  Made by :func:`open_domain`.

    Every method raises DomainUnreachable when QEMU goes away or does not answer; then it is not known what was
    done, and the next session looks.
    """

    def __init__(self, session: Session, address: DomainAddress) -> None:
        self._session = session
        self._address = address

    @property
    def session(self) -> Session:
        """The session with QEMU that this domain is reached by; UsageError when it has ended."""
        return still_open(self._session)

    # -- what there is --------------------------------------------------------------------------------------------

    async def facts(self) -> Facts:
        """The domain as it is now."""
        return await self.session.observe()

    def name_of(self, facts: Facts) -> str:
        """What the domain is called: as the caller said, as QEMU says, or after the socket or image."""
        return self._address.name or facts.name or self.session.default_name

    async def disks(self) -> tuple[Disk, ...]:
        """The disks that can be backed up: writable, with a medium."""
        return select_disks(await self.facts()).disks

    async def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The usable checkpoints, oldest first, with what changed since each."""
        return checkpoints_in(await self.facts())

    async def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshots that can be read, oldest first."""
        return tuple(bind(one, self.session) for one in snapshots_in(await self.facts()))

    async def find_snapshot(self, name: str) -> Snapshot:
        """The snapshot called ``name``; UsageError, with those there are, when there is none."""
        snapshots = await self.snapshots()
        for snapshot in snapshots:
            if name in (snapshot.name, snapshot.id):
                return snapshot
        there = ", ".join(snapshot.name for snapshot in snapshots) or "none"
        raise UsageError(f"there is no snapshot {name}", todo=f"There is {there}.")

    async def exports(self) -> tuple[Export, ...]:
        """The exports of ours."""
        return tuple(bind(one, self.session) for one in exports_in(await self.facts()))

    async def changes(self, since: str) -> tuple[Changes, ...]:
        """For each disk how much changed since a checkpoint, or why that is not known."""
        answers = []
        for disk in select_disks(await self.facts()).disks:
            edges = read_chain(disk.bitmaps).since(since)
            if disk.untracked or isinstance(edges, Unknown):
                reason = disk.untracked or (edges.reason if isinstance(edges, Unknown) else "")
                answers.append(Changes(disk.target, disk.virtual_size, reason))
            else:
                most = min(sum(edge.bitmap.count for edge in edges), disk.virtual_size)
                answers.append(Changes(disk.target, most))
        return tuple(answers)

    # -- snapshots ------------------------------------------------------------------------------------------------

    async def create_snapshot(
        self,
        disks: Sequence[str] = (),
        *,
        name: str = "",
        checkpoint: str | None = None,
        freeze: bool | Freeze = False,
        scratch: str | None = None,
        scratch_files: Mapping[str, str] | None = None,
        method: Method | None = None,
    ) -> Snapshot:
        """Freeze disks at one instant; the snapshot lives until it is deleted or QEMU ends.

        All disks if none is named.  ``freeze`` as in :class:`SnapshotRequest`; True is "try".
        UsageError for names that are taken or impossible; Refused when it could harm the domain; CommandFailed when
        QEMU cannot do it.  After any failure nothing of it is left, and no checkpoint.
        """
        mode: Freeze = freeze if isinstance(freeze, str) else "try" if freeze else "no"
        files = scratch_files or {}
        return await self.freeze(SnapshotRequest(name, names_of(disks), checkpoint, mode, scratch, files, method))

    async def freeze(self, request: SnapshotRequest) -> Snapshot:
        """The same for a request, which may also be of a snapshot that ends with its maker."""
        self.session.announce("create_snapshot", name=request.name, checkpoint=request.checkpoint)
        return bind(await freeze_disks(self.session, request, self._address.agent), self.session)

    async def end_snapshot(self, snapshot: Snapshot) -> None:
        """Take a snapshot out of QEMU; harmless when it is gone already."""
        await self.session.run(remove_snapshots(await self.facts(), {snapshot.id}))
        snapshot.ended = True

    @asynccontextmanager
    async def temporary_snapshot(self, request: SnapshotRequest) -> AsyncIterator[Snapshot]:
        """A snapshot while the block runs.  When the block fails, its checkpoint is taken back."""
        snapshot = await self.freeze(request)
        try:
            yield snapshot
        except BaseException:
            kept = None if snapshot.keep_checkpoint else request.checkpoint
            await uncancelled(take_back(self.session, snapshot.id, kept))
            raise
        if not snapshot.ended:
            await uncancelled(self.end_snapshot(snapshot))

    async def broken_disks(self, snapshot: Snapshot) -> tuple[str, ...]:
        """Which of a snapshot's disks cannot be read any more, by reading a little of each."""
        facts = await self.facts()
        states = read_snapshots(facts)
        parts = [part for state in states if state.id == snapshot.id for part in state.parts if part.viewed]
        for part in parts:
            await self.session.run(clear_probe(facts, part))
        return tuple([part.target for part in parts if await uncancelled(self._probe(part))])

    async def _probe(self, part: SnapshotPart) -> bool:
        await self.session.run(start_probe(part))
        while True:
            job = (await self.session.jobs())[part.names.id("probe")]
            concluded = job.status == "concluded"
            if concluded or job.done > 0:
                await self.session.run(end_probe(part, concluded))
                return bool(job.error)
            await asyncio.sleep(_LOOK_EVERY)

    # -- exports --------------------------------------------------------------------------------------------------

    async def start_export(
        self,
        snapshot: Snapshot,
        disks: Sequence[str] = (),
        *,
        address: Address,
        since: Since | Mapping[str, Since] | None = None,
        names: Mapping[str, str] | None = None,
        tls: str | None = None,
        insecure: bool = False,
        writable: bool = False,
    ) -> tuple[Export, ...]:
        """Offer a snapshot's disks over NBD, with the changed blocks since checkpoints.

        All its disks if none is named; the rest as in :class:`ExportRequest`.
        Refused for changes that are not known (each with the reason), and where an export could end QEMU;
        DomainBusy when another program uses QEMU's one NBD server.  After a failure nothing is exported.
        """
        targets, named = names_of(disks), names or {}
        request = ExportRequest(
            address, targets, since_given(since), named, tls=tls, insecure=insecure, writable=writable
        )
        return await self.offer(snapshot, request)

    async def start_writable_export(
        self,
        disks: Sequence[str] = (),
        *,
        address: Address,
        names: Mapping[str, str] | None = None,
        tls: str | None = None,
        insecure: bool = False,
    ) -> tuple[Export, ...]:
        """Offer a domain's own disks for writing: of a stopped domain, or of one that waits for a migration.

        Refused, with what to do, when QEMU does not allow it because the domain uses the disk.
        """
        return await self.offer(
            None, ExportRequest(address, names_of(disks), names=names or {}, tls=tls, insecure=insecure)
        )

    async def offer(
        self, snapshot: Snapshot | None, request: ExportRequest, facts: Facts | None = None
    ) -> tuple[Export, ...]:
        """The same for a request; without a snapshot it is of the domain's own disks.  ``facts`` save another look."""
        if snapshot is None:
            self.session.announce("start_writable_export", disks=list(request.disks))
            exports = await start_writable_export(self.session, request)
        else:
            self.session.announce("start_export", snapshot=snapshot.name, since=request.since)
            exports = await start_snapshot_export(self.session, snapshot, request, facts)
        return tuple(bind(export, self.session) for export in exports)

    async def stop_exports(self, exports: Collection[Export]) -> None:
        """End several exports in one plan, whoever is connected; the last one ends the NBD server."""
        self.session.announce("stop_exports", exports=[export.name for export in exports])
        await end_exports(self.session, exports)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    async def delete_checkpoint(self, name: str) -> None:
        """Merge a checkpoint away on all disks, in one transaction; what is known since the others stays exact.

        UsageError when no disk has it.
        """
        self.session.announce("delete_checkpoint", name=name)
        chains = chains_of(await self.facts())
        if not any(name in disk.chain.points for disk in chains):
            there = ", ".join(dict.fromkeys(point for disk in chains for point in disk.chain.points)) or "none"
            raise UsageError(f"there is no checkpoint {name}", todo=f"There is {there}.")
        await self.remove_checkpoints({name})

    async def remove_checkpoints(self, names: Collection[str]) -> None:
        """Merge checkpoints away, on all disks in one transaction; ones that are not there are ignored."""
        chains = chains_of(await self.facts())
        await self.session.run(remove_checkpoints([(disk, names) for disk in chains]))

    async def prune(self, choose: Callable[[NodeChain], Collection[str]]) -> None:
        """Merge away the checkpoints that ``choose`` names for each disk, and remove bitmaps that are of no use."""
        chains = chains_of(await self.facts())
        await self.session.run(remove_checkpoints([(disk, choose(disk)) for disk in chains]) + remove_broken(chains))

    # -- after a crash --------------------------------------------------------------------------------------------

    async def clear_stale(self) -> tuple[str, ...]:
        """Clear snapshots that clients that died left behind: half made ones, and those of backups.

        What is live stays: snapshots that can be read, and their exports.  What was cleared, in words.
        """
        self.session.announce("clear_stale")
        return (await self.cleared())[1]

    async def cleared(self) -> tuple[Facts, tuple[str, ...]]:
        """The same, with the domain as it is afterwards."""
        facts = await self.facts()
        stale = stale_snapshots(facts)
        cleared = [f"snapshot {snapshot}, which nobody uses" for snapshot in clearable(facts)]
        if plan := remove_snapshots(facts, stale):
            await uncancelled(self.session.run(plan))
            facts = await self.facts()
        if (server := current_server(facts)) is not None and idle_server(facts):
            cleared.append(f"the NBD server at {server.place}, which serves nobody")
            await uncancelled(self.session.run(stop_exports(facts, ())))
            facts = await self.facts()
        return facts, tuple(cleared)

    async def recover(self) -> tuple[str, ...]:
        """Clear what clients that died left behind, and bitmaps that are of no use any more.

        What is live stays: snapshots that can be read, their exports, the chain.  What was cleared, in words.
        """
        self.session.announce("recover")
        facts, found = await self.cleared()
        cleared = list(found)
        chains = chains_of(facts)
        targets = {facts.disk(device).node: device.target for device in facts.devices if device.root}
        for disk in chains:
            cleared += [
                f"bitmap {bitmap.name} of {targets[disk.node]}, which QEMU could not store"
                for bitmap, _ in disk.chain.broken
                if bitmap.inconsistent
            ]
        await uncancelled(self.session.run(remove_broken(chains)))
        return tuple(cleared)


def names_of(disks: Sequence[str]) -> tuple[str, ...]:
    """The disks that a caller names; UsageError for one bare name, which is a sequence of letters."""
    if isinstance(disks, str):
        raise UsageError(f"disks is {disks!r}, and no list of names", todo=f"Write [{disks!r}].")
    return tuple(disks)


def chains_of(facts: Facts) -> list[NodeChain]:
    """The chains of all disks that have any bitmap of ours."""
    disks = [facts.disk(device) for device in facts.devices if device.root]
    chains = [NodeChain(disk.node, read_chain(disk.bitmaps)) for disk in disks]
    return [one for one in chains if one.chain.edges or one.chain.broken]


def checkpoints_in(facts: Facts) -> tuple[Checkpoint, ...]:
    """The usable checkpoints of all disks, oldest first as far as the chains say."""
    changed: dict[str, dict[str, int]] = {}
    for device in facts.devices:
        if not device.root:
            continue
        disk = facts.disk(device)
        edges = read_chain(disk.bitmaps).edges
        for position, edge in enumerate(edges):
            most = sum(later.bitmap.count for later in edges[position:])
            changed.setdefault(edge.checkpoint, {})[device.target] = min(most, disk.virtual_size)
    return tuple(Checkpoint(name, tuple(disks), disks) for name, disks in changed.items())


@asynccontextmanager
async def open_domain(
    address: DomainAddress, *, tell: Tell | None = None, trace: Trace | None = None
) -> AsyncIterator[Domain]:
    """The domain at ``address``, for us alone while the block runs.

    ``tell`` makes it a dry run: plans are told and not carried out.  ``trace`` gets every command and reply.
    DomainUnreachable when nobody listens or it is no QMP socket; DomainBusy when another pullback, or another
    program on this monitor, holds it; Refused when another process uses an image of a stopped domain.
    """
    if address.images:
        session = open_offline_session(parse_images(address.images), name=address.name, tell=tell, trace=trace)
    else:
        session = open_session(address.socket, name=address.name, tell=tell, trace=trace)
    async with session as opened:
        try:
            yield Domain(opened, address)
        finally:
            opened.ended = True
