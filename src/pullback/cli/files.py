# SPDX-License-Identifier: Apache-2.0
"""The command ``files``."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pullback.cli import options as opt
from pullback.cli.interrupts import run_interruptible
from pullback.cli.passwords import repository_opener
from pullback.cli.reporter import Reporter, table
from pullback.errors import RestoreError, UsageError
from pullback.model.units import human_bytes
from pullback.plan.files import FileSystem, printable

if TYPE_CHECKING:
    from pullback.engine.files import FileEntry, FilesResult

_Backup = Annotated[
    str, typer.Argument(metavar="BACKUP", help="A backup's id or the unique start of one, latest, or DOMAIN@latest")
]
_Paths = Annotated[
    list[str] | None, typer.Argument(metavar="PATH", help="What to list or extract; none: list the file systems")
]
_KINDS = {"-": "file", "d": "directory", "l": "link"}


def files(
    backup_id: Annotated[
        str, typer.Argument(metavar="BACKUP", help="A backup's id or the unique start of one, latest, or DOMAIN@latest")
    ],
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="Directories and files in it; none: list its file systems"),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Extract the paths into this new or empty directory")
    ] = None,
    filesystem: Annotated[
        str | None, typer.Option("--filesystem", metavar="NAME", help="In this one: device, label or UUID of the list")
    ] = None,
    disk: opt.Disks = None,
    repo: opt.Repo = None,
    password_file: opt.PasswordFile = None,
    password_command: opt.PasswordCommand = None,
    cache_dir: opt.CacheDir = None,
    no_cache: opt.NoCache = False,
    lock_retry: opt.LockRetry = 0.0,
    config: opt.ConfigFile = None,
    json: opt.Json = False,
) -> None:
    """List or extract files in a backup, without restoring its disks; needs libguestfs."""
    if to is not None and not paths:
        raise UsageError("--to needs paths that are to be extracted", todo="For a whole file system: /.")
    where = opt.repository_options(repo, password_file, password_command, opt.load_config(config))
    opener = repository_opener(where, opt.cache_options(cache_dir, no_cache, json))
    from pullback.engine.files import Files, FilesRequest

    reporter = Reporter(json)
    request = FilesRequest(backup_id, tuple(paths or ()), to, filesystem or "", tuple(disk or ()), lock_retry)
    work = Files(request, opener, reporter.emit)
    result = run_interruptible(work.run(), stop=work.stop)
    _tell(reporter, result, to, bool(paths))


def _tell(reporter: Reporter, result: FilesResult, to: Path | None, some: bool) -> None:
    if not some:
        reporter.answer(_filesystems_json(result), _filesystem_lines(result.filesystems))
    elif to is None:
        reporter.answer(_entries_json(result), [_entry_line(entry) for entry in result.entries])
    else:
        reporter.answer(_extracted_json(result, to), list(_extracted_lines(result, to)))
        _tell_failures(result)


def _filesystems_json(result: FilesResult) -> dict[str, Any]:
    found = [
        {
            "filesystem": printable(one.device),
            "disk": one.disk,
            "type": printable(one.kind),
            "label": printable(one.label),
            "uuid": printable(one.uuid),
            "size": one.size,
        }
        for one in result.filesystems
    ]
    return {"event": "filesystems", "backup": result.backup, "filesystems": found}


def _filesystem_lines(found: tuple[FileSystem, ...]) -> list[str]:
    rows = [
        [
            *(printable(text) or "-" for text in (one.device, one.disk, one.kind)),
            human_bytes(one.size) if one.size else "-",
            *(printable(text) or "-" for text in (one.label, one.uuid)),
        ]
        for one in found
    ]
    return table(["FILE SYSTEM", "DISK", "TYPE", "SIZE", "LABEL", "UUID"], rows)


def _entries_json(result: FilesResult) -> dict[str, Any]:
    entries = [
        {
            "path": printable(entry.path),
            "type": _KINDS.get(stat.filemode(entry.stat.mode)[0], "other"),
            "size": entry.stat.size,
            "mode": f"{stat.S_IMODE(entry.stat.mode):04o}",
            "time": _time(entry),
        }
        for entry in result.entries
    ]
    return {"event": "files", "backup": result.backup, "filesystem": _mounted(result), "entries": entries}


def _entry_line(entry: FileEntry) -> str:
    return f"{stat.filemode(entry.stat.mode)} {entry.stat.size:>13,} {_time(entry)} {printable(entry.path)}"


def _extracted_json(result: FilesResult, to: Path) -> dict[str, Any]:
    assert result.extraction is not None
    return {
        "event": "extracted",
        "backup": result.backup,
        "filesystem": _mounted(result),
        "to": str(to),
        "files": result.extraction.files,
        "bytes": result.extraction.bytes_written,
        "left_out": [{"path": printable(one.path), "reason": one.reason} for one in result.left_out],
    }


def _extracted_lines(result: FilesResult, to: Path) -> Iterator[str]:
    assert result.extraction is not None
    for one in result.left_out:
        yield f"left out {printable(one.path)}: {one.reason}"
    yield f"extracted {result.extraction.files:,} files, {human_bytes(result.extraction.bytes_written)}, to {to}"


def _tell_failures(result: FilesResult) -> None:
    failed = [one for one in result.left_out if not one.harmless]
    if failed:
        raise RestoreError(
            f"{len(failed)} files could not be written, {printable(failed[0].path)} for one: {failed[0].reason}",
            means="The others were extracted.",
            todo="pullback restore gives whole disks.",
        )


def _mounted(result: FilesResult) -> str:
    return printable(result.filesystem.device) if result.filesystem else ""


def _time(entry: FileEntry) -> str:
    """When it was last changed, to the second, UTC; what no calendar has is shown as the first second of 1970."""
    try:
        return datetime.fromtimestamp(entry.stat.mtime // 10**9, UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0, UTC).isoformat()
