# SPDX-License-Identifier: Apache-2.0
"""What backups a repository holds."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from pullback.errors import Damaged
from pullback.model.manifest import Manifest, parse_manifest
from pullback.repository.layout import StoredBackup
from pullback.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class ListedBackup:
    """A backup; ``manifest`` is None when it cannot be read, and ``damage`` says why."""

    id: str
    time: datetime
    domain: str
    manifest: Manifest | None
    damage: str = ""


def list_stored(repository: Repository, domain: str | None = None) -> list[ListedBackup]:
    """All backups of domains, or of one, oldest first; what other programs stored otherwise is passed over."""
    found = []
    for snapshot in repository.snapshots(domain):
        try:
            manifest = parse_manifest(StoredBackup(repository, snapshot).manifest_bytes())
        except Damaged as error:
            if "pullback" in snapshot.tags:
                time = snapshot.time.astimezone(UTC)
                found.append(ListedBackup(snapshot.id, time, snapshot.hostname, None, error.what))
            continue
        found.append(ListedBackup(snapshot.id, snapshot.time.astimezone(UTC), snapshot.hostname, manifest))
    return found
