# SPDX-License-Identifier: Apache-2.0
"""The commands a user would type: pullback's own, and restic's on the same repository."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.interrupts import held_back
from demo.narration import DemoFailed, Narrator

PULLBACK = Path(sys.executable).with_name("pullback")
LIMIT = 120.0
"""Seconds that any command may take; then it is killed."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What ``pullback backup --json`` said of a backup; ``seconds`` without the time it was held."""

    id: str
    mode: str
    bytes_read: int
    bytes_stored: int
    seconds: float
    paused_ms: float


class Commands:
    """Runs commands in ``place``, with a repository and its password set up by restic's own variables."""

    def __init__(self, place: Path, narrator: Narrator) -> None:
        self._place = place
        self._narrator = narrator
        (place / "password").write_text(secrets.token_hex(16) + "\n")
        (place / "config.toml").write_text("")  # whatever the user's own file says
        self._scratch = place / "scratch"
        self._scratch.mkdir()
        self._env = {key: value for key, value in os.environ.items() if not key.startswith("RESTIC_")} | {
            "RESTIC_REPOSITORY": "repository",
            "RESTIC_PASSWORD_FILE": "password",
            "PULLBACK_CONFIG": "config.toml",
            "PULLBACK_CACHE_DIR": "cache",
        }

    def show(self, *command: str) -> None:
        """Run a command and show it with what it printed; DemoFailed unless it ends with 0."""
        with self._started(command, merge=True) as child:
            assert child.stdout is not None
            output = child.stdout.read()
            code = child.wait()
        self._narrator.command(shlex.join(command), output)
        if code:
            raise DemoFailed(f"{shlex.join(command)} ended with {code}")

    def backup(self, socket: Path, at_freeze: Callable[[], None]) -> Backup:
        """Back up the domain behind ``socket``; ``at_freeze`` runs the moment the disks are frozen.

        pullback itself stands still (SIGSTOP) while ``at_freeze`` runs: whatever that makes the guest write is written
        before pullback reads, the hardest order there is, and not left to luck.
        """
        command = ("pullback", "backup", f"qmp:{socket}", "--scratch", str(self._scratch), "--json")
        self._narrator.command(shlex.join(command), "")
        held = None
        last: dict[str, Any] = {}
        with self._started(command) as child:
            assert child.stdout is not None
            for line in child.stdout:
                last = json.loads(line)
                if last["event"] == "frozen":
                    held = _hold(child, at_freeze)
            code = child.wait()
        if code:
            raise DemoFailed(f"pullback backup ended with {code}: {last.get('message', 'without a word')}")
        if last.get("event") != "backup" or held is None:
            raise DemoFailed(f"pullback backup ended without an event 'frozen' and an event 'backup': {last}")
        modes = {disk["mode"] for disk in last["disks"]}
        return Backup(
            last["id"],
            modes.pop() if len(modes) == 1 else "mixed",
            last["bytes_read"],
            last["bytes_stored"],
            last["seconds"] - held,
            last["paused_ms"],
        )

    @contextmanager
    def _started(self, command: tuple[str, ...], merge: bool = False) -> Iterator[subprocess.Popen[str]]:
        """A running command, ended in any case: by the kernel when we die, and when it takes too long."""
        program = str(PULLBACK) if command[0] == "pullback" else command[0]
        with ExitStack() as stack:
            with held_back():
                child = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", program, *command[1:]],
                    cwd=self._place,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT if merge else None,
                    text=True,
                )
                limit = threading.Timer(LIMIT, child.kill)
                stack.callback(_end, child, limit)
                limit.start()
            yield child


def _end(child: subprocess.Popen[str], limit: threading.Timer) -> None:
    limit.cancel()
    child.kill()
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _hold(child: subprocess.Popen[str], meanwhile: Callable[[], None]) -> float:
    """Let a process stand still while ``meanwhile`` runs; for how many seconds it did."""
    began = time.monotonic()
    child.send_signal(signal.SIGSTOP)
    meanwhile()
    child.send_signal(signal.SIGCONT)
    return time.monotonic() - began
