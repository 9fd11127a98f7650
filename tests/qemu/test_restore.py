# SPDX-License-Identifier: Apache-2.0
"""Restoring to new images, and restic as the judge of what is stored."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import images
from lab.disks import DiskSpec
from lab.processes import LabError
from lab.qemu import BareQemu
from pullback.errors import PullbackError
from tests.support.backups import open_repository
from tests.support.product import KIB, MIB, Stage, forked, mounted_tmpfs, reference, references, same
from tests.support.restic import needs_restic
from tests.support.serving import Server

Start = Callable[..., BareQemu]
ODD = 5 * MIB + 3 * 512


class Made:
    """A domain with two disks and two backups, what each of these must hold, and the domain itself, ended."""

    def __init__(self, place: Path, start: Start) -> None:
        self.stage = Stage(place)
        with start([self.stage.disk("vda", ODD), self.stage.disk("vdb", 40 * MIB)], running=True) as qemu:
            qemu.device_write("vda", 0, MIB, os.urandom(4096))
            qemu.device_write("vda", ODD - 1024, 1024, 3)
            qemu.device_write("vdb", 30 * MIB, 300 * KIB, 4)
            self.states = [references(qemu)]
            self.ids = [self.stage.backup(qemu).id]
            qemu.device_write("vda", 64 * KIB, 4096, 5)
            qemu.device_zero("vdb", 30 * MIB, 64 * KIB, unmap=True)
            self.states.append(references(qemu))
            self.ids.append(self.stage.backup(qemu).id)
            qemu.shutdown()


@pytest.fixture
def made(lab_dir: Path, bare_qemu: Start) -> Made:
    return Made(lab_dir, bare_qemu)


def test_formats_and_names(made: Made, lab_dir: Path) -> None:
    for number, (spec, state) in enumerate(
        [
            (made.ids[0], made.states[0]),
            (made.ids[0][:10], made.states[0]),
            (made.ids[1], made.states[1]),
            ("latest", made.states[1]),
            ("lab@latest", made.states[1]),
        ]
    ):
        image_format = "raw" if number % 2 else "qcow2"
        to = lab_dir / f"to{number}" / "deeper"
        done = made.stage.cli("restore", spec, "--to", to, "--format", image_format)
        assert done.code == 0
        assert sorted(path.name for path in to.iterdir()) == [f"vda.{image_format}", f"vdb.{image_format}"]
        for disk in ("vda", "vdb"):
            path = to / f"{disk}.{image_format}"
            assert str(path) in done.out
            info = images.info(path)
            assert (info["format"], info["virtual-size"]) == (image_format, len(state[disk]))
            assert images.raw_bytes(path) == state[disk]


def test_images_are_sound_and_thin(made: Made, lab_dir: Path) -> None:
    for image_format in ("qcow2", "raw"):
        to = lab_dir / image_format
        done = made.stage.cli("restore", "latest", "--to", to, "--format", image_format, "--json")
        assert done.code == 0
        written = {disk["target"]: disk["bytes_written"] for disk in done.event("restore")["disks"]}
        assert written == {"vda": MIB + 1536, "vdb": 448 * KIB}
        for disk in ("vda", "vdb"):
            path = to / f"{disk}.{image_format}"
            assert path.stat().st_blocks * 512 <= written[disk] + 512 * KIB
    images.check(lab_dir / "qcow2" / "vda.qcow2")
    assert images.bitmaps(lab_dir / "qcow2" / "vda.qcow2") == {}


def test_a_domain_boots_from_restored_images_and_is_backed_up_again(
    made: Made, lab_dir: Path, bare_qemu: Start
) -> None:
    made.stage.restore("latest", lab_dir / "to")
    qemu = bare_qemu([DiskSpec(lab_dir / "to" / f"{disk}.qcow2", disk) for disk in ("vda", "vdb")], running=True)
    qemu.device_read_check("vda", 64 * KIB, 4096, 5)
    qemu.device_write("vda", 0, 4096, 9)
    state = references(qemu)
    first = made.stage.backup(qemu)
    # The restored images know no checkpoint: the first backup of them reads everything and stores next to nothing.
    assert {disk.mode for disk in first.manifest.disks} == {"full"}
    assert sum(disk.bytes_new for disk in first.manifest.disks) <= 256 * KIB
    qemu.device_write("vda", MIB, 4096, 10)
    again = made.stage.backup(qemu)
    assert {disk.mode for disk in again.manifest.disks} == {"incremental"}
    same(made.stage.contents(first.id), state)
    same(made.stage.contents(again.id), references(qemu))


def test_some_disks(made: Made, lab_dir: Path) -> None:
    assert made.stage.cli("restore", "latest", "--to", lab_dir / "to", "--disk", "vdb").code == 0
    assert [path.name for path in (lab_dir / "to").iterdir()] == ["vdb.qcow2"]
    refused = made.stage.cli("restore", "latest", "--to", lab_dir / "to", "--disk", "sda")
    assert refused.code == 2
    assert "no disk sda" in refused.err
    # What is there already is no obstacle to what is not.
    assert made.stage.cli("restore", "latest", "--to", lab_dir / "to", "--disk", "vda").code == 0
    assert images.raw_bytes(lab_dir / "to" / "vda.qcow2") == made.states[1]["vda"]


def test_a_target_that_holds_the_files(made: Made, lab_dir: Path) -> None:
    to = lab_dir / "to"
    to.mkdir()
    (to / "vdb.qcow2").write_text("precious")
    (to / "other").write_text("mine")
    done = made.stage.cli("restore", "latest", "--to", to)
    assert done.code == 9
    assert f"{to}/vdb.qcow2 exists already" in done.err
    assert sorted(path.name for path in to.iterdir()) == ["other", "vdb.qcow2"]
    assert (to / "vdb.qcow2").read_text() == "precious"


def test_targets_that_cannot_be_written(made: Made, lab_dir: Path) -> None:
    (lab_dir / "file").write_text("x")
    for to in (lab_dir / "file", lab_dir / "file" / "below"):
        done = made.stage.cli("restore", "latest", "--to", to)
        assert done.code == 9
        assert str(to) in done.err
    (lab_dir / "to" / "vda.qcow2.partial").mkdir(parents=True)
    done = made.stage.cli("restore", "latest", "--to", lab_dir / "to")
    assert done.code == 9
    assert [path.name for path in (lab_dir / "to").iterdir()] == ["vda.qcow2.partial"]


@pytest.mark.skipif(os.geteuid() != 0, reason="root is not stopped by permissions")
def test_a_target_without_permission(made: Made, lab_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    to = lab_dir / "to"
    to.mkdir(mode=0o755)
    lab_dir.chmod(0o755)
    repository = open_repository(made.stage.repo)
    backup = repository.find("latest").id
    for place in (made.stage.repo, *made.stage.repo.rglob("*")):
        place.chmod(0o777 if place.is_dir() else 0o644)

    def as_nobody() -> int:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            made.stage.restore(backup, to)
        except PullbackError as error:
            print(error, flush=True)
            return error.exit_code
        return 0

    assert forked(as_nobody) == 9
    assert "Permission denied" in capfd.readouterr().out
    assert list(to.iterdir()) == []


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_a_full_target(made: Made, lab_dir: Path, image_format: str) -> None:
    try:
        with mounted_tmpfs(lab_dir / "tiny", "1m") as tiny:
            done = made.stage.cli("restore", "latest", "--to", tiny, "--format", image_format)
            assert done.code == 9
            assert "no space left" in done.err.lower()
            assert list(tiny.iterdir()) == []
    except LabError as error:
        if "mount" in str(error):
            pytest.skip(f"cannot mount: {error}")
        raise


def test_signals_end_a_restore(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    with bare_qemu([stage.disk("vda", 128 * MIB)], running=True) as qemu:
        for at in range(4):
            qemu.device_write("vda", at * 32 * MIB, 32 * MIB, os.urandom(MIB + 4096))
        stage.backup(qemu)
    state = images.raw_bytes(lab_dir / "vda.qcow2")
    for number in (signal.SIGINT, signal.SIGTERM):
        to = lab_dir / f"to-{number.name}"
        # So slow that it lasts 16 seconds: the signal comes before its end.
        with stage.running("restore", "latest", "--to", to, "--limit-rate", "8M", "--json") as process:
            server = Server(process)
            assert server.read("progress")
            assert server.events[0]["event"] == "progress"
            done = server.end(number)
        assert done.code == 130
        said = done.events[-1]
        if to.exists():
            assert said["message"].startswith("interrupted. What was restored is kept")
            assert {path.name for path in to.iterdir()} == {"vda.qcow2.partial", "vda.qcow2.partial.json"}
        else:
            assert said["message"].startswith("interrupted; what was begun was taken back")
        assert stage.cli("restore", "latest", "--to", to).code == 0
        assert images.raw_bytes(to / "vda.qcow2") == state
        assert [path.name for path in to.iterdir()] == ["vda.qcow2"]


# -- restic as the judge ------------------------------------------------------------------------------------------


def _joined(place: Path) -> dict[str, bytes]:
    """The disks in a directory of our layout, as anyone would put them together."""
    return {
        disk.name: b"".join(segment.read_bytes() for segment in sorted(disk.glob("*/*.raw")))
        for disk in place.iterdir()
        if disk.is_dir()
    }


@needs_restic
def test_restic_reads_what_pullback_wrote(made: Made, lab_dir: Path) -> None:
    made.stage.restic.check()
    for backup, state in zip(made.ids, made.states, strict=True):
        made.stage.restic.run("restore", backup, "--target", str(lab_dir / backup[:8]))
        same(_joined(lab_dir / backup[:8] / "lab"), state)
        assert made.stage.restic.run("dump", backup, "/lab/vda/0000/0000.raw") == state["vda"]
    listed = made.stage.restic.json("snapshots")
    assert [one["id"] for one in listed] == made.ids
    assert [(one["hostname"], one["paths"], one["tags"]) for one in listed] == [("lab", ["/lab"], ["pullback"])] * 2
    assert listed[1]["parent"] == made.ids[0]


@needs_restic
def test_pullback_reads_and_builds_on_what_restic_wrote(lab_dir: Path, bare_qemu: Start) -> None:
    """Restic cuts files by content: no chunk of such a backup is where pullback would have cut."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", ODD), stage.disk("vdb", 260 * MIB)], running=True)
    for at in range(5):
        qemu.device_write("vda", at * MIB, MIB, os.urandom(MIB))
    qemu.device_write("vdb", 255 * MIB, 4 * MIB, os.urandom(MIB))
    state = references(qemu)
    first = stage.backup(qemu).id
    stage.restic.run("restore", first, "--target", str(lab_dir / "out"))
    stage.restic.run("forget", first)
    stage.restic.run("backup", "--host", "lab", "--tag", "pullback", str(lab_dir / "out" / "lab"))
    theirs = stage.listed()[-1]
    assert theirs != first
    same(stage.contents(theirs), state)
    for number in range(2):
        qemu.device_write("vda", 2 * MIB + number * 999 * 512, 4096, 1 + number)
        qemu.device_write("vdb", number * MIB, 512, 1 + number)
        state = references(qemu)
        backup = stage.backup(qemu)
        assert {disk.mode for disk in backup.manifest.disks} == {"incremental"}
        base = backup.manifest.disks[0].base
        assert base is not None
        assert (base.backup == theirs) == (number == 0)
        same(stage.contents(backup.id), state)
    # Only the first one on top of theirs had to read touched segments whole.
    assert backup.bytes_read <= 4 * 256 * KIB
    stage.restic.check()


@needs_restic
def test_forget_and_prune_leave_the_rest_whole(made: Made) -> None:
    made.stage.restic.run("forget", made.ids[0], "--prune")
    made.stage.restic.check()
    same(made.stage.contents("latest"), made.states[1])


def test_the_domain_is_not_needed(made: Made, lab_dir: Path) -> None:
    """The original images are gone; so is the scratch; what is in the repository is enough."""
    for path in lab_dir.glob("*.qcow2"):
        path.unlink()
    same(made.stage.contents(made.ids[0]), made.states[0])


def test_reference_is_what_the_device_reads(made: Made, lab_dir: Path, bare_qemu: Start) -> None:
    """The judge is judged: after the restore, the device reads what qemu-img said the disk held."""
    made.stage.restore(made.ids[0], lab_dir / "to")
    qemu = bare_qemu([DiskSpec(lab_dir / "to" / "vda.qcow2", "vda")])
    qemu.device_read_check("vda", ODD - 1024, 1024, 3)
    assert reference(qemu) == made.states[0]["vda"]
