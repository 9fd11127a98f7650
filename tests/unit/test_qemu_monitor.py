# SPDX-License-Identifier: Apache-2.0
"""A monitor that is held by others or says nothing, jobs that end by themselves or never, and the guard's patience."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest

from pullback.errors import CommandFailed, DomainBusy, DomainUnreachable
from pullback.plan.command import JobGone, Step
from pullback.qemu import execute, guard, monitor
from pullback.qemu.monitor import Monitor, Peer
from tests.support.greeting import GREETING, greeting_server

LIMIT = 10
JOB = "pullback-s1-0"


def test_a_socket_that_takes_no_more_clients_is_in_use(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        with pytest.raises(
            DomainBusy, match=r"takes no more clients now.*holds this monitor.*second -qmp socket"
        ) as caught:
            monitor.dial(path)
    assert caught.value.exit_code == 4


def test_who_began_to_listen_may_be_gone(tmp_path: Path) -> None:
    """As when a program hands its listening socket to QEMU and ends: what the kernel noted is all there is."""
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listen = f"import socket; socket.socket(fileno={listener.fileno()}).listen()"
        with subprocess.Popen([sys.executable, "-I", "-S", "-c", listen], pass_fds=[listener.fileno()]) as began:
            assert began.wait(LIMIT) == 0
        line = monitor.dial(path)
    line.socket.close()
    assert line.peer == Peer(began.pid, os.geteuid(), os.getegid())


async def test_a_socket_without_a_greeting_is_in_use_and_is_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "GREETING_TIMEOUT", 0.1)
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        line = monitor.dial(path)
        silent, _ = listener.accept()
        with silent:
            with pytest.raises(DomainBusy, match=r"gave no greeting"):
                await monitor.connect(line)
            silent.settimeout(LIMIT)
            assert silent.recv(1) == b""
    assert line.socket.fileno() == -1


REFUSED: dict[str, Any] = {"error": {"class": "CommandNotFound", "desc": "negotiation is complete"}}


async def test_a_negotiation_that_fails_is_begun_anew_once(tmp_path: Path) -> None:
    path, answers = str(tmp_path / "qmp"), [REFUSED, {"return": {}}]
    async with greeting_server(path, answers):
        made = await monitor.connect(first := monitor.dial(path))
        await made.close()
    assert (answers, first.socket.fileno()) == ([], -1)


async def test_a_session_that_is_lost_as_soon_as_it_is_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As when QEMU ends just then: it fails here or later, in our words, and nothing is left to be told by others."""
    path = str(tmp_path / "qmp")

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(GREETING).encode() + b"\n")
        await reader.read(4096)
        writer.write(b'{"return": {}}\n')
        writer.close()

    async with await asyncio.start_unix_server(leave, path):
        for _ in range(30):
            with contextlib.suppress(DomainUnreachable):
                await (await monitor.connect(monitor.dial(path))).close()
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


async def test_and_no_more_than_once(tmp_path: Path) -> None:
    path, answers = str(tmp_path / "qmp"), [REFUSED, REFUSED, {"return": {}}]
    async with greeting_server(path, answers):
        with pytest.raises(DomainUnreachable, match="is not a QMP socket"):
            await monitor.connect(monitor.dial(path))
    assert len(answers) == 1


# -- jobs --------------------------------------------------------------------------------------------------------------


class Jobs:
    """A monitor whose job has ``status``, None: there is none.  It is not ``cancellable``, or does not care."""

    def __init__(self, status: str | None, cancellable: bool = False) -> None:
        self.status, self.cancellable = status, cancellable
        self.lost = False

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """As QEMU would."""
        if command == "query-jobs":
            return [] if self.status is None else [{"id": JOB, "status": self.status}]
        assert arguments == {"id": JOB}
        if command == "job-dismiss":
            self.status = None
        elif not self.cancellable:
            raise CommandFailed(command, "GenericError", "it cannot be cancelled now")
        return {}

    @asynccontextmanager
    async def events(self, *_: str) -> AsyncIterator[asyncio.Queue[Any]]:
        """None."""
        yield asyncio.Queue()


async def end(jobs: Jobs) -> None:
    await execute.run_step(cast(Monitor, jobs), Step("job-cancel", {"id": JOB}, "a test", JobGone(JOB)))


@pytest.mark.parametrize("status", [None, "concluded"])
async def test_a_job_that_ended_by_itself_need_not_be_cancelled(status: str | None) -> None:
    jobs = Jobs(status)
    await end(jobs)
    assert jobs.status is None


async def test_a_job_that_cannot_be_cancelled_is_an_error() -> None:
    with pytest.raises(CommandFailed, match="QEMU refused job-cancel: it cannot be cancelled now"):
        await end(Jobs("running"))


async def test_a_job_that_never_ends_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "REPLY_TIMEOUT", 0.1)
    jobs = Jobs("running", cancellable=True)
    with pytest.raises(DomainUnreachable, match=f"waited 0 s for job {JOB} to end"):
        await end(jobs)
    assert jobs.lost


# -- the guard ---------------------------------------------------------------------------------------------------------


def _tried_again(_: float) -> NoReturn:
    pytest.fail("it tried again")


@pytest.mark.parametrize("left", ["nothing", "a socket"])
def test_where_nobody_listens_the_guard_has_nothing_to_undo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    path = str(tmp_path / "qmp")
    if left == "a socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
    monkeypatch.setattr("time.sleep", _tried_again)
    guard._persist("qmp", path)


@contextmanager
def served(path: str, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """A thread that serves those who connect to ``path``."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(LIMIT)
        thread = threading.Thread(target=serve, args=[listener])
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(LIMIT)


def test_the_guard_knows_the_agents_answer_to_its_own_question(tmp_path: Path) -> None:
    """What the agent still owes the dead one comes first."""
    path = str(tmp_path / "agent")
    said: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        link, _ = listener.accept()
        with link, link.makefile("rwb") as lines:
            said.append(lines.readline())
            lines.write(b'{"return": 2}\n')
            lines.flush()
            link.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                said.append(link.recv(1))  # it would go on now
            link.settimeout(LIMIT)
            lines.write(b'\xff{"return": 20180525}\n')
            lines.flush()
            said.append(lines.readline())
            lines.write(b'{"return": 2}\n')
            lines.flush()

    with served(path, serve):
        guard._persist("agent", path)
    assert [json.loads(line.lstrip(b"\xff"))["execute"] for line in said] == [
        "guest-sync-delimited",
        "guest-fsfreeze-thaw",
    ]


def test_the_guard_tries_again_until_the_domain_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a connection that is closed on it (QEMU serves another one), and one that greets with nonsense."""
    monkeypatch.setattr(guard, "PERSISTENCE", LIMIT)
    path = str(tmp_path / "qmp")
    heard: list[str] = []

    def serve(listener: socket.socket) -> None:
        for greeting, stays in ((b'{"QMP": {}}\n', False), (b"busy\n", False), (b'{"QMP": {}}\n', True)):
            link, _ = listener.accept()
            with link, link.makefile("rwb") as lines:
                lines.write(greeting)
                lines.flush()
                while stays and (line := lines.readline()):
                    heard.append((command := json.loads(line))["execute"])
                    reply = json.dumps({"return": {}, "id": command["id"]}).encode()
                    lines.write(b'{"event": "RESUME"}\n{"return": {}, "id": "of the dead one"}\n' + reply + b"\n")
                    lines.flush()

    with served(path, serve):
        guard._persist("qmp", path)
    assert heard == ["qmp_capabilities", "cont"]
