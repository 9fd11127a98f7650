# SPDX-License-Identifier: Apache-2.0
"""Between pullback and QEMU's monitor: cuts the connection after a byte, or holds back or loses a reply."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from pullback.qemu.monitor import REPLY_TIMEOUT, Monitor
from tests.support.dying import changes_something

How = Literal["cut", "late", "deaf", "lost"]


class MonitorProxy:
    """Hands everything on until it does, once, what it was made for; later connections are left alone.

    With ``cut_after`` the connection is closed when that many bytes went through, in both directions together.  With
    ``count``, at the ``count``-th command that changes something, ``how`` is "cut" (both ends closed instead), "late"
    (it reaches QEMU, what QEMU says comes once ``overdue`` is set), "deaf" (it reaches QEMU, no reply comes back) or
    "lost" (it never reaches QEMU, and no reply comes).
    """

    def __init__(self, path: Path, qmp: Path, count: int = 0, how: How = "cut", cut_after: int | None = None) -> None:
        self.path, self._qmp, self._left, self._how, self._cut_after = path, qmp, count, how, cut_after
        self.overdue = threading.Event()
        #: Whether QEMU answered the command whose reply does not come, or not in time.
        self.answered = threading.Event()
        #: How long each line was that went through, in bytes.
        self.lines: list[int] = []
        self.done = False
        self._passing = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._links: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def __enter__(self) -> MonitorProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                self._links += [client, server]
                server.connect(str(self._qmp))
                silent = threading.Event()
                for work in (self._commands, self._replies):
                    thread = threading.Thread(target=work, args=(client, server, silent))
                    self._threads.append(thread)
                    thread.start()

    def _pass(self, line: bytes, to: socket.socket) -> bool:
        """Hand a line on; False when the connection is cut in it."""
        with self._passing:
            self.lines.append(len(line))
            rest = None if self._cut_after is None else self._cut_after - (sum(self.lines) - len(line))
            if rest is None or self.done or rest > len(line):
                to.sendall(line)
                return True
            self.done = True
            to.sendall(line[:rest])
            return False

    def _commands(self, client: socket.socket, server: socket.socket, silent: threading.Event) -> None:
        with contextlib.suppress(OSError):
            for line in _commands_from(client):
                if self._is_the_one(line):
                    self.done = True
                    if self._how == "cut":
                        break
                    silent.set()
                if silent.is_set() and self._how == "lost":
                    continue
                if not self._pass(line, server):
                    break
        if silent.is_set() and self._how == "late":
            self.answered.wait(10)  # QEMU drops what it has not read yet when its client is gone
        _shut(client, server)

    def _is_the_one(self, line: bytes) -> bool:
        command = json.loads(line)["execute"]
        if command == "qmp_capabilities" or not changes_something(command):
            return False
        self._left -= 1
        return self._left == 0

    def _replies(self, client: socket.socket, server: socket.socket, silent: threading.Event) -> None:
        with contextlib.suppress(OSError):
            held: list[bytes] = []
            for line in server.makefile("rb"):
                held.append(line)
                if silent.is_set():
                    # Events may come first.
                    if b'"return"' not in line and b'"error"' not in line:
                        continue
                    self.answered.set()
                    if self._how != "late":
                        continue
                    self.overdue.wait(10)
                if not all(self._pass(one, client) for one in held):
                    break
                held.clear()
        _shut(client, server)

    def close(self) -> None:
        """End everything; nobody is to use it any more."""
        self.overdue.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(10)
        _shut(*self._links)
        for thread in self._threads:
            thread.join(10)
        for link in self._links:
            link.close()
        self.path.unlink()


def _commands_from(client: socket.socket) -> Iterator[bytes]:
    """Each command; nothing but its own end shows where it ends."""
    said = b""
    while data := client.recv(65536):
        said += data
        while said:
            try:
                end = json.JSONDecoder().raw_decode(said.decode())[1]
            except ValueError:
                break
            yield said[:end]
            said = said[end:].lstrip()


def _shut(*links: socket.socket) -> None:
    for link in links:
        with contextlib.suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def impatient(proxy: MonitorProxy, count: int, seconds: float = 0.1) -> Iterator[None]:
    """The ``count``-th command that changes something waits this long for its reply, which is overdue afterwards."""
    execute, left = Monitor.execute, count

    async def hurried(
        self: Monitor, command: str, arguments: Mapping[str, Any] | None = None, timeout: float = REPLY_TIMEOUT
    ) -> Any:
        nonlocal left
        left -= changes_something(command)
        if left or not changes_something(command):
            return await execute(self, command, arguments, timeout)
        try:
            return await execute(self, command, arguments, seconds)
        finally:
            proxy.overdue.set()

    with mock.patch.object(Monitor, "execute", hurried):
        yield
