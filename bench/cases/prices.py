# SPDX-License-Identifier: Apache-2.0
"""Case 11: what a proof costs a backup, and what telling how far it is.

Full backups of the disk of all cases, each into an empty repository; a bar is drawn on a terminal of its own.
"""

from __future__ import annotations

import os
import pty
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from bench.cases.backups import domain
from bench.harness import Bench, BenchError, Case, Peer, Race, Run
from bench.rivals import OURS, Pullback
from lab.qemu import BareQemu

PROOF, PROGRESS = 2.0, 1.03


class Backups:
    """Full backups of a domain, as a user at a terminal makes them."""

    def __init__(self, bench: Bench, qemu: BareQemu) -> None:
        self._program, self._qemu, self._place = Pullback(bench), qemu, bench.place

    def at_a_terminal(self, *program: str, prove: bool = False) -> Run:
        """One, with processor seconds of the process alone."""
        self._program.reset()
        command = [*program, "backup", f"qmp:{self._qemu.qmp_path}", "--full", "--scratch", str(self._place)]
        command += ["--prove=all"] if prove else []
        begin = time.perf_counter()
        pid, terminal = pty.fork()
        if not pid:  # pragma: no cover
            os.execve(command[0], command, {**self._program.env, "TERM": "xterm"})
        shown = threading.Thread(target=_swallow, args=(terminal,))
        shown.start()
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - begin
        shown.join()
        os.close(terminal)
        if status:
            raise BenchError(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
        return Run(seconds, usage.ru_utime + usage.ru_stime, peak_mib=usage.ru_maxrss / 1024)


def _swallow(terminal: int) -> None:
    with suppress(OSError):  # EIO: its other end was closed
        while os.read(terminal, 1 << 16):
            pass


@contextmanager
def proving(bench: Bench) -> Iterator[Race]:
    """--prove=all beside none."""
    with domain(bench) as qemu:
        backups = Backups(bench, qemu)
        yield Race(
            ours=lambda: backups.at_a_terminal(OURS, prove=True),
            peers=(
                Peer("without --prove", lambda: backups.at_a_terminal(OURS), PROOF),
                Peer("without --prove", lambda: backups.at_a_terminal(OURS), PROOF, "cpu"),
            ),
        )


@contextmanager
def telling(bench: Bench) -> Iterator[Race]:
    """A bar, five times a second, beside none."""
    silent = (sys.executable, "-m", "bench.progressless")
    with domain(bench) as qemu:
        backups = Backups(bench, qemu)
        yield Race(
            ours=lambda: backups.at_a_terminal(OURS),
            peers=(
                Peer("without a bar", lambda: backups.at_a_terminal(*silent), PROGRESS),
                Peer("without a bar", lambda: backups.at_a_terminal(*silent), PROGRESS, "cpu"),
            ),
        )


CASES = [Case("11", "proof", proving, (2,)), Case("11", "progress", telling, (2,))]
