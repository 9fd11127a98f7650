# SPDX-License-Identifier: Apache-2.0
"""Carrying out a plan: its commands in order, with what each has to wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from qemu.qmp import EventListener

from pullback.errors import CommandFailed, DomainError, DomainUnreachable
from pullback.plan.command import ExportDeleted, JobConcluded, JobGone, Paused, Plan, Step
from pullback.qemu.cancelling import uncancelled
from pullback.qemu.guard import Guard
from pullback.qemu.monitor import REPLY_TIMEOUT, Monitor

T = TypeVar("T")

#: Seconds for which a domain may stand still; it is milliseconds unless we are stopped, or QEMU cannot drain its I/O.
PAUSE_LIMIT = 10.0


async def _job_concluded(monitor: Monitor, job_id: str, events: EventListener) -> None:
    """Wait for the job's end by its events; look first, since it may have ended before we listened."""
    while True:
        status = {job["id"]: job for job in await monitor.execute("query-jobs")}
        job = status.get(job_id)
        if job is None:
            return
        if job["status"] == "concluded":
            await monitor.execute("job-dismiss", {"id": job_id})
            if "error" in job:
                raise CommandFailed(f"job {job_id}", "GenericError", job["error"])
            return
        await _next(monitor, events, f"job {job_id} to end")


async def _end_job(monitor: Monitor, step: Step, job_id: str) -> None:
    """Send the command that ends a job; one that ended by itself meanwhile needs none."""
    try:
        await monitor.execute(step.execute, step.arguments)
    except CommandFailed:
        if any(job["id"] == job_id and job["status"] != "concluded" for job in await monitor.execute("query-jobs")):
            raise


async def _job_gone(monitor: Monitor, job_id: str, events: EventListener) -> None:
    """Wait until a cancelled job is no more; one that does not dismiss itself is dismissed."""
    while job := next((job for job in await monitor.execute("query-jobs") if job["id"] == job_id), None):
        if job["status"] == "concluded":
            await monitor.execute("job-dismiss", {"id": job_id})
            return
        await _next(monitor, events, f"job {job_id} to end")


async def _export_deleted(monitor: Monitor, export_id: str, events: EventListener) -> None:
    while any(export["id"] == export_id for export in await monitor.execute("query-block-exports")):
        await _next(monitor, events, f"export {export_id} to close")


async def _next(monitor: Monitor, events: EventListener, what: str) -> None:
    try:
        async with asyncio.timeout(REPLY_TIMEOUT):
            await events.get()
    except TimeoutError as error:
        monitor.lost = True
        raise DomainUnreachable(f"waited {REPLY_TIMEOUT:.0f} s for {what}") from error


async def run_step(monitor: Monitor, step: Step) -> None:
    """Send one step's command and wait for what it asks to wait for."""
    try:
        await _run_step(monitor, step)
    except CommandFailed:
        if not step.optional:
            raise


async def _run_step(monitor: Monitor, step: Step) -> None:
    match step.wait:
        case JobConcluded(job_id):
            async with monitor.events("JOB_STATUS_CHANGE") as events:
                await monitor.execute(step.execute, step.arguments)
                await _job_concluded(monitor, job_id, events)
        case JobGone(job_id):
            async with monitor.events("JOB_STATUS_CHANGE") as events:
                await _end_job(monitor, step, job_id)
                await _job_gone(monitor, job_id, events)
        case ExportDeleted(export_id):
            async with monitor.events("BLOCK_EXPORT_DELETED") as events:
                await monitor.execute(step.execute, step.arguments)
                await _export_deleted(monitor, export_id, events)
        case None:
            await monitor.execute(step.execute, step.arguments)


@asynccontextmanager
async def _stopped(monitor: Monitor, guard: Guard) -> AsyncIterator[None]:
    """Pause the domain; continue it only if it was we who paused it (QEMU's STOP event says so)."""
    async with monitor.events("STOP") as events:
        try:
            await uncancelled(guard.arm(PAUSE_LIMIT))
            await uncancelled(monitor.execute("stop"))
            if events.empty():
                await uncancelled(guard.disarm())
            yield
        finally:
            # Without a connection it is the guard who continues it, and why it was lost is what has to be told.
            if not monitor.lost:
                await uncancelled(_continue(monitor, guard, paused=not events.empty()))


async def _continue(monitor: Monitor, guard: Guard, paused: bool) -> None:
    """``cont``; if even that fails, the guard stays armed and does it when we close it."""
    if paused:
        await monitor.execute("cont")
    await guard.disarm()


async def _run_paused(monitor: Monitor, action: Paused) -> float:
    guard = Guard("qmp", monitor.path, monitor.fileno())
    try:
        await guard.ready()
        for step in action.before:
            await run_step(monitor, step)
        begin = time.monotonic()
        async with _stopped(monitor, guard):
            for step in action.steps:
                await run_step(monitor, step)
        if guard.undid:
            raise DomainError(
                f"the domain was paused for {PAUSE_LIMIT:.0f} s, and then was let go on",
                means="Its disks were not frozen at one instant, so nothing was stored; earlier backups are untouched.",
                todo="Run it again. Either pullback itself was stopped meanwhile, or QEMU was too slow.",
            )
        return time.monotonic() - begin
    finally:
        if monitor.lost:
            # The guard is armed still, and the monitor serves one client at a time.
            await monitor.close()
        await asyncio.to_thread(guard.close)


async def run_plan(monitor: Monitor, plan: Plan) -> float:
    """Carry out a plan; give back for how many seconds the domain was paused.

    The first failure is raised and ends it.  Whoever called observes QEMU and plans the clean-up from there.
    """
    paused = 0.0
    for action in plan.actions:
        if isinstance(action, Paused):
            paused += await _run_paused(monitor, action)
        else:
            await run_step(monitor, action)
    return paused
