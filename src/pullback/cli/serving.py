# SPDX-License-Identifier: Apache-2.0
"""The command ``serve``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import options as opt
from pullback.cli.exports import listen_address
from pullback.cli.interrupts import run_interruptible
from pullback.cli.passwords import repository_opener
from pullback.cli.reporter import Reporter
from pullback.errors import UsageError

if TYPE_CHECKING:
    from pullback.engine.events import Event

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def serve(
    backup_id: opt.Backup,
    disk: opt.Disks = None,
    socket: Annotated[
        str | None,
        typer.Option("--socket", metavar="PATH", help="Listen on this unix socket [one in a new directory]"),
    ] = None,
    listen: Annotated[
        str | None, typer.Option("--listen", metavar="HOST[:PORT]", help="Listen on TCP; without a port on a free one")
    ] = None,
    tls: Annotated[
        str | None, typer.Option("--tls", metavar="DIR", help="Encrypt with the certificates in this directory")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow TCP without TLS")] = False,
    cache_size: Annotated[
        str, typer.Option("--cache-size", metavar="SIZE", help="Memory for chunks that were read: 64M, 1G")
    ] = "64M",
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    cache_dir: opt.CacheDir = None,
    no_cache: opt.NoCache = False,
    lock_retry: opt.LockRetry = 0.0,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """Serve a backup's disks over NBD, read-only, until it is stopped; prints a URI for each."""
    address, size = listen_address(socket, listen), _size(cache_size)
    where = opt.repository_options(repo, password_file, password_command, opt.load_config(config))
    opener = repository_opener(where, opt.cache_options(cache_dir, no_cache, json))
    from pullback.engine.events import Serving
    from pullback.engine.serving import Serve, ServeRequest

    reporter = Reporter(json)

    def tell(event: Event) -> None:
        if isinstance(event, Serving):
            reporter.answer(event.to_json(), [export.uri for export in event.exports])
        else:
            reporter.emit(event)

    work = Serve(ServeRequest(backup_id, tuple(disk or ()), address, tls, insecure, size, lock_retry), opener, tell)
    served = run_interruptible(work.run(), stop=work.stop)
    if json:
        seconds = round(served.seconds, 3)
        reporter.result(
            {"event": "served", "backup": served.backup, "bytes_loaded": served.bytes_loaded, "seconds": seconds}
        )


def _size(text: str) -> int:
    """Bytes from a number with a unit; UsageError for another word."""
    if (match := re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text, re.IGNORECASE)) is None:
        raise UsageError(f"{text!r} is no size", todo="Write a number of bytes, or one with K, M, G or T: 64M.")
    return int(match[1]) * _UNITS[match[2].upper()]
