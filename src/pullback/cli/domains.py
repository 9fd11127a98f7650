# SPDX-License-Identifier: Apache-2.0
"""The commands ``domain list`` and ``domain show``, and ``recover``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pullback.cli import options as opt
from pullback.cli.interrupts import run_interruptible
from pullback.cli.passwords import repository_opener
from pullback.cli.reporter import Reporter, table
from pullback.cli.working import OnDomain
from pullback.errors import PullbackError
from pullback.model.units import human_bytes

if TYPE_CHECKING:
    from pullback.cli.config import DomainOptions
    from pullback.engine.domain import Domain
    from pullback.engine.show import DomainView, EdgeView, NextBackupView

app = typer.Typer(help="Look at domains.", no_args_is_help=False)


@app.command("list")
def list_domains(config: opt.ConfigFile = None, json: opt.Json = False) -> None:
    """List the domains of the configuration, and whether each can be reached."""
    settings = opt.load_config(config)
    found = [(name, options, run_interruptible(_reach(options))) for name, options in settings.domains.items()]
    rows = [(name, options.name, options.qmp or f"disk:{options.images}", state) for name, options, state in found]
    Reporter(json).answer(
        {
            "event": "domains",
            "domains": [
                {"domain": name, "name": options.name, "address": place, "state": state}
                for (name, options, _), (_, _, place, state) in zip(found, rows, strict=True)
            ],
        },
        table(("DOMAIN", "NAME", "ADDRESS", "STATE"), rows) if rows else ["no domains in the configuration"],
    )


async def _reach(options: DomainOptions) -> str:

    from pullback.engine.domain import open_domain

    if options.images:
        # Opening them to look would write to them.
        return "stopped"
    try:
        async with open_domain(opt.domain_address(options)) as domain:
            return (await domain.facts()).run_state
    except PullbackError as error:
        return error.what


@app.command("show")
def show(
    domain: opt.DomainArgument,
    xml: Annotated[bool, typer.Option("--xml", help="Print the XML of the pull backup API")] = False,
    repo: Annotated[
        str | None,
        typer.Option("--repo", "-r", metavar="LOCATION", help="Show what the next backup into this repository reads"),
    ] = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="The domain's name in the repository [QEMU's -name]")
    ] = None,
    config: opt.ConfigFile = None,
    trace: opt.TraceOption = False,
    json: opt.Json = False,
) -> None:
    """Show a domain's disks with their checkpoints, its snapshots and exports, and what is broken."""
    on = OnDomain(domain, config, json=json, trace=trace, name=name)
    from pullback.engine.show import look_at

    opener = None
    if repo is not None:
        where = opt.repository_options(repo, password_file, password_command, opt.load_config(config))
        opener = repository_opener(where)

    async def look(opened: Domain) -> DomainView:
        return await look_at(opened, opener, on.options.disks, on.reporter.emit)

    view = on.run(look)
    if xml:
        from pullback.cli.documents import domain_xml

        on.reporter.answer({"event": "domain", "xml": domain_xml(view)}, domain_xml(view).splitlines())
        return
    on.reporter.answer(_view_json(view), _view_lines(view))


def _view_json(view: DomainView) -> dict[str, Any]:
    document: dict[str, Any] = dataclasses.asdict(view)
    return {"event": "domain", **document}


def _view_lines(view: DomainView) -> list[str]:
    lines = [f"domain {view.name}: QEMU {view.qemu}, {view.state}"]
    for disk in view.disks:
        lines.append(f"disk {disk.target}: {disk.driver}, {human_bytes(disk.virtual_size)}, {disk.filename or '-'}")
        if disk.untracked:
            lines.append(f"    not tracked: {disk.untracked}; every backup reads it whole")
        elif disk.chain:
            lines.append("    " + _draw(disk.chain))
        else:
            lines.append("    no checkpoint yet; the next backup reads it whole")
        lines += [f"    {broken.bitmap} is of no use: {broken.reason}; {broken.cost}" for broken in disk.broken]
        lines += [
            f"    between two states: a restore of backup {backup[:8]} did not end; run it again"
            for backup in disk.unfinished
        ]
        lines += [f"    {name}: another program's bitmap, left alone" for name in disk.foreign]
    for snapshot in view.snapshots:
        point = f", checkpoint {snapshot.checkpoint}" if snapshot.checkpoint else ""
        frozen = ", file systems frozen" if snapshot.consistency == "frozen" else ""
        lines.append(f"snapshot {snapshot.name}: {snapshot.time}{point}, disks {', '.join(snapshot.disks)}{frozen}")
        lines += [f"    {target} is broken: {snapshot.why_broken}" for target in snapshot.broken]
    names = {snapshot.id: f"snapshot {snapshot.name}" for snapshot in view.snapshots}
    for export in view.exports:
        of = "the domain's own disk" if export.snapshot is None else names.get(export.snapshot, export.snapshot)
        since = f", changes since {', '.join(export.checkpoints)}" if export.checkpoints else ""
        lines.append(f"export {export.name} of {of}: {export.uri or 'address not known'}{since}")
    lines += [f"left over: snapshot {name}; pullback recover clears it" for name in view.left_over]
    return lines + (_next_lines(view.next_backup) if view.next_backup else [])


def _next_lines(view: NextBackupView) -> list[str]:
    last = f"the last one is {view.last[:8]}" if view.last else "there is none yet"
    lines = [f"next backup of {view.domain} into this repository ({last}):"]
    for disk in view.disks:
        if disk.backup is not None:
            built = f"since {disk.checkpoint} of backup {disk.backup[:8]}, at most {human_bytes(disk.most)}"
            lines.append(f"    {disk.target}: incremental, {built}")
        else:
            lines.append(f"    {disk.target}: full, {human_bytes(disk.most)}: {disk.reason}")
    return lines + [f"    {target}: not in it; the domain has no such disk any more" for target in view.gone]


def _draw(chain: Sequence[EdgeView]) -> str:
    """Points and the bytes that changed between them: ``A --(1.00 MiB)-- B --(64.0 KiB)-- now``."""
    return "".join(f"{edge.checkpoint} --({human_bytes(edge.changed)})-- " for edge in chain) + "now"


def recover(
    domain: opt.DomainArgument,
    config: opt.ConfigFile = None,
    dry_run: opt.DryRun = False,
    trace: opt.TraceOption = False,
    json: opt.Json = False,
) -> None:
    """Clear what clients that died left behind in a domain; what is live stays."""
    on = OnDomain(domain, config, json=json, trace=trace, dry_run=dry_run)

    async def clear(opened: Domain) -> tuple[str, ...]:
        return await opened.recover()

    cleared = on.run(clear)
    verb = "would clear" if dry_run else "cleared"
    on.reporter.answer(
        {"event": "recovered", "cleared": list(cleared), "dry_run": dry_run},
        [f"{verb} {one}" for one in cleared] or ["nothing was left over"],
    )
