# SPDX-License-Identifier: Apache-2.0
"""The product on repositories that restic made, copied and changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import images
from lab.qemu import BareQemu
from pullback.model.units import SEGMENT
from pullback.repository.blob import BlobKind
from pullback.repository.crypto import make_key_file
from pullback.repository.layout import StoredBackup
from pullback.repository.store import FileKind
from tests.support.backups import CHEAP, open_repository
from tests.support.cli import MANIFEST
from tests.support.product import MIB, Stage, chain, references, same
from tests.support.restic import PASSWORD, Restic, needs_restic

pytestmark = needs_restic
Start = Callable[..., BareQemu]


def use(stage: Stage, place: Path, version: str = "2") -> Path:
    """Have the stage work on a new repository that restic made."""
    stage.repo, stage.restic = place, Restic(place)
    stage.restic.run("init", "--repository-version", version)
    # restic's key takes a second to open each time; the same one, sealed for less.
    repository = open_repository(place)
    dear = [name for name, _ in repository.store.list(FileKind.KEYS)]
    created = "2026-01-01T00:00:00Z"
    cheap = make_key_file(repository._key, PASSWORD, created=created, username="", hostname="", cost=CHEAP)
    repository.store.save(FileKind.KEYS, *cheap)
    for name in dear:
        repository.store.remove(FileKind.KEYS, name)
    return place


def lay_out(folder: Path, disk: bytes, **more: object) -> Path:
    """A backup of a disk of one segment and a bit, as plain files; the segment itself is a hole."""
    entry = MANIFEST["disks"][0] | {"virtual_size": SEGMENT + len(disk)}  # type: ignore[index]
    for number in ("0000", "0001"):
        (folder / "vda" / number).mkdir(parents=True)
    os.truncate(os.open(folder / "vda/0000/0000.raw", os.O_CREAT | os.O_WRONLY, 0o600), SEGMENT)
    (folder / "vda/0001/0001.raw").write_bytes(disk)
    (folder / "domain.json").write_text(json.dumps(MANIFEST | {"disks": [entry]} | more))
    return folder


@pytest.mark.parametrize("version", ["1", "2"])
def test_what_restic_backup_stored_is_listed_and_restored(lab_dir: Path, version: str) -> None:
    """restic cuts the files where it likes, and knows nothing of our tag."""
    stage, disk = Stage(lab_dir), os.urandom(3 * MIB + 512)
    use(stage, lab_dir / "theirs", version)
    stage.restic.run("backup", str(lay_out(lab_dir / "web", disk)), "--host", "web", "--tag", "by-hand")
    (one,) = json.loads(stage.cli("list", "--json").out)["backups"]
    assert one["domain"] == "web"
    done = stage.cli("restore", "web@latest", "--to", lab_dir / "to", "--format", "raw")
    assert done.code == 0, done.err
    restored = lab_dir / "to" / "vda.raw"
    assert restored.stat().st_size == SEGMENT + len(disk)
    with restored.open("rb") as file:
        assert file.read(SEGMENT).count(0) == SEGMENT
        assert file.read() == disk


def test_nothing_is_written_into_a_repository_of_format_1(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    use(stage, lab_dir / "old", "1")
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    # What writes and takes back leaves no file, but another time.
    before = {path: path.stat().st_mtime_ns for path in stage.repo.rglob("*")}
    for arguments in ([], ["--full"], ["--dry-run"]):
        done = stage.cli_backup(qemu, *arguments)
        assert done.code == 14
        assert "format version 1" in done.err
        assert "restic migrate upgrade_repo_v2" in done.err
        assert {path: path.stat().st_mtime_ns for path in stage.repo.rglob("*")} == before
        assert chain(qemu) == {}


def test_a_repository_brought_to_format_2_by_restic(lab_dir: Path, bare_qemu: Start) -> None:
    """What was stored in the old format stays readable beside what is stored in the new one."""
    stage, disk = Stage(lab_dir), os.urandom(MIB)
    use(stage, lab_dir / "old", "1")
    stage.restic.run("backup", str(lay_out(lab_dir / "web", disk)), "--host", "web")
    stage.restic.run("migrate", "upgrade_repo_v2")
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, os.urandom(4096))
    state = references(qemu)
    same(stage.contents(stage.backup(qemu).id), state)
    old = stage.restore("web@latest", format="raw").disks[0]
    with open(old.path, "rb") as file:
        file.seek(SEGMENT)
        assert file.read() == disk


def test_every_password_opens_and_one_that_was_removed_does_not(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    use(stage, lab_dir / "theirs")
    (lab_dir / "second").write_text("second password\n")
    stage.restic.run("key", "add", "--new-password-file", str(lab_dir / "second"))
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, 5)
    state = references(qemu)
    for password in (PASSWORD, "second password"):
        assert stage.cli_backup(qemu, env={"RESTIC_PASSWORD": password}).code == 0
    first = next(key["id"] for key in stage.restic.json("key", "list") if key["current"])
    Restic(stage.repo, "second password").run("key", "remove", first)
    refused = stage.cli("list", env={"RESTIC_PASSWORD": PASSWORD})
    assert refused.code == 12
    assert PASSWORD not in refused.err
    done = stage.cli("restore", "latest", "--to", lab_dir / "to", env={"RESTIC_PASSWORD": "second password"})
    assert done.code == 0
    assert images.raw_bytes(lab_dir / "to/vda.qcow2") == state["vda"]
    # For the judge, who has the first one.
    (lab_dir / "first").write_text(PASSWORD)
    Restic(stage.repo, "second password").run("key", "add", "--new-password-file", str(lab_dir / "first"))


def test_what_restic_copied_and_tagged_is_built_on(lab_dir: Path, bare_qemu: Start) -> None:
    """The copy names the same checkpoint, so the next backup there reads only what changed since."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 2 * MIB)], running=True)
    qemu.device_write("vda", 0, 2 * MIB, os.urandom(4096))
    stage.backup(qemu)
    state, source = references(qemu), stage.restic
    use(stage, lab_dir / "copy")
    stage.restic.run("copy", "--from-repo", source.repository, RESTIC_FROM_PASSWORD=PASSWORD)
    (copied,) = stage.listed()
    stage.restic.run("tag", "--add", "keep", copied)
    (tagged,) = stage.listed()
    assert tagged != copied
    same(stage.contents(tagged), state)
    qemu.device_write("vda", MIB, 4096, 9)
    state = references(qemu)
    made = stage.backup(qemu)
    assert made.manifest.disks[0].mode == "incremental"
    assert made.bytes_read < MIB
    same(stage.contents(made.id), state)


def test_dump_gives_the_bytes_of_a_segment(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", SEGMENT + MIB)], running=True)
    qemu.device_write("vda", SEGMENT + 4096, 70_000 // 512 * 512, os.urandom(512))
    qemu.device_flush("vda")
    made = stage.backup(qemu)
    repository = open_repository(stage.repo)
    stored = StoredBackup(repository, repository.find(made.id))
    last = stored.segments("vda")[-1]
    ours = b"".join(repository.load_blob(BlobKind.DATA, blob) for blob, _ in stored.content(last))
    dumped = stage.restic.run("dump", made.id, "/lab/vda/0001/0001.raw")
    assert dumped == ours
    with open(stage.restore(made.id, format="raw").disks[0].path, "rb") as file:
        file.seek(SEGMENT)
        assert file.read() == dumped
    assert any(dumped)
