# SPDX-License-Identifier: Apache-2.0
"""The command restore with ``--into``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pullback.cli import options as opt
from pullback.cli.config import find_domain
from pullback.cli.interrupts import run_interruptible
from pullback.cli.reporter import Reporter
from pullback.errors import UsageError
from pullback.model.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from pullback.engine.in_place import DiskInPlace, InPlaceResult
    from pullback.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class IntoDomain:
    """What the command line says of a restore in place."""

    domain: str
    disks: tuple[str, ...]
    lock_retry: float
    verify: bool
    dry_run: bool
    limit_rate: int


def restore_into(
    into: IntoDomain,
    backup: str,
    for_images: bool,
    opener: Callable[[], Repository],
    config: str | None,
    reporter: Reporter,
) -> None:
    """Restore into a domain's own disks, and tell what was done; UsageError where options of new images were given."""
    if for_images:
        raise UsageError(
            "--into restores into images that are there, and options of new ones were given",
            todo="Leave out --to, --format, --overwrite, --keep-going and --no-space-check.",
        )
    found = find_domain(into.domain, opt.load_config(config))
    from pullback.engine.in_place import InPlaceRequest, restore_in_place

    request = InPlaceRequest(
        backup,
        opt.domain_address(found),
        into.disks,
        into.lock_retry,
        verify=into.verify,
        dry=into.dry_run,
        limit_rate=into.limit_rate,
    )
    with reporter.working():
        result = run_interruptible(restore_in_place(request, opener, reporter.emit))
    reporter.answer(_json(result), list(_lines(result)))


def _json(result: InPlaceResult) -> dict[str, Any]:
    return {
        "event": "restore_in_place",
        "backup": result.backup,
        "domain": result.domain,
        "disks": [dataclasses.asdict(one) for one in result.disks],
        "dry_run": result.dry,
        "verified": result.verified and not result.dry,
        "seconds": round(result.seconds, 3),
    }


def _lines(result: InPlaceResult) -> Iterator[str]:
    for one in result.disks:
        yield f"{one.target}: {human_bytes(one.virtual_size)}, {_done(one, result.dry)}"
    if result.dry:
        yield f"nothing was written: this is what restoring backup {result.backup[:8]} into {result.domain} would do"
        return
    verified = ", read again and compared" if result.verified else ""
    yield (
        f"restored backup {result.backup[:8]} into domain {result.domain} in {human_seconds(result.seconds)}{verified}"
    )


def _done(one: DiskInPlace, dry: bool) -> str:
    how = f"by its changes since {one.reason}" if one.way == "changes" else f"by comparing all of it: {one.reason}"
    if dry:
        return f"would write at most {human_bytes(one.most)} {how}"
    return f"wrote {human_bytes(one.bytes_written)} {how}"
