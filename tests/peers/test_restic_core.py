# SPDX-License-Identifier: Apache-2.0
"""restic reads what we write."""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

from pullback.repository.blob import BlobKind
from pullback.repository.crypto import ScryptCost
from pullback.repository.layout import BackupBuilder, StoredBackup
from pullback.repository.local_store import LocalStore
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot
from tests.support.restic import PASSWORD, Restic, needs_restic

pytestmark = needs_restic

CHEAP = ScryptCost(n=16, r=1, p=1)
MIB = 1 << 20


def store_backup(repository: Repository, domain: str, disks: dict[str, list[bytes]], chunk: int = 256 << 10) -> str:
    """A backup of these disks, given as lists of segments."""
    moment = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
    with repository.lock(), repository.new_writer() as writer:
        builder = BackupBuilder(repository, writer, domain, moment)
        for disk, segments in disks.items():
            for number, data in enumerate(segments):
                pieces = [data[start : start + chunk] for start in range(0, len(data), chunk)]
                content = [writer.add(BlobKind.DATA, piece) for piece in pieces]
                builder.add_segment(disk, number, len(data), content)
        tree = builder.finish(b'{"format": 1}')
        writer.flush()
        repository.save_index()
        return repository.save_snapshot(Snapshot(moment, tree, (builder.path,), domain, tags=("pullback",)))


def test_restic_reads_a_backup(tmp_path: Path) -> None:
    repository = Repository.init(LocalStore(tmp_path / "repo"), PASSWORD, cost=CHEAP)
    segments = [os.urandom(4 * MIB), bytes(4 * MIB), b"text " * 500_000]
    snapshot = store_backup(repository, "web", {"sda": segments, "sdb": [bytes(64 << 10)]})

    restic = Restic(tmp_path / "repo")
    restic.check()
    (shown,) = restic.json("snapshots")
    assert (shown["id"], shown["hostname"], shown["paths"]) == (snapshot, "web", ["/web"])
    restic.run("restore", snapshot, "--target", str(tmp_path / "out"))
    files = sorted((tmp_path / "out/web/sda").glob("*/*.raw"))
    assert [file.name for file in files] == ["0000.raw", "0001.raw", "0002.raw"]
    assert b"".join(file.read_bytes() for file in files) == b"".join(segments)
    assert restic.run("dump", snapshot, "/web/domain.json") == b'{"format": 1}'

    again = Repository.open(LocalStore(tmp_path / "repo"), PASSWORD)
    stored = StoredBackup(again, again.find("web@latest"))
    assert stored.disks() == ["sda", "sdb"]
    read = hashlib.sha256()
    for segment in stored.segments("sda"):
        for blob, length in stored.content(segment):
            data = again.load_blob(BlobKind.DATA, blob)
            assert len(data) == length
            read.update(data)
    assert read.digest() == hashlib.sha256(b"".join(segments)).digest()
