# SPDX-License-Identifier: Apache-2.0
"""A storage daemon that does not end when it is told to."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lab.processes import wait_for
from pullback.errors import RestoreError
from pullback.qemu import storage_daemon
from pullback.qemu.storage_daemon import StorageDaemon, Watcher

STUBBORN = """#!/bin/sh
trap '' TERM
echo "still writing" >&2
echo $$ >"$2"
exec sleep 600
"""

DEAF_ONCE = """#!/bin/sh
trap 'trap "exit 0" TERM' TERM
echo $$ >"$2"
while :; do sleep 0.05; done
"""


def test_a_daemon_that_missed_the_signal_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / storage_daemon.PROGRAM
    program.write_text(DEAF_ONCE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(storage_daemon, "ASK_EVERY", 0.3)
    with StorageDaemon([], [], tmp_path) as daemon:
        pass
    assert daemon._process is not None
    assert daemon._process.returncode == 0


def test_a_daemon_that_does_not_end_in_time_is_killed_and_its_images_are_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / storage_daemon.PROGRAM
    program.write_text(STUBBORN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(storage_daemon, "_STOP", 0.2)
    monkeypatch.setattr(storage_daemon, "ASK_EVERY", 0.1)
    daemon = StorageDaemon([], [], tmp_path)
    with pytest.raises(RestoreError, match="storage-daemon ended with -9: still writing"), daemon:
        pass
    assert daemon._process is not None
    assert not Path(f"/proc/{daemon._process.pid}").exists()


def test_a_watcher_asks_again_and_ends_with_what_it_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_daemon, "ASK_EVERY", 0.2)
    (program := tmp_path / "deaf daemon").write_text(DEAF_ONCE)
    program.chmod(0o755)
    with subprocess.Popen([program, "", tmp_path / "pid"]) as process:
        wait_for((tmp_path / "pid").exists, "the process to be deaf")
        watcher = Watcher(process.pid)
        watcher._process.stdin.close()  # as when we die
        assert process.wait(10) == 0
        watcher._process.wait(10)
