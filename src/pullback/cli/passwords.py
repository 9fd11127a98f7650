# SPDX-License-Identifier: Apache-2.0
"""The repository and its password, from options or from restic's own variables, so that one setting serves both."""

from __future__ import annotations

import getpass
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pullback.errors import UsageError

if TYPE_CHECKING:
    from pullback.engine.restic import RepositoryAccess
    from pullback.repository.crypto import Key
    from pullback.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class RepositoryOptions:
    """Where the repository is and where its password comes from; None leaves it to the environment."""

    location: str | None = None
    password_file: str | None = None
    password_command: str | None = None
    password: str | None = field(default=None, repr=False)

    def or_else(self, other: RepositoryOptions) -> RepositoryOptions:
        """These, and where they say nothing what ``other`` says."""
        password = self if self.password_file or self.password_command or self.password else other
        return RepositoryOptions(
            self.location or other.location, password.password_file, password.password_command, password.password
        )


def from_environment() -> RepositoryOptions:
    """RESTIC_REPOSITORY (or _FILE), RESTIC_PASSWORD_FILE, RESTIC_PASSWORD_COMMAND and RESTIC_PASSWORD."""
    location = os.environ.get("RESTIC_REPOSITORY")
    if not location and (file := os.environ.get("RESTIC_REPOSITORY_FILE")):
        location = _content(file, "repository")
    return RepositoryOptions(
        location,
        os.environ.get("RESTIC_PASSWORD_FILE"),
        os.environ.get("RESTIC_PASSWORD_COMMAND"),
        os.environ.get("RESTIC_PASSWORD"),
    )


def _content(path: str, what: str) -> str:
    """What a file holds, without white space around it: restic reads these files so."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the {what} file {path}: {getattr(error, 'strerror', None) or error}") from error
    if not text:
        raise UsageError(f"the {what} file {path} is empty")
    return text


def _from_command(command: str) -> str:
    try:
        done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, check=False, text=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot run the password command: {error}") from error
    if done.returncode != 0:
        raise UsageError(f"the password command ended with exit code {done.returncode}")
    if not (password := done.stdout.strip()):
        raise UsageError("the password command printed nothing")
    return password


def _ask(confirm: bool) -> str:
    if not sys.stdin.isatty():
        raise UsageError(
            "no password for the repository was given",
            todo="Set RESTIC_PASSWORD_FILE, RESTIC_PASSWORD_COMMAND or RESTIC_PASSWORD, or use --password-file.",
        )
    password = getpass.getpass("Password for the repository: ")
    if confirm and getpass.getpass("The same password again: ") != password:
        raise UsageError("the two passwords are not the same")
    return password


def read_password(options: RepositoryOptions, confirm: bool = False) -> str:
    """The password, from where the options say or from the person at the terminal.

    ``confirm`` asks twice.  UsageError when there is none to be had.
    """
    if options.password_file:
        return _content(options.password_file, "password")
    if options.password_command:
        return _from_command(options.password_command)
    return options.password or _ask(confirm)


def repository_access(options: RepositoryOptions) -> RepositoryAccess:
    """Location and password, settled now, so that questions come first; UsageError when there is none to be had.

    To be called in the main thread: from here on this process may hold a lock of the repository.
    """
    return _access(*_settled(options))


def _settled(options: RepositoryOptions) -> tuple[str, str]:
    if not options.location:
        raise UsageError("no repository was named", todo="Use --repo, or set RESTIC_REPOSITORY.")
    return options.location, read_password(options)


def _access(location: str, password: str) -> RepositoryAccess:
    from pullback.engine.restic import RepositoryAccess
    from pullback.repository.locks import survive_restic_probe

    survive_restic_probe()
    return RepositoryAccess(location, password)


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """Where copies of what a repository holds may be kept on this machine; ``warn`` hears if they cannot be."""

    directory: str | None = None
    none: bool = False
    warn: Callable[[str], None] | None = None

    def path(self) -> Path | None:
        """The directory, None for no cache."""
        from pullback.repository.cache_folder import default_cache_directory

        if self.none:
            return None
        return Path(self.directory) if self.directory else default_cache_directory()


def repository_opener(options: RepositoryOptions, cache: CacheOptions | None = None) -> Callable[[], Repository]:
    """A function that opens the repository; as repository_access.  The password may be tried before it is called."""
    location, password = _settled(options)
    caching = cache or CacheOptions()
    from pullback.repository.location import is_local

    ahead = [_tried(location, password)] if is_local(location) else []
    access = _access(location, password)

    def opener() -> Repository:
        return access.open(caching.path(), caching.warn, ahead.pop() if ahead else None)

    return opener


def _tried(location: str, password: str) -> Callable[[], Key]:
    """A function that waits for the key; what the password costs takes longer than importing all that comes next.

    Not for a store that may be away: whoever presses Ctrl-C must not wait for it (repository.interruption).
    """
    from pullback.repository.keys import find_key
    from pullback.repository.location import open_store

    pool = ThreadPoolExecutor(1, thread_name_prefix="pullback-key")
    found = pool.submit(find_key, open_store(location), password)
    pool.shutdown(wait=False)
    return found.result
