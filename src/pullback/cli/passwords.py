# SPDX-License-Identifier: Apache-2.0
"""The repository and its password, from options or from restic's own variables, so that one setting serves both."""

from __future__ import annotations

import getpass
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pullback.errors import UsageError

if TYPE_CHECKING:
    from pullback.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class RepositoryOptions:
    """Where the repository is and where its password comes from; None leaves it to the environment."""

    location: str | None = None
    password_file: str | None = None
    password_command: str | None = None

    def or_else(self, other: RepositoryOptions) -> RepositoryOptions:
        """These, and where they say nothing what ``other`` says."""
        password_given = self.password_file or self.password_command
        return RepositoryOptions(
            self.location or other.location,
            self.password_file if password_given else other.password_file,
            self.password_command if password_given else other.password_command,
        )


def from_environment() -> RepositoryOptions:
    """RESTIC_REPOSITORY (or _FILE), RESTIC_PASSWORD_FILE and RESTIC_PASSWORD_COMMAND."""
    location = os.environ.get("RESTIC_REPOSITORY")
    if not location and (file := os.environ.get("RESTIC_REPOSITORY_FILE")):
        location = _first_line(file, "repository")
    return RepositoryOptions(
        location, os.environ.get("RESTIC_PASSWORD_FILE"), os.environ.get("RESTIC_PASSWORD_COMMAND")
    )


def _first_line(path: str, what: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the {what} file {path}: {getattr(error, 'strerror', None) or error}") from error
    if not lines:
        raise UsageError(f"the {what} file {path} is empty")
    return lines[0].strip("\r")


def _from_command(command: str) -> str:
    try:
        done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, check=False, text=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot run the password command: {error}") from error
    if done.returncode != 0:
        raise UsageError(f"the password command ended with exit code {done.returncode}")
    return done.stdout.splitlines()[0] if done.stdout else ""


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
    """The password, from where the options, the environment or the person at the terminal say.

    ``confirm`` asks twice.  UsageError when there is none to be had.
    """
    if options.password_file:
        return _first_line(options.password_file, "password")
    if options.password_command:
        return _from_command(options.password_command)
    password = os.environ.get("RESTIC_PASSWORD")
    return password if password is not None else _ask(confirm)


def repository_opener(options: RepositoryOptions) -> Callable[[], Repository]:
    """A function that opens the repository; location and password are settled now, so questions come first."""
    if not options.location:
        raise UsageError("no repository was named", todo="Use --repo, or set RESTIC_REPOSITORY.")
    location, password = options.location, read_password(options)

    def open_it() -> Repository:
        from pullback.repository.repository import Repository
        from pullback.repository.store import open_store

        return Repository.open(open_store(location), password)

    return open_it
