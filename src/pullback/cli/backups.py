# SPDX-License-Identifier: Apache-2.0
"""The commands of a backup's life: init, backup, list."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from pullback.cli import options as opt
from pullback.cli.config import find_domain
from pullback.cli.interrupts import run_interruptible
from pullback.cli.passwords import read_password, repository_opener
from pullback.cli.reporter import Reporter, table
from pullback.errors import UsageError
from pullback.model.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from pullback.engine.backup import BackupResult
    from pullback.engine.listing import ListedBackup
    from pullback.model.manifest import Manifest
    from pullback.plan.prove import Prove, Proved


def init(
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """Make a new repository (restic format 2)."""
    from pullback.repository.location import open_store
    from pullback.repository.repository import Repository

    where = opt.repository_options(repo, password_file, password_command, opt.load_config(config))
    if not where.location:
        raise UsageError("no repository was named", todo="Use --repo, or set RESTIC_REPOSITORY.")
    made = Repository.init(open_store(where.location), read_password(where, confirm=True))
    Reporter(json).answer(
        {"event": "repository", "id": made.id, "location": where.location},
        [
            f"made repository {made.id[:8]} at {where.location}",
            "Keep its password: without it nobody can read the backups.",
        ],
    )


class BackupCommand(TyperCommand):
    """``backup``, whose ``--prove`` may stand alone: else the word after it, the domain, would be its value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["--prove=sample" if word == "--prove" else word for word in args])


def backup(
    domain: opt.DomainArgument,
    disk: opt.Disks = None,
    full: Annotated[bool, typer.Option("--full", help="Read the disks whole, whatever is known of changes")] = False,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="NAME", help="The domain's name in the repository [QEMU's -name, else the socket's stem]"
        ),
    ] = None,
    scratch: Annotated[
        str | None, typer.Option("--scratch", metavar="DIR", help="Where QEMU makes the scratch images [/var/tmp]")
    ] = None,
    keep_checkpoints: Annotated[
        int,
        typer.Option(
            "--keep-checkpoints",
            metavar="N",
            min=1,
            help="How many of its own checkpoints this repository keeps per disk",
        ),
    ] = 4,
    prove: Annotated[
        str | None,
        typer.Option(
            "--prove",
            metavar="[all]",
            help="Compare the backup with the frozen disks before it counts as one: all that changed, and a sample of"
            " the rest; --prove=all compares everything",
        ),
    ] = None,
    limit_rate: opt.LimitRate = None,
    freeze: opt.FreezeOption = False,
    require_freeze: opt.RequireFreeze = False,
    agent: opt.AgentSocket = None,
    method: opt.MethodOption = None,
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    cache_dir: opt.CacheDir = None,
    no_cache: opt.NoCache = False,
    lock_retry: opt.LockRetry = 0.0,
    config: opt.ConfigFile = None,
    dry_run: opt.DryRun = False,
    trace: opt.TraceOption = False,
    json: opt.Json = False,
) -> None:
    """Back up a domain: what changed, or all of it."""
    settings = opt.load_config(config)
    found = find_domain(domain, settings)
    where = opt.repository_options(repo, password_file, password_command, settings)
    opener = repository_opener(where, opt.cache_options(cache_dir, no_cache, json))
    from pullback.engine.backup import BackupRequest, plan_backup, run_backup

    request = BackupRequest(
        domain=opt.domain_address(found, name, agent),
        freeze=opt.freeze_mode(freeze, require_freeze),
        method=opt.method_of(method),
        disks=tuple(disk or found.disks),
        full=full,
        scratch=scratch or found.scratch,
        keep_checkpoints=keep_checkpoints,
        lock_retry=lock_retry,
        prove=_how_to_prove(prove),
        limit_rate=opt.rate_of(limit_rate, found),
    )
    reporter = Reporter(json)
    tracer = reporter.trace if trace else None
    if dry_run:
        run_interruptible(plan_backup(request, opener, reporter.emit, reporter.plan, tracer))
        return
    with reporter.working():
        result = run_interruptible(run_backup(request, opener, reporter.emit, tracer))
    reporter.answer(_backup_json(result) | {"limit_rate": request.limit_rate}, _backup_lines(result))


def _how_to_prove(given: str | None) -> Prove | None:
    match given:
        case "sample" | "all" | None:
            return given
        case _:
            raise UsageError(
                f"there is no --prove={given}", todo="Use --prove for a sample of what did not change, or --prove=all."
            )


def _backup_json(result: BackupResult) -> dict[str, Any]:
    return {
        "event": "backup",
        "id": result.id,
        **manifest_json(result.manifest),
        "bytes_read": result.bytes_read,
        "bytes_stored": result.bytes_stored,
        "seconds": round(result.seconds, 3),
        "paused_ms": round(result.paused_seconds * 1000, 1),
        "proved": None if result.proved is None else dataclasses.asdict(result.proved),
    }


def manifest_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "domain": manifest.domain,
        "time": manifest.time.isoformat(),
        "consistency": manifest.consistency,
        "disks": [dataclasses.asdict(disk) for disk in manifest.disks],
        "skipped": [{"target": target, "reason": reason} for target, reason in manifest.skipped],
    }


def _backup_lines(result: BackupResult) -> list[str]:
    lines = [
        f"{disk.target}: {disk.mode}, read {human_bytes(disk.bytes_read)}, new {human_bytes(disk.bytes_new)}"
        for disk in result.manifest.disks
    ]
    if result.proved is not None:
        lines.append(_proved_line(result.proved))
    lines.append(
        f"backup {result.id[:8]} of {result.manifest.domain}: read {human_bytes(result.bytes_read)}, stored"
        f" {human_bytes(result.bytes_stored)} in {human_seconds(result.seconds)}"
    )
    return lines


def _proved_line(proved: Proved) -> str:
    rest = f"{human_bytes(proved.unchanged)} of {human_bytes(proved.of_unchanged)} that did not change"
    return f"proved: {human_bytes(proved.changed)} that changed and {rest} are stored as they were frozen"


def list_backups(
    domain: Annotated[
        str | None, typer.Argument(metavar="DOMAIN", help="Only backups of this domain (its name in the repository)")
    ] = None,
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    cache_dir: opt.CacheDir = None,
    no_cache: opt.NoCache = False,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """List the backups in the repository."""
    where = opt.repository_options(repo, password_file, password_command, opt.load_config(config))
    opener = repository_opener(where, opt.cache_options(cache_dir, no_cache, json))
    from pullback.engine.events import Note
    from pullback.engine.listing import list_stored

    reporter = Reporter(json)
    found = list_stored(opener(), domain, broken=lambda error: reporter.emit(Note(str(error))))
    rows = [_row(one) for one in found]
    lines = (
        table(("ID", "TIME (UTC)", "DOMAIN", "MODE", "DISKS", "SIZE", "READ", "NEW"), rows) if rows else ["no backups"]
    )
    reporter.answer(
        {
            "event": "backups",
            "backups": [
                {"id": one.id, **(manifest_json(one.manifest) if one.manifest else _damaged_json(one))} for one in found
            ],
        },
        lines,
    )


def _damaged_json(one: ListedBackup) -> dict[str, Any]:
    return {"domain": one.domain, "time": one.time.isoformat(), "damaged": one.damage}


def _row(one: ListedBackup) -> tuple[str, ...]:
    stamp = f"{one.time:%Y-%m-%d %H:%M:%S}"
    if one.manifest is None:
        return (one.id[:8], stamp, one.domain, "damaged", "?", "?", "?", "?")
    disks = one.manifest.disks
    modes = {disk.mode for disk in disks}
    return (
        one.id[:8],
        stamp,
        one.domain,
        modes.pop() if len(modes) == 1 else "mixed",
        ",".join(disk.target for disk in disks),
        human_bytes(sum(disk.virtual_size for disk in disks)),
        human_bytes(sum(disk.bytes_read for disk in disks)),
        human_bytes(sum(disk.bytes_new for disk in disks)),
    )
