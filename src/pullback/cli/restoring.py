# SPDX-License-Identifier: Apache-2.0
"""The command restore."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from pullback.cli import options as opt
from pullback.cli.interrupts import run_interruptible
from pullback.cli.passwords import repository_opener
from pullback.cli.reporter import Reporter
from pullback.errors import UsageError
from pullback.model.units import human_bytes, human_seconds


def restore(
    backup_id: Annotated[
        str, typer.Argument(metavar="BACKUP", help="A backup's id or the unique start of one, latest, or DOMAIN@latest")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The directory for the new images")],
    disk: opt.Disks = None,
    image_format: Annotated[
        str, typer.Option("--format", metavar="qcow2|raw", help="The format of the images")
    ] = "qcow2",
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    cache_dir: opt.CacheDir = None,
    no_cache: opt.NoCache = False,
    lock_retry: opt.LockRetry = 0.0,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """Restore a backup to new images, DIR/DISK.qcow2."""
    if image_format not in ("qcow2", "raw"):
        raise UsageError(f"{image_format!r} is no format of images", todo="Use qcow2 or raw.")
    where = opt.repository_options(repo, password_file, password_command, opt.load_config(config))
    opener = repository_opener(where, opt.cache_options(cache_dir, no_cache, json))
    from pullback.engine.restore import Restore, RestoreRequest

    request = RestoreRequest(backup_id, to, tuple(disk or ()), "raw" if image_format == "raw" else "qcow2", lock_retry)
    reporter = Reporter(json)
    work = Restore(request, opener, reporter.emit)
    with reporter.working():
        result = run_interruptible(asyncio.to_thread(work.run), stop=work.stop)
    reporter.answer(
        {
            "event": "restore",
            "backup": result.backup,
            "disks": [dataclasses.asdict(one) for one in result.disks],
            "seconds": round(result.seconds, 3),
        },
        [
            *(
                f"{one.path}: {human_bytes(one.virtual_size)}, wrote {human_bytes(one.bytes_written)}"
                for one in result.disks
            ),
            f"restored backup {result.backup[:8]} of {result.manifest.domain} in {human_seconds(result.seconds)}",
        ],
    )
