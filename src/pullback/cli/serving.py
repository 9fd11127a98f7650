# SPDX-License-Identifier: Apache-2.0
"""The command ``serve``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import options as opt
from pullback.cli.exports import listen_address
from pullback.cli.interrupts import run_interruptible
from pullback.cli.passwords import repository_opener
from pullback.cli.reporter import Reporter

if TYPE_CHECKING:
    from pullback.engine.events import Event


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
    address, size = listen_address(socket, listen), opt.size_of(cache_size)
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
