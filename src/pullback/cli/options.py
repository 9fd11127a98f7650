# SPDX-License-Identifier: Apache-2.0
"""Options and arguments that several commands share, and what they come to."""

from __future__ import annotations

from typing import Annotated

import typer

from pullback.cli.config import Config, load_config
from pullback.cli.passwords import RepositoryOptions, from_environment

Repo = Annotated[
    str | None,
    typer.Option("--repo", "-r", metavar="LOCATION", help="The repository: a directory, or s3:… [RESTIC_REPOSITORY]"),
]
PasswordFile = Annotated[
    str | None,
    typer.Option("--password-file", "-p", metavar="FILE", help="A file that holds its password [RESTIC_PASSWORD_FILE]"),
]
PasswordCommand = Annotated[
    str | None,
    typer.Option(
        "--password-command", metavar="COMMAND", help="A command that prints its password [RESTIC_PASSWORD_COMMAND]"
    ),
]
ConfigFile = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="The configuration file [PULLBACK_CONFIG]")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines for programs")]
LockRetry = Annotated[
    float, typer.Option("--lock-retry", metavar="SECONDS", min=0, help="Wait so long for a locked repository")
]
Disks = Annotated[
    list[str] | None, typer.Option("--disk", "-d", metavar="DISK", help="Only this disk; may be repeated")
]


def repository_options(
    repo: str | None, password_file: str | None, password_command: str | None, config: Config
) -> RepositoryOptions:
    """What the command line says, else the environment, else the configuration file."""
    given = RepositoryOptions(repo, password_file, password_command)
    return given.or_else(from_environment()).or_else(config.repository)


__all__ = [
    "ConfigFile",
    "Disks",
    "Json",
    "LockRetry",
    "PasswordCommand",
    "PasswordFile",
    "Repo",
    "load_config",
    "repository_options",
]
