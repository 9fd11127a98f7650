# SPDX-License-Identifier: Apache-2.0
"""How events and results reach the user: a progress bar on a terminal, plain lines elsewhere, JSON lines for programs.

Results go to standard output; progress and notes to standard error, so that a pipe gets only what was asked for.  With
``--json`` everything, errors too, is JSON lines on standard output.

A reader that has gone away ends nothing: the work goes on unheard, and the exit code says how it ended.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from pullback.errors import PullbackError
from pullback.model.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from pullback.engine.events import Event, Progress
    from pullback.plan.command import Plan

#: Control characters, those that change the direction of text or end a line, and halves of characters.
_UNSEEN = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
#: Seconds between two lines of progress where there is no terminal.
_PLAIN_EVERY = 5.0


class Reporter:
    """Takes events from any thread; use as a context manager around the work."""

    def __init__(self, json_lines: bool) -> None:
        self._json = json_lines
        self._lock = threading.Lock()
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._plain_due = 0.0
        self._began = time.monotonic()
        self._work = ""

    @contextmanager
    def working(self) -> Iterator[Reporter]:
        """Show progress while the block runs."""
        try:
            yield self
        finally:
            if self._bar is not None:
                with suppress(OSError):
                    self._bar.stop()
                self._bar = None

    def emit(self, event: Event) -> None:
        """Tell one event."""
        # No event comes before a password is tried; that begins the sooner.
        from pullback.engine.events import Progress

        with self._lock:
            if self._json:
                self.result(event.to_json())
            elif isinstance(event, Progress):
                self._progress(event)
            elif (line := _sentence(event)) is not None:
                self._say(line)

    def result(self, value: dict[str, Any]) -> None:
        """Print a JSON object on a line of its own."""
        _print_result([json.dumps(value, ensure_ascii=False)])

    def answer(self, value: dict[str, Any], lines: Sequence[str]) -> None:
        """Print what was asked for: the object with ``--json``, else the lines."""
        if self._json:
            self.result(value)
        else:
            _print_result(lines)

    def plan(self, plan: Plan) -> None:
        """Print the commands of a plan that is not carried out, each with its reason."""
        for step in plan.commands():
            command = {"execute": step.execute, "arguments": dict(step.arguments)}
            if self._json:
                self.result({"event": "command", "why": step.why, **command})
            else:
                _print_result([f"# {step.why}", json.dumps(command, ensure_ascii=False)])

    def trace(self, command: str, arguments: Mapping[str, Any], reply: Any) -> None:
        """Print an operation (``command`` is empty), or a command and its reply; of the schema only how long it is."""
        if command == "query-qmp-schema":
            reply = f"{len(reply)} entries"
        if self._json:
            self.result({"event": "trace", "command": command, "arguments": dict(arguments), "reply": reply})
        elif not command:
            given = ", ".join(f"{name}={value!r}" for name, value in arguments["arguments"].items())
            self._say(f"{arguments['call']}({given})")
        else:
            self._say(f"  -> {json.dumps({'execute': command, 'arguments': dict(arguments)}, ensure_ascii=False)}")
            self._say(f"  <- {json.dumps(reply, ensure_ascii=False)}")

    def error(self, message: str, exit_code: int) -> None:
        """Tell why it failed."""
        if self._json:
            self.result({"event": "error", "message": message, "exit_code": exit_code})
        else:
            self._say(f"pullback: {message}")

    def _say(self, line: str) -> None:
        line = visible(line)
        try:
            if self._bar is not None:
                self._bar.console.print(line, markup=False, highlight=False)
            else:
                print(line, file=sys.stderr, flush=True)
        except OSError:  # a closed pipe, or a terminal that is gone
            silence(sys.stderr)

    def _progress(self, event: Progress) -> None:
        if event.work != self._work:
            self._next_work(event)
        if sys.stderr.isatty():
            self._move_bar(event)
            return
        now = time.monotonic()
        if event.done >= event.total or now < (self._plain_due or now + _PLAIN_EVERY):
            self._plain_due = self._plain_due or now + _PLAIN_EVERY
            return
        self._plain_due = now + _PLAIN_EVERY
        rate = self._rate(event)
        eta = f", {human_seconds((event.total - event.done) / rate)} to go" if rate else ""
        self._say(f"{event.work}: {human_bytes(event.done)} of {human_bytes(event.total)}, {human_bytes(rate)}/s{eta}")

    def _next_work(self, event: Progress) -> None:
        """Count from here: what was done before says nothing of this work's rate."""
        if self._work:
            self._began = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, total=event.total, description=event.work)
        self._work = event.work

    def _move_bar(self, event: Progress) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                refresh_per_second=4,
            )
            self._bar.start()
            self._task = self._bar.add_task(event.work, total=event.total, rate="")
        assert self._task is not None
        rate = f"{human_bytes(self._rate(event))}/s"
        self._bar.update(self._task, completed=event.done, total=event.total, rate=rate)

    def _rate(self, event: Progress) -> float:
        """Bytes per second since the work began."""
        return event.done / max(time.monotonic() - self._began, 0.001)


def silence(stream: TextIO) -> None:
    """Let what is printed to ``stream`` from here on go nowhere; Python would complain once more at its final flush."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def visible(text: str) -> str:
    """Text as it may be shown, on one line: names in a repository are whatever somebody wrote into it.

    What would move a terminal's cursor, change its title or turn the order of letters round is written as in JSON; a
    JSON text means the same as before.
    """
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def settle_standard_streams() -> None:
    """Let standard streams that whoever called us has closed lead nowhere; what no character set can show is escaped.

    A closed one is a number without a file: the next file that is opened, one of a repository for instance, would get
    it, and what is printed, by restic too, would be written there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number: this one
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _print_result(lines: Sequence[str]) -> None:
    try:
        print("\n".join(visible(line) for line in lines), flush=True)
    except BrokenPipeError:
        silence(sys.stdout)
    except OSError as error:
        silence(sys.stdout)
        raise PullbackError(f"cannot write to standard output: {error.strerror}") from error


def _sentence(event: Event) -> str | None:
    from pullback.engine.events import DiskPlanned, Frozen, Note

    match event:
        case Note(message):
            return message
        case DiskPlanned(disk, mode, reason, virtual_size):
            return f"{disk}: {mode} ({reason}), {human_bytes(virtual_size)}"
        case Frozen(instant, _, paused_ms):
            pause = f", the domain stood still for {paused_ms:.1f} ms" if paused_ms else ", the domain was not paused"
            return f"frozen at {instant}{pause}"
        case _:
            return None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned columns, the same on a terminal and in a pipe."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
