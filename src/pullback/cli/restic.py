# SPDX-License-Identifier: Apache-2.0
"""restic, called from the command line: what it prints is passed on as it comes, or becomes JSON lines."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from pullback.cli import options as opt
from pullback.cli.interrupts import run_interruptible
from pullback.cli.passwords import repository_access
from pullback.cli.reporter import Reporter, silence
from pullback.engine.events import Note
from pullback.errors import Damaged, UsageError, WrongPassword

if TYPE_CHECKING:
    from pullback.engine.restic import RepositoryAccess, Sink
    from pullback.repository.repository import Repository
    from pullback.repository.snapshots import Snapshot


class OnRepository:
    """The repository that a command line names, and how the command is to talk."""

    def __init__(
        self,
        repo: str | None,
        password_file: str | None,
        password_command: str | None,
        config: str | None,
        *,
        json: bool,
        lock_retry: float = 0.0,
    ) -> None:
        self._options = opt.repository_options(repo, password_file, password_command, opt.load_config(config))
        self.access: RepositoryAccess = repository_access(self._options)
        self.json = json
        self.reporter = Reporter(json)
        self._lock_retry = lock_retry

    def open(self) -> Repository:
        """Open it: what is wrong with location, password or config is then said in our words."""
        return self.access.open()

    def another(
        self, source: Repository, location: str, password_file: str | None, password_command: str | None
    ) -> RepositoryAccess:
        """A second repository, by default with the password of ``source``, the first; opened once.

        UsageError if it is the first.
        """
        from pullback.cli.passwords import RepositoryOptions
        from pullback.engine.restic import RepositoryAccess

        if password_file or password_command:
            found = repository_access(RepositoryOptions(location, password_file, password_command))
        else:
            found = RepositoryAccess(location, self.access.password)
        try:
            opened = found.open()
        except WrongPassword as error:
            raise WrongPassword(
                f"no key of the other repository, {location}, opens with the password for it",
                means="Nothing was copied.",
                todo="Give its own with --to-password-file or --to-password-command.",
            ) from error
        if opened.id == source.id:
            raise UsageError(
                f"{location} is the repository that is copied from, or a copy of its files",
                means="Nothing was copied.",
                todo="Name another one with --to; pullback init makes one.",
            )
        return found

    def find(self, repository: Repository, specs: Sequence[str], domain: str | None = None) -> list[Snapshot]:
        """The backups called so, each once; all of pullback's if none is named.  Broken snapshot files are told."""
        from pullback.engine.forgetting import TAG

        files = repository.snapshot_files().of(domain)
        found = [files.find(spec) for spec in specs] or [one for one in files.readable if TAG in one.tags]
        for damage in files.broken.values():
            self.tell_damage(damage)
        return list({one.id: one for one in found}.values())

    def tell_damage(self, error: Damaged) -> None:
        """Tell what was passed over."""
        self.reporter.emit(Note(str(error)))

    def restic(
        self,
        arguments: Sequence[str],
        *,
        quiet: bool = False,
        repository: RepositoryAccess | None = None,
        source: RepositoryAccess | None = None,
    ) -> list[Any]:
        """Run restic; returns what it printed as JSON if it was asked to, by us (``quiet``) or with ``--json``.

        Everything else it prints is passed on: as it is, or as notes with ``--json``.
        """
        from pullback.engine.restic import Restic

        lines, words = _Lines(self.reporter), _Lines(self.reporter)
        collect = quiet or self.json
        work = Restic(
            [*arguments, "--json"] if self.json and "--json" not in arguments else arguments,
            repository or self.access,
            source=source,
            out=lines.feed if collect else None if sys.stdout.isatty() else _pass_on(sys.stdout.buffer),
            err=words.feed if self.json else _pass_on(sys.stderr.buffer),
            lock_retry=self._lock_retry,
            waiting=lambda note: self.reporter.emit(Note(note)),
        )
        try:
            run_interruptible(asyncio.to_thread(work.run), stop=work.stop)
        finally:
            lines.end()
            words.end()
        return lines.values

    def show(self, command: str, arguments: Sequence[str], **more: Any) -> None:
        """Open the repository, run restic on it, and with ``--json`` print its JSON as the result."""
        self.open()
        values = self.restic(arguments, **more)
        if self.json:
            self.reporter.result({"event": "restic", "command": command, "output": values})


class _Lines:
    """Takes what restic prints: lines of JSON are collected, others become notes."""

    def __init__(self, reporter: Reporter) -> None:
        self.values: list[Any] = []
        self._reporter = reporter
        self._rest = b""

    def feed(self, piece: bytes) -> None:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._take(line)

    def end(self) -> None:
        """What came after the last end of a line counts, too."""
        self._take(self._rest)
        self._rest = b""

    def _take(self, line: bytes) -> None:
        text = line.decode(errors="replace").strip()
        if text[:1] in ("{", "[") or text == "null":
            try:
                self.values.append(json.loads(text))
                return
            except (ValueError, RecursionError):
                pass  # "[0:00] 100%": it only looked like it
        if text:
            self._reporter.emit(Note(text))


def _pass_on(stream: BinaryIO) -> Sink:
    """Write to one of our streams; when its reader is gone the work goes on unheard."""
    gone = threading.Event()

    def write(piece: bytes) -> None:
        if gone.is_set():
            return
        try:
            stream.write(piece)
            stream.flush()
        except OSError:
            gone.set()
            silence(sys.stdout if stream is sys.stdout.buffer else sys.stderr)

    return write
