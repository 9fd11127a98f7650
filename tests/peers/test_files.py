# SPDX-License-Identifier: Apache-2.0
"""``pullback files`` with libguestfs itself: a real partition table and real file systems, made without it.

It needs a kernel, of which it uses the laboratory's package, unpacked; and it is booted once.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from lab import guest
from pullback.engine.appliance import Appliance
from pullback.engine.files import FilesReader
from tests.support.backups import open_repository, store_backup
from tests.support.product import MIB, Stage
from tests.support.restic import needs_restic
from tests.support.serving import manifest, serving

TOOLS = ("guestfish", "sfdisk", "mkfs.ext4", "mkfs.vfat", "mcopy")
HOSTILE = os.fsdecode(b"we\x1b[2Jird'\"\n\xe9 name")

pytestmark = [
    needs_restic,
    pytest.mark.skipif(
        any(shutil.which(tool) is None for tool in TOOLS) or not Path("/lib/modules").is_dir(),
        reason="libguestfs (package guestfish) is not installed, or nothing ever had a kernel here",
    ),
]


def run(*command: str | Path, said: str | None = None, **more: str) -> None:
    subprocess.run(command, input=said, check=True, capture_output=True, text=True, env={**os.environ, **more})


def make_disk(place: Path) -> bytes:
    """A GPT with a FAT and an ext4, in which names and links are hostile."""
    tree = place / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/passwd").write_text("root:x:0\n")
    os.utime(tree / "etc/passwd", (981158400, 981158400))
    (tree / "etc/passwd").chmod(0o4640)
    (tree / "etc" / HOSTILE).write_text("hostile")
    (tree / "etc/up").symlink_to("../../../../escaped")
    (tree / "etc/shadow").symlink_to("/etc/shadow")
    os.mkfifo(tree / "etc/fifo")
    image = place / "disk.raw"
    image.touch()
    os.truncate(image, 64 * MIB)
    run("sfdisk", image, said="label: gpt\nstart=2048, size=40960\nstart=43008, size=65536\n")
    run("mkfs.ext4", "-q", "-L", "rootfs", "-d", tree, "-E", f"offset={43008 * 512}", image, f"{65536 // 2}k")
    run("mkfs.vfat", "-F", "16", "-n", "EFI", "-h", "2048", "--offset", "2048", image, str(40960 // 2))
    run("mcopy", "-i", f"{image}@@{MIB}", tree / "etc/passwd", "::/boot.txt", MTOOLS_SKIP_CHECK="1")
    return image.read_bytes()


@pytest.fixture
def kernel(lab_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libguestfs finds a kernel, and keeps what it builds of it where the test's things are."""
    run("dpkg-deb", "-x", guest._package(), lab_dir / "kernel")
    (modules,) = (lab_dir / "kernel/lib/modules").iterdir()
    run("depmod", "-b", lab_dir / "kernel", modules.name)
    monkeypatch.setenv("SUPERMIN_KERNEL", str(next((lab_dir / "kernel/boot").glob("vmlinuz-*"))))
    monkeypatch.setenv("SUPERMIN_MODULES", str(modules))
    monkeypatch.setenv("LIBGUESTFS_CACHEDIR", str(lab_dir))


def test_partitions_and_file_systems_are_read(tmp_path: Path, lab_dir: Path, kernel: None) -> None:
    stage = Stage(tmp_path)
    disk = make_disk(tmp_path)
    repository = open_repository(stage.repo)
    with repository.lock():
        store_backup(repository, {"vda": [disk]}, manifest=manifest({"vda": len(disk)}))
    socket = lab_dir / "nbd"
    with serving(stage, "latest", "--socket", socket), Appliance(str(socket), ["vda"], print) as appliance:
        appliance.start()
        reader = FilesReader(appliance, ["vda"])
        found = list(reader.filesystems())
        assert [(one.device, one.disk, one.kind, one.label) for one in found] == [
            ("/dev/sda1", "vda", "vfat", "EFI"),
            ("/dev/sda2", "vda", "ext4", "rootfs"),
        ]
        assert [one.size for one in found] == [20 * MIB, 32 * MIB]
        assert reader.mount(found, "", ["/etc/passwd"]) is found[1]
        listed = {entry.path: entry.stat for entry in reader.list("/etc")}
        names = {"passwd", "up", "shadow", "fifo", HOSTILE}
        assert listed.keys() == {f"/etc/{name}" for name in names}
        assert listed["/etc/passwd"].mtime == 981158400 * 10**9
        assert listed["/etc/passwd"].size == 9
        extraction = reader.extract(["/etc", f"/etc/{HOSTILE}", "/etc/up"], tmp_path / "all")
        reader.extract([f"/etc/{HOSTILE}", "/etc/up", "/etc/passwd"], tmp_path / "some")
    assert [one.path for one in extraction.left_out if one.harmless] == ["etc/fifo"]
    for place, expected in (("all", names - {"fifo"}), ("some", {"passwd", "up", HOSTILE})):
        where = tmp_path / place / "etc"
        assert {path.name for path in where.iterdir()} == expected
        assert (where / "passwd").read_text() == "root:x:0\n"
        assert stat.S_IMODE((where / "passwd").stat().st_mode) == 0o640
        assert (where / "passwd").stat().st_mtime == 981158400
        assert (where / HOSTILE).read_text() == "hostile"
        assert os.readlink(where / "up") == "../../../../escaped"
