# SPDX-License-Identifier: Apache-2.0
"""What is known to go wrong in backups of virtual machines elsewhere, each case by its name.

More of the same kind is in ``tests/fault``: every point at which a backup can die in ``test_backup_killed.py``, every
file of a repository that can be damaged in ``test_repository_damaged.py``, what a full target leaves in
``test_restore_killed.py``.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import images
from lab.disks import DiskSpec
from lab.processes import LabError, run
from lab.qemu import BareQemu
from pullback.engine.backup import BackupResult
from pullback.errors import Damaged
from pullback.repository.layout import BackupBuilder
from pullback.repository.repository import Repository
from tests.support import dying
from tests.support.api import inside
from tests.support.backups import new_repository, open_repository, read_disk
from tests.support.product import KIB, MIB, Stage, chain, leftovers, mounted_tmpfs, reference, same
from tests.support.survival import Fault, survives

Start = Callable[..., BareQemu]


class Case:
    """A domain with the disk vda, its backups, and what each of them must hold."""

    def __init__(self, place: Path, start: Start, **more: Any) -> None:
        self.stage = Stage(place)
        self.spec: DiskSpec = self.stage.disk("vda", 4 * MIB, **more)
        self.qemu = start([self.spec], running=True)
        self.states: dict[tuple[Path, str], bytes] = {}

    def backup(self, repo: Path | None = None) -> BackupResult:
        """A backup, which holds what the disk holds."""
        state = reference(self.qemu)
        made = self.stage.backup(self.qemu, repo=repo)
        self.states[repo or self.stage.repo, made.id] = state
        self._judge(repo or self.stage.repo, made.id)
        return made

    def judge(self) -> None:
        """Every backup there is holds what the disk held at its instant."""
        for repo, backup in self.states:
            self._judge(repo, backup)

    def _judge(self, repo: Path, backup: str) -> None:
        same({"vda": read_disk(open_repository(repo), backup, "vda")}, {"vda": self.states[repo, backup]})

    def kill(self, point: dying.Point) -> None:
        """A backup that is killed at this point, before it is one."""
        with survives(Fault.KILLED_IN_THE_DATA):
            assert dying.hit_backup(self.stage, self.qemu, point, signal.SIGKILL) == -signal.SIGKILL
            assert len(self.stage.listed()) == len(self.states)

    def restart_on(self, image: Path) -> None:
        """The stopped domain's image is replaced by another one, and it starts."""
        self.qemu.shutdown()
        shutil.copy(image, self.spec.path)
        self.qemu.start()


@pytest.fixture
def case(lab_dir: Path, bare_qemu: Start) -> Iterator[Case]:
    """Whatever the case, in its end every backup still holds what it held."""
    made = Case(lab_dir, bare_qemu, detect_zeroes="unmap")
    yield made
    made.judge()


def mode(made: BackupResult) -> str:
    return made.manifest.disks[0].mode


def base(made: BackupResult) -> str | None:
    """The id of the backup that this one builds on."""
    found = made.manifest.disks[0].base
    return found.backup if found else None


# -- what changed -------------------------------------------------------------------------------------------------


def test_changes_to_zero(case: Case) -> None:
    """Elsewhere: what is dirty and reads as zero is taken for a hole that nobody needs, and the restore has the old
    data there."""
    case.qemu.device_write("vda", 0, 4 * MIB, 0x61)
    case.backup()
    case.qemu.device_zero("vda", 0, 256 * KIB)
    case.qemu.device_zero("vda", 512 * KIB, 300 * KIB, unmap=True)
    case.qemu.device_discard("vda", MIB, 512 * KIB)
    case.qemu.device_write("vda", 2 * MIB, 256 * KIB, 0)  # detect-zeroes makes it an unmap
    case.qemu.device_zero("vda", 3 * MIB + 1024, 512)
    state = reference(case.qemu)
    for at, length in ((0, 256), (512, 300), (2048, 256)):
        assert state[at * KIB : (at + length) * KIB] == bytes(length * KIB)
    second = case.backup()
    assert mode(second) == "incremental"
    assert second.manifest.disks[0].bytes_zero >= 256 * KIB + 256 * KIB + 512 * KIB + 256 * KIB
    same(case.stage.contents(second.id), {"vda": state})


def test_an_incremental_that_is_killed_and_the_next_one(case: Case) -> None:
    """Elsewhere: the bitmap was cleared when the backup that died began, and the next one misses what it should have
    held."""
    case.qemu.device_write("vda", 0, 2 * MIB, 1)
    first = case.backup()
    for number, point in enumerate(
        (dying.at_call(BackupBuilder, "finish"), dying.at_call(Repository, "save_snapshot"))
    ):
        case.qemu.device_write("vda", number * 512 * KIB, 4096, 10 + number)
        case.kill(point)
        case.qemu.device_write("vda", number * 512 * KIB + 256 * KIB, 4096, 20 + number)
    made = case.backup()
    assert (mode(made), base(made), made.bytes_read) == ("incremental", first.id, 4 * 256 * KIB)
    assert leftovers(case.qemu, case.stage.scratch) == []


def test_a_full_backup_that_is_killed_half_written(case: Case) -> None:
    """Elsewhere: the next one is an incremental on a full backup that is half there."""
    case.qemu.device_write("vda", 0, 4 * MIB, bytes(range(256)) * 16)
    for point in (dying.at_call(BackupBuilder, "finish"), dying.at_call(Repository, "save_index", after=True)):
        case.kill(point)
    assert len(chain(case.qemu)) == 2
    made = case.backup()
    assert (mode(made), base(made), made.bytes_read) == ("full", None, 4 * MIB)
    assert len(chain(case.qemu)) == 3
    case.qemu.device_write("vda", MIB, 4096, 7)
    assert base(case.backup()) == made.id


def test_two_repositories_in_turn(case: Case) -> None:
    """Elsewhere: there is one bitmap, so each target's increments lack what went to the other one."""
    other = case.stage.place / "other"
    new_repository(other)
    made = []
    for turn in range(10):
        case.qemu.device_write("vda", turn * 150 * KIB, 4096, turn + 1)
        made.append(case.backup(other if turn % 3 == 1 else None))
    assert [mode(backup) for backup in made] == ["full", "full"] + ["incremental"] * 8
    # What one did in between is in the other's next one too, and no more than that.
    assert all(0 < backup.bytes_read <= 3 * 256 * KIB for backup in made[2:])


# -- what is kept -------------------------------------------------------------------------------------------------


def test_a_backup_in_the_middle_that_was_removed(case: Case) -> None:
    """Elsewhere: backups are a chain of files, and without the one in the middle those after it are of no use, or are
    restored all the same."""
    made = []
    for number in range(4):
        case.qemu.device_write("vda", number * 300 * KIB, 4096, number + 1)
        made.append(case.backup().id)
    for gone in made[1:3]:
        case.stage.restic.run("forget", gone, "--prune")
        del case.states[case.stage.repo, gone]
        case.judge()
    case.qemu.device_write("vda", 100 * KIB, 4096, 9)
    assert base(case.backup()) == made[3]


def test_the_newest_backup_that_was_removed(case: Case) -> None:
    """Elsewhere: the next one builds on the backup that the tracking knows and that is not there any more."""
    made = []
    for number in range(3):
        case.qemu.device_write("vda", number * 300 * KIB, 4096, number + 1)
        made.append(case.backup().id)
    case.stage.restic.run("forget", made[2], "--prune")
    del case.states[case.stage.repo, made[2]]
    case.qemu.device_write("vda", MIB, 4096, 9)
    again = case.backup()
    assert base(again) == made[1]
    case.stage.restic.run("forget", *made[:2], again.id, "--prune")
    case.states.clear()
    last = case.backup()
    assert last.manifest.disks[0].reason == "this is the first backup of the disk in this repository"


@pytest.mark.damages_repository("a bit of a pack is turned")
@pytest.mark.fault(Fault.REPOSITORY_DAMAGED)
def test_a_bit_that_turned(case: Case) -> None:
    """Elsewhere: it is restored, into an image that nobody knows to be wrong."""
    case.qemu.device_write("vda", 0, 256 * KIB, 5)
    older = case.backup()
    packs = set((case.stage.repo / "data").rglob("*"))
    case.qemu.device_write("vda", MIB, 256 * KIB, bytes(range(256)) * 16)
    newer = case.backup()
    added = [path for path in set((case.stage.repo / "data").rglob("*")) - packs if path.is_file()]
    pack = max(added, key=lambda path: path.stat().st_size)
    content = bytearray(pack.read_bytes())
    content[10] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)
    to = case.stage.place / "to"
    with pytest.raises(Damaged, match=pack.name):
        case.stage.restore(newer.id, to)
    assert not list(to.glob("*.qcow2"))
    same(case.stage.contents(older.id), {"vda": case.states[case.stage.repo, older.id]})
    # It is found without a restore, too.
    told = inside(["verify", "--all", "--data"], case.stage.environment())
    assert told.code == 15 and newer.id[:8] in told.out and older.id[:8] not in told.out
    del case.states[case.stage.repo, newer.id]


@pytest.mark.fault(Fault.TARGET_FULL)
def test_a_restore_to_where_there_is_no_room(case: Case) -> None:
    """Elsewhere: the image is cut short, and the restore ends with success."""
    case.qemu.device_write("vda", 0, 4 * MIB, bytes(range(256)) * 16)
    made = case.backup()
    try:
        with mounted_tmpfs(case.stage.place / "small", "2m") as small:
            for more in ([], ["--no-space-check"]):
                done = inside(["restore", made.id, "--to", str(small), *more], case.stage.environment())
                assert (done.code, "no space left" in done.err) == (9, True), done
                assert not list(small.glob("*.qcow2"))
    except LabError as error:
        pytest.skip(f"cannot mount: {error}")


# -- a disk that went back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 6])
def test_a_disk_put_back_to_an_older_copy(case: Case, after: int) -> None:
    """Elsewhere: the next increment holds what changed since the newest backup, on a disk that never was at it.

    The copy was made while the domain was stopped.  Its last checkpoint K is the newest that it knows, and K's bitmap
    says what changed from K to the copy: so the next backup builds on that made at K, if K is still kept.
    """
    case.qemu.device_write("vda", 0, MIB, 1)
    at_the_copy = case.backup()
    case.qemu.device_write("vda", 3 * MIB, 4096, 2)
    case.qemu.shutdown()
    copy = Path(shutil.copy(case.spec.path, case.stage.place / "copy"))
    case.qemu.start()
    for number in range(after):
        # Over what is in the copy, over what was changed before it, and where nothing was.
        for at in (number * 100 * KIB, 3 * MIB, 2 * MIB + number * 64 * KIB):
            case.qemu.device_write("vda", at, 80 * KIB, 10 + number)
        case.backup()
    for _ in range(2):  # also a second time: by then there is a backup of what went back
        case.restart_on(copy)
        case.qemu.device_write("vda", MIB, 4096, 99)
        made = case.backup()
        assert (mode(made), base(made), made.bytes_read) == ("incremental", at_the_copy.id, 2 * 256 * KIB)
        case.qemu.device_write("vda", MIB + 512 * KIB, 4096, 98)
        assert base(case.backup()) == made.id


@pytest.mark.parametrize("how", ["before any checkpoint", "its content only", "while the domain ran"])
def test_a_disk_put_back_to_a_copy_that_knows_no_changes(case: Case, how: str) -> None:
    """Elsewhere: as above.  Such a copy has no bitmap, or one that QEMU marked as in use: the disk is read whole."""
    copy = case.stage.place / "copy.qcow2"
    case.qemu.device_write("vda", 0, MIB, 1)
    if how == "before any checkpoint":
        case.qemu.shutdown()
        shutil.copy(case.spec.path, copy)
        case.qemu.start()
    case.backup()
    case.qemu.shutdown()
    case.qemu.start()
    case.qemu.device_write("vda", MIB, 4096, 2)
    case.qemu.device_flush("vda")
    if how == "while the domain ran":
        shutil.copy(case.spec.path, copy)
    elif how == "its content only":
        run(["qemu-img", "convert", "-U", "-O", "qcow2", case.spec.path, copy])
    case.qemu.device_write("vda", 2 * MIB, 4096, 3)
    case.backup()
    case.restart_on(copy)
    made = case.backup()
    assert (mode(made), base(made)) == ("full", None)
    assert made.manifest.disks[0].reason != "this is the first backup of the disk in this repository"
    case.qemu.device_write("vda", 3 * MIB, 4096, 4)
    assert base(case.backup()) == made.id


def test_a_disk_put_back_from_a_backup(case: Case) -> None:
    """Elsewhere: as above.  What a restore makes is a new image without bitmaps: it is read whole."""
    case.qemu.device_write("vda", 0, MIB, 1)
    first = case.backup()
    case.qemu.device_write("vda", MIB, 4096, 2)
    case.backup()
    (restored,) = case.stage.restore(first.id).disks
    case.restart_on(Path(restored.path))
    assert reference(case.qemu) == case.states[case.stage.repo, first.id]
    made = case.backup()
    assert (mode(made), made.bytes_stored < 64 * KIB) == ("full", True)


def test_an_internal_snapshot_cannot_be_gone_back_to(case: Case) -> None:
    """Elsewhere: as above, with bitmaps that say nothing of it.  QEMU itself refuses to go back under bitmaps."""
    case.qemu.device_write("vda", 0, MIB, 1)
    case.backup()
    case.qemu.shutdown()
    run(["qemu-img", "snapshot", "-c", "before", case.spec.path])
    with pytest.raises(LabError, match="active dirty bitmaps"):
        run(["qemu-img", "snapshot", "-a", "before", case.spec.path])
    # Without them it works, and the disk is read whole.
    for name in images.bitmaps(case.spec.path):
        run(["qemu-img", "bitmap", "--remove", case.spec.path, name])
    run(["qemu-img", "snapshot", "-a", "before", case.spec.path])
    case.qemu.start()
    assert mode(case.backup()) == "full"
