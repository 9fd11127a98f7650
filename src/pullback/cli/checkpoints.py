# SPDX-License-Identifier: Apache-2.0
"""The commands ``checkpoint list``, ``checkpoint delete`` and ``checkpoint size``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pullback.cli import options as opt
from pullback.cli.reporter import table
from pullback.cli.working import OnDomain
from pullback.errors import UsageError
from pullback.model.chain import bitmap_name
from pullback.model.units import human_bytes

if TYPE_CHECKING:
    from pullback.engine.domain import Changes, Checkpoint, Domain

app = typer.Typer(help="Points in time from which changes are known.", no_args_is_help=False)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The checkpoint")]


@app.command("list")
def list_checkpoints(
    domain: opt.DomainArgument, config: opt.ConfigFile = None, trace: opt.TraceOption = False, json: opt.Json = False
) -> None:
    """List a domain's checkpoints, oldest first, with what changed since each."""
    on = OnDomain(domain, config, json=json, trace=trace)

    async def look(opened: Domain) -> tuple[Checkpoint, ...]:
        return await opened.checkpoints()

    points = on.run(look)
    rows = [(point.name, ",".join(point.disks), human_bytes(sum(point.changed.values()))) for point in points]
    on.reporter.answer(
        {
            "event": "checkpoints",
            "checkpoints": [{"name": point.name, "changed": dict(point.changed)} for point in points],
        },
        table(("CHECKPOINT", "DISKS", "CHANGED SINCE"), rows) if rows else ["no checkpoints"],
    )


@app.command("delete")
def delete(
    domain: opt.DomainArgument,
    name: Name,
    config: opt.ConfigFile = None,
    dry_run: opt.DryRun = False,
    trace: opt.TraceOption = False,
    json: opt.Json = False,
) -> None:
    """Merge a checkpoint away on all disks at once; what changed since the others stays known."""
    on = OnDomain(domain, config, json=json, trace=trace, dry_run=dry_run)

    async def remove(opened: Domain) -> None:
        await opened.delete_checkpoint(name)

    on.run(remove)
    if not dry_run:
        on.reporter.answer({"event": "checkpoint_deleted", "name": name}, [f"deleted checkpoint {name}"])


@app.command("size")
def size(
    domain: opt.DomainArgument,
    name: Name,
    config: opt.ConfigFile = None,
    trace: opt.TraceOption = False,
    json: opt.Json = False,
) -> None:
    """Tell how much changed since a checkpoint: what a backup that builds on it would read at most."""
    on = OnDomain(domain, config, json=json, trace=trace)

    async def ask(opened: Domain) -> tuple[Changes, ...]:
        await _find(opened, name)
        return await opened.changes(name)

    changes = on.run(ask)
    on.reporter.answer(
        {
            "event": "changes",
            "since": name,
            "disks": [{"target": one.target, "most": one.most, "unknown": one.unknown} for one in changes],
        },
        [
            f"{one.target}: not known, {one.unknown}; the whole disk would be read, {human_bytes(one.most)}"
            if one.unknown
            else f"{one.target}: at most {human_bytes(one.most)}"
            for one in changes
        ],
    )


async def _find(domain: Domain, name: str) -> None:
    """UsageError, with those there are, where no disk has a bitmap of this checkpoint; one may be of no use."""
    facts = await domain.facts()
    bitmaps = [bitmap.name for device in facts.devices if device.root for bitmap in facts.disk(device).bitmaps]
    first = bitmap_name(name, None)
    if not any(bitmap == first or bitmap.startswith(f"{first}^") for bitmap in bitmaps):
        there = ", ".join(point.name for point in await domain.checkpoints()) or "none"
        raise UsageError(f"there is no checkpoint {name}", todo=f"There is {there}.")
