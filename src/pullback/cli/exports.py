# SPDX-License-Identifier: Apache-2.0
"""The commands ``export start``, ``export stop`` and ``export list``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pullback.cli import options as opt
from pullback.cli.reporter import table
from pullback.cli.working import OnDomain
from pullback.errors import UsageError

if TYPE_CHECKING:
    from pullback.engine.domain import Domain
    from pullback.engine.exporting import Export, ExportRequest
    from pullback.nbd.address import Address

app = typer.Typer(help="Frozen disks offered over NBD.", no_args_is_help=False)


@app.command("start")
def start(
    domain: opt.DomainArgument,
    snapshot: Annotated[str | None, typer.Option("--snapshot", metavar="NAME", help="The snapshot to offer")] = None,
    disk: opt.Disks = None,
    since: Annotated[
        list[str] | None,
        typer.Option("--since", metavar="CHECKPOINT", help="Offer the changes since this checkpoint; may be repeated"),
    ] = None,
    all_checkpoints: Annotated[
        bool, typer.Option("--all-checkpoints", help="Offer the changes since every checkpoint")
    ] = False,
    socket: Annotated[str | None, typer.Option("--socket", metavar="PATH", help="Listen on this unix socket")] = None,
    listen: Annotated[
        str | None, typer.Option("--listen", metavar="HOST[:PORT]", help="Listen on TCP; without a port on a free one")
    ] = None,
    tls: Annotated[
        str | None, typer.Option("--tls", metavar="DIR", help="Encrypt with the certificates in this directory")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow TCP without TLS")] = False,
    export_name: Annotated[
        list[str] | None,
        typer.Option("--export-name", metavar="DISK=NAME", help="Another export name than the disk's; may be repeated"),
    ] = None,
    writable: Annotated[
        bool, typer.Option("--writable", help="Without --snapshot: offer the domain's own disks for writing")
    ] = False,
    xml: Annotated[
        Path | None, typer.Option("--xml", metavar="FILE", help="A domainblockexport document that says all this")
    ] = None,
    config: opt.ConfigFile = None,
    dry_run: opt.DryRun = False,
    trace: opt.TraceOption = False,
    json: opt.Json = False,
) -> None:
    """Offer a snapshot's disks to any NBD client; prints a URI for each."""
    on = OnDomain(domain, config, json=json, trace=trace, dry_run=dry_run)
    from pullback.engine.exporting import check_request

    if xml is not None:
        if snapshot or disk or since or all_checkpoints or socket or listen or export_name or writable:
            raise UsageError("--xml says what to export where", todo="Leave that out of the command line.")
        from pullback.cli.documents import export_request

        snapshot, request = export_request(xml, tls, insecure)
    else:
        request = _request(disk, since, all_checkpoints, _address(socket, listen), tls, insecure, export_name, writable)
    if snapshot is None and not request.writable:
        raise UsageError(
            "no snapshot was named", todo="Name one with --snapshot; --writable offers the domain's own disks."
        )
    check_request(request)
    if snapshot is None and (since or all_checkpoints):
        raise UsageError("changes need a snapshot that they lead to", todo="Leave --since out, or name a --snapshot.")

    async def offer(opened: Domain) -> tuple[Export, ...]:
        return await _offer(opened, snapshot, request)

    exports = on.run(offer)
    if not dry_run:
        on.reporter.answer(
            {"event": "exports", "exports": [_json(export) for export in exports]}, [export.uri for export in exports]
        )


async def _offer(domain: Domain, snapshot: str | None, request: ExportRequest) -> tuple[Export, ...]:
    return await domain.offer(await domain.find_snapshot(snapshot) if snapshot is not None else None, request)


def _request(
    disk: list[str] | None,
    since: list[str] | None,
    all_checkpoints: bool,
    address: Address,
    tls: str | None,
    insecure: bool,
    export_name: list[str] | None,
    writable: bool,
) -> ExportRequest:
    """The request that the options make."""
    from pullback.engine.exporting import ExportRequest

    if since and all_checkpoints:
        raise UsageError("--since and --all-checkpoints cannot both be given")
    names = {}
    for pair in export_name or ():
        target, equals, name = pair.partition("=")
        if not equals or not target or not name:
            raise UsageError(f"{pair!r} is not DISK=NAME")
        names[target] = name
    return ExportRequest(
        address,
        tuple(disk or ()),
        "all" if all_checkpoints else tuple(since or ()),
        names,
        tls=tls,
        insecure=insecure,
        writable=writable,
    )


def _address(socket: str | None, listen: str | None) -> Address:
    address = listen_address(socket, listen)
    if address is None:
        raise UsageError("one of --socket and --listen is needed")
    return address


def listen_address(socket: str | None, listen: str | None) -> Address | None:
    """The address that the two options mean, None for neither; UsageError for both or nonsense."""
    from pullback.nbd.address import TcpAddress, UnixAddress

    if socket is not None and listen is not None:
        raise UsageError("one of --socket and --listen is needed, not both")
    if socket is not None:
        return UnixAddress(str(Path(socket).absolute()))
    if listen is None:
        return None
    host, colon, port = listen.rpartition(":")
    if not colon or listen.endswith("]"):
        host, port = listen, "0"
    if not host.strip("[]"):
        raise UsageError(f"{listen!r} names no HOST to listen at", todo="Write HOST or HOST:PORT, 127.0.0.1 for one.")
    if not port.isdigit() or not 0 <= int(port) < 1 << 16:
        raise UsageError(f"{listen!r} is not HOST or HOST:PORT")
    return TcpAddress(host.strip("[]"), int(port))


def _json(export: Export) -> dict[str, Any]:
    return {
        "id": export.id,
        "name": export.name,
        "disk": export.disk,
        "snapshot": export.snapshot,
        "uri": export.uri,
        "checkpoints": list(export.checkpoints),
    }


@app.command("list")
def list_exports(
    domain: opt.DomainArgument, config: opt.ConfigFile = None, trace: opt.TraceOption = False, json: opt.Json = False
) -> None:
    """List a domain's exports."""
    on = OnDomain(domain, config, json=json, trace=trace)

    async def look(opened: Domain) -> tuple[tuple[Export, ...], dict[str | None, str]]:
        return await opened.exports(), {one.id: one.name for one in await opened.snapshots()}

    exports, names = on.run(look)
    rows = [
        (
            one.name,
            names.get(one.snapshot, one.snapshot or "-"),
            ",".join(one.checkpoints) or "-",
            one.uri or "?",
        )
        for one in exports
    ]
    on.reporter.answer(
        {"event": "exports", "exports": [_json(export) for export in exports]},
        table(("EXPORT", "SNAPSHOT", "CHANGES SINCE", "URI"), rows) if rows else ["no exports"],
    )


@app.command("stop")
def stop(
    domain: opt.DomainArgument,
    name: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="The exports [all]")] = None,
    config: opt.ConfigFile = None,
    dry_run: opt.DryRun = False,
    trace: opt.TraceOption = False,
    json: opt.Json = False,
) -> None:
    """End exports, whoever is connected."""
    on = OnDomain(domain, config, json=json, trace=trace, dry_run=dry_run)

    async def end(opened: Domain) -> list[str]:
        exports = await opened.exports()
        for wanted in name or ():
            if wanted not in {export.name for export in exports}:
                there = ", ".join(export.name for export in exports) or "none"
                raise UsageError(f"there is no export {wanted}", todo=f"There is {there}.")
        ending = [export for export in exports if not name or export.name in name]
        await opened.stop_exports(ending)
        return [export.name for export in ending]

    ended = on.run(end)
    if not dry_run:
        on.reporter.answer(
            {"event": "exports_stopped", "exports": ended}, [f"stopped export {one}" for one in ended] or ["no exports"]
        )
