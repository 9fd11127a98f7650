# SPDX-License-Identifier: Apache-2.0
"""pullback stopped (SIGSTOP) at a point of a backup and continued later, while the domain writes.

The backup goes on and is right, or ends with one error; a domain that it held paused does not wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.processes import wait_for
from lab.qemu import BareQemu
from pullback.engine.pull import Pull
from pullback.errors import DomainError
from pullback.qemu import agent, execute
from pullback.repository.repository import Repository
from pullback.repository.writer import PackWriter
from tests.support import dying
from tests.support.life import Life
from tests.support.product import references, run_state
from tests.support.survival import Fault, survives

Start = Callable[..., BareQemu]

IN_THE_DATA = [dying.at_call(Pull, "run"), dying.at_call(PackWriter, "add", 3), dying.at_call(Pull, "finish_segment")]
IN_THE_COMMIT = [
    dying.at_call(Repository, "save_index"),
    dying.at_call(Repository, "save_snapshot"),
    dying.at_call(Repository, "save_snapshot", after=True),
]


#: Seconds that it stays stopped, at least.
STOPPED = float(os.environ.get("PULLBACK_TEST_STOPPED", "0"))


class Stopping(Life):
    """A domain whose backups are stopped for a while."""

    def stopped(self, point: dying.Point, *, paused: bool = False) -> int:
        """A backup that stops itself at ``point`` until the domain has written; its exit code.

        Where the domain is ``paused`` by then, the guard has to let it go on, and does so soon.
        """
        self.go_on()
        before, chains = references(self.qemu), self.chains()
        self.qemu.monitor.events.clear()
        child = os.fork()
        if child == 0:
            code = 99
            try:
                if paused:
                    execute.PAUSE_LIMIT = 0.5
                code = dying.hit_here(self.stage, self.qemu, point, signal.SIGSTOP)
            finally:
                os._exit(code)
        try:
            assert os.WIFSTOPPED(_changed(child))
            if paused:  # it may not be by now: QEMU was told, no more
                self.qemu.monitor.wait_event("RESUME", 10)
            until = time.monotonic() + STOPPED
            self.go_on()
            while time.monotonic() < until:
                # A guest's pace; nothing is waited for.
                time.sleep(0.2)
                self.go_on()
            os.kill(child, signal.SIGCONT)
            code = os.waitstatus_to_exitcode(_changed(child))
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        assert run_state(self.qemu) == "running"
        after = references(self.qemu)
        (extra,) = set(self.stage.listed()) - set(self.states) or {None}
        assert (extra is None) == (code != 0)
        if extra is None:
            assert self.chains() == chains
        else:
            self._is_one_of(extra, before, after)
        self.nothing_left()
        return code

    def _is_one_of(self, backup: str, *states: dict[str, bytes]) -> None:
        """What it holds is what the disks held at one of two instants, all of them."""
        for state in states:
            self.states[backup] = state
            try:
                self.judge(backup)
                return
            except AssertionError:
                continue
        raise AssertionError("it is of no instant")


def _changed(child: int) -> int:
    """The child's next status: it was stopped, or ended."""

    def look() -> tuple[int] | None:
        pid, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        return (status,) if pid else None

    return wait_for(look, "the child to stop or to end", timeout=60)[0]


@pytest.fixture
def life(lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch) -> Stopping:
    return Stopping(lab_dir, bare_qemu, monkeypatch)


def test_stopped_inside_the_pause(life: Stopping) -> None:
    """The guard lets the domain go on; the disks are not of one instant then, so there is no backup."""
    commands = life.commands()
    stop, go_on = commands.index("stop") + 1, commands.index("cont") + 1
    assert go_on > stop + 1
    for point in (
        dying.after_sending(stop),
        *(dying.before_command(at) for at in range(stop + 1, go_on + 1)),
        dying.after_sending(go_on - 1),
    ):
        with survives(Fault.FROZEN_PROCESS):
            assert life.stopped(point, paused=True) == 4
    life.go_on()
    life.backup()
    life.judge_all()


def test_stopped_anywhere_else(life: Stopping) -> None:
    commands = life.commands()
    pause = range(commands.index("stop") + 1, commands.index("cont") + 2)
    around = [at for at in range(1, len(commands) + 1, 6) if at not in pause]
    for point in (*map(dying.before_command, around), *IN_THE_DATA, *IN_THE_COMMIT):
        with survives(Fault.FROZEN_PROCESS):
            assert life.stopped(point) == 0
    life.go_on()
    life.backup()
    life.judge_all()


class GuestAgent:
    """A guest agent on a unix socket, with one client at a time; ``frozen`` says whether its file systems are."""

    def __init__(self, path: Path) -> None:
        self.frozen = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, client.makefile("rwb") as lines:
                    for line in lines:
                        lines.write(self._answer(json.loads(line.rpartition(b"\xff")[2])))
                        lines.flush()

    def _answer(self, request: dict[str, Any]) -> bytes:
        name, result, prefix = request["execute"], 1, b""
        if name == "guest-sync-delimited":
            result, prefix = request["arguments"]["id"], b"\xff"
        elif name.startswith("guest-fsfreeze-"):
            self.frozen = name.endswith("freeze")
        return prefix + json.dumps({"return": result}).encode() + b"\n"

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.fault(Fault.FROZEN_PROCESS)
def test_stopped_while_file_systems_are_frozen(
    lab_dir: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    """They thaw whether pullback lives or not; one that goes on is told that they did."""
    monkeypatch.setattr(agent, "FROZEN_LIMIT", 0.3)
    inside = GuestAgent(lab_dir / "agent")

    async def work() -> int:
        connected = await agent.connect_agent(str(lab_dir / "agent"))
        try:
            async with agent.frozen_file_systems(connected):
                os.kill(os.getpid(), how)
        except DomainError as error:
            return 7 if "then were thawed" in str(error) else 1
        finally:
            await connected.close()
        return 0

    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = asyncio.run(work())
        finally:
            os._exit(code)
    try:
        status = _changed(child)
        wait_for(lambda: not inside.frozen, "the thaw", timeout=10)
        if how == signal.SIGKILL:
            assert os.WTERMSIG(status) == how
            return
        assert os.WIFSTOPPED(status)
        os.kill(child, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(_changed(child)) == 7
        assert not inside.frozen
    except BaseException:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise
    finally:
        inside.close()
