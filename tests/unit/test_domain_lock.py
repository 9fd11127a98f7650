# SPDX-License-Identifier: Apache-2.0
"""The lock of a domain where its directory, its holder or its file is not what one expects."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pullback.engine import domain_lock as module
from pullback.engine.domain_lock import domain_lock, lock_directory, qemu_identity
from pullback.errors import DomainBusy, UsageError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock directory of somebody who is not root."""
    user = os.geteuid()
    monkeypatch.setattr(module.os, "geteuid", lambda: user or 1)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    directory = tmp_path / "pullback"
    directory.mkdir(0o700)
    os.chown(directory, user or 1, -1)
    return directory


def test_no_place_for_locks_is_said(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    with pytest.raises(UsageError, match=f"cannot make the lock directory {tmp_path}/gone/pullback: No such file"):
        lock_directory()


def test_a_listener_that_is_gone_is_told_by_its_socket(tmp_path: Path) -> None:
    identities = set()
    for name in ("a", "b"):
        path = str(tmp_path / name)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            # The kernel says 0 of a process in another namespace.
            identities.add(qemu_identity(0, path))
            assert qemu_identity(0, path) == qemu_identity(os.getpid(), path)
    assert len(identities) == 2
    assert all(identity.startswith("socket-") for identity in identities)


def test_a_lock_that_is_let_go_of_at_that_moment_is_made_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch, handles: Callable[[], dict[int, str]]
) -> None:
    """Its holder removes the file that we have just opened: locking that one would exclude nobody."""
    path = place / "d.lock"
    locked: list[int] = []

    def flock(handle: int, how: int) -> None:
        locked.append(handle)
        if len(locked) == 1:
            path.unlink()
        fcntl_flock(handle, how)

    fcntl_flock = fcntl.flock
    monkeypatch.setattr(module.fcntl, "flock", flock)
    before = handles().items()
    with domain_lock("d", "web"):
        assert path.read_text() == f"{os.getpid()}\n"
        assert len(locked) == 2
        assert [link for _, link in handles().items() - before] == [str(path)]
        with (
            pytest.raises(DomainBusy, match=rf"process {os.getpid()}\) is working on domain web"),
            domain_lock("d", "web"),
        ):
            pass
    assert not list(place.iterdir())
    assert handles().items() <= before


def test_a_holder_that_ends_before_it_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: Any) -> None:
        (place / "d.lock").unlink()
        raise BlockingIOError

    monkeypatch.setattr(module.fcntl, "flock", busy)
    with pytest.raises(DomainBusy, match=r"process \?\) is working on domain web"), domain_lock("d", "web"):
        pass
