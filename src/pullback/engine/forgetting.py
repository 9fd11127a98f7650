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

from pullback.errors import Damaged, Refused, RepositoryError, UsageError
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot
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


def by_policy(
    call: CallRestic,
    repository: Repository,
    policy: Sequence[str],
    domain: str | None,
    tell: Callable[[Damaged], None],
) -> Retention:
    """What restic would keep of our backups by this policy (its own options), each domain on its own.

    ``tell`` hears of broken snapshot files, which neither count nor are forgotten.  Refused where a domain would keep
    nothing, or what we cannot read would be forgotten.
    """
    if not policy:
        raise UsageError(
            "no backup and no --keep option was given",
            means="Nothing was forgotten.",
            todo="Name backups, or say what to keep, --keep-daily 14 for instance.",
        )
    hosts = ["--host", domain] if domain else []
    answers = call(["forget", "--dry-run", "--json", "--tag", TAG, "--group-by", "host", *hosts, *policy])
    try:
        groups = [_group(fields) for answer in answers for fields in answer or ()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RepositoryError(
            f"restic's answer to forget --dry-run cannot be understood ({type(error).__name__})",
            means="Nothing was forgotten.",
        ) from error
    # Listed after the question: what was stored meanwhile is more than restic knew, and not less.
    readable = {one.id for one in repository.snapshots(domain, tell) if TAG in one.tags}
    _refuse_unread([one for group in groups for one in group.forget if one.id not in readable])
    _refuse_to_empty([group for group in groups if group.forget and not any(one.id in readable for one in group.keep)])
    return Retention(
        _oldest_first([one for group in groups for one in group.keep]),
        _oldest_first([one for group in groups for one in group.forget]),
    )


def _group(fields: dict[str, Any]) -> Retention:
    """restic's answer for one domain."""
    kept = fields.get("keep") or []
    reasons = [tuple(reason["matches"]) for reason in fields.get("reasons") or []]
    return Retention(
        tuple(_judged(one, why) for one, why in zip(kept, reasons, strict=True)),
        tuple(_judged(one) for one in fields.get("remove") or []),
    )


def _refuse_unread(backups: Sequence[Judged]) -> None:
    """What pullback cannot read it does not know to be a backup that may go."""
    if backups:
        raise Refused(
            f"the policy would forget {', '.join(one.id[:8] for one in backups[:5])}{', …' if backups[5:] else ''},"
            " which pullback cannot read, or which was forgotten meanwhile",
            means="Nothing was forgotten.",
            todo="Run it again; pullback verify --all says what is damaged.",
        )


def _refuse_to_empty(groups: Sequence[Retention]) -> None:
    """restic does forget all that a policy does not keep, and a tag that is misspelt keeps nothing."""
    if groups:
        counts = sorted((group.forget[0].domain, len(group.forget)) for group in groups)
        raise Refused(
            f"this policy keeps none of the backups of {', '.join(f'{domain} ({count})' for domain, count in counts)}",
            means="Nothing was forgotten, of other domains neither.",
            todo="Say more to keep, --keep-last 1 for instance; to forget them all the same, name them: pullback forget"
            " BACKUP.",
        )


def _judged(fields: dict[str, Any], reasons: tuple[str, ...] = ()) -> Judged:
    return Judged(str(fields["id"]), str(fields.get("hostname", "")), parse_time(fields["time"]), reasons)


def _oldest_first(backups: Sequence[Judged]) -> tuple[Judged, ...]:
    return tuple(sorted(backups, key=lambda one: (one.time, one.id)))


def by_name(
    repository: Repository,
    specs: Sequence[str],
    domain: str | None,
    tell: Callable[[Damaged], None],
) -> Retention:
    """These backups, found as everywhere; Refused for what pullback did not store, BackupNotFound, Damaged.

    ``tell`` hears of broken snapshot files that cannot have been meant.
    """
    files = repository.snapshot_files().of(domain)
    known = files.readable
    chosen: dict[str, Snapshot] = {}
    for spec in specs:
        found = files.find(spec)
        if TAG not in found.tags:
            raise Refused(
                f"{found.short_id} is no backup of pullback's",
                means="Nothing was forgotten.",
                todo="restic forget can forget it.",
            )
        chosen[found.id] = found
    for damage in files.broken.values():
        tell(damage)
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
