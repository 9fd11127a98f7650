# SPDX-License-Identifier: Apache-2.0
"""The QEMU of a booted backup that does not come up, does not end, or is gone while it is looked for."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pullback.engine import booted
from pullback.engine.booted import Start, accelerator, find_running, start_qemu
from pullback.engine.events import Event, Note, silent
from pullback.errors import DomainError, DomainUnreachable
from pullback.qemu import monitor
from tests.support.greeting import greeting_server

SLEEPS = ("sleep", "600")
LISTENS = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).listen()"


def children() -> set[str]:
    """Processes that the test started and that are not waited for, with the watchers of some."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def start(place: Path, *, dies_with_us: bool = False) -> Start:
    return Start(SLEEPS, str(place / "qmp"), "socket", None, dies_with_us)


@contextmanager
def ignored(number: signal.Signals) -> Iterator[None]:
    """A signal ignored, also by those that are started meanwhile."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


async def test_a_processor_that_does_not_run_with_kvm_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(booted, "_KVM", tmp_path / "kvm")
    monkeypatch.setattr(booted, "_PROBE_LIMIT", 0.1)
    (program := tmp_path / "qemu").write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    told: list[Event] = []
    assert await accelerator(str(program), told.append) == "tcg"
    (note,) = told
    assert isinstance(note, Note)
    assert "a processor was not seen to run with it in time" in note.message


async def test_one_that_has_ended_before_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whose exit code was taken by then: there is no such process any more."""

    def gone(pid: int) -> int:
        raise ProcessLookupError(pid)

    monkeypatch.setattr(os, "pidfd_open", gone)
    qemu = await start_qemu(Start(["false"], str(tmp_path / "qmp"), "socket", None, False), silent)
    assert qemu.has_ended
    await qemu.end()
    with pytest.raises(DomainError, match="QEMU ended with exit code 1"):
        qemu.check("", "")


async def test_one_that_never_listens_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(booted, "_START", 0.1)
    with pytest.raises(DomainUnreachable, match=f"does not listen at its monitor {tmp_path}/qmp within 0.1 s"):
        await start_qemu(start(tmp_path, dies_with_us=True), silent)


async def test_one_that_listens_may_take_its_time_to_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits at another socket, say; those who gave up hearing from it are in its queue."""
    monkeypatch.setattr(booted, "_START", 0.1)
    monkeypatch.setattr(monitor, "GREETING_TIMEOUT", 0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path := str(tmp_path / "qmp"))
        listener.listen(0)
        starting = asyncio.create_task(start_qemu(start(tmp_path), silent))
        await asyncio.sleep(0.5)
        assert not starting.done()
        async with greeting_server(answers := str(tmp_path / "answers"), [{"return": {}}] * 10):
            monkeypatch.setattr(monitor, "GREETING_TIMEOUT", 10)
            os.replace(answers, path)
            qemu = await starting
    await qemu.end()


async def test_one_that_nobody_waits_for_any_more_is_ended(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(start_qemu(start(tmp_path, dies_with_us=True), silent), 0.3)


async def test_one_that_does_not_end_is_killed_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(booted, "_STOP", 0.1)
    with ignored(signal.SIGTERM):
        async with greeting_server(str(tmp_path / "qmp"), [{"return": {}}]):
            qemu = await start_qemu(start(tmp_path), silent)
    await qemu.end()
    with pytest.raises(DomainError, match=r"QEMU ended by SIGKILL\. It means\. Do that\."):
        qemu.check("It means.", "Do that.")


def test_a_listener_that_is_gone_is_no_qemu(tmp_path: Path, handles: Callable[[], dict[int, str]]) -> None:
    """What it started still holds its socket, and would answer."""
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        handle = listener.fileno()
        subprocess.run([sys.executable, "-c", LISTENS, str(handle)], pass_fds=[handle], check=True)
        before = handles().items()
        assert find_running(path, silent) is None
        assert handles().items() <= before
