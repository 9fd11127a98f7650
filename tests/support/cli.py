# SPDX-License-Identifier: Apache-2.0
"""What tests of the command line need: a repository with something in it, and a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.backups import new_repository, store_backup
from tests.support.product import Stage

MANIFEST = {
    "format": 1,
    "domain": "web",
    "uuid": "",
    "time": "2026-05-04T03:02:01+00:00",
    "consistency": "crash",
    "qemu": "7.2.0",
    "pullback": "0.1.0",
    "segment_size": 256 << 20,
    "disks": [
        {
            "target": "vda",
            "virtual_size": 1 << 20,
            "checkpoint": None,
            "mode": "full",
            "reason": "for a test",
            "base": None,
            "source_format": "raw",
            "bytes_read": 1 << 20,
            "bytes_new": 1 << 20,
            "bytes_zero": 0,
        }
    ],
    "skipped": [],
}


def filled_stage(place: Path) -> Stage:
    """A stage whose repository holds one backup, of domain web with disk vda of 1 MiB; made without QEMU."""
    stage = Stage(place)
    stage.repo = place / "filled"
    repository = new_repository(stage.repo)
    with repository.lock():
        store_backup(repository, {"vda": [os.urandom(1 << 20)]}, manifest=json.dumps(MANIFEST).encode())
    return stage


class Terminal:
    """A command that runs on a terminal of its own; ended with the block if it still runs."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self.shown = b""
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            try:
                os.execve(argv[0], list(argv), dict(environment))
            finally:
                os._exit(127)
        self._waited = False

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._terminal)
        if not self._waited:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def read_until(self, what: bytes | None, timeout: float = 30) -> bool:
        """Read what it shows until that holds ``what``, or to its end; whether ``what`` came."""
        deadline = time.monotonic() + timeout
        while what is None or what not in self.shown:
            ready, _, _ = select.select([self._terminal], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"{what!r} did not come, but {self.shown!r}")
            try:
                self.shown += os.read(self._terminal, 65536)
            except OSError:  # nobody has the other end any more
                return False
        return True

    def type(self, line: str) -> None:
        """Type a line."""
        os.write(self._terminal, line.encode() + b"\n")

    def end(self) -> tuple[int, str]:
        """Read to the end; the exit code and all that was shown."""
        self.read_until(None)
        self._waited = True
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1]), self.shown.decode()
