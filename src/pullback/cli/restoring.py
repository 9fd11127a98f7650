# SPDX-License-Identifier: Apache-2.0
"""The command restore."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pullback.cli import options as opt
from pullback.cli.instant import check_options, qmp_socket, restore_instantly
from pullback.cli.interrupts import run_interruptible
from pullback.cli.passwords import repository_opener
from pullback.cli.reporter import Reporter
from pullback.cli.restoring_in_place import IntoDomain, restore_into
from pullback.errors import DamageFound, UsageError
from pullback.model.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from pullback.engine.restore import RestoreResult


def restore(
    backup_id: opt.Backup,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="The directory for the new images")] = None,
    into: Annotated[
        str | None,
        typer.Option("--into", metavar="DOMAIN", help="Restore into the disks of this domain, which must not run"),
    ] = None,
    disk: opt.Disks = None,
    image_format: Annotated[
        str, typer.Option("--format", metavar="qcow2|raw", help="The format of the images")
    ] = "qcow2",
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace images that are there once the new ones are whole; give up unfinished ones"
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the images again, and compare them with the backup")
    ] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Restore what can be read of a damaged backup; zeroes for the rest")
    ] = False,
    no_space_check: Annotated[
        bool, typer.Option("--no-space-check", help="Begin even if the images seem not to fit")
    ] = False,
    instant: Annotated[
        bool, typer.Option("--instant", help="Make images that a domain may use at once, and fill them meanwhile")
    ] = False,
    domain: Annotated[
        str | None,
        typer.Option("--domain", metavar="DOMAIN", help="The domain that runs on these images, or will: qmp:PATH"),
    ] = None,
    limit_rate: opt.LimitWrites = None,
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    cache_dir: opt.CacheDir = None,
    no_cache: opt.NoCache = False,
    lock_retry: opt.LockRetry = 0.0,
    config: opt.ConfigFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --into: say what would be written, and change nothing")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Restore a backup to new images, DIR/DISK.qcow2, or into a domain's own disks."""
    if to is None and into is None:
        raise UsageError("a restore needs --to DIR or --into DOMAIN", todo="Say where the backup is to go.")
    if image_format not in ("qcow2", "raw"):
        raise UsageError(f"{image_format!r} is no format of images", todo="Use qcow2 or raw.")
    wrong = {"--overwrite": overwrite, "--verify": verify, "--keep-going": keep_going, "--into": into is not None}
    wrong |= {"--format raw": image_format == "raw", "--limit-rate": limit_rate is not None}
    check_options(wrong, instant, domain)
    rate = opt.rate_of(limit_rate)
    where = opt.repository_options(repo, password_file, password_command, opt.load_config(config))
    opener = repository_opener(where, opt.cache_options(cache_dir, no_cache, json))
    if into is not None:
        for_images = to or overwrite or keep_going or no_space_check or image_format != "qcow2"
        domain_disks = IntoDomain(into, tuple(disk or ()), lock_retry, verify, dry_run, rate)
        restore_into(domain_disks, backup_id, bool(for_images), opener, config, Reporter(json))
        return
    if to is None or dry_run:
        raise UsageError("--dry-run is for a restore --into a domain", todo="Leave it out with --to.")
    if instant:
        socket = qmp_socket(domain, opt.load_config(config))
        restore_instantly(backup_id, to, tuple(disk or ()), socket, lock_retry, opener, json)
        return
    from pullback.engine.restore import Restore, RestoreRequest

    request = RestoreRequest(
        backup_id,
        to,
        tuple(disk or ()),
        "raw" if image_format == "raw" else "qcow2",
        lock_retry,
        overwrite=overwrite,
        verify=verify,
        keep_going=keep_going,
        check_space=not no_space_check,
        limit_rate=rate,
    )
    reporter = Reporter(json)
    work = Restore(request, opener, reporter.emit)
    with reporter.working():
        result = run_interruptible(asyncio.to_thread(work.run), stop=work.stop)
    reporter.answer(_result_json(result), list(_result_lines(result)))
    _tell_losses(result)


def _result_json(result: RestoreResult) -> dict[str, Any]:
    return {
        "event": "restore",
        "backup": result.backup,
        "disks": [dataclasses.asdict(one) for one in result.disks],
        "verified": result.verified,
        "seconds": round(result.seconds, 3),
    }


def _result_lines(result: RestoreResult) -> Iterator[str]:
    for one in result.disks:
        kept = f", kept {human_bytes(one.bytes_kept)} of an interrupted restore" if one.bytes_kept else ""
        yield f"{one.path}: {human_bytes(one.virtual_size)}, wrote {human_bytes(one.bytes_written)}{kept}"
        for span in one.lost:
            yield f"{one.path}: bytes {span.offset:,}-{span.end - 1:,}: lost, zeroes in the image"
    verified = ", read again and compared" if result.verified else ""
    yield (
        f"restored backup {result.backup[:8]} of {result.manifest.domain} in {human_seconds(result.seconds)}{verified}"
    )


def _tell_losses(result: RestoreResult) -> None:
    lost = {disk.target: sum(span.length for span in disk.lost) for disk in result.disks if disk.lost}
    if lost:
        said = ", ".join(f"{human_bytes(count)} of {target}" for target, count in lost.items())
        raise DamageFound(
            f"the backup is damaged: {said} could not be restored",
            means="The images have zeroes there, and are right everywhere else.",
            todo="See pullback verify for what is damaged; another backup may hold these bytes.",
        )
