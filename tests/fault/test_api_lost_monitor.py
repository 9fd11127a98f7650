# SPDX-License-Identifier: Apache-2.0
"""The monitor lost in the middle of a command: one clear error, and the next command clears what is left."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from lab.qemu import BareQemu
from pullback.engine.domain_lock import domain_lock, qemu_identity
from pullback.qemu import monitor as monitor_module
from tests.support.api import Api, difference, state_of
from tests.support.product import MIB, Stage, run_state

Start = Callable[..., BareQemu]
SIZE = 2 * MIB


class Proxy:
    """Between pullback and QEMU: hands everything on until the ``count``-th changing command.

    Then ``how`` is "cut" (both ends closed at once), "deaf" (it reaches QEMU, no reply comes back) or "lost" (it never
    reaches QEMU, and no reply comes).
    """

    def __init__(self, path: Path, qmp: Path, count: int, how: str) -> None:
        self.path, self._qmp, self._left, self._how = path, qmp, count, how
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._links: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(self._qmp))
                self._links += [client, server]
                deaf = threading.Event()
                for work in (self._commands, self._replies):
                    thread = threading.Thread(target=work, args=(client, server, deaf))
                    self._threads.append(thread)
                    thread.start()

    def _commands(self, client: socket.socket, server: socket.socket, deaf: threading.Event) -> None:
        with contextlib.suppress(OSError):
            for line in client.makefile("rb"):
                if b'"query-' not in line and b'"qom-get"' not in line and b"qmp_capabilities" not in line:
                    self._left -= 1
                    if self._left == 0:
                        deaf.set()
                        if self._how == "deaf":
                            server.sendall(line)
                        if self._how == "cut":
                            break
                        continue
                if not (deaf.is_set() and self._how == "lost"):
                    server.sendall(line)
        for link in (client, server):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def _replies(self, client: socket.socket, server: socket.socket, deaf: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if not deaf.is_set():
                    client.sendall(data)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for link in self._links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for link in self._links:
            link.close()
        self.path.unlink()


@contextlib.contextmanager
def _through(api: Api, count: int, how: str) -> Iterator[None]:
    """Commands go through a proxy, and a reply has to come soon."""
    proxy = Proxy(api.stage.place / "proxy", api.qemu.qmp_path, count, how)
    direct, api.domain = api.domain, f"qmp:{proxy.path}"
    defaults = monitor_module.Monitor.execute.__defaults__
    assert defaults is not None
    try:
        with mock.patch.object(monitor_module.Monitor.execute, "__defaults__", (*defaults[:-1], 1.0)):
            yield
    finally:
        api.domain = direct
        proxy.close()


@pytest.fixture
def api(lab_dir: Path, bare_qemu: Start) -> Api:
    stage = Stage(lab_dir)
    return Api(stage, bare_qemu([stage.disk("vda", SIZE), stage.disk("vdb", SIZE)], running=True))


@pytest.mark.parametrize("how", ["cut", "deaf", "lost"])
@pytest.mark.parametrize("count", [1, 10, 16])
def test_the_monitor_is_lost_while_a_snapshot_is_made(api: Api, how: str, count: int) -> None:
    before = state_of(api.qemu)
    with _through(api, count, how):
        words = ("snapshot", "create", "s", "--scratch", api.stage.scratch, "--checkpoint", "one")
        done = api.attempt(*words)
    assert done.code == 4, done.err
    assert done.err.count("pullback: ") == 1 and "Traceback" not in done.err
    api.do("recover", "")
    for one in api.do("checkpoint", "list")["checkpoints"]:
        api.do("checkpoint", "delete", one["name"])
    assert difference(state_of(api.qemu), before) == []
    assert run_state(api.qemu) == "running"
    api.snapshot("s")
    api.do("snapshot", "delete", "s")
    assert api.clean() == []


def test_qemu_is_killed_in_the_middle(api: Api) -> None:
    stage, qemu = api.stage, api.qemu
    ended = threading.Event()

    def trace(self: object, command: str, *_: object) -> None:
        if command == "blockdev-add" and not ended.is_set():
            ended.set()
            qemu.kill()

    with mock.patch.object(monitor_module.Monitor, "_note", trace):
        done = api.attempt("snapshot", "create", "s", "--scratch", stage.scratch, "--checkpoint", "one")
    assert done.code == 4 and done.err.count("pullback: ") == 1, done.err
    qemu.start()
    qemu.qmp("cont")
    api.snapshot("s", "--checkpoint", "one")
    api.do("snapshot", "delete", "s")
    assert api.clean() == []


def test_two_at_once(api: Api) -> None:
    """The second one says which process holds the domain."""
    with domain_lock(qemu_identity(api.qemu.pid, str(api.qemu.qmp_path)), "web"):
        done = api.attempt("snapshot", "create", "s", env={})
    assert done.code == 4 and f"another pullback (process {os.getpid()})" in done.err
