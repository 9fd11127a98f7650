# SPDX-License-Identifier: Apache-2.0
"""The commands ``snapshot create``, ``snapshot list`` and ``snapshot delete``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pullback.cli import options as opt
from pullback.cli.reporter import Reporter, table
from pullback.cli.working import OnDomain
from pullback.errors import UsageError

if TYPE_CHECKING:
    from pullback.engine.domain import Domain
    from pullback.engine.freezing import Freeze, Snapshot, SnapshotRequest

app = typer.Typer(help="Disks frozen at one instant.", no_args_is_help=False)


@app.command("create")
def create(
    domain: opt.DomainArgument,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="What to call it [a name is made]")] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="NAME", help="Make this checkpoint at the same instant")
    ] = None,
    disk: opt.Disks = None,
    freeze: opt.FreezeOption = False,
    require_freeze: opt.RequireFreeze = False,
    agent: opt.AgentSocket = None,
    scratch: opt.Scratch = None,
    method: opt.MethodOption = None,
    xml: Annotated[
        Path | None, typer.Option("--xml", metavar="FILE", help="A domainblocksnapshot document that says all this")
    ] = None,
    config: opt.ConfigFile = None,
    dry_run: opt.DryRun = False,
    trace: opt.TraceOption = False,
    json: opt.Json = False,
) -> None:
    """Freeze a domain's disks at one instant; the domain goes on, the snapshot stays until it is deleted."""
    on = OnDomain(domain, config, json=json, trace=trace, dry_run=dry_run, agent=agent)
    from pullback.engine.freezing import SnapshotRequest, check_names

    mode = opt.freeze_mode(freeze, require_freeze)
    if on.options.images and mode != "no":
        mode = _nothing_to_freeze(on.reporter, mode)
    if xml is not None:
        if name or checkpoint or disk:
            raise UsageError("--xml says which disks, name and checkpoint", todo="Leave them out of the command line.")
        from pullback.cli.documents import snapshot_request

        request = snapshot_request(xml, mode, scratch or on.options.scratch, opt.method_of(method))
    else:
        request = SnapshotRequest(
            name=name or "",
            disks=tuple(disk or on.options.disks),
            checkpoint=checkpoint,
            freeze=mode,
            scratch=scratch or on.options.scratch,
            method=opt.method_of(method),
        )
    check_names(request)

    async def make(opened: Domain) -> Snapshot:
        return await opened.freeze(request)

    made = on.run(make)
    if not dry_run:
        on.reporter.answer({"event": "snapshot", **_json(made), **_how(made)}, _lines(made, request))


def _nothing_to_freeze(reporter: Reporter, mode: Freeze) -> Freeze:
    if mode == "require":
        raise UsageError(
            "the domain is stopped: there is no guest agent that could freeze its file systems",
            todo="Leave --require-freeze out: the images are as the domain left them, clean if it was shut down.",
        )
    from pullback.engine.events import Note

    reporter.emit(Note("the domain is stopped, so nothing needs freezing: its images are as it left them"))
    return "no"


def _json(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "id": snapshot.id,
        "name": snapshot.name,
        "time": snapshot.time.isoformat(),
        "checkpoint": snapshot.checkpoint,
        "disks": list(snapshot.targets),
        "consistency": snapshot.consistency,
    }


def _how(snapshot: Snapshot) -> dict[str, Any]:
    """What only its maker knows: QEMU keeps none of it."""
    return {
        "paused_ms": round(snapshot.paused_seconds * 1000, 1),
        "frozen_ms": round(snapshot.frozen_seconds * 1000, 1),
    }


def _lines(snapshot: Snapshot, request: SnapshotRequest) -> list[str]:
    lines = [f"snapshot {snapshot.name} of {', '.join(snapshot.targets)}, {snapshot.time.isoformat()}"]
    if snapshot.checkpoint:
        lines.append(f"checkpoint {snapshot.checkpoint}")
    if snapshot.paused_seconds:
        lines.append(f"the domain stood still for {snapshot.paused_seconds * 1000:.1f} ms")
    if snapshot.consistency == "frozen":
        lines.append(f"its file systems were frozen for {snapshot.frozen_seconds * 1000:.1f} ms")
    elif request.freeze == "try":
        lines.append("no guest agent answered: the point is crash-consistent")
    return lines


@app.command("list")
def list_snapshots(
    domain: opt.DomainArgument, config: opt.ConfigFile = None, trace: opt.TraceOption = False, json: opt.Json = False
) -> None:
    """List a domain's snapshots, oldest first."""
    on = OnDomain(domain, config, json=json, trace=trace)

    async def look(opened: Domain) -> list[tuple[Snapshot, tuple[str, ...]]]:
        return [(one, await opened.broken_disks(one)) for one in await opened.snapshots()]

    snapshots = on.run(look)
    rows = [
        (
            one.name,
            f"{one.time:%Y-%m-%d %H:%M:%S}",
            one.checkpoint or "-",
            ",".join(one.targets),
            one.consistency,
            f"broken: {','.join(broken)}" if broken else "readable",
        )
        for one, broken in snapshots
    ]
    on.reporter.answer(
        {"event": "snapshots", "snapshots": [{**_json(one), "broken": list(broken)} for one, broken in snapshots]},
        table(("SNAPSHOT", "TIME (UTC)", "CHECKPOINT", "DISKS", "CONSISTENCY", "STATE"), rows)
        if rows
        else ["no snapshots"],
    )


@app.command("delete")
def delete(
    domain: opt.DomainArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The snapshot")],
    config: opt.ConfigFile = None,
    dry_run: opt.DryRun = False,
    trace: opt.TraceOption = False,
    json: opt.Json = False,
) -> None:
    """Delete a snapshot and its exports; its checkpoint stays."""
    on = OnDomain(domain, config, json=json, trace=trace, dry_run=dry_run)

    async def remove(opened: Domain) -> None:
        await (await opened.find_snapshot(name)).delete()

    on.run(remove)
    if not dry_run:
        on.reporter.answer({"event": "snapshot_deleted", "name": name}, [f"deleted snapshot {name}"])
