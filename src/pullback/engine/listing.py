# SPDX-License-Identifier: Apache-2.0
"""What backups a repository holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from pullback.engine.forgetting import TAG
from pullback.errors import Damaged, Refused, RepositoryUnsupported
from pullback.model.manifest import Manifest, parse_manifest
from pullback.repository.layout import StoredBackup
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot


@dataclass(frozen=True, slots=True)
class ListedBackup:
    """A backup; ``manifest`` is None when it cannot be read, and ``damage`` says why."""

    id: str
    time: datetime
    domain: str
    manifest: Manifest | None
    damage: str = ""


@dataclass(frozen=True, slots=True)
class ShownBackup:
    """A backup with its manifest; ``bases`` says of each backup it was built on under which id it is here, if it is."""

    id: str
    manifest: Manifest
    bases: dict[str, str | None]
    original: str | None


def list_stored(
    repository: Repository, domain: str | None = None, broken: Callable[[Damaged], None] | None = None
) -> list[ListedBackup]:
    """All backups of domains, or of one, oldest first; what other programs stored otherwise is passed over.

    A broken snapshot file is told to ``broken``; raises Damaged where nobody is to be told.
    """
    found = []
    for snapshot in repository.snapshots(domain, broken):
        try:
            manifest = parse_manifest(StoredBackup(repository, snapshot).manifest_bytes())
        except (Damaged, RepositoryUnsupported) as error:
            if TAG in snapshot.tags:
                time = snapshot.time.astimezone(UTC)
                found.append(ListedBackup(snapshot.id, time, snapshot.hostname, None, error.what))
            continue
        found.append(ListedBackup(snapshot.id, snapshot.time.astimezone(UTC), snapshot.hostname, manifest))
    return found


def refuse_foreign(repository: Repository, snapshot: Snapshot) -> None:
    """Raise Refused for what another program stored: it has neither our tag nor a manifest."""
    if TAG in snapshot.tags:
        return
    try:
        StoredBackup(repository, snapshot).manifest_bytes()
    except Damaged as error:
        raise Refused(
            f"{snapshot.short_id} is no backup of pullback's: another program stored it, of {snapshot.hostname},"
            f" {snapshot.time:%Y-%m-%d %H:%M:%S %Z}",
            means="Nothing is known to be wrong with it.",
            todo="pullback list shows the backups; restic can show and check that one.",
        ) from error


def manifest_of(repository: Repository, snapshot: Snapshot) -> Manifest:
    """A backup's manifest; raises as refuse_foreign, and Damaged or RepositoryUnsupported."""
    refuse_foreign(repository, snapshot)
    return parse_manifest(StoredBackup(repository, snapshot).manifest_bytes())


def show_stored(repository: Repository, spec: str, broken: Callable[[Damaged], None]) -> ShownBackup:
    """The backup called so; raises as find and refuse_foreign, and Damaged or RepositoryUnsupported for its manifest.

    A base is here under another id where it is a copy.
    """
    files = repository.snapshot_files()
    snapshot = files.find(spec)
    refuse_foreign(repository, snapshot)
    for damage in files.broken.values():
        broken(damage)
    try:
        manifest = parse_manifest(StoredBackup(repository, snapshot).manifest_bytes())
    except Damaged as error:
        raise Damaged(
            f"the backup {snapshot.short_id} of {snapshot.hostname}, {snapshot.time:%Y-%m-%d %H:%M:%S %Z}, cannot be"
            f" read: {error.what}",
            means=error.means,
            todo=f"pullback verify {snapshot.short_id} --data says what of it is damaged.",
        ) from error
    here = {one.original: one.id for one in files.readable if one.original}
    here |= {one.id: one.id for one in files.readable}
    bases = {disk.base.backup: here.get(disk.base.backup) for disk in manifest.disks if disk.base is not None}
    return ShownBackup(snapshot.id, manifest, bases, snapshot.original)
