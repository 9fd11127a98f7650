# SPDX-License-Identifier: Apache-2.0
"""Having QEMU push frozen disks into our own server, and waiting until it has."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from pullback.engine.cores import cores
from pullback.engine.domain import Domain
from pullback.engine.freezing import Snapshot
from pullback.engine.push import PushedDisk
from pullback.engine.storing import Prepared, Storing
from pullback.engine.survey import judge_last, last_data
from pullback.errors import SnapshotBroken, TransferError
from pullback.model.chain import Edge
from pullback.model.extents import Span
from pullback.model.units import SECTOR, align_down, align_up
from pullback.nbd.address import UnixAddress
from pullback.nbd.backend import Backend, MemoryBackend
from pullback.nbd.server import NbdServer
from pullback.plan.base import Incremental
from pullback.plan.method import FROZEN_VIEW_EXACT
from pullback.plan.push import PushPart, end_push, push_window, start_push
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
    pushed = {disk.target: disk for disk in await asyncio.to_thread(storing.begin_push)}
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
    async with _serving(domain, pushed, socket):
        try:
            await domain.session.run(start_push(parts, socket))
            await _all_pushed(domain, parts, pushed, storing)
            checked = [await _distrusted(domain, part, pushed[part.target], storing, socket) for part in parts]
            if again := [part for part in checked if part is not None]:
                await domain.session.run(start_push(again, socket))
                await _all_pushed(domain, again, pushed, storing)
        finally:
            storing.rate.stop()  # or the server would wait for writes that wait for the limit
    await asyncio.to_thread(storing.finish_push, list(pushed.values()))


@asynccontextmanager
async def _serving(domain: Domain, exports: Mapping[str, Backend], socket: str) -> AsyncIterator[None]:
    """A server that QEMU, and nobody but it and us, can connect to."""
    async with NbdServer(exports, workers=cores()) as server:
        await server.listen(UnixAddress(socket))
        peer = domain.session.peer
        if os.geteuid() == 0 and peer.uid != 0:
            os.chown(socket, peer.uid, peer.gid)
        yield


async def _distrusted(
    domain: Domain, part: PushPart, disk: PushedDisk, storing: Storing, socket: str
) -> PushPart | None:
    """The part that pushes a disk whole, where what was not pushed is not what its base has; else None.

    As in a survey, the last piece of data that should not have changed is compared.
    """
    base = storing.base(part.target)
    last = await asyncio.to_thread(last_data, base[0], part.target, disk.spans()) if base else None
    if last is None:
        return None
    await domain.session.run(end_push(part))
    span, blob = last
    start, end = align_down(span.offset, SECTOR), min(align_up(span.end, SECTOR), disk.size)
    window = MemoryBackend(bytes(end - start))
    async with _serving(domain, {part.target: window}, f"{socket}-window"):
        await domain.session.run(push_window(part, Span(start, end - start), f"{socket}-window"))
        await _all_pushed(domain, [part], {}, storing)
        await domain.session.run(end_push(part, window=True))
    reason = judge_last(window.read(span.offset - start, span.length), blob)
    if not reason:
        return None
    await asyncio.to_thread(storing.distrust, part.target, reason)
    disk.forget()
    return replace(part, edges=None)


async def _all_pushed(
    domain: Domain, parts: Sequence[PushPart], pushed: Mapping[str, PushedDisk], storing: Storing
) -> None:
    while True:
        jobs = await domain.session.jobs()
        mine = [(part, jobs.get(part.names.id("push"))) for part in parts]
        storing.total = max(storing.total, sum(job.total for _, job in mine if job is not None))
        for part, job in mine:
            _raise_failure(part, job, pushed)
        if all(job is not None and job.status == "concluded" for _, job in mine):
            return
        await asyncio.sleep(_LOOK_EVERY)


def _raise_failure(part: PushPart, job: JobState | None, pushed: Mapping[str, PushedDisk]) -> None:
    own = next((disk.failure for disk in pushed.values() if disk.failure is not None), None)
    if own is not None:
        raise own
    if job is None:
        raise TransferError(f"the job that pushed {part.target} was ended by somebody else")
    if job.status != "concluded" or not job.error:
        return
    if "Permission denied" in job.error:
        raise SnapshotBroken.of_disk(part.target)
    raise TransferError(f"QEMU could not push {part.target}: {job.error}")
