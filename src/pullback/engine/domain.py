# SPDX-License-Identifier: Apache-2.0
"""A running domain: its disks and checkpoints, and the snapshots and exports made of it.

Every operation observes, plans, executes.  Whatever fails in between is cleared by observing again and planning the
way back, so the domain is left without anything of ours and with the chain it had.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pullback.engine.domain_lock import domain_lock, qemu_identity
from pullback.engine.workdir import DEFAULT_BASE, work_directory
from pullback.errors import CommandFailed, DomainError, Refused
from pullback.model.chain import Chain, Edge, read_chain
from pullback.model.facts import Disk, Facts
from pullback.plan.checkpoint import NodeChain, remove_broken, remove_checkpoints
from pullback.plan.cleanup import PRIVATE, remove_snapshots, stale_snapshots
from pullback.plan.selection import refuse_unsafe
from pullback.plan.snapshot import (
    FROZEN_VIEW_EXACT,
    DiskSnapshot,
    ExportPart,
    disown_server,
    freeze,
    open_access,
    prepare_snapshot,
    start_export,
)
from pullback.qemu.execute import run_plan
from pullback.qemu.monitor import Monitor, Peer, Trace, connect, dial
from pullback.qemu.observe import observe

T = TypeVar("T")


@dataclass(slots=True)
class Snapshot:
    """The frozen disks, as of ``time``; ``checkpoint`` was made at that instant on the disks that can be tracked.

    ``keep_checkpoint`` is set once something relies on the checkpoint; until then a failure takes it back.
    """

    parts: tuple[DiskSnapshot, ...]
    checkpoint: str | None
    time: datetime
    paused_seconds: float
    keep_checkpoint: bool = False

    @property
    def id(self) -> str:
        return self.parts[0].snapshot


@dataclass(frozen=True, slots=True)
class Export:
    """Frozen disks, offered on the unix socket ``socket``; the export of a disk has its target's name.

    Where it is not ``exact`` (a QEMU older than 8.0), a read must not cross a multiple of 64 KiB, and what block status
    calls zero may be data that the export ``saved_name(target)`` holds.
    """

    snapshot: Snapshot
    socket: str
    exact: bool


class Domain:
    """A session with one QEMU process; made by :func:`open_domain`."""

    def __init__(self, monitor: Monitor, peer: Peer, resources: AsyncExitStack) -> None:
        self._monitor = monitor
        self._peer = peer
        self._resources = resources

    async def observe(self) -> Facts:
        """The domain as it is now."""
        return await observe(self._monitor)

    async def clear_stale(self) -> bool:
        """Remove what a backup that died left in QEMU; whether there was anything.  We hold the domain's lock."""
        facts = await self.observe()
        stale = stale_snapshots(facts)
        await run_plan(self._monitor, remove_snapshots(facts, stale))
        return bool(stale)

    @asynccontextmanager
    async def snapshot(
        self, disks: Sequence[Disk], checkpoint: str | None, scratch: str | None = None
    ) -> AsyncIterator[Snapshot]:
        """Freeze ``disks`` at one instant while the block runs, with a new ``checkpoint`` on those that can be tracked.

        ``scratch`` is the directory for the scratch images.  When the block fails, the checkpoint is taken back.
        Refused when a snapshot could harm the domain; CommandFailed when QEMU cannot do it.
        """
        facts = await self.observe()
        refuse_unsafe(facts, disks)
        base = scratch or DEFAULT_BASE
        with work_directory(base, self._peer) as place:
            snapshot_id = PRIVATE + secrets.token_hex(4)
            parts = tuple(
                DiskSnapshot(disk, snapshot_id, number, str(place / f"{number}.scratch"))
                for number, disk in enumerate(disks)
            )
            snapshot = None
            try:
                snapshot = await self._freeze(facts, parts, checkpoint, place, base)
                yield snapshot
            except BaseException:
                kept = snapshot is not None and snapshot.keep_checkpoint
                await uncancelled(self._take_back(snapshot_id, None if kept else checkpoint))
                raise
            await uncancelled(self.end_snapshot(snapshot_id))

    async def _freeze(
        self, facts: Facts, parts: tuple[DiskSnapshot, ...], checkpoint: str | None, place: Path, base: str
    ) -> Snapshot:
        try:
            await run_plan(self._monitor, prepare_snapshot(parts))
        except CommandFailed as error:
            raise Refused(
                f"QEMU cannot make a scratch image in {base}: {error.desc}",
                means="Nothing was frozen, no backup was made.",
                todo="Name a directory that QEMU's user can write to with --scratch.",
            ) from error
        _unlink_scratch(parts)
        tracked = [NodeChain(p.disk.node, read_chain(p.disk.bitmaps)) for p in parts if not p.disk.untracked]
        paused = await run_plan(self._monitor, freeze(parts, tracked, checkpoint, facts.running))
        time = datetime.now(UTC)
        await run_plan(self._monitor, open_access(parts))
        return Snapshot(parts, checkpoint if tracked else None, time, paused)

    async def end_snapshot(self, snapshot_id: str) -> None:
        """Take the snapshot and its exports out of QEMU; harmless when they are gone already."""
        await run_plan(self._monitor, remove_snapshots(await self.observe(), {snapshot_id}))

    async def _take_back(self, snapshot_id: str, checkpoint: str | None) -> None:
        """The way back from a failure; QEMU may be gone, and then so is the snapshot."""
        try:
            monitor = self._monitor
            if monitor.lost:
                await monitor.close()
                self._monitor = await connect(dial(monitor.path))
                self._resources.push_async_callback(self._monitor.close)
            await self.end_snapshot(snapshot_id)
            if checkpoint is not None:
                await self.remove_checkpoints({checkpoint})
        except DomainError:
            # What failed first is what the user has to know; the next run clears the rest.
            return

    @asynccontextmanager
    async def export(
        self, snapshot: Snapshot, since: Mapping[str, tuple[str, tuple[Edge, ...]]], writable: bool = False
    ) -> AsyncIterator[Export]:
        """Offer a snapshot's disks over NBD while the block runs; the snapshot's end also ends the export.

        ``since`` maps targets to a checkpoint and the edges from it, which becomes the context
        ``qemu:dirty-bitmap:CHECKPOINT``.  ``writable`` allows trims, which let ranges go.
        """
        items = [ExportPart(part, tuple(x for x in [since.get(part.disk.target)] if x)) for part in snapshot.parts]
        with work_directory(DEFAULT_BASE, self._peer) as place:
            socket = str(place / "nbd")
            exact = self._monitor.version >= FROZEN_VIEW_EXACT
            try:
                await run_plan(self._monitor, start_export(items, socket, writable, saved=not exact))
            except CommandFailed as error:
                if error.command == "nbd-server-start":
                    await run_plan(self._monitor, disown_server(snapshot.parts[0]))
                    raise Refused(
                        f"QEMU cannot start its NBD server: {error.desc}",
                        means="Another program exports disks of this domain; QEMU has only one NBD server.",
                        todo="Wait until that program has ended, or stop its export.",
                    ) from error
                raise
            yield Export(snapshot, socket, exact)

    async def remove_checkpoints(self, names: Collection[str]) -> None:
        """Merge checkpoints away, on all disks in one transaction; ones that are not there are ignored."""
        chains = chains_of(await self.observe())
        await run_plan(self._monitor, remove_checkpoints([(disk, names) for disk in chains]))

    async def prune(self, choose: Callable[[NodeChain], Collection[str]]) -> None:
        """Merge away the checkpoints that ``choose`` names for each disk, and remove bitmaps that are of no use."""
        chains = chains_of(await self.observe())
        await run_plan(
            self._monitor, remove_checkpoints([(disk, choose(disk)) for disk in chains]) + remove_broken(chains)
        )


def chains_of(facts: Facts) -> list[NodeChain]:
    """The chains of all disks that have any bitmap of ours."""
    disks = [facts.disk(device) for device in facts.devices if device.root]
    return [NodeChain(disk.node, chain) for disk in disks if _has_bitmaps(chain := read_chain(disk.bitmaps))]


def _has_bitmaps(chain: Chain) -> bool:
    return bool(chain.edges or chain.broken)


def _unlink_scratch(parts: Sequence[DiskSnapshot]) -> None:
    """QEMU has them open: unlinked now, they end with their nodes, even if QEMU or we are killed."""
    for part in parts:
        Path(part.scratch_path).unlink(missing_ok=True)


async def uncancelled(work: Coroutine[Any, Any, T]) -> T:
    """Carry ``work`` to its end even when we are cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


@asynccontextmanager
async def open_domain(path: str, trace: Trace | None = None) -> AsyncIterator[Domain]:
    """The domain whose QMP unix socket is ``path``, for us alone while the block runs.

    DomainUnreachable when nobody listens or it is no QMP socket; DomainBusy when another pullback, or another
    program on this monitor, holds it.
    """
    async with AsyncExitStack() as resources:
        line = dial(path)
        resources.callback(line.socket.close)
        resources.enter_context(domain_lock(qemu_identity(line.peer.pid, path), path))
        monitor = await connect(line, trace)
        resources.push_async_callback(monitor.close)
        yield Domain(monitor, line.peer, resources)
