# SPDX-License-Identifier: Apache-2.0
"""Which backups are to be forgotten: by restic's policies, or by name; and forgetting exactly those.

restic is asked first what a policy would keep.  What is then forgotten is named by id: a backup that is stored, or a
clock that moves, between the question and the deed changes nothing of what was shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pullback.errors import Refused, RepositoryError, UsageError
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot, find_snapshot
from pullback.repository.tree import parse_time

TAG = "pullback"

#: Ids given to one restic: far below what a command line may hold.
IDS_AT_ONCE = 1000

#: Runs a restic command on the repository; what it printed as JSON.
CallRestic = Callable[[Sequence[str]], list[Any]]


@dataclass(frozen=True, slots=True)
class Judged:
    """A backup, and why it is kept; ``reasons`` is empty for one to forget."""

    id: str
    domain: str
    time: datetime
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept and what is to be forgotten; both oldest first."""

    keep: tuple[Judged, ...]
    forget: tuple[Judged, ...]


def by_policy(call: CallRestic, policy: Sequence[str], domain: str | None) -> Retention:
    """What restic would keep of our backups by this policy (its own options), each domain on its own."""
    if not policy:
        raise UsageError(
            "no backup and no --keep option was given",
            means="Nothing was forgotten.",
            todo="Name backups, or say what to keep, --keep-daily 14 for instance.",
        )
    hosts = ["--host", domain] if domain else []
    groups = call(["forget", "--dry-run", "--json", "--tag", TAG, "--group-by", "host", *hosts, *policy])
    keep: list[Judged] = []
    forget: list[Judged] = []
    try:
        for group in (group for answer in groups for group in answer or ()):
            kept = group.get("keep") or []
            reasons = [tuple(reason["matches"]) for reason in group.get("reasons") or []]
            keep += [_judged(one, why) for one, why in zip(kept, reasons, strict=True)]
            forget += [_judged(one) for one in group.get("remove") or []]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RepositoryError(
            f"restic's answer to forget --dry-run cannot be understood ({type(error).__name__})",
            means="Nothing was forgotten.",
        ) from error
    return Retention(_oldest_first(keep), _oldest_first(forget))


def _judged(fields: dict[str, Any], reasons: tuple[str, ...] = ()) -> Judged:
    return Judged(str(fields["id"]), str(fields.get("hostname", "")), parse_time(fields["time"]), reasons)


def _oldest_first(backups: Sequence[Judged]) -> tuple[Judged, ...]:
    return tuple(sorted(backups, key=lambda one: (one.time, one.id)))


def by_name(repository: Repository, specs: Sequence[str], domain: str | None = None) -> Retention:
    """These backups, found as everywhere; Refused for what pullback did not store, BackupNotFound."""
    known = repository.snapshots(domain, broken=lambda error: None)
    chosen: dict[str, Snapshot] = {}
    for spec in specs:
        found = find_snapshot(known, spec)
        if TAG not in found.tags:
            raise Refused(
                f"{found.short_id} is no backup of pullback's",
                means="Nothing was forgotten.",
                todo="restic forget can forget it.",
            )
        chosen[found.id] = found
    domains = {snapshot.hostname for snapshot in chosen.values()}
    others = [
        one for one in known if one.id not in chosen and one.hostname in domains and TAG in one.tags
    ]  # what is left of the same domains
    return Retention(
        tuple(Judged(one.id, one.hostname, one.time.astimezone(UTC), ("not named",)) for one in others),
        tuple(Judged(one.id, one.hostname, one.time.astimezone(UTC)) for one in known if one.id in chosen),
    )


def forget(call: CallRestic, backups: Sequence[Judged], prune: bool) -> None:
    """Forget exactly these, and prune if that was asked for and any was forgotten."""
    ids = [one.id for one in backups]
    for start in range(0, len(ids), IDS_AT_ONCE):
        call(["forget", *ids[start : start + IDS_AT_ONCE]])
    if prune and ids:
        call(["prune"])
