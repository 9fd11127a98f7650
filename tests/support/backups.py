# SPDX-License-Identifier: Apache-2.0
"""Small backups, stored and read back without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pullback.repository.blob import BlobKind
from pullback.repository.crypto import Key
from pullback.repository.key_file import KeyFile, ScryptCost
from pullback.repository.layout import BackupBuilder, StoredBackup
from pullback.repository.local_store import LocalStore
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot
from tests.support.restic import PASSWORD

# What a password costs here: nothing.
CHEAP = ScryptCost(n=16, r=1, p=1)
MOMENT = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
CHUNK = 256 << 10


def new_repository(path: Path, version: int = 2) -> Repository:
    """An empty repository in a directory."""
    return Repository.init(LocalStore(path), PASSWORD, version=version, cost=CHEAP)


def open_repository(path: Path, password: str = PASSWORD) -> Repository:
    """The same one as another process sees it."""
    return Repository.open(LocalStore(path), password)


def open_key_file(content: bytes, password: str) -> Key:
    """The keys in a key file."""
    file = KeyFile.parse(content)
    return Key.of_file(file, file.derive(password))


def store_backup(
    repository: Repository,
    disks: Mapping[str, Sequence[bytes]],
    *,
    domain: str = "web",
    day: int = 0,
    manifest: bytes = b'{"format": 1}',
    chunk: int = CHUNK,
) -> str:
    """Store a backup of disks given as lists of segments; returns its id.  The caller holds the lock."""
    moment = MOMENT + timedelta(days=day)
    with repository.new_writer() as writer:
        builder = BackupBuilder(repository, writer, domain, moment)
        for disk, segments in disks.items():
            builder.add_disk(disk)
            for number, data in enumerate(segments):
                pieces = [data[start : start + chunk] for start in range(0, len(data), chunk)]
                content = [writer.add(BlobKind.DATA, piece) for piece in pieces]
                builder.add_segment(disk, number, len(data), content)
        tree = builder.finish(manifest)
    repository.save_index()
    return repository.save_snapshot(Snapshot(moment, tree, (builder.path,), domain, tags=("pullback",)))


def read_disk(repository: Repository, spec: str, disk: str) -> bytes:
    """The whole disk of a backup."""
    stored = StoredBackup(repository, repository.find(spec))
    parts = []
    for segment in stored.segments(disk):
        for blob, length in stored.content(segment):
            data = repository.load_blob(BlobKind.DATA, blob)
            assert len(data) == length
            parts.append(data)
    return b"".join(parts)
