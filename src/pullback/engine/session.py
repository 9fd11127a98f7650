# SPDX-License-Identifier: Apache-2.0
"""A session with one QEMU: the running domain's own, or a storage daemon on a stopped domain's images.

Everything that is done to QEMU goes through :meth:`Session.run`, so a dry run is a session that only tells.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pullback.engine.domain_lock import domain_lock, lock_directory, qemu_identity
from pullback.engine.offline import Holder, OfflineDaemon, daemon_place, holders_of
from pullback.errors import CommandFailed, DomainError, Refused, UsageError
from pullback.model.facts import Facts
from pullback.model.snapshots import read_exports, read_snapshots
from pullback.plan.command import Plan
from pullback.plan.offline import Image, as_if_writable, open_images, try_images
from pullback.qemu.cancelling import uncancelled
from pullback.qemu.execute import run_plan
from pullback.qemu.monitor import JobState, Monitor, Peer, Trace, connect, dial
from pullback.qemu.observe import observe, observe_daemon

T = TypeVar("T")

#: Gets each plan of a dry run, instead of QEMU.
Tell = Callable[[Plan], None]


class Session:
    """One QEMU, ours alone until the session ends.  Made by :func:`open_session`."""

    def __init__(
        self,
        monitor: Monitor,
        peer: Peer,
        resources: AsyncExitStack,
        *,
        default_name: str,
        daemon: bool = False,
        tell: Tell | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._monitor = monitor
        self.peer = peer
        self._resources = resources
        self._default_name = default_name
        self._daemon = daemon
        self._tell = tell
        self._trace = trace
        #: Whether the block that it was opened for is left.
        self.ended = False

    @property
    def dry(self) -> bool:
        """Whether plans are only told."""
        return self._tell is not None

    @property
    def default_name(self) -> str:
        """What the domain is called where QEMU does not say."""
        return self._default_name

    async def observe(self) -> Facts:
        """The domain as it is now."""
        if self._daemon:
            facts = await observe_daemon(self._monitor, self._default_name)
            # A dry run opened the images read-only, and tells what would be done to writable ones.
            return as_if_writable(facts) if self.dry else facts
        return await observe(self._monitor)

    async def run(self, plan: Plan) -> float:
        """Carry out a plan, or tell it in a dry run; for how many seconds the domain was paused."""
        if self._tell is not None:
            self._tell(plan)
            return 0.0
        return await run_plan(self._monitor, plan)

    async def jobs(self) -> dict[str, JobState]:
        """How far QEMU's jobs are, by id."""
        return await self._monitor.jobs()

    def announce(self, call: str, **arguments: Any) -> None:
        """Tell the trace which operation the following commands belong to."""
        if self._trace is not None:
            self._trace("", {"call": call, "arguments": arguments}, None)

    async def end_daemon(self, daemon: OfflineDaemon) -> None:
        """Let the storage daemon end, or leave it if there is anything of ours in it."""
        try:
            await self.reconnect()
            facts = await self.observe()
            if read_exports(facts) or any(not state.private for state in read_snapshots(facts)):
                await self._monitor.close()
                await asyncio.to_thread(daemon.leave)
                return
            await self._monitor.execute("quit")
        except DomainError:
            await self._monitor.close()
            await asyncio.to_thread(daemon.terminate)
            return
        await self._monitor.close()
        await asyncio.to_thread(daemon.wait)

    async def reconnect(self) -> None:
        """Make a new connection if the old one was given up.  DomainUnreachable when QEMU is gone."""
        monitor = self._monitor
        if monitor.lost:
            await monitor.close()
            self._monitor = await connect(dial(monitor.path), self._trace)
            self._resources.push_async_callback(self._monitor.close)


class Bound:
    """A value with methods of its own, which work in the session that it came from.

    The session is no field: it is not compared, printed, or taken along by a copy or ``dataclasses.asdict``.
    """

    __slots__ = ("_session",)

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        return None, {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


BoundT = TypeVar("BoundT", bound=Bound)


def bind(value: BoundT, session: Session) -> BoundT:
    """The same value, whose methods work in ``session`` from here on."""
    object.__setattr__(value, "_session", session)
    return value


def session_of(value: Bound) -> Session:
    """The session that a value came from; UsageError when that has ended, or it is a copy that came from none."""
    session: Session | None = getattr(value, "_session", None)
    if session is None:
        raise UsageError("this object is a copy, and belongs to no session", todo="Use the one that a Domain returned.")
    return still_open(session)


def still_open(session: Session) -> Session:
    """The session, unless it has ended: UsageError then."""
    if session.ended:
        raise UsageError(
            "the session with this domain has ended",
            means="Nothing was done; what was left in the domain is still there.",
            todo="Open the domain again: its snapshots and exports are found again by name.",
        )
    return session


@asynccontextmanager
async def open_session(
    socket: str, *, name: str = "", tell: Tell | None = None, trace: Trace | None = None
) -> AsyncIterator[Session]:
    """A session with the running domain whose QMP unix socket is ``socket``, for us alone while the block runs.

    DomainUnreachable when nobody listens or it is no QMP socket; DomainBusy when another pullback, or another
    program on this monitor, holds it.
    """
    async with AsyncExitStack() as resources:
        line = dial(socket)
        resources.callback(line.socket.close)
        resources.enter_context(domain_lock(qemu_identity(line.peer.pid, socket), socket))
        monitor = await connect(line, trace)
        resources.push_async_callback(monitor.close)
        yield Session(monitor, line.peer, resources, default_name=name or Path(socket).stem, tell=tell, trace=trace)


async def _give_up(daemon: OfflineDaemon, monitor: Monitor | None) -> None:
    if monitor is not None:
        await monitor.close()
    await asyncio.to_thread(daemon.terminate)


async def _open_images(monitor: Monitor, daemon: Peer, images: tuple[Image, ...], *, read_only: bool) -> None:
    for plan in (try_images, partial(open_images, read_only=read_only)):
        for image in images:
            try:
                await run_plan(monitor, plan((image,)))
            except CommandFailed as error:
                # QEMU's 'Failed to get shared "write" lock'
                if '" lock' in error.desc:
                    raise _in_use(image, await asyncio.to_thread(holders_of, image.path, daemon.pid)) from error
                raise Refused(
                    f"the storage daemon cannot open the image {image.path}: {error.desc}", means="Nothing was touched."
                ) from error


def _in_use(image: Image, holders: Sequence[Holder]) -> Refused:
    means = "Nothing was touched."
    for holder in holders:
        if holder.images:
            return Refused(
                f"the image {image.path} is in use by another pullback (process {holder.pid}): a command works on it,"
                " or a snapshot or an export was left in it",
                means=means,
                todo=f"Wait for that command, or name all images that it opened together: {', '.join(holder.images)}.",
            )
    who = ", ".join(f"{holder.program} ({holder.pid})" for holder in holders)
    # Of another user's processes, and of users of its backing files, only this is known.
    return Refused(
        f"the image {image.path} is in use by another process: {who}"
        if who
        else f"the image {image.path}, or one that it is built on, is in use by another process",
        means=means,
        todo="If the domain is running, name it by its QMP socket (qmp:PATH).",
    )


@asynccontextmanager
async def open_offline_session(
    images: tuple[Image, ...], *, name: str = "", tell: Tell | None = None, trace: Trace | None = None
) -> AsyncIterator[Session]:
    """A session with a storage daemon on the images of a stopped domain.

    The daemon ends with the session, unless a snapshot or an export is left in it: then it stays, and the next session
    on these images finds it.  Refused when another process uses an image.  A dry run opens the images read-only:
    opening a qcow2 image for writing is a write already.
    """
    place = daemon_place(images, lock_directory())
    title = name or Path(images[0].path).stem
    async with AsyncExitStack() as resources:
        resources.enter_context(domain_lock(place.identity, title))
        daemon = OfflineDaemon(place)
        monitor = None
        try:
            line = await uncancelled(asyncio.to_thread(daemon.start))
            monitor = await connect(line, trace)
            if not daemon.found:
                await _open_images(monitor, line.peer, images, read_only=tell is not None)
        except BaseException:
            await uncancelled(_give_up(daemon, monitor))
            raise
        session = Session(monitor, line.peer, resources, default_name=title, daemon=True, tell=tell, trace=trace)
        try:
            yield session
        finally:
            await uncancelled(session.end_daemon(daemon))
