# SPDX-License-Identifier: Apache-2.0
"""Processes that end while a stopped domain's images are looked after: nobody waits for them, nothing of them stays."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.processes import wait_for
from pullback.engine import offline
from pullback.engine.offline import DaemonPlace, OfflineDaemon, holders_of


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process of others."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.fixture
def place(tmp_path: Path, other: subprocess.Popen[bytes]) -> DaemonPlace:
    """What a daemon leaves that was killed: all of its files, with a pid that was ``other``'s."""
    found = DaemonPlace("disk", *(tmp_path / name for name in ("qmp", "pid", "log", "kept")))
    for path in (found.socket, found.log, found.kept):
        path.touch()
    found.pidfile.write_text(f"{other.pid}\n")
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_who_holds_an_image_may_end_while_it_is_asked_who_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "vda.qcow2"
    with image.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = subprocess.Popen(["sleep", "60"], pass_fds=[file.fileno()])
    wait_for(Path(f"/proc/{holder.pid}/cmdline").read_text, "the program to be there")
    locked_files = offline._locked_files

    def the_last_moment(process: Path) -> dict[str, os.stat_result]:
        found = locked_files(process)
        if process.name == str(holder.pid):
            end(holder)
        return found

    try:
        (before,) = holders_of(str(image), os.getpid())
        assert (before.pid, before.program) == (holder.pid, "sleep")
        monkeypatch.setattr(offline, "_locked_files", the_last_moment)
        (found,) = holders_of(str(image), os.getpid())
        assert (found.pid, found.program, found.images) == (holder.pid, "?", ())
        assert holders_of(str(image), os.getpid()) == ()
    finally:
        end(holder)


def test_a_process_that_has_ended_has_no_name_any_more() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert offline._command_line(Path(f"/proc/{process.pid}")) == ["?"]


@pytest.mark.parametrize("when", ["before", "while it is looked at"])
def test_a_daemon_that_ended_is_not_waited_for_and_its_files_go(
    place: DaemonPlace, other: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    read_text = Path.read_text

    def late(path: Path, *arguments: Any, **keywords: Any) -> str:
        if path == Path(f"/proc/{other.pid}/stat"):
            with path.open() as file:
                end(other)
                return file.read()
        return read_text(path, *arguments, **keywords)

    if when == "before":
        end(other)
    else:
        monkeypatch.setattr(Path, "read_text", late)
    begin = time.monotonic()
    OfflineDaemon(place).wait()
    assert time.monotonic() - begin < offline._STOP / 2
    assert list(place.socket.parent.iterdir()) == []


def test_an_orphan_that_ends_by_itself_needs_no_signal(
    place: DaemonPlace, other: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client was killed, and it may be ending already: nothing may come of the signal that is too late."""
    kill = os.kill
    sent: list[int] = []

    def late(pid: int, number: int) -> None:
        sent.append(number)
        kill(pid, signal.SIGKILL)
        other.wait()
        kill(pid, number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", late)
        OfflineDaemon(place).wait(ending=other.pid)
    assert sent == [signal.SIGTERM]
    assert list(place.socket.parent.iterdir()) == []


def test_one_that_missed_the_signal_is_asked_again(place: DaemonPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "ASK_EVERY", 0.2)
    trapped = place.socket.parent / "trapped"
    deaf = f"trap 'trap \"exit 0\" TERM' TERM; touch {trapped}; while :; do sleep 0.05; done"
    with subprocess.Popen(["sh", "-c", deaf]) as process:
        wait_for(trapped.exists, "the process to be deaf")
        OfflineDaemon(place).wait(ending=process.pid)
        assert process.wait(0) == 0


def test_a_pidfile_is_there_before_what_stands_in_it(place: DaemonPlace, other: subprocess.Popen[bytes]) -> None:
    place.pidfile.write_text("")
    writing = threading.Timer(0.1, place.pidfile.write_text, [f"{other.pid}\n"])
    writing.start()
    assert OfflineDaemon(place)._pid() == other.pid
    writing.join()


def test_a_pidfile_of_one_that_was_killed_may_stay_empty(place: DaemonPlace) -> None:
    place.pidfile.write_text("")
    assert OfflineDaemon(place)._pid() is None
