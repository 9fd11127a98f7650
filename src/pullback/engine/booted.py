# SPDX-License-Identifier: Apache-2.0
"""The QEMU of a backup that was booted: started, or found where an earlier command left it; and whether KVM works."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pullback.engine.events import Emit, Note
from pullback.errors import DomainBusy, DomainError, DomainUnreachable, UsageError
from pullback.plan import boot as plan
from pullback.qemu.monitor import Line, connect, dial
from pullback.qemu.storage_daemon import Watcher

_KVM = Path("/dev/kvm")
#: Seconds for the firmware to run through with KVM, which takes a third of one; on one machine that offers KVM and is
#: slower with it than without, it took 5.
_PROBE_LIMIT = 3.0
#: Seconds to come up, and to write out what is left at the end: a QEMU whose reads nobody answers has to be killed.
_START, _STOP = 60.0, 20.0


def find_qemu(program: str) -> str:
    """The path of the QEMU to boot with; UsageError, saying what to install, when it is missing."""
    if path := shutil.which(program):
        return path
    raise UsageError(
        f"{program} is not installed",
        means="Nothing was begun.",
        todo="On Debian it comes with qemu-system-x86; --qemu names another one.",
    )


async def accelerator(program: str, emit: Emit) -> str:
    """Say kvm if a processor was seen to run with it, else tcg, and why in a note."""
    if not (why := _why_no_kvm()):
        if await _runs(plan.probe(program)):
            return "kvm"
        why = "a processor was not seen to run with it in time"
    emit(Note(f"KVM is not used ({why}): QEMU emulates the processor, which is slow."))
    return "tcg"


def _why_no_kvm() -> str:
    if not _KVM.exists():
        return "this machine has no /dev/kvm"
    return "" if os.access(_KVM, os.R_OK | os.W_OK) else "/dev/kvm may not be opened; its group is kvm"


async def _runs(argv: Sequence[str]) -> bool:
    nowhere = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*argv, stdin=nowhere, stdout=nowhere, stderr=nowhere)
    try:
        async with asyncio.timeout(_PROBE_LIMIT):
            return await process.wait() == 0
    except TimeoutError:
        return False
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@dataclass(frozen=True, slots=True)
class Start:
    """How QEMU is started: a terminal it shares with us; ``handle`` is a lock that it holds until it ends."""

    argv: Sequence[str]
    qmp: str
    console: plan.Console
    handle: int | None
    dies_with_us: bool


class BootedQemu:
    """A QEMU that runs; :meth:`end` ends it however it is."""

    def __init__(self, pid: int, process: asyncio.subprocess.Process | None, emit: Emit) -> None:
        self.pid = pid
        self.found = process is None
        self._process = process
        self._emit = emit
        self._last = ""
        self._watcher: Watcher | None = None
        self._ended = asyncio.Event()
        self._pidfd = -1
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            if self.found:
                raise
            self._ended.set()  # so soon that its exit code was taken already
        else:
            asyncio.get_running_loop().add_reader(self._pidfd, self._note_end)
        self._hearing = asyncio.create_task(self._hear())

    def _note_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._ended.set()

    async def _hear(self) -> None:
        """Tell what QEMU says on its standard error."""
        begun = b""
        while self._process is not None and self._process.stderr is not None:
            if not (got := await self._process.stderr.read(65536)):
                return
            *lines, begun = (begun + got).split(b"\n")
            for line in lines:
                self._last = line.decode(errors="replace").strip()
                self._emit(Note(f"QEMU: {self._last}"))

    async def wait(self) -> None:
        """Return when it has ended, and was heard to its end."""
        await self._ended.wait()
        if self._process is not None:
            await self._process.wait()
        # What it started may still hold its standard error.
        await asyncio.wait({self._hearing}, timeout=1.0)

    @property
    def has_ended(self) -> bool:
        """Whether it is gone."""
        return self._ended.is_set()

    async def come_up(self, qmp: str) -> None:
        """Return when it answers, or has ended.  DomainUnreachable if it does not even listen in time.

        It listens before the sockets after this one and the domain's devices are made, and may then wait for somebody
        at one of its user's sockets (``wait=on``): there is no limit on that.
        """
        deadline = time.monotonic() + _START
        while not self._ended.is_set():
            try:
                line = dial(qmp)
            except DomainUnreachable as error:
                if time.monotonic() > deadline:
                    raise DomainUnreachable(
                        f"the QEMU that was started does not listen at its monitor {qmp} within {_START:g} s",
                        means="It was ended again; the backup is untouched.",
                        todo="Try again when the machine is less busy; QEMU's own arguments have to leave it alone.",
                    ) from error
            except DomainBusy:  # by us: who gave up is among those who wait to be heard
                pass
            else:
                if await _answers(line):
                    return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), 0.02)

    def watch(self) -> None:
        """Have it ended, in order, should we die."""
        self._watcher = Watcher(self.pid)

    async def end(self) -> None:
        """End it in order, or after a while as it is; gone when this returns."""
        if not self._ended.is_set():
            self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._ended.wait(), _STOP)
        except TimeoutError:
            self._signal(signal.SIGKILL)
        await self.wait()
        self._hearing.cancel()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        if self._watcher is not None:
            await asyncio.to_thread(self._watcher.release)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def check(self, means: str, todo: str) -> None:
        """DomainError unless it ended well, as far as that can be known."""
        code = self._process.returncode if self._process is not None else 0
        if not code:
            return
        how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
        said = f": {self._last}" if self._last else ""
        raise DomainError(f"QEMU ended {how}{said}", means=means, todo=todo)


async def _answers(line: Line) -> bool:
    try:
        monitor = await connect(line)
    except (DomainUnreachable, DomainBusy):
        return False
    await monitor.close()
    return True


async def start_qemu(start: Start, emit: Emit) -> BootedQemu:
    """Start QEMU, and wait until it answers or has ended; ended again when this is cancelled."""
    on_terminal = start.console == "terminal"
    process = await asyncio.create_subprocess_exec(
        *start.argv,
        stdin=None if on_terminal or not os.isatty(0) else asyncio.subprocess.DEVNULL,
        # Our standard output may be for a program that expects JSON.
        stdout=2 if start.console == "socket" else None,
        stderr=asyncio.subprocess.PIPE,
        # Elsewhere a Ctrl-C is for us, and we end it in order.
        start_new_session=not on_terminal,
        pass_fds=() if start.handle is None else (start.handle,),
    )
    qemu = BootedQemu(process.pid, process, emit)
    try:
        if start.dies_with_us:
            qemu.watch()
        await qemu.come_up(start.qmp)
    except BaseException:
        await qemu.end()
        raise
    return qemu


def find_running(qmp: str, emit: Emit) -> BootedQemu | None:
    """The QEMU that an earlier command left at this monitor; None without one.  DomainBusy if that cannot be told."""
    try:
        line = dial(qmp)
    except DomainUnreachable:
        return None
    line.socket.close()
    try:
        return BootedQemu(line.peer.pid, None, emit)
    except ProcessLookupError:
        return None
