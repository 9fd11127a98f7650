# SPDX-License-Identifier: Apache-2.0
"""We read what restic writes, byte for byte."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from pullback.repository.blob import BlobKind
from pullback.repository.layout import StoredBackup
from tests.support.backups import open_repository, read_disk, store_backup
from tests.support.restic import Restic, needs_restic

pytestmark = needs_restic

MIB = 1 << 20


def disk_of(seed: int) -> list[bytes]:
    """Segments of 5 MiB with noise, text and zeroes, the last one shorter: restic cuts each where it likes."""
    chance = random.Random(seed)
    noise = chance.randbytes(5 * MIB)
    mixed = chance.randbytes(2 * MIB) + bytes(2 * MIB) + b"text and more text. " * (MIB // 20)
    return [noise, mixed.ljust(5 * MIB, b"\0"), bytes(5 * MIB), b"tail" * 1000]


def lay_out(folder: Path, disks: dict[str, list[bytes]]) -> None:
    """The layout of a backup as plain files."""
    for disk, segments in disks.items():
        for number, data in enumerate(segments):
            place = folder / disk / f"{number:04d}"
            place.mkdir(parents=True)
            (place / f"{number:04d}.raw").write_bytes(data)
    (folder / "domain.json").write_bytes(b'{"format": 1, "name": "web"}')


@pytest.mark.parametrize(
    ("version", "compression"), [("1", "auto"), ("2", "off"), ("2", "auto"), ("2", "max")]
)  # fmt: skip
def test_a_backup_by_restic_reads_the_same(tmp_path: Path, version: str, compression: str) -> None:
    restic, disk = Restic(tmp_path / "repo"), disk_of(1)
    restic.run("init", "--repository-version", version)
    folder = tmp_path / "some where" / "web"
    lay_out(folder, {"sda": disk, "sdb": [b"small"]})
    restic.run("backup", str(folder), "--host", "web", "--compression", compression)

    repository = open_repository(tmp_path / "repo")
    assert repository.version == int(version)
    stored = StoredBackup(repository, repository.find("web@latest"))
    assert stored.snapshot.paths == (str(folder),)
    assert stored.disks() == ["sda", "sdb"]
    assert stored.manifest_bytes() == b'{"format": 1, "name": "web"}'
    assert [segment.size for segment in stored.segments("sda")] == [5 * MIB] * 3 + [4000]
    assert read_disk(repository, "latest", "sda") == b"".join(disk)
    assert read_disk(repository, "latest", "sdb") == b"small"


def test_its_blobs_read_by_packs_too(tmp_path: Path) -> None:
    restic, disk = Restic(tmp_path / "repo"), disk_of(2)
    restic.run("init", "--repository-version", "2")
    lay_out(tmp_path / "web", {"sda": disk})
    restic.run("backup", str(tmp_path / "web"), "--host", "web")
    repository = open_repository(tmp_path / "repo")
    stored = StoredBackup(repository, repository.find("latest"))
    content = [blob for segment in stored.segments("sda") for blob, _ in stored.content(segment)]
    packs: dict[bytes, list[bytes]] = {}
    for blob in content:
        place = repository.index.lookup(BlobKind.DATA, blob)
        assert place is not None
        packs.setdefault(place.pack_id, []).append(blob)
    blobs = {}
    for pack, ids in packs.items():
        blobs |= dict(repository.load_blobs_of_pack(pack, ids))
    assert b"".join(blobs[blob] for blob in content) == b"".join(disk)


def test_both_write_to_one_repository(tmp_path: Path) -> None:
    restic, disk = Restic(tmp_path / "repo"), disk_of(3)
    restic.run("init", "--repository-version", "2")
    lay_out(tmp_path / "files", {"sda": disk})
    repository = open_repository(tmp_path / "repo")
    with repository.lock():
        store_backup(repository, {"sda": disk}, domain="ours")
        restic.run("backup", str(tmp_path / "files"), "--host", "theirs")
    restic.run("prune", "--max-unused", "0")
    restic.check()
    repository = open_repository(tmp_path / "repo")
    for domain in ("ours", "theirs"):
        assert read_disk(repository, f"{domain}@latest", "sda") == b"".join(disk)


def test_an_incremental_by_restic_on_top_of_ours(tmp_path: Path) -> None:
    """What we stored, restored by restic, changed and backed up by restic: the chain of two programs holds."""
    restic = Restic(tmp_path / "repo")
    restic.run("init", "--repository-version", "2")
    disk = [os.urandom(MIB), os.urandom(MIB)]
    repository = open_repository(tmp_path / "repo")
    with repository.lock():
        store_backup(repository, {"sda": disk})
    restic.run("restore", "latest", "--target", str(tmp_path / "out"))
    changed = tmp_path / "out/web/sda/0001/0001.raw"
    changed.write_bytes(disk[1][: MIB // 2] + bytes(MIB // 2))
    restic.run("backup", str(tmp_path / "out/web"), "--host", "web")
    read = read_disk(open_repository(tmp_path / "repo"), "web@latest", "sda")
    assert read == disk[0] + disk[1][: MIB // 2] + bytes(MIB // 2)
