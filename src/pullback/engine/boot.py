# SPDX-License-Identifier: Apache-2.0
"""A backup booted: images on it, a server under them, and a QEMU on top.

kept           the rest of the backup is copied into the images meanwhile, and the same command goes on
thrown away    nothing is copied; the images, what the domain wrote with them, go at the end
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pullback.engine.booted import BootedQemu, Start, accelerator, find_qemu, find_running, start_qemu
from pullback.engine.cores import cores
from pullback.engine.events import Booted, Emit, Event, Note, Serving, Streamed
from pullback.engine.instant import find_backup
from pullback.engine.overlays import Overlay, OverlayPlace
from pullback.engine.serving import Serve, ServeRequest
from pullback.engine.streaming import Streaming
from pullback.engine.targets import claimed
from pullback.engine.throwaway import throwaway_directory
from pullback.engine.workdir import DEFAULT_BASE
from pullback.errors import DomainError, RestoreError
from pullback.model.manifest import Manifest
from pullback.nbd.address import UnixAddress
from pullback.plan import boot as plan
from pullback.plan.instant import RECONNECT
from pullback.repository.repository import Repository

#: Seconds for which a domain waits for the server of images that are thrown away: nobody will serve them again.
_SHORT_RECONNECT = 10


@dataclass(frozen=True, slots=True)
class BootRequest:
    """What to boot, and how.

    ``to`` is the directory of images that are kept; without it they are made below ``work`` and thrown away.
    ``arguments`` are QEMU's, and replace what they name; ``console`` is where the first serial port goes.
    """

    backup: str
    to: Path | None = None
    disks: tuple[str, ...] = ()
    qemu: str = "qemu-system-x86_64"
    arguments: tuple[str, ...] = ()
    console: plan.Console = "socket"
    work: str = DEFAULT_BASE
    lock_retry: float = 0.0


@dataclass(frozen=True, slots=True)
class BootResult:
    """How it ended: ``left`` are the disks whose images still need the backup (none of those thrown away)."""

    backup: str
    manifest: Manifest
    images: tuple[str, ...]
    kept: bool
    left: tuple[str, ...]
    seconds: float


@dataclass
class _Run:
    """One boot while it lasts; ``over`` is set when the domain has ended."""

    repository: Repository
    backup: str
    manifest: Manifest
    place: OverlayPlace
    directory: Path
    overlays: Sequence[Overlay]
    kept: bool
    handle: int | None
    accel: str
    over: asyncio.Event = field(default_factory=asyncio.Event)
    failure: RestoreError | None = None

    @property
    def images(self) -> tuple[str, ...]:
        return tuple(str(one.path) for one in self.overlays)

    @property
    def left(self) -> tuple[str, ...]:
        return tuple(one.target for one in self.overlays if self.kept and not one.stands_alone)

    @property
    def qmp(self) -> str:
        return str(self.directory / "qmp")

    @property
    def serial(self) -> str:
        return str(self.directory / "serial")

    def remove_sockets(self) -> None:
        """A QEMU that was killed leaves them."""
        for path in (self.qmp, self.serial):
            Path(path).unlink(missing_ok=True)

    @property
    def means(self) -> str:
        if not self.kept:
            return "What the domain wrote is thrown away."
        return "What the domain flushed is in the images."

    @property
    def todo(self) -> str:
        if not self.kept:
            return ""
        return "Run the same command again: it goes on." if self.left else "Run the same command to boot it again."


class Boot:
    """One boot; :meth:`stop` ends it early, and is to be called in the event loop of :meth:`run`."""

    def __init__(self, request: BootRequest, open_repository: Callable[[], Repository], emit: Emit) -> None:
        self._request = request
        self._open = open_repository
        self._emit = emit
        self._begin = time.monotonic()
        self._stopping = asyncio.Event()
        self._ready = asyncio.Event()

    def stop(self) -> None:
        """End soon, QEMU too, with a RestoreError that says what is kept."""
        self._stopping.set()
        self._ready.set()

    async def run(self) -> BootResult:
        """Boot the backup, and return when its QEMU has ended.

        UsageError, BackupNotFound, Damaged, TargetExists: nothing was begun.  DomainError when QEMU fails.  Later
        RestoreError and RepositoryError: QEMU has ended; images that are kept hold what the domain flushed.
        """
        request = self._request
        program = find_qemu(request.qemu)
        probing = asyncio.create_task(self._accelerator(program))
        try:
            repository = await asyncio.to_thread(self._open)
            backup, manifest = await asyncio.to_thread(find_backup, repository, request.backup, request.disks)
            accel = await probing
        finally:
            probing.cancel()
        if request.to is None:
            with throwaway_directory(request.work) as (directory, handle):
                place = OverlayPlace(directory, backup, _SHORT_RECONNECT)
                return await self._boot(repository, backup, manifest, place, directory, handle, accel)
        with claimed(request.to, (), False):
            place = OverlayPlace(request.to, backup, RECONNECT)
            return await self._boot(repository, backup, manifest, place, request.to.resolve(), None, accel)

    async def _accelerator(self, program: str) -> str:
        return "" if plan.names_accelerator(self._request.arguments) else await accelerator(program, self._emit)

    async def _boot(
        self,
        repository: Repository,
        backup: str,
        manifest: Manifest,
        place: OverlayPlace,
        directory: Path,
        handle: int | None,
        accel: str,
    ) -> BootResult:
        overlays = place.overlays(manifest.disks, self._request.disks)
        kept = self._request.to is not None
        run = _Run(repository, backup, manifest, place, directory, overlays, kept, handle, accel)
        if kept and place.were_booted(overlays):
            if place.work.exists():  # the last boot was killed before it could let go
                await asyncio.to_thread(place.finish, overlays)
            await self._run_domain(run, None)
        else:
            await asyncio.to_thread(place.prepare, overlays)
            await self._serve(run)
        if run.failure is not None:
            raise run.failure
        if self._stopping.is_set():
            raise RestoreError("the boot was interrupted", means=run.means, todo=run.todo)
        return BootResult(backup, manifest, run.images, kept, run.left, time.monotonic() - self._begin)

    async def _serve(self, run: _Run) -> None:
        targets = tuple(one.target for one in run.overlays)
        address = UnixAddress(run.place.socket)
        request = ServeRequest(run.backup, targets, address, lock_retry=self._request.lock_retry)
        serve = Serve(request, lambda: run.repository, self._hear)
        serving = asyncio.create_task(serve.run())

        async def let_go() -> None:
            serve.stop()
            await asyncio.wait({serving})

        running = asyncio.create_task(self._run_domain(run, let_go))
        try:
            await asyncio.wait({serving, running}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done() and serving.exception() is not None:
                self.stop()  # without its backup the domain would wait for nothing
                await asyncio.wait({running})
                serving.result()
        except asyncio.CancelledError:
            self.stop()
            raise
        finally:
            await asyncio.wait({running})
            serve.stop()
            await asyncio.gather(serving, return_exceptions=True)
        running.result()

    async def _run_domain(self, run: _Run, let_go: Callable[[], Awaitable[None]] | None) -> None:
        if let_go is not None:
            await self._ready.wait()
        if self._stopping.is_set():
            return
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            if (qemu := await self._start_unless(stopped, run)) is not None:
                await self._attend(qemu, stopped, run, let_go)
        finally:
            stopped.cancel()

    async def _start_unless(self, stopped: asyncio.Task[bool], run: _Run) -> BootedQemu | None:
        """Start it; one that has not come up when ``stopped`` is done is ended again."""
        starting = asyncio.create_task(self._start(run))
        try:
            await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not starting.done():
                starting.cancel()
                await asyncio.wait({starting})
                run.remove_sockets()
        return None if starting.cancelled() else starting.result()

    async def _attend(
        self,
        qemu: BootedQemu,
        stopped: asyncio.Task[bool],
        run: _Run,
        let_go: Callable[[], Awaitable[None]] | None,
    ) -> None:
        """Be there until it ends or is to end; it has ended when this returns."""
        ended = asyncio.create_task(qemu.wait())
        filling = asyncio.create_task(self._fill(run, let_go))
        try:
            await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            run.over.set()
            await qemu.end()
            run.remove_sockets()
            await asyncio.wait({filling, ended})
        filling.result()
        if not self._stopping.is_set():
            qemu.check(run.means, run.todo)

    async def _start(self, run: _Run) -> BootedQemu:
        """The QEMU on the images: the one that an earlier command left, or a new one."""
        qmp, serial = run.qmp, run.serial
        qemu = find_running(qmp, self._emit) if run.kept else None
        given = self._request.arguments
        if qemu is not None:
            self._emit(Note(f"QEMU (process {qemu.pid}) still runs on the images, and is gone on with as it is."))
            serial = ""  # where its serial port goes was said to whoever started it
        else:
            what = plan.Booting(
                find_qemu(self._request.qemu),
                run.manifest.domain,
                tuple(plan.BootDisk(one.target, str(one.path)) for one in run.overlays),
                qmp,
                serial,
                run.accel,
                min(cores(), 2),
                self._request.console,
            )
            argv, serial = plan.arguments(what, given), plan.serial_socket(what, given)
            start = Start(argv, qmp, self._request.console, run.handle, dies_with_us=not run.kept)
            qemu = await start_qemu(start, self._emit)
        if not qemu.has_ended:
            self._emit(Booted(run.backup, run.images, qemu.pid, qmp, serial, run.accel, run.kept))
        return qemu

    async def _fill(self, run: _Run, let_go: Callable[[], Awaitable[None]] | None) -> None:
        """Copy the rest into images that are kept; should that fail, the domain runs on with what is served."""
        if not run.kept or let_go is None:
            return
        try:
            streaming = Streaming(run.overlays, run.over, self._emit)
            if not await streaming.in_domain(run.qmp):
                return
            await let_go()
            await asyncio.to_thread(run.place.remember, run.overlays)
            await asyncio.to_thread(run.place.finish, run.overlays)
        except (RestoreError, DomainError) as error:
            run.failure = RestoreError(error.what, means=run.means, todo=error.todo)
            self._emit(Note(f"{error.what}. The domain runs on, and needs the backup to be served as before."))
            return
        self._emit(Streamed(run.backup, run.images, round(time.monotonic() - self._begin, 3)))

    def _hear(self, event: Event) -> None:
        if isinstance(event, Serving):
            self._ready.set()
        else:
            self._emit(event)
