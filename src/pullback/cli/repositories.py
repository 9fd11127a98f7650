# SPDX-License-Identifier: Apache-2.0
"""The commands on a repository that restic carries out: forget, prune, check, copy, unlock, key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pullback.cli import options as opt
from pullback.cli.reporter import table
from pullback.cli.restic import OnRepository
from pullback.errors import UsageError

if TYPE_CHECKING:
    from pullback.engine.forgetting import Judged, Retention

_SPAN = re.compile("([0-9]+[ymdh])+")

app = typer.Typer(help="The passwords of a repository.", no_args_is_help=False)

ResticDryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done")]
NewPassword = Annotated[
    str | None,
    typer.Option("--new-password-file", metavar="FILE", help="A file that holds the new password [asked for]"),
]


def _keep(what: str) -> Any:
    return typer.Option(f"--keep-{what}", metavar="N", min=1, help=f"Keep the newest of each of the last N {what}")


def forget(
    backup: opt.Backups = None,
    domain: opt.OfDomain = None,
    keep_last: Annotated[int | None, typer.Option("--keep-last", metavar="N", min=1, help="Keep the last N")] = None,
    keep_hourly: Annotated[int | None, _keep("hourly")] = None,
    keep_daily: Annotated[int | None, _keep("daily")] = None,
    keep_weekly: Annotated[int | None, _keep("weekly")] = None,
    keep_monthly: Annotated[int | None, _keep("monthly")] = None,
    keep_yearly: Annotated[int | None, _keep("yearly")] = None,
    keep_within: Annotated[
        str | None,
        typer.Option("--keep-within", metavar="SPAN", help="Keep what is younger than the newest by this: 1y5m7d2h"),
    ] = None,
    keep_tag: Annotated[
        list[str] | None, typer.Option("--keep-tag", metavar="TAG", help="Keep what has this tag; may be repeated")
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Then free what only they needed")] = False,
    dry_run: ResticDryRun = False,
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    lock_retry: opt.LockRetry = 0.0,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """Forget backups, by name or by what to keep."""
    counts = {
        "last": keep_last,
        "hourly": keep_hourly,
        "daily": keep_daily,
        "weekly": keep_weekly,
        "monthly": keep_monthly,
        "yearly": keep_yearly,
    }
    policy = _policy(counts, keep_within, keep_tag or ())
    if backup and policy:
        raise UsageError(
            "backups were named and --keep options given", means="Nothing was forgotten.", todo="Use one of the two."
        )
    on = OnRepository(repo, password_file, password_command, config, json=json, lock_retry=lock_retry)
    _forget(on, backup or [], policy, domain, prune=prune, dry_run=dry_run)


def _policy(counts: Mapping[str, int | None], within: str | None, tags: Sequence[str]) -> list[str]:
    """restic's options for a policy; UsageError for what restic would take as a policy that keeps nothing."""
    policy = [word for name, count in counts.items() if count for word in (f"--keep-{name}", str(count))]
    if within is not None:
        if _SPAN.fullmatch(within) is None or not any(map(int, re.findall("[0-9]+", within))):
            raise UsageError(
                f"{within!r} is no span of time", todo="Write years, months, days and hours, 1y5m7d2h for instance."
            )
        policy += ["--keep-within", within]
    for tag in tags:
        if not all(part.strip() for part in tag.split(",")):
            raise UsageError("--keep-tag is followed by an empty tag", means="It would keep what has no tag at all.")
        policy += ["--keep-tag", tag]
    return policy


def _forget(
    on: OnRepository, specs: list[str], policy: list[str], domain: str | None, *, prune: bool, dry_run: bool
) -> None:
    from pullback.engine import forgetting

    repository = on.open()
    retention = (
        forgetting.by_name(repository, specs, domain, on.tell_damage)
        if specs
        else forgetting.by_policy(
            lambda arguments: on.restic(arguments, quiet=True), repository, policy, domain, on.tell_damage
        )
    )
    on.reporter.answer(
        {
            "event": "retention",
            "dry_run": dry_run,
            "keep": [_judged_json(one) for one in retention.keep],
            "forget": [_judged_json(one) for one in retention.forget],
        },
        _retention_lines(retention),
    )
    if dry_run:
        return
    forgetting.forget(on.restic, retention.forget, prune)
    done = [one.id for one in retention.forget]
    on.reporter.answer(
        {"event": "forgotten", "backups": done, "pruned": prune and bool(done)},
        [f"forgot {len(done)} backups; the next incremental builds on what is left" if done else "nothing to forget"],
    )


def _judged_json(one: Judged) -> dict[str, Any]:
    return {"id": one.id, "domain": one.domain, "time": one.time.isoformat(), "reasons": list(one.reasons)}


def _retention_lines(retention: Retention) -> list[str]:
    rows = [("keep", one) for one in retention.keep] + [("forget", one) for one in retention.forget]
    if not rows:
        return ["no backups"]
    cells = [
        (what, one.id[:8], f"{one.time:%Y-%m-%d %H:%M:%S}", one.domain, ", ".join(one.reasons)) for what, one in rows
    ]
    return table(("", "ID", "TIME (UTC)", "DOMAIN", "WHY"), cells)


def prune(
    dry_run: ResticDryRun = False,
    max_unused: Annotated[
        str | None,
        typer.Option("--max-unused", metavar="LIMIT", help="Leave so much unused: 10%, 5G or unlimited [restic's 5%]"),
    ] = None,
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    lock_retry: opt.LockRetry = 0.0,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """Free what no backup needs (restic prune)."""
    on = OnRepository(repo, password_file, password_command, config, json=json, lock_retry=lock_retry)
    on.show("prune", ["prune", *_flag("--dry-run", dry_run), *_value("--max-unused", max_unused)])


def check(
    read_data: Annotated[bool, typer.Option("--read-data", help="Read and verify all data")] = False,
    read_data_subset: Annotated[
        str | None,
        typer.Option("--read-data-subset", metavar="PART", help="Read a part of it: 1/7, 5% or 10G"),
    ] = None,
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    lock_retry: opt.LockRetry = 0.0,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """Check the whole repository (restic check)."""
    on = OnRepository(repo, password_file, password_command, config, json=json, lock_retry=lock_retry)
    on.show("check", ["check", *_flag("--read-data", read_data), *_value("--read-data-subset", read_data_subset)])


def copy(
    to: Annotated[str, typer.Option("--to", metavar="LOCATION", help="The repository to copy to; it has to be there")],
    backup: opt.Backups = None,
    domain: opt.OfDomain = None,
    to_password_file: Annotated[
        str | None,
        typer.Option("--to-password-file", metavar="FILE", help="A file with its password [that of the first]"),
    ] = None,
    to_password_command: Annotated[
        str | None, typer.Option("--to-password-command", metavar="COMMAND", help="A command that prints its password")
    ] = None,
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    lock_retry: opt.LockRetry = 0.0,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """Copy backups to another repository (restic copy)."""
    on = OnRepository(repo, password_file, password_command, config, json=json, lock_retry=lock_retry)
    source = on.open()
    target = on.another(source, to, to_password_file, to_password_command)
    chosen = [one.id for one in on.find(source, backup or (), domain)]
    if not chosen:
        raise UsageError("there is no backup to copy", means="Nothing was copied.")
    on.show("copy", ["copy", *chosen], repository=target, source=on.access)


def unlock(
    remove_all: Annotated[
        bool, typer.Option("--remove-all", help="Remove locks of processes that live, too: be sure that none does")
    ] = False,
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """Remove locks of processes that are gone (restic unlock)."""
    on = OnRepository(repo, password_file, password_command, config, json=json)
    on.show("unlock", ["unlock", *_flag("--remove-all", remove_all)])


@app.command("list")
def key_list(
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """List the keys: one for each password."""
    OnRepository(repo, password_file, password_command, config, json=json).show("key list", ["key", "list"])


@app.command("add")
def key_add(
    new_password_file: NewPassword = None,
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """Add a password."""
    on = OnRepository(repo, password_file, password_command, config, json=json)
    on.show("key add", ["key", "add", *_value("--new-password-file", new_password_file)])


@app.command("passwd")
def key_passwd(
    new_password_file: NewPassword = None,
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """Change the password that was given."""
    on = OnRepository(repo, password_file, password_command, config, json=json)
    on.show("key passwd", ["key", "passwd", *_value("--new-password-file", new_password_file)])


@app.command("remove")
def key_remove(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="Its id, as key list shows it")],
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """Remove a key, and with it its password."""
    if key_id.startswith("-"):
        raise UsageError(f"{key_id!r} is no id of a key")
    OnRepository(repo, password_file, password_command, config, json=json).show("key remove", ["key", "remove", key_id])


def _flag(option: str, given: bool) -> list[str]:
    return [option] if given else []


def _value(option: str, given: str | None) -> list[str]:
    return [f"{option}={given}"] if given else []
