# SPDX-License-Identifier: Apache-2.0
"""Processes that do not outlive the one who started them, and waiting that has a deadline."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

POLL = 0.004
"""Seconds between two looks at a condition that nothing announces (a socket file appearing, a process ending)."""


class LabError(Exception):
    """Something in the laboratory went wrong; the message holds what is needed to see why."""


class LabTimeout(LabError):
    """A condition did not come true within its time limit."""


def wait_for(condition: Callable[[], T | None], what: str, timeout: float = 10.0) -> T:
    """Call ``condition`` until it returns something true, and return that.

    ``timeout`` is in seconds.  Raises LabTimeout naming ``what``; whatever the condition raises goes through.
    """
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise LabTimeout(f"{what}: not within {timeout:g} s")
        time.sleep(POLL)


def run(argv: Sequence[str | Path], *, timeout: float = 120.0, cwd: Path | None = None) -> bytes:
    """Run a command to its end and return its standard output; LabError holds what it said if it failed.

    mkfs and its kin are where only root's PATH leads, and need no root.
    """
    env = {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False, cwd=cwd, env=env
        )
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]} is not installed; scripts/setup installs what the laboratory needs") from error
    except subprocess.TimeoutExpired as error:
        raise LabTimeout(f"{argv[0]}: not done within {timeout:g} s") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise LabError(f"{' '.join(map(str, argv))}: exit code {done.returncode}: {said}")
    return done.stdout


class Process:
    """A child process whose output goes to a file, line by line.

    When started from the main thread the kernel also ends it when we die, however we die; from another thread that
    would end it together with the thread (PR_SET_PDEATHSIG is about threads), so there it is left out.
    """

    def __init__(self, argv: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None) -> None:
        self.argv = list(argv)
        self.log = log
        # QEMU's `qemu-io` prints to standard output, which a file would make fully buffered.
        full = ["stdbuf", "-oL", *argv]
        if threading.current_thread() is threading.main_thread():
            full = ["setpriv", "--pdeathsig", "KILL", *full]
        with log.open("ab") as out:
            self._child = subprocess.Popen(
                full,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs, the exit code, or minus the signal that ended it."""
        return self._child.poll()

    def running(self) -> bool:
        return self.returncode is None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = 10.0) -> int:
        """Wait for the end and return the exit code; LabTimeout leaves it running."""
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise LabTimeout(f"{self.argv[0]} (pid {self.pid}) still runs after {timeout:g} s") from error

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self._child.wait()

    def end(self, grace: float = 3.0) -> None:
        """SIGTERM, then SIGKILL after ``grace`` seconds; gone when this returns."""
        self.signal(signal.SIGTERM)
        try:
            self._child.wait(grace)
        except subprocess.TimeoutExpired:
            self.kill()
