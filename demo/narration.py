# SPDX-License-Identifier: Apache-2.0
"""What the demo says: numbered steps with their durations, in plain lines: the same on a terminal and in a pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pullback.model.units import human_seconds

_INDENT = "   "


class DemoFailed(Exception):
    """Something is not as it has to be; the message says what, for people."""


class Narrator:
    """Prints to standard output; ``title`` is the step that is under way."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._number = 0
        self.title = "the beginning"

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One step of the demo: its title before, how long it took after."""
        self._number += 1
        self.title = f"step {self._number} ({title})"
        began = time.monotonic()
        self._print(f"{self._number}. {title}")
        yield
        self.say(f"took {human_seconds(time.monotonic() - began)}")

    def say(self, line: str) -> None:
        """One line about the step that is under way."""
        self._print(_INDENT + line)

    def command(self, line: str, output: str) -> None:
        """A command and what it printed, as somebody at a terminal would see it."""
        self.say(f"$ {line}")
        for said in filter(str.strip, output.splitlines()):
            self.say(f"  {said}")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Aligned columns; the first two to the left, figures to the right."""
        lines = [header, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        self._print("")
        for line in lines:
            cells = [
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            self._print("  ".join(cells).rstrip())

    def end(self) -> None:
        """The last line."""
        self._print(f"\nAll as it has to be, in {human_seconds(time.monotonic() - self._began)}.")

    def _print(self, line: str) -> None:
        print(line, flush=True)
