# SPDX-License-Identifier: Apache-2.0
"""The commands that look at stored backups: show and verify."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pullback.cli import options as opt
from pullback.cli.backups import manifest_json
from pullback.cli.interrupts import run_interruptible
from pullback.cli.passwords import CacheOptions, repository_opener
from pullback.cli.reporter import Reporter
from pullback.engine.events import Note
from pullback.errors import DamageFound, UsageError
from pullback.model.units import human_bytes

if TYPE_CHECKING:
    from pullback.engine.damage import Damage, Touched
    from pullback.engine.listing import ShownBackup
    from pullback.engine.verify import Verified
    from pullback.model.manifest import DiskEntry

#: So many ranges of a disk are printed for people; JSON has all.
_MOST_RANGES = 10


def show(
    backup: opt.Backup,
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    cache_dir: opt.CacheDir = None,
    no_cache: opt.NoCache = False,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """Show what a backup says of itself."""
    where = opt.repository_options(repo, password_file, password_command, opt.load_config(config))
    opener = repository_opener(where, opt.cache_options(cache_dir, no_cache, json))
    from pullback.engine.listing import show_stored

    reporter = Reporter(json)
    shown = show_stored(opener(), backup, lambda error: reporter.emit(Note(str(error))))
    reporter.answer(_shown_json(shown), _shown_lines(shown))


def _shown_json(shown: ShownBackup) -> dict[str, Any]:
    manifest = shown.manifest
    return {
        "event": "manifest",
        "id": shown.id,
        **manifest_json(manifest),
        "uuid": manifest.uuid,
        "qemu": manifest.qemu,
        "pullback": manifest.pullback,
        "segment_size": manifest.segment_size,
        "definition": manifest.definition,
        "bases": [{"backup": backup, "here": here} for backup, here in shown.bases.items()],
        "original": shown.original,
    }


def _shown_lines(shown: ShownBackup) -> list[str]:
    manifest = shown.manifest
    state = {"crash": "crash-consistent, as after a power cut", "frozen": "the guest's file systems were frozen"}
    lines = [
        f"backup {shown.id}",
        f"domain {manifest.domain}" + (f", uuid {manifest.uuid}" if manifest.uuid else ""),
        f"taken at {manifest.time:%Y-%m-%d %H:%M:%S} UTC, {state[manifest.consistency]}",
        f"by pullback {manifest.pullback} from QEMU {manifest.qemu}",
    ]
    if shown.original:
        lines.append(f"copied from backup {shown.original} of another repository")
    for disk in manifest.disks:
        lines += _disk_lines(disk, shown.bases)
    lines += [f"left out: {target} ({reason})" for target, reason in manifest.skipped]
    return lines


def _disk_lines(disk: DiskEntry, bases: dict[str, str | None]) -> list[str]:
    lines = [f"disk {disk.target}: {human_bytes(disk.virtual_size)} ({disk.virtual_size} bytes), {disk.source_format}"]
    if disk.base is None:
        lines.append(f"    read whole: {disk.reason}")
    else:
        here = bases[disk.base.backup]
        where = "which is not here any more, and not needed"
        if here is not None:
            where = "which is here" if here == disk.base.backup else f"which is here as its copy {here[:8]}"
        lines.append(f"    incremental since {disk.base.checkpoint} of backup {disk.base.backup[:8]}, {where}")
    lines.append(f"    checkpoint {disk.checkpoint}" if disk.checkpoint else "    no checkpoint: it cannot be tracked")
    counts = ((disk.bytes_read, "read"), (disk.bytes_new, "new"), (disk.bytes_zero, "zero"))
    lines.append("    " + ", ".join(f"{human_bytes(count)} {what}" for count, what in counts))
    return lines


def verify(
    backup: opt.Backups = None,
    everything: Annotated[bool, typer.Option("--all", help="Verify all backups that pullback stored")] = False,
    domain: opt.OfDomain = None,
    data: Annotated[bool, typer.Option("--data", help="Read all data of these backups, too")] = False,
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    lock_retry: opt.LockRetry = 0.0,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """Verify backups; say which bytes of which disks damage touches."""
    if bool(backup) == (everything or (domain is not None and not backup)):
        raise UsageError("either backups or --all has to be given", todo="pullback verify --all, for instance.")
    where = opt.repository_options(repo, password_file, password_command, opt.load_config(config))
    # What is verified is the repository, its index files included, not what was copied from there.
    opener = repository_opener(where, CacheOptions(none=True))
    from pullback.engine.verify import Verification, VerifyRequest

    reporter = Reporter(json)
    work = Verification(VerifyRequest(tuple(backup or ()), domain, data, lock_retry), opener, reporter.emit)
    with reporter.working():
        done = run_interruptible(asyncio.to_thread(work.run), stop=work.stop)
    reporter.answer(_verified_json(done), _verified_lines(done, data))
    if not done.sound:
        raise _damage_found(done)


def _damage_found(done: Verified) -> DamageFound:
    from pullback.engine.damage import backups_hurt

    hurt = backups_hurt(done.damages) | {backup for backup, _ in done.wrong}
    return DamageFound(
        "damage was found: see above",
        means=f"{len(hurt)} backups cannot be read whole; all else in them can."
        if hurt
        else "Every backup can still be read whole.",
        todo="What to do is in docs/repository.md, Verifying.",
    )


def _verified_json(done: Verified) -> dict[str, Any]:
    return {
        "event": "verified",
        "backups": done.backups,
        "disks": done.disks,
        "packs": done.packs,
        "bytes_read": done.bytes_read,
        "damages": [_damage_json(damage) for damage in done.damages],
        "wrong": [{"backup": backup, "reason": reason} for backup, reason in done.wrong],
    }


def _damage_json(damage: Damage) -> dict[str, Any]:
    touched = [
        {
            "backup": one.backup,
            "domain": one.domain,
            "time": one.time.isoformat(),
            "disk": one.disk,
            "ranges": [[span.offset, span.length] for span in one.spans],
            "lost": one.lost,
        }
        for one in damage.touched
    ]
    return {"file": damage.file, "reason": damage.reason, "blobs": list(damage.blobs), "touched": touched}


def _verified_lines(done: Verified, data: bool) -> list[str]:
    lines = [line for damage in done.damages for line in _damage_lines(damage)]
    lines += [f"backup {backup[:8]} is wrong: {reason}" for backup, reason in done.wrong]
    read = f"{human_bytes(done.bytes_read)} read" if data else "data not read (--data reads it)"
    outcome = "nothing damaged" if done.sound else f"{len(done.damages) + len(done.wrong)} damaged"
    return [*lines, f"{done.backups} backups, {done.disks} disks, {done.packs} packs, {read}: {outcome}"]


def _damage_lines(damage: Damage) -> list[str]:
    lines = [f"{damage.file} is damaged: {damage.reason}"]
    if damage.blobs:
        lines.append(f"    {len(damage.blobs)} blobs in it cannot be read")
    if not damage.touched and "/" in damage.file:
        lines.append("    no blob that a backup needs is touched")
    return lines + [f"    {_touched_line(one)}" for one in damage.touched]


def _touched_line(one: Touched) -> str:
    backup = f"backup {one.backup[:8]} ({one.domain}, {one.time:%Y-%m-%d %H:%M:%S})"
    ranges = ", ".join(f"{span.offset:,}-{span.end - 1:,}" for span in one.spans[:_MOST_RANGES])
    if len(one.spans) > _MOST_RANGES:
        left = sum(span.length for span in one.spans[_MOST_RANGES:])
        ranges += f" and {len(one.spans) - _MOST_RANGES} more ({left:,} bytes)"
    if one.disk is None:
        what = f"the manifest or a directory of {backup}"
    else:
        what = f"{one.disk} of {backup}" + (f" bytes {ranges}" if ranges else "")
    return f"{what}: lost" if one.lost else f"{what}: not lost, another pack has the same"
