# SPDX-License-Identifier: Apache-2.0
"""The command ``boot``."""

from __future__ import annotations

import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pullback.cli import options as opt
from pullback.cli.interrupts import run_interruptible
from pullback.cli.passwords import repository_opener
from pullback.cli.reporter import Reporter
from pullback.model.units import human_seconds

if TYPE_CHECKING:
    from pullback.engine.boot import BootResult
    from pullback.engine.events import Booted, Event
    from pullback.plan.boot import Console


def boot(
    backup_id: opt.Backup,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- QEMU-ARGUMENTS]", help="QEMU's; they replace pullback's that name the same"),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Keep what the domain writes, in images here, and copy the rest"),
    ] = None,
    disk: opt.Disks = None,
    qemu: Annotated[
        str, typer.Option("--qemu", metavar="PROGRAM", help="The QEMU to boot with")
    ] = "qemu-system-x86_64",
    work: Annotated[
        str, typer.Option("--work", metavar="DIR", help="Where images that are thrown away are made")
    ] = "/var/tmp",
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    cache_dir: opt.CacheDir = None,
    no_cache: opt.NoCache = False,
    lock_retry: opt.LockRetry = 0.0,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """Run a backup as a VM at once: it reads what it needs from the repository."""
    where = opt.repository_options(repo, password_file, password_command, opt.load_config(config))
    opener = repository_opener(where, opt.cache_options(cache_dir, no_cache, json))
    from pullback.engine.boot import Boot, BootRequest

    reporter, console = Reporter(json), _console(json)
    teller = _Teller(reporter, console)
    request = BootRequest(backup_id, to, tuple(disk or ()), qemu, tuple(arguments or ()), console, work, lock_retry)
    work_to_do = Boot(request, opener, teller.tell)
    with reporter.working(), _terminal_as_it_was(console):
        result = run_interruptible(work_to_do.run(), stop=work_to_do.stop)
    reporter.answer(_result_json(result), [_result_line(result, to)])


def _console(json: bool) -> Console:
    """Where the domain's serial port belongs: at a terminal to it; where our output is for programs at neither."""
    if json:
        return "socket"
    return "terminal" if sys.stdin.isatty() and sys.stdout.isatty() else "output"


@contextmanager
def _terminal_as_it_was(console: Console) -> Iterator[None]:
    """A QEMU that is killed leaves the terminal raw."""
    if console != "terminal":
        yield
        return
    modes = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)


class _Teller:
    """Tells of a boot; no bar on a terminal that is the domain's."""

    def __init__(self, reporter: Reporter, console: Console) -> None:
        self._reporter = reporter
        self._console = console

    def tell(self, event: Event) -> None:
        from pullback.engine.events import Booted, Progress, Streamed

        if isinstance(event, Booted):
            self._reporter.answer(event.to_json(), list(self._booted_lines(event)))
        elif isinstance(event, Streamed):
            line = (
                f"all of backup {event.backup[:8]} is copied ({human_seconds(event.seconds)}); the images stand alone"
            )
            self._reporter.answer(event.to_json(), [line])
        elif not (isinstance(event, Progress) and self._console == "terminal"):
            self._reporter.emit(event)

    def _booted_lines(self, event: Booted) -> Iterator[str]:
        yield f"booted backup {event.backup[:8]}: QEMU is process {event.pid}, its monitor {event.qmp}"
        if event.kept:
            yield f"what it writes is kept in {Path(event.images[0]).parent}"
        else:
            yield "what it writes is thrown away at the end; --to DIR would keep it"
        if self._console == "terminal":
            yield "this terminal is its serial port: Ctrl-A X ends it, Ctrl-A H helps"


def _result_json(result: BootResult) -> dict[str, Any]:
    return {
        "event": "ended",
        "backup": result.backup,
        "images": list(result.images) if result.kept else [],
        "left": list(result.left),
        "seconds": round(result.seconds, 3),
    }


def _result_line(result: BootResult, to: Path | None) -> str:
    if not result.kept:
        return "the domain has ended; what it wrote is thrown away"
    if not result.left:
        return f"the domain has ended; the images in {to} stand alone"
    return (
        f"the domain has ended; not all of {', '.join(result.left)} is copied yet. The same command goes on, and"
        f" pullback restore {result.backup[:8]} --instant --to {to} copies the rest without booting"
    )
