# SPDX-License-Identifier: Apache-2.0
"""Having QEMU push frozen disks into our own server, and waiting until it has."""

from __future__ import annotations

import asyncio
import os

from pullback.engine.domain import Domain
from pullback.engine.freezing import Snapshot
from pullback.engine.push import PushedDisk
from pullback.engine.storing import Prepared, Storing
from pullback.errors import SnapshotBroken, TransferError
from pullback.model.chain import Edge
from pullback.nbd.address import UnixAddress
from pullback.nbd.server import NbdServer
from pullback.plan.base import Incremental
from pullback.plan.method import FROZEN_VIEW_EXACT
from pullback.plan.push import PushPart, start_push
from pullback.plan.view import open_view
from pullback.qemu.monitor import JobState

#: How often, in seconds, the jobs are looked at.
_LOOK_EVERY = 0.1


def _edges(prepared: Prepared, target: str) -> tuple[Edge, ...] | None:
    base = prepared.bases[target]
    return base.edges if isinstance(base, Incremental) else None


async def push_disks(domain: Domain, prepared: Prepared, snapshot: Snapshot, storing: Storing, socket: str) -> None:
    """Have all disks pushed to a server of ours at ``socket`` and build their segments.

    SnapshotBroken when the frozen view was lost; else the first failure of ours, or TransferError with QEMU's reason.
    """
    pushed = await asyncio.to_thread(storing.begin_push)
    exact = prepared.facts.version >= FROZEN_VIEW_EXACT
    if not exact:
        for disk in prepared.selection.disks:
            await domain.session.run(open_view(snapshot.names(disk.target), disk.target, disk.virtual_size))
    parts = [
        PushPart(
            snapshot.names(disk.target),
            disk.target,
            disk.node,
            _edges(prepared, disk.target),
            "access" if exact else "view",
        )
        for disk in prepared.selection.disks
    ]
    async with NbdServer({disk.target: disk for disk in pushed}, workers=os.cpu_count() or 1) as server:
        await server.listen(UnixAddress(socket))
        peer = domain.session.peer
        if os.geteuid() == 0 and peer.uid != 0:
            os.chown(socket, peer.uid, peer.gid)
        await domain.session.run(start_push(parts, socket))
        await _all_pushed(domain, parts, pushed, storing)
    await asyncio.to_thread(storing.finish_push, pushed)


async def _all_pushed(domain: Domain, parts: list[PushPart], pushed: list[PushedDisk], storing: Storing) -> None:
    while True:
        jobs = await domain.session.jobs()
        mine = [(part, jobs.get(part.names.id("push"))) for part in parts]
        storing.total = sum(job.total for _, job in mine if job is not None)
        for part, job in mine:
            _raise_failure(part, job, pushed)
        if all(job is not None and job.status == "concluded" for _, job in mine):
            return
        await asyncio.sleep(_LOOK_EVERY)


def _raise_failure(part: PushPart, job: JobState | None, pushed: list[PushedDisk]) -> None:
    own = next((disk.failure for disk in pushed if disk.failure is not None), None)
    if own is not None:
        raise own
    if job is None:
        raise TransferError(f"the job that pushed {part.target} was ended by somebody else")
    if job.status != "concluded" or not job.error:
        return
    if "Permission denied" in job.error:
        raise SnapshotBroken.of_disk(part.target)
    raise TransferError(f"QEMU could not push {part.target}: {job.error}")
