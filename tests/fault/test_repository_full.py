# SPDX-License-Identifier: Apache-2.0
"""A repository without room, or that cannot be written at all: a clear error, and what is stored still comes back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import images
from lab.processes import LabError, run
from lab.qemu import BareQemu
from tests.support.backups import new_repository
from tests.support.cli import filled_stage
from tests.support.product import MIB, Done, Stage, chain, leftovers, mounted_tmpfs, references, same
from tests.support.restic import Restic, needs_restic
from tests.support.survival import Fault

Start = Callable[..., BareQemu]
FAILED = 14


class Small:
    """A running domain, a repository on a file system of 8 MiB with one backup in it, and what that one must hold."""

    def __init__(self, place: Path, small: Path, start: Start) -> None:
        self.mount = small
        self.stage = Stage(place)
        self.stage.repo = small / "repo"
        new_repository(self.stage.repo)
        self.stage.restic = Restic(self.stage.repo)
        self.qemu = start([self.stage.disk("vda", 16 * MIB)], running=True)
        self.qemu.device_write("vda", 0, MIB, os.urandom(MIB))
        self.state = references(self.qemu)
        self.first = self.stage.backup(self.qemu).id
        self.chain = chain(self.qemu)

    def refuses(self, words: str, *arguments: str) -> Done:
        """A backup fails, and all is as it was."""
        files = {path: path.stat().st_size for path in self.stage.repo.rglob("*") if path.is_file()}
        done = self.stage.cli_backup(self.qemu, *arguments)
        assert done.code == FAILED, done.err
        assert words in done.err
        assert str(self.stage.repo) in done.err
        assert "Backups stored earlier are untouched." in done.err
        assert chain(self.qemu) == self.chain
        assert leftovers(self.qemu, self.stage.scratch) == []
        assert list((self.stage.repo / "locks").iterdir()) == []
        left = {path: path.stat().st_size for path in self.stage.repo.rglob("*") if path.is_file()}
        # Whole packs may have been stored; nothing that is half of anything, and no backup.
        assert files.items() <= left.items()
        assert {path.parent.parent.name for path in set(left) - set(files)} <= {"data"}
        assert not [path for path in left if "-tmp-" in path.name]
        self.judge()
        return done

    def judge(self) -> None:
        """The first backup is the only one, and whole."""
        assert self.stage.listed() == [self.first]
        same(self.stage.contents(self.first), self.state)
        self.stage.restic.run("check", "--read-data", "--no-lock")

    def goes_on(self) -> None:
        """The next backup is incremental, and right."""
        state = references(self.qemu)
        made = self.stage.backup(self.qemu)
        assert made.manifest.disks[0].mode == "incremental"
        same(self.stage.contents(made.id), state)
        same(self.stage.contents(self.first), self.state)
        self.stage.restic.run("prune", "--max-unused", "0")
        self.stage.restic.check()


@pytest.fixture
def small(lab_dir: Path, bare_qemu: Start) -> Iterator[Small]:
    try:
        with mounted_tmpfs(lab_dir / "small", "8m") as place:
            yield Small(lab_dir, place, bare_qemu)
    except LabError as error:
        if "mount" in str(error):
            pytest.skip(f"cannot mount: {error}")
        raise


def fill(place: Path, leave: int = 0) -> Path:
    """A file that takes all room but ``leave`` bytes."""
    file = place / "filler"
    free = os.statvfs(place)
    size = max(free.f_bavail * free.f_frsize - leave, 0)
    file.write_bytes(b"\1" * size)
    return file


@pytest.mark.fault(Fault.REPOSITORY_FULL)
@needs_restic
def test_no_room_for_what_changed(small: Small) -> None:
    small.qemu.device_write("vda", 2 * MIB, 12 * MIB, os.urandom(12 * MIB))
    for arguments in ([], ["--full"], []):
        done = small.refuses("no space left", *arguments)
        assert "Make room" in done.err
    run(["mount", "-o", "remount,size=64m", str(small.mount)])
    small.goes_on()


@pytest.mark.fault(Fault.REPOSITORY_FULL)
@needs_restic
@pytest.mark.parametrize("leave", [0, 4096, 8192, 16384, 24576])
def test_no_room_at_any_step(small: Small, leave: int) -> None:
    """Not even for the lock; for the lock alone; for that and a pack; and so on."""
    small.qemu.device_write("vda", 0, 4096, 7)
    filler = fill(small.mount, leave)
    small.refuses("no space left")
    filler.unlink()
    small.goes_on()


@pytest.mark.fault(Fault.REPOSITORY_FULL)
@needs_restic
def test_a_read_only_file_system(small: Small, lab_dir: Path) -> None:
    small.qemu.device_write("vda", 0, 4096, 7)
    run(["mount", "-o", "remount,ro", str(small.mount)])
    small.refuses("read-only")
    assert small.stage.cli("list").code == 0
    done = small.stage.cli("restore", "latest", "--to", lab_dir / "to")
    assert done.code == 0
    assert "without a lock" in done.err
    assert "read-only" in done.err
    assert images.raw_bytes(lab_dir / "to" / "vda.qcow2") == small.state["vda"]
    run(["mount", "-o", "remount,rw", str(small.mount)])
    small.goes_on()


@pytest.mark.fault(Fault.REPOSITORY_FULL)
def test_a_repository_that_is_not_ours_to_write(lab_dir: Path) -> None:
    """As another user: who may read it restores, who may not is told so."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    stage = filled_stage(lab_dir)
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    lab_dir.chmod(0o755)
    (to := lab_dir / "nobodys").mkdir()
    os.chown(to, 65534, 65534)
    for arguments in (["list"], ["restore", "latest", "--to", str(to / "a")]):
        done = stage.cli(*arguments, prefix=nobody)
        assert done.code == FAILED, done.err
        assert "permission is denied" in done.err
    assert list(to.iterdir()) == []
    run(["chmod", "-R", "a+rX", str(stage.repo)])
    assert stage.cli("list", prefix=nobody).code == 0
    done = stage.cli("restore", "latest", "--to", to / "b", prefix=nobody)
    assert done.code == 0, done.err
    assert "without a lock" in done.err
    assert images.info(to / "b" / "vda.qcow2")["virtual-size"] == MIB
    refused = stage.cli("init", prefix=nobody, env={"RESTIC_REPOSITORY": str(lab_dir / "new")})
    assert refused.code == FAILED
    assert "permission is denied" in refused.err
    assert not (lab_dir / "new").exists()
