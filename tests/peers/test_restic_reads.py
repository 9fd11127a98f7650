# SPDX-License-Identifier: Apache-2.0
"""restic works on what we write."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from pullback.repository.blob import BlobKind
from pullback.repository.repository import Repository
from pullback.repository.store import FileKind
from pullback.repository.tree import decode_tree, encode_tree
from tests.support.backups import CHUNK, new_repository, open_repository, read_disk, store_backup
from tests.support.restic import PASSWORD, Restic, needs_restic

pytestmark = needs_restic

MIB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "repo"


@pytest.fixture
def repository(place: Path) -> Repository:
    return new_repository(place)


@pytest.fixture
def restic(place: Path) -> Restic:
    return Restic(place)


def segments() -> list[bytes]:
    return [os.urandom(2 * MIB), bytes(2 * MIB), b"some text " * 150_000]


@pytest.mark.parametrize("version", [1, 2])
def test_check_snapshots_ls_dump_restore(tmp_path: Path, version: int) -> None:
    repository, restic, disk = new_repository(tmp_path / "repo", version), Restic(tmp_path / "repo"), segments()
    name = store_backup(repository, {"sda": disk, "sdb": [b"x"], "empty": []}, domain='we<b> "ü"')
    restic.check()
    (shown,) = restic.json("snapshots")
    assert (shown["id"], shown["hostname"], shown["tags"]) == (name, 'we<b> "ü"', ["pullback"])
    assert shown["paths"] == ['/we<b> "ü"']
    assert restic.run("dump", name, '/we<b> "ü"/domain.json') == b'{"format": 1}'
    listed = [json.loads(line) for line in restic.run("ls", name, "--json").splitlines()]
    assert [node["path"].rpartition('"')[2] for node in listed[1:]] == [
        "", "/domain.json", "/empty", "/sda", "/sda/0000", "/sda/0000/0000.raw", "/sda/0001", "/sda/0001/0001.raw",
        "/sda/0002", "/sda/0002/0002.raw", "/sdb", "/sdb/0000", "/sdb/0000/0000.raw",
    ]  # fmt: skip
    restic.run("restore", name, "--target", str(tmp_path / "out"))
    files = sorted((tmp_path / 'out/we<b> "ü"/sda').glob("*/*.raw"))
    assert b"".join(file.read_bytes() for file in files) == b"".join(disk)


@pytest.mark.damages_repository("to see that restic sees it")
def test_a_damaged_pack_fails_restics_check(place: Path, repository: Repository, restic: Restic) -> None:
    """The judge judges: its approval in the other tests means something."""
    store_backup(repository, {"sda": segments()})
    path = max((path for path in (place / "data").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    assert restic.attempt("check", "--read-data").returncode != 0


def test_forget_and_prune_leave_the_other_backups_whole(repository: Repository, restic: Restic, place: Path) -> None:
    shared, disks = os.urandom(2 * MIB), [[os.urandom(2 * MIB)] for _ in range(3)]
    names = [store_backup(repository, {"sda": [shared, *disk]}, day=day) for day, disk in enumerate(disks)]
    restic.run("forget", names[0], "--prune", "--max-unused", "0")
    restic.check()
    again = open_repository(place)
    assert [one.id for one in again.snapshots()] == names[1:]
    for name, disk in zip(names[1:], disks[1:], strict=True):
        assert read_disk(again, name, "sda") == shared + disk[0]


def test_a_prune_finds_nothing_to_improve_in_a_fresh_backup(repository: Repository, restic: Restic) -> None:
    store_backup(repository, {"sda": segments()})
    said = restic.run("prune", "--max-unused", "0", "--dry-run").decode()
    assert re.search(r"to repack: +0 blobs", said)
    assert re.search(r"total prune: +0 blobs", said)


def test_copy_in_both_directions(repository: Repository, restic: Restic, tmp_path: Path) -> None:
    disk = segments()
    store_backup(repository, {"sda": disk})
    other, elsewhere = new_repository(tmp_path / "other"), Restic(tmp_path / "other")
    elsewhere.run("copy", "--from-repo", restic.repository, RESTIC_FROM_PASSWORD=PASSWORD)
    elsewhere.check()
    assert read_disk(open_repository(tmp_path / "other"), "latest", "sda") == b"".join(disk)
    assert other.snapshots()[0].hostname == "web"


def test_both_programs_agree_on_keys(repository: Repository, restic: Restic, place: Path, tmp_path: Path) -> None:
    new = tmp_path / "password"
    new.write_text("another one\n")
    restic.run("key", "add", "--new-password-file", str(new))
    assert open_repository(place, "another one").id == open_repository(place).id == repository.id
    assert Restic(place, "another one").json("cat", "config")["id"] == repository.id
    assert len(restic.json("key", "list")) == 2


def test_restic_rebuilds_the_index_from_our_packs(repository: Repository, restic: Restic, place: Path) -> None:
    disk = segments()
    store_backup(repository, {"sda": disk})
    for path in (place / "index").iterdir():
        path.unlink()
    restic.run("rebuild-index")
    restic.check()
    assert read_disk(open_repository(place), "latest", "sda") == b"".join(disk)


def test_tagging_keeps_what_a_backup_needs(repository: Repository, restic: Restic, place: Path) -> None:
    disk = segments()
    name = store_backup(repository, {"sda": disk})
    restic.run("tag", "--add", "keep", name)
    tagged = open_repository(place).find("web@latest")
    assert tagged.id != name
    assert (tagged.original, set(tagged.tags)) == (name, {"pullback", "keep"})
    assert read_disk(open_repository(place), "latest", "sda") == b"".join(disk)


def test_our_trees_are_spelt_as_restics_own(
    restic: Restic, tmp_path: Path, repository: Repository, place: Path
) -> None:
    """restic's trees with the fields we never write cut out of their text are what our encoder makes of them."""
    names = ["plain", 'quo"te', "back\\slash", "<&>", "ünï €", "\x01\t\n\x7f", "\u200b\u2028\U000e0001", "\U0001f600"]
    source = tmp_path / "source"
    source.mkdir()
    for number, name in enumerate([os.fsencode(name) for name in names] + [b"not utf-8 \xff\xc3"]):
        path = os.fsencode(source) + b"/" + name
        with open(path, "wb") as file:
            file.write(b"x" * number)
        os.utime(path, ns=(number * 1_000_000_010, number * 1_100_000_000))
    (source / "folder").mkdir()
    restic.run("backup", str(source), "--host", "h")
    again = open_repository(place)
    tree = again.load_tree(again.find("latest").tree)
    for name in (*tmp_path.parts[1:], "source"):
        node = tree.find(name)
        assert node is not None
        assert node.subtree is not None
        text = again.load_blob(BlobKind.TREE, node.subtree)
        cut = re.sub(rb'"(inode|device_id|links)":\d+,|"(user|group)":"[^"]*",', b"", text)
        tree = decode_tree(text)
        assert encode_tree(tree.nodes) == cut
    assert sorted(os.fsencode(node.name) for node in tree.nodes) == sorted(os.listdir(os.fsencode(source)))


def test_a_restored_backup_has_the_modes_and_times_we_gave(
    repository: Repository, restic: Restic, tmp_path: Path
) -> None:
    store_backup(repository, {"sda": [b"x"]})
    restic.run("restore", "latest", "--target", str(tmp_path / "out"))
    manifest, segment = tmp_path / "out/web/domain.json", tmp_path / "out/web/sda/0000/0000.raw"
    assert (manifest.stat().st_mode & 0o777, segment.stat().st_mode & 0o777) == (0o600, 0o600)
    assert (manifest.parent.stat().st_mode & 0o777) == 0o700
    assert (manifest.stat().st_mtime, segment.stat().st_mtime) == (1777863721, 0)


def test_many_blobs_in_many_index_files(place: Path, restic: Restic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pullback.repository.writer.MAX_INDEX_BLOBS", 500)
    monkeypatch.setattr("pullback.repository.pack.MAX_BLOBS", 300)
    repository, disk = new_repository(place), os.urandom(2 * MIB)
    store_backup(repository, {"sda": [disk]}, chunk=1024)
    assert len(list(repository.store.list(FileKind.INDEX))) > 3
    restic.check()
    assert read_disk(open_repository(place), "latest", "sda") == disk


def test_restic_sees_the_blob_we_see(repository: Repository, restic: Restic) -> None:
    data = os.urandom(CHUNK)
    with repository.new_writer() as writer:
        blob = writer.add(BlobKind.DATA, data)
    repository.save_index()
    assert restic.run("cat", "blob", blob.hex()) == data
