# SPDX-License-Identifier: Apache-2.0
"""restic, called for what it does well: forget, prune, check, copy, keys, locks.

It gets the repository in its environment and the password through a pipe: nothing of it stands on a command line, in a
file, or in an environment that others of the same user, or restic's own children, could read.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pullback.errors import (
    DamageFound,
    PullbackError,
    RepositoryError,
    RepositoryLocked,
    RepositoryMissing,
    UsageError,
    WrongPassword,
)
from pullback.repository.crypto import Key
from pullback.repository.location import open_store
from pullback.repository.repository import Repository

#: The first version that knows format 2 and `copy --from-repo`.
OLDEST = (0, 14)

_RETRY_EVERY = 5.0
#: Of what restic says on standard error so much is kept, to tell failures apart.
_KEPT = 8192
_SETTINGS = (
    "RESTIC_REPOSITORY",
    "RESTIC_REPOSITORY_FILE",
    "RESTIC_PASSWORD",
    "RESTIC_PASSWORD_FILE",
    "RESTIC_PASSWORD_COMMAND",
)
#: How restic's words begin when somebody else has the lock; until 0.16, and from then on.
_LOCKED = (b"unable to create lock", b"Fatal: unable to create lock")
_HOLDER = re.compile("already locked (.+)")
#: What it says of a value that it cannot take.
_BAD_VALUE = re.compile(
    "^(?:Fatal: )?((?:invalid argument|invalid number of bytes|percentage for|check flags? |no matching ID found"
    "|multiple IDs with prefix|.+ does not exist$).*)",
    re.MULTILINE,
)
_READ_AGAIN = "See what restic said above; its own words are on standard error."

Sink = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class RepositoryAccess:
    """A repository's location and a password of it."""

    location: str
    password: str = field(repr=False)

    def open(
        self,
        cache: Path | None = None,
        warn: Callable[[str], None] | None = None,
        key: Callable[[], Key] | None = None,
    ) -> Repository:
        """Open it; as Repository.open."""
        return Repository.open(open_store(self.location), self.password, cache=cache, warn=warn, key=key)


def restic_program() -> str:
    """Where restic is; UsageError, saying what to install, when it is missing or too old."""
    path = shutil.which("restic")
    if path is None:
        raise UsageError("restic is not installed", todo="On Debian it is the package restic.")
    done = subprocess.run([path, "version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    version = re.match(r"restic (\d+)\.(\d+)", done.stdout)
    if version is None:
        raise UsageError(f"{path} does not say its version", todo="Is it restic? On Debian it is the package restic.")
    if (int(version[1]), int(version[2])) < OLDEST:
        raise UsageError(
            f"{path} is restic {version[1]}.{version[2]}, too old: it has to be {OLDEST[0]}.{OLDEST[1]} or newer",
            todo="Debian 12 and newer have one, in the package restic.",
        )
    return path


class Restic:
    """One restic command on a repository; :meth:`run` blocks, :meth:`stop` interrupts it from another thread.

    ``source`` is the repository that `copy` copies from.  ``out`` and ``err`` get what restic prints, piece by piece,
    from threads of this object; without ``out`` it prints on our own standard output.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        repository: RepositoryAccess,
        *,
        err: Sink,
        out: Sink | None = None,
        source: RepositoryAccess | None = None,
        lock_retry: float = 0.0,
        waiting: Callable[[str], None] = lambda note: None,
    ) -> None:
        self._arguments = list(arguments)
        self._repository = repository
        self._source = source
        self._out = out
        self._err = err
        self._lock_retry = lock_retry
        self._waiting = waiting
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        self._starting = threading.Lock()
        self._said = bytearray()
        self._held = bytearray()

    def stop(self) -> None:
        """Interrupt restic, which then takes its lock back; ``run`` raises when it has ended."""
        with self._starting:
            self._stopped.set()
            if self._process is not None:
                # Not SIGTERM: restic before 0.17 dies of that and leaves its lock.
                self._process.send_signal(signal.SIGINT)

    def run(self) -> None:
        """Run it to its end, again for `lock_retry` seconds while the repository is locked.

        Raises the error that fits what restic said; the repository is then as restic left it.
        """
        program = restic_program()
        deadline, told, cleared = time.monotonic() + self._lock_retry, "", False
        while True:
            try:
                self._run_once(program)
                return
            except RepositoryLocked:
                # A killed backup's lock: restic would have it removed by hand, a backup removes it without asking.
                if not cleared and self._clear_dead_locks():
                    cleared = True
                    self._held.clear()
                    continue
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                # restic says all of it again at every try: what is new is who holds the lock.
                self._held.clear()
                if (holder := _holder(self._said)) != told:
                    told = holder
                    self._waiting(f"waiting for the repository, which is locked {holder}, {left:.0f} s more at most")
                self._stopped.wait(min(left, _RETRY_EVERY))
            finally:
                self._pass_on()

    def _clear_dead_locks(self) -> bool:
        places = [self._repository] if self._source is None else [self._repository, self._source]
        return sum(place.open().lock().clear_dead() for place in places) > 0

    def _run_once(self, program: str) -> None:
        self._said.clear()
        environment, secrets = self._environment()
        try:
            with self._starting:
                if self._stopped.is_set():
                    raise RepositoryError("restic was not started: interrupted")
                self._process = subprocess.Popen(
                    [program, *self._arguments],
                    env=environment,
                    pass_fds=secrets,
                    stdout=None if self._out is None else subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
        finally:
            for secret in secrets:
                os.close(secret)
        with self._process as process:
            self._relay(process)
        self._judge(process.returncode)

    def _environment(self) -> tuple[dict[str, str], list[int]]:
        """restic's environment, and the read ends of pipes with passwords that it inherits."""
        known = {
            name: value
            for name, value in os.environ.items()
            if name not in _SETTINGS and not name.startswith("RESTIC_FROM_")
        }
        if "AWS_REGION" in known:  # restic knows the other name only
            known.setdefault("AWS_DEFAULT_REGION", known["AWS_REGION"])
        secrets: list[int] = []
        for prefix, access in (("RESTIC_", self._repository), ("RESTIC_FROM_", self._source)):
            if access is not None:
                known[f"{prefix}REPOSITORY"] = access.location
                known |= _hand_over(access.password, prefix, secrets)
        return known, secrets

    def _relay(self, process: subprocess.Popen[bytes]) -> None:
        """Pass on what restic prints until it ends."""
        sinks: dict[IO[bytes], Sink] = {}
        if process.stderr is not None:
            sinks[process.stderr] = self._keep
        if process.stdout is not None and self._out is not None:
            sinks[process.stdout] = self._out
        while sinks:
            for stream in select.select([*sinks], [], [])[0]:
                if piece := os.read(stream.fileno(), 65536):
                    sinks[stream](piece)
                else:
                    del sinks[stream]

    def _keep(self, piece: bytes) -> None:
        self._said += piece
        del self._said[:-_KEPT]
        self._held += piece
        if not any(self._held.startswith(words[: len(self._held)]) for words in _LOCKED):
            self._pass_on()

    def _pass_on(self) -> None:
        held, self._held = bytes(self._held), bytearray()
        if held:
            self._err(held)

    def _judge(self, code: int) -> None:
        if code != 0:
            raise _failure(self._arguments[0], code, self._said.decode(errors="replace"))


def _holder(said: bytes | bytearray) -> str:
    """Who has the lock, by restic's words."""
    found = _HOLDER.search(said.decode(errors="replace"))
    return found[1].strip() if found else "by somebody else"


def _hand_over(password: str, prefix: str, secrets: list[int]) -> dict[str, str]:
    """The setting that gives restic this password; the read end of its pipe is added to ``secrets``."""
    raw = os.fsencode(password)
    if password != password.strip() or password.startswith("\ufeff") or len(raw) > select.PIPE_BUF:
        # restic strips white space from what it reads as a file, and a pipe takes only so much.
        return {f"{prefix}PASSWORD": password}
    reading, writing = os.pipe()
    secrets.append(reading)
    with suppress(BrokenPipeError), os.fdopen(writing, "wb") as pipe:
        pipe.write(raw)
    return {f"{prefix}PASSWORD_FILE": f"/dev/fd/{reading}"}


def _failure(command: str, code: int, said: str) -> PullbackError:
    """The error for a restic that ended so.  Before 0.17 it said almost everything with exit code 1."""
    if code == 10 or "unable to open config file" in said:
        return RepositoryMissing("restic finds no repository there", todo="Check the location.")
    if code == 11 or "already locked" in said:
        return RepositoryLocked(
            "the repository is locked by somebody else, so restic did nothing",
            means="What is stored is untouched.",
            todo="Wait, or use --lock-retry; pullback unlock removes locks of processes that are gone.",
        )
    if code == 12 or "wrong password or no key found" in said:
        return WrongPassword("restic says that no key of the repository opens with this password")
    if "an empty password is not a password" in said:
        return UsageError(
            "no new password was given",
            means="The repository's passwords are as they were.",
            todo="Use --new-password-file FILE; at a terminal it is asked for, elsewhere read from standard input.",
        )
    if code == 1 and (wrong := _BAD_VALUE.search(said)):
        return UsageError(f"restic {command} cannot take this: {wrong[1].strip()}", means="It did nothing.")
    if command == "check" and ("contains errors" in said or "LoadIndex returned errors" in said):
        return DamageFound(
            "restic check found errors in the repository",
            todo="They are listed above. pullback verify --all --data says which disks of which backups they touch.",
        )
    if code < 0:
        return RepositoryError(f"restic {command} was killed by signal {-code}", todo=_READ_AGAIN)
    return RepositoryError(f"restic {command} failed with exit code {code}", todo=_READ_AGAIN)
