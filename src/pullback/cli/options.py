# SPDX-License-Identifier: Apache-2.0
"""Options and arguments that several commands share, and what they come to."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli.config import Config, DomainOptions, load_config
from pullback.cli.passwords import CacheOptions, RepositoryOptions, from_environment
from pullback.cli.reporter import Reporter
from pullback.errors import UsageError

if TYPE_CHECKING:
    from pullback.engine.domain import DomainAddress
    from pullback.engine.freezing import Freeze
    from pullback.plan.method import Method

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

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
CacheDir = Annotated[
    str | None,
    typer.Option("--cache-dir", metavar="DIR", help="Where copies of its index are kept here [PULLBACK_CACHE_DIR]"),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Keep no copies, and use none")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines for programs")]
LockRetry = Annotated[
    float, typer.Option("--lock-retry", metavar="SECONDS", min=0, help="Wait so long for a locked repository")
]
DomainArgument = Annotated[
    str,
    typer.Argument(
        metavar="DOMAIN",
        help="qmp:PATH (a QMP socket), disk:[TARGET=]PATH[,…] (a stopped domain), or a name from the configuration",
    ),
]
Backup = Annotated[
    str, typer.Argument(metavar="BACKUP", help="A backup's id or the unique start of one, latest, or DOMAIN@latest")
]
Backups = Annotated[
    list[str] | None,
    typer.Argument(metavar="[BACKUP]...", help="Ids or unique starts of them, latest, or DOMAIN@latest"),
]
OfDomain = Annotated[
    str | None, typer.Option("--domain", metavar="DOMAIN", help="Only backups of this domain (its name there)")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be sent to QEMU, and change nothing")]
TraceOption = Annotated[bool, typer.Option("--trace", help="Print every command sent to QEMU and its reply")]
AgentSocket = Annotated[
    str | None, typer.Option("--agent", metavar="PATH", help="The unix socket of the domain's guest agent")
]
FreezeOption = Annotated[
    bool, typer.Option("--freeze", help="Have the guest agent freeze the file systems around the instant")
]
RequireFreeze = Annotated[
    bool, typer.Option("--require-freeze", help="The same, and make nothing if they cannot be frozen")
]
MethodOption = Annotated[
    str | None, typer.Option("--method", metavar="filter|job", help="How to freeze [the safe one for this QEMU]")
]
Scratch = Annotated[
    str | None, typer.Option("--scratch", metavar="DIR", help="Where QEMU makes the scratch images [/var/tmp]")
]
LimitRate = Annotated[
    str | None,
    typer.Option("--limit-rate", metavar="RATE", help="Read at most so many bytes a second from the disks: 50M"),
]
LimitWrites = Annotated[
    str | None,
    typer.Option("--limit-rate", metavar="RATE", help="Write at most so many bytes a second to the disks: 50M"),
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


def size_of(text: str) -> int:
    """Bytes from a number with a unit; UsageError for another word."""
    if (match := re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text, re.IGNORECASE)) is None:
        raise UsageError(f"{text!r} is no size", todo="Write a number of bytes, or one with K, M, G or T: 64M.")
    return int(match[1]) * _UNITS[match[2].upper()]


def rate_of(given: str | None, config: DomainOptions | None = None) -> int:
    """Bytes a second that the command line allows, else the configuration; 0 for no limit."""
    from pullback.engine.rate import Rate

    rate = size_of(given) if given is not None else size_of(config.limit_rate if config and config.limit_rate else "0")
    Rate(rate)  # refuses one that is too small
    return rate


def cache_options(directory: str | None, none: bool, json: bool) -> CacheOptions:
    """What the command line says; a cache that cannot be used is a note."""

    def warn(sentence: str) -> None:
        from pullback.engine.events import Note

        Reporter(json).emit(Note(sentence))

    return CacheOptions(directory, none, warn)


def domain_address(found: DomainOptions, name: str | None = None, agent: str | None = None) -> DomainAddress:
    """How to reach the domain that the command line means."""
    from pullback.engine.domain import DomainAddress

    return DomainAddress(found.qmp, found.images, name or found.name, agent or found.agent)


def freeze_mode(freeze: bool, require: bool) -> Freeze:
    """What the two options come to."""
    return "require" if require else "try" if freeze else "no"


def method_of(given: str | None) -> Method | None:
    """The method asked for; UsageError for another word."""
    if given is None or given in ("filter", "job"):
        return "job" if given == "job" else "filter" if given else None
    raise UsageError(f"{given!r} is no method to freeze with", todo="Use filter or job, or leave --method out.")


__all__ = [
    "AgentSocket",
    "Backup",
    "Backups",
    "CacheDir",
    "ConfigFile",
    "Disks",
    "DomainArgument",
    "DryRun",
    "FreezeOption",
    "Json",
    "LimitRate",
    "LimitWrites",
    "LockRetry",
    "MethodOption",
    "NoCache",
    "OfDomain",
    "PasswordCommand",
    "PasswordFile",
    "Repo",
    "RequireFreeze",
    "Scratch",
    "TraceOption",
    "cache_options",
    "domain_address",
    "freeze_mode",
    "load_config",
    "method_of",
    "rate_of",
    "repository_options",
    "size_of",
]
