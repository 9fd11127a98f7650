# SPDX-License-Identifier: Apache-2.0
"""Who fills the images of an instant restore: the domain's own QEMU, or a storage daemon while no domain runs.

Each look is a short session on the monitor: it serves one client at a time, and backups need it, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from pullback.engine.events import Emit, Note, Progress
from pullback.engine.offline import DaemonPlace, OfflineDaemon
from pullback.engine.overlays import FLUSH, Overlay
from pullback.errors import CommandFailed, DomainBusy, DomainError, DomainUnreachable, RestoreError
from pullback.model.facts import DISK_NODE, Facts
from pullback.nbd.address import UnixAddress
from pullback.nbd.blocking import NbdConnection
from pullback.plan import instant as plan
from pullback.plan.command import Step
from pullback.qemu.monitor import JobState, Monitor, connect, dial
from pullback.qemu.observe import observe, observe_daemon

#: Seconds between two looks.
_EVERY = 0.5

_Flush = Callable[[Overlay, str], Awaitable[None]]


class Streaming:
    """Fills ``overlays`` until each stands alone, or until ``stopping`` is set; :meth:`run` then says so."""

    def __init__(self, overlays: Sequence[Overlay], stopping: asyncio.Event, emit: Emit) -> None:
        self._overlays = overlays
        self._stopping = stopping
        self._emit = emit
        self._done: dict[int, int] = {one.number: one.size if one.stands_alone else 0 for one in overlays}
        self._told: set[int] = set()
        #: Processes of QEMU that were seen filling an image, and the image's number.
        self._seen: set[tuple[int, int]] = set()

    @property
    def left(self) -> list[Overlay]:
        """Those that do not stand alone yet."""
        return [one for one in self._overlays if not one.stands_alone]

    async def in_domain(self, socket: str) -> bool:
        """Have the QEMU with this QMP socket fill the images, whenever it runs; False when it was stopped before."""
        while self.left:
            with suppress(DomainUnreachable, DomainBusy):
                await self._look_at_domain(socket)
            if self.left and await self._pause():
                return False
        return True

    async def in_daemon(self, work: Path) -> bool:
        """Have a storage daemon fill the images; False when it was stopped before."""
        if not self.left:
            return True
        async with self._daemon(work) as monitor:

            async def flush(one: Overlay, node: str) -> None:
                # A storage daemon has no human monitor; an NBD client may ask it to flush.
                await asyncio.to_thread(_flush_export, str(work / FLUSH), node)

            while self.left:
                await self._look(monitor, 0, await observe_daemon(monitor, "instant"), flush)
                if self.left and await self._pause():
                    return False
        return True

    async def _pause(self) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), _EVERY)
        return self._stopping.is_set()

    async def _look_at_domain(self, socket: str) -> None:
        line = dial(socket)
        monitor = await connect(line)

        async def flush(one: Overlay, node: str) -> None:
            await _execute(monitor, one, plan.flush_node(node))

        try:
            await self._look(monitor, line.peer.pid, await observe(monitor), flush)
        finally:
            await monitor.close()

    async def _look(self, monitor: Monitor, pid: int, facts: Facts, flush: _Flush) -> None:
        jobs = await monitor.jobs()
        for one in self._overlays:
            if (node := plan.find_node(facts, one.is_file)) is None:
                self._tell_missing(one)
                continue
            job = jobs.get(plan.job_id(one.number))
            has_backing = "backing" in node.children and not one.stands_alone
            match plan.next_act(job.status if job else None, has_backing, (pid, one.number) in self._seen):
                case plan.Act.START:
                    await _execute(monitor, one, plan.start_stream(one.number, node.name))
                case plan.Act.FINALIZE:
                    await flush(one, node.name)
                    await _execute(monitor, one, plan.finalize(one.number))
                case plan.Act.GIVE_UP:
                    raise _failed(one, "it ended before all was copied")
            self._seen.add((pid, one.number))
            self._progress(one, job)

    def _tell_missing(self, one: Overlay) -> None:
        if one.number not in self._told and not one.stands_alone:
            self._told.add(one.number)
            self._emit(Note(f"{one.target}: the domain does not have {one.path} open; it is filled once it does."))

    def _progress(self, one: Overlay, job: JobState | None) -> None:
        if one.stands_alone:
            self._done[one.number] = one.size
        elif job is not None:
            self._done[one.number] = min(job.done, one.size)
        total = sum(each.size for each in self._overlays)
        self._emit(Progress("stream", sum(self._done.values()), total))

    @asynccontextmanager
    async def _daemon(self, work: Path) -> AsyncIterator[Monitor]:
        """A storage daemon that has the images open, and offers them for flushing; ended in order."""
        daemon = OfflineDaemon(DaemonPlace("instant", *(work / name for name in ("qmp", "pid", "log", "kept"))))
        monitor = await connect(await asyncio.to_thread(daemon.start))
        try:
            address = {"type": "unix", "data": {"path": str(work / FLUSH)}}
            await monitor.execute("nbd-server-start", {"addr": address})
            for one in self.left:
                await self._open(monitor, one)
            yield monitor
        finally:
            with suppress(DomainError):
                await monitor.execute("quit")
            await monitor.close()
            await asyncio.to_thread(daemon.wait)

    async def _open(self, monitor: Monitor, one: Overlay) -> None:
        node = f"{DISK_NODE}{one.number}"
        file = {"driver": "file", "filename": str(one.path)}
        try:
            await monitor.execute("blockdev-add", {"driver": "qcow2", "node-name": node, "file": file})
            export = {"type": "nbd", "id": node, "node-name": node, "name": node}
            await monitor.execute("block-export-add", export)
        except CommandFailed as error:
            raise RestoreError(
                f"{one.path} cannot be opened: {error.desc}",
                means="Nothing is lost; what a domain wrote is in the image.",
                todo="If a domain runs on it, name its QMP socket with --domain qmp:PATH.",
            ) from error


async def _execute(monitor: Monitor, one: Overlay, step: Step) -> None:
    try:
        await monitor.execute(step.execute, step.arguments)
    except CommandFailed as error:
        raise _failed(one, error.desc) from error


def _failed(one: Overlay, said: str) -> RestoreError:
    return RestoreError(
        f"QEMU cannot pull the rest of {one.target}: {said}",
        means="What a domain wrote is in the image; the rest it can read only while the backup is served.",
        todo="See to the cause (room, the repository's health), then run the same command again.",
    )


def _flush_export(socket: str, name: str) -> None:
    with NbdConnection.connect(UnixAddress(socket), name) as link:
        link.flush()
