# SPDX-License-Identifier: Apache-2.0
"""Making snapshots: observe, plan, freeze; and the way back when that fails."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pullback.engine.session import Bound, Session, session_of
from pullback.engine.workdir import DEFAULT_BASE, work_directory
from pullback.errors import CommandFailed, DomainError, Refused, UsageError
from pullback.model.chain import bitmap_name, is_checkpoint_name, read_chain
from pullback.model.facts import ON_CBW_ERROR, Disk, Facts
from pullback.model.snapshots import PRIVATE, PUBLIC, Names, SnapshotMark, SnapshotState, fits, read_snapshots
from pullback.plan.checkpoint import NodeChain, remove_checkpoints
from pullback.plan.cleanup import remove_snapshots, stale_snapshots
from pullback.plan.command import Plan
from pullback.plan.freeze import FreezePart, freeze, mark_frozen, open_access, prepare_snapshot
from pullback.plan.method import FROZEN_VIEW_EXACT, Method, choose_method
from pullback.plan.selection import select_disks
from pullback.plan.view import open_view
from pullback.qemu.agent import Agent, NotFrozen, connect_agent, frozen_file_systems
from pullback.qemu.cancelling import uncancelled

Freeze = Literal["no", "try", "require"]


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """What to freeze and how.

    ``disks`` are targets, all if empty; ``checkpoint`` names the one to make at the instant.  ``freeze`` asks the guest
    agent to freeze the file systems around it: "try" takes a crash-consistent point where that fails, "require" does
    not.  ``scratch`` is a directory, ``scratch_files`` paths by target.  A ``private`` snapshot ends with its maker.
    """

    name: str = ""
    disks: tuple[str, ...] = ()
    checkpoint: str | None = None
    freeze: Freeze = "no"
    scratch: str | None = None
    scratch_files: Mapping[str, str] = field(default_factory=dict)
    method: Method | None = None
    private: bool = False


@dataclass(slots=True)
class Snapshot(Bound):
    """Frozen disks; ``targets`` in the order of their numbers, ``checkpoint`` the one made at the instant.

    ``time`` is the instant (of a snapshot found again: when it was asked for).  ``paused_seconds`` is for how long the
    domain stood still, ``frozen_seconds`` for how long its file systems did.  ``keep_checkpoint`` is set once something
    relies on the checkpoint; until then a failure takes it back.  ``ended`` is set when it was taken out of QEMU early.
    """

    id: str
    name: str
    targets: tuple[str, ...]
    checkpoint: str | None
    time: datetime
    consistency: Literal["crash", "frozen"] = "crash"
    paused_seconds: float = 0.0
    frozen_seconds: float = 0.0
    keep_checkpoint: bool = False
    ended: bool = False

    def names(self, target: str) -> Names:
        """The names of everything that belongs to one of its disks."""
        return Names(self.id, self.targets.index(target))

    async def delete(self) -> None:
        """Delete it and its exports; its checkpoint stays.  Harmless when it is gone.

        With a newer snapshot of the same disk its filter stays, doing nothing, until that one is deleted too.
        UsageError after the end of the session that it came from.
        """
        session = session_of(self)
        session.announce("snapshot.delete", name=self.name)
        facts = await session.observe()
        # What a dead client left on its filter would be in the way.
        await uncancelled(session.run(remove_snapshots(facts, {self.id} | stale_snapshots(facts))))


def snapshots_in(facts: Facts) -> tuple[Snapshot, ...]:
    """The public snapshots that can be read."""
    return tuple(_found(state) for state in read_snapshots(facts) if state.whole and not state.private and state.parts)


def _found(state: SnapshotState) -> Snapshot:
    return Snapshot(
        id=state.id,
        name=state.name,
        targets=tuple(part.target for part in sorted(state.parts, key=lambda part: part.names.number)),
        checkpoint=state.checkpoint,
        time=datetime.fromisoformat(state.time),
        consistency="frozen" if state.frozen else "crash",
    )


def check_names(request: SnapshotRequest) -> None:
    """UsageError for names that no snapshot and no checkpoint can have, of whatever domain."""
    if request.name and not is_checkpoint_name(request.name):
        raise UsageError(
            f"{request.name!r} cannot name a snapshot",
            todo="Use letters, digits and ._:+@-, beginning with one of the first two.",
        )
    if request.checkpoint is not None and not is_checkpoint_name(request.checkpoint):
        raise UsageError(
            f"{request.checkpoint!r} cannot name a checkpoint",
            todo="Use letters, digits and ._:+@-, beginning with one of the first two; at most 400.",
        )


def _check_free(facts: Facts, request: SnapshotRequest) -> None:
    if request.name and any(request.name == state.name for state in read_snapshots(facts) if not state.private):
        raise UsageError(f"there is a snapshot {request.name} already", todo="Delete it first, or use another name.")
    checkpoint = request.checkpoint
    if checkpoint is None:
        return
    taken = bitmap_name(checkpoint, None)
    for device in facts.devices:
        if device.root and any(
            bitmap.name == taken or bitmap.name.startswith(f"{taken}^") for bitmap in facts.disk(device).bitmaps
        ):
            raise UsageError(f"there is a checkpoint {checkpoint} already on {device.target}", todo="Use another name.")


@contextmanager
def _scratch_paths(session: Session, request: SnapshotRequest, disks: Sequence[Disk]) -> Iterator[dict[str, str]]:
    """Where each scratch is made; the directories of ours are only there while QEMU opens them."""
    for target, path in request.scratch_files.items():
        if not path.startswith("/") or os.path.lexists(path):
            raise UsageError(
                f"the scratch of {target} cannot be {path}",
                todo="Name a file that does not exist yet, beginning with /.",
            )
    with ExitStack() as stack:
        paths = dict(request.scratch_files)
        if any(disk.target not in paths for disk in disks):
            place = stack.enter_context(work_directory(request.scratch or DEFAULT_BASE, session.peer))
            for number, disk in enumerate(disks):
                paths.setdefault(disk.target, str(place / f"{number}.scratch"))
        try:
            yield paths
        finally:
            # QEMU has them open: unlinked now, they end with their nodes, even if QEMU or we are killed.
            for path in paths.values():
                Path(path).unlink(missing_ok=True)


async def freeze_disks(session: Session, request: SnapshotRequest, agent_path: str = "") -> Snapshot:
    """Freeze disks at one instant.  After a failure nothing of it is left, and no checkpoint."""
    check_names(request)
    facts = await session.observe()
    disks = select_disks(facts, request.disks).disks
    method = choose_method(facts, disks, request.method)
    _check_free(facts, request)
    tracked = [disk for disk in disks if not disk.untracked]
    if request.checkpoint is not None and not tracked and not request.private:
        raise Refused(
            f"no checkpoint can be made: {disks[0].target}: {disks[0].untracked}", means="Nothing was frozen."
        )
    snapshot = _new(request, disks, bool(tracked))
    # A dry run leaves the file systems inside alone, too.
    async with _agent("no" if session.dry else request.freeze, agent_path) as agent:
        try:
            await _carry_out(session, facts, request, snapshot, disks, method, agent)
        except BaseException:
            if not session.dry:
                await uncancelled(take_back(session, snapshot.id, request.checkpoint))
            raise
    return snapshot


def _new(request: SnapshotRequest, disks: Sequence[Disk], tracked: bool) -> Snapshot:
    snapshot_id = (PRIVATE if request.private else PUBLIC) + secrets.token_hex(4)
    return Snapshot(
        id=snapshot_id,
        name=request.name or snapshot_id,
        targets=tuple(disk.target for disk in disks),
        checkpoint=request.checkpoint if tracked else None,
        time=datetime.now(UTC),
    )


async def _carry_out(
    session: Session,
    facts: Facts,
    request: SnapshotRequest,
    snapshot: Snapshot,
    disks: Sequence[Disk],
    method: Method,
    agent: Agent | None,
) -> None:
    # Others are given a view that they may believe; a backup reads what QEMU has, knowing what was saved.
    exact = facts.version >= FROZEN_VIEW_EXACT
    with _scratch_paths(session, request, disks) as paths:
        parts = [_part(snapshot, disk, paths[disk.target]) for disk in disks]
        try:
            await session.run(prepare_snapshot(parts, map_saved=request.private and not exact))
        except CommandFailed as error:
            raise Refused(
                f"QEMU cannot make a scratch image in {request.scratch or DEFAULT_BASE}: {error.desc}",
                means="Nothing was frozen.",
                todo="Name a directory that QEMU's user can write to with --scratch.",
            ) from error
    tracked = [NodeChain(disk.node, read_chain(disk.bitmaps)) for disk in disks if not disk.untracked]

    def plan(*, running: bool) -> Plan:
        known = ON_CBW_ERROR in facts.features
        return freeze(parts, tracked, snapshot.checkpoint, method, running=running, break_snapshot=known)

    if agent is not None and await _freeze_inside(session, request, snapshot, agent, plan(running=False)):
        await session.run(mark_frozen(parts))
    else:
        running = facts.running and not (session.dry and request.freeze != "no")
        snapshot.paused_seconds = await session.run(plan(running=running))
    snapshot.time = datetime.now(UTC)
    await _open(session, parts, believable=not (request.private or exact))


async def _open(session: Session, parts: Sequence[FreezePart], *, believable: bool) -> None:
    """Open the frozen views; ``believable`` puts one that any reader may believe on each."""
    await session.run(open_access(parts))
    for part in parts if believable else ():
        await session.run(open_view(part.names, part.disk.target, part.disk.virtual_size))


async def _freeze_inside(
    session: Session, request: SnapshotRequest, snapshot: Snapshot, agent: Agent, plan: Plan
) -> bool:
    """Carry the plan out while the file systems are frozen; False, with nothing done, when they could not be."""
    begin = time.monotonic()
    try:
        async with frozen_file_systems(agent):
            snapshot.paused_seconds = await session.run(plan)
    except NotFrozen:
        if request.freeze == "require":
            raise
        return False
    snapshot.frozen_seconds = time.monotonic() - begin
    snapshot.consistency = "frozen"
    return True


def _part(snapshot: Snapshot, disk: Disk, scratch: str) -> FreezePart:
    mark = SnapshotMark(snapshot.name, disk.target, disk.node, snapshot.time.isoformat(), snapshot.checkpoint)
    if not fits(mark):
        raise UsageError(f"the names of snapshot {snapshot.name} and its checkpoint are too long together")
    return FreezePart(disk, snapshot.names(disk.target), scratch, mark)


@asynccontextmanager
async def _agent(wanted: Freeze, path: str) -> AsyncIterator[Agent | None]:
    """The guest agent, or None where there is none and that is all right."""
    agent = None
    if wanted != "no":
        try:
            if not path:
                raise UsageError("no guest agent's socket is known", todo="Name it with --agent.")
            agent = await connect_agent(path)
        except (DomainError, UsageError):
            if wanted == "require":
                raise
    try:
        yield agent
    finally:
        if agent is not None:
            await agent.close()


async def take_back(session: Session, snapshot_id: str, checkpoint: str | None) -> None:
    """The way back from a failure; QEMU may be gone, and then so is the snapshot."""
    try:
        await session.reconnect()
        await session.run(remove_snapshots(await session.observe(), {snapshot_id}))
        if checkpoint is not None:
            facts = await session.observe()
            chains = [
                NodeChain(disk.node, read_chain(disk.bitmaps))
                for disk in (facts.disk(device) for device in facts.devices if device.root)
            ]
            await session.run(remove_checkpoints([(chain, {checkpoint}) for chain in chains]))
    except DomainError:
        # What failed first is what the user has to know; the next run clears the rest.
        return
