# SPDX-License-Identifier: Apache-2.0
"""A restore that dies at any point goes on when it is run again: the same bytes, and nothing durable written twice.

The points are counted, not listed: what a restore does today is what is tried.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lab.processes import LabError, run
from pullback.engine import restoring, targets
from pullback.engine.events import Event, Note
from pullback.engine.restore import Restore, RestoreRequest
from pullback.engine.targets import Target
from pullback.errors import PullbackError, RepositoryError, RestoreError, TargetExists, TransferError
from pullback.model.unfinished import parse_unfinished
from pullback.nbd.blocking import NbdConnection
from pullback.qemu.storage_daemon import StorageDaemon
from pullback.repository.local_store import LocalStore
from tests.support import dying
from tests.support.backups import open_repository
from tests.support.product import forked, mounted_tmpfs
from tests.support.restoring import KIB, MIB, Kept, data_bytes, some_disk
from tests.support.survival import Fault, survives


@pytest.fixture(autouse=True)
def every_step_is_kept(monkeypatch: pytest.MonkeyPatch, lab_dir: Path) -> None:
    monkeypatch.setattr(restoring, "CHECKPOINT_EVERY", 0.0)
    (lab_dir / "work").mkdir()
    monkeypatch.setattr("pullback.engine.restore.DEFAULT_BASE", str(lab_dir / "work"))


@pytest.fixture
def kept(lab_dir: Path) -> Iterator[Kept]:
    made = Kept(lab_dir)
    yield made
    # What the dead left in the way of work directories went with the next ones.
    assert len(list((lab_dir / "work").iterdir())) <= 1


@pytest.fixture
def backup(kept: Kept) -> str:
    return kept.store({"vda": some_disk(3 * MIB + 512, 1), "vdb": some_disk(MIB, 2)})


def dies(kept: Kept, backup: str, to: Path, point: dying.Point, image_format: str) -> bool:
    """A restore in a child that is killed at ``point``; whether it came there."""

    def work() -> int:
        with point(signal.SIGKILL):
            kept.restore(backup, to, format=image_format)
        return 0

    code = forked(work)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def calls_of(kept: Kept, backup: str, to: Path, owner: Any, name: str) -> int:
    """How often a restore calls this."""
    count = 0
    method = getattr(owner, name)

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        return method(*arguments, **keywords)

    with mock.patch.object(owner, name, counted):
        kept.restore(backup, to)
    return count


POINTS: list[tuple[Any, str]] = [
    (Target, "_save_state"),
    (targets, "create_image"),
    (NbdConnection, "submit_write"),
    (NbdConnection, "flush"),
    (Target, "sync"),
    (Target, "publish"),
    (os, "link"),
    (Target, "forget"),
]


#: How often these are called depends on how long they take.
BY_TIME = ("flush", "_save_state")


def goes_on_to_its_end(kept: Kept, backup: str, to: Path, image_format: str) -> bool:
    """Run it again; whether it had to write less than everything."""
    most = sum(data_bytes(disk) for disk in kept.disks[backup].values())
    if list(to.glob("*")) and not list(to.glob("*.partial*")):
        return False  # it was killed after its last step
    done = kept.restore(backup, to, format=image_format)
    assert sum(disk.bytes_written + disk.bytes_kept for disk in done.disks) <= most
    return any(disk.bytes_kept for disk in done.disks)


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_killed_anywhere_it_goes_on(kept: Kept, backup: str, lab_dir: Path, image_format: str) -> None:
    went_on = 0
    for number, (owner, name) in enumerate(POINTS):
        count = calls_of(kept, backup, lab_dir / f"counted-{number}", owner, name)
        assert count
        for at in range(1, count + 1, max(count // 3, 1)):
            for after in (False, True):
                with survives(Fault.KILLED_IN_A_RESTORE):
                    to = lab_dir / f"{name}-{at}-{after}"
                    died = dies(kept, backup, to, dying.at_call(owner, name, at, after), image_format)
                    # Threads may pass one another, so that a call is not seen to return as the so-and-so-many-th;
                    # and how often the state is saved is a matter of time, but it is at the beginning and at the end.
                    assert died or after or at > (1 if name in BY_TIME else count // 2)
                    if (
                        all((to / f"{disk}.{image_format}").exists() for disk in kept.disks[backup])
                        and name == "forget"
                    ):
                        # All have their names; at most a state file is left of one, which is in nobody's way.
                        assert not list(to.glob("*.partial"))
                        for left in to.glob("*.json"):
                            left.unlink()
                    else:
                        went_on += goes_on_to_its_end(kept, backup, to, image_format)
                    kept.judge(backup, to, image_format)
    assert went_on > 10


def durable_bytes(to: Path) -> int:
    """What the state files say is done."""
    states = [parse_unfinished(path.read_bytes()) for path in to.glob("*.partial.json")]
    return sum(span.length for state in states if state is not None for span in state.done)


def test_killed_again_and_again_it_comes_to_an_end(kept: Kept, backup: str, lab_dir: Path) -> None:
    """Each life adds to what was durable before it: progress is never lost."""
    to = lab_dir / "to"
    lives = [0]
    while dies(kept, backup, to, dying.at_call(Target, "_save_state", 5, after=True), "qcow2"):
        with survives(Fault.KILLED_IN_A_RESTORE):
            lives.append(durable_bytes(to))
            assert lives == sorted(lives)
            assert len(lives) < 20
    assert len(lives) >= 2
    kept.judge(backup, to)


def fails(kept: Kept, backup: str, to: Path, kind: type[PullbackError], **more: Any) -> list[Event]:
    """A restore that fails, and says that the same command goes on; what it told."""
    told: list[Event] = []
    with pytest.raises(kind):
        kept.restore(backup, to, told.append, **more)
    assert not list(to.glob("*.qcow2"))
    assert any(isinstance(event, Note) and "the same command goes on" in event.message for event in told)
    return told


def goes_on(kept: Kept, backup: str, to: Path) -> None:
    done = kept.restore(backup, to)
    assert sum(disk.bytes_kept for disk in done.disks) > 0
    assert sum(disk.bytes_kept + disk.bytes_written for disk in done.disks) == sum(
        data_bytes(disk) for disk in kept.disks[backup].values()
    )
    kept.judge(backup, to)


def nth_time(owner: Any, name: str, count: int, do: Callable[..., None]) -> Any:
    """At the ``count``-th call ``do`` comes first."""
    method = getattr(owner, name)
    left = [count]

    def hit(*arguments: Any, **keywords: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            do(*arguments)
        return method(*arguments, **keywords)

    return mock.patch.object(owner, name, hit)


@pytest.mark.fault(Fault.QEMU_KILLED_IN_THE_DATA)
def test_qemu_gone(kept: Kept, backup: str, lab_dir: Path) -> None:
    daemons: list[StorageDaemon] = []
    enter = StorageDaemon.__enter__

    def seen(self: StorageDaemon) -> StorageDaemon:
        daemons.append(self)
        return enter(self)

    def kill(*_: object) -> None:
        assert daemons[-1]._process is not None
        daemons[-1]._process.kill()

    with mock.patch.object(StorageDaemon, "__enter__", seen), nth_time(Target, "_save_state", 6, kill):
        fails(kept, backup, lab_dir / "to", TransferError)
    goes_on(kept, backup, lab_dir / "to")


@pytest.mark.fault(Fault.REPOSITORY_FAILS)
def test_the_repository_gone(kept: Kept, backup: str, lab_dir: Path) -> None:
    load = LocalStore.load
    left = calls_of(kept, backup, lab_dir / "counted", LocalStore, "load") - 3

    def broken(self: LocalStore, *arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left <= 0:
            raise RepositoryError("the network is down")
        return load(self, *arguments)

    with mock.patch.object(LocalStore, "load", broken):
        fails(kept, backup, lab_dir / "to", RepositoryError)
    goes_on(kept, backup, lab_dir / "to")


@pytest.mark.fault(Fault.REPOSITORY_FAILS)
@pytest.mark.parametrize("fails_before", [False, True])
def test_a_lock_that_cannot_be_removed_hides_nothing(
    kept: Kept, backup: str, lab_dir: Path, fails_before: bool
) -> None:
    said: list[Event] = []
    gone = RepositoryError("the network is down")
    with mock.patch.object(LocalStore, "remove", side_effect=gone):
        if fails_before:
            with (
                mock.patch.object(restoring.Writing, "carry", side_effect=RestoreError("no space")),
                pytest.raises(RestoreError, match="no space"),
            ):
                kept.restore(backup, lab_dir / "to", said.append)
        else:
            kept.restore(backup, lab_dir / "to", said.append)
            kept.judge(backup, lab_dir / "to")
    assert "the network is down" in str(said)


@pytest.mark.fault(Fault.TARGET_FULL)
def test_a_full_disk(kept: Kept, lab_dir: Path) -> None:
    backup = kept.store({"vda": some_disk(12 * MIB, 3), "vdb": some_disk(8 * MIB, 4)})
    try:
        with mounted_tmpfs(lab_dir / "small", "6m") as small:
            with pytest.raises(RestoreError, match="there is no space left"):
                kept.restore(backup, small)
            assert list(small.iterdir()) == []
            with pytest.raises(RestoreError, match="there is no space left"):
                kept.restore(backup, small, check_space=False)
            assert not list(small.glob("*.qcow2"))
            run(["mount", "-o", "remount,size=64m", str(small)])
            goes_on(kept, backup, small)
    except LabError as error:
        if "mount" in str(error):
            pytest.skip(f"cannot mount: {error}")
        raise


@pytest.mark.fault(Fault.TARGET_FULL)
def test_no_space_for_the_state_beside_an_image(kept: Kept, lab_dir: Path) -> None:
    """The image may take the last block, or the state."""
    backup = kept.store({"vda": some_disk(MIB, 3)})
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(os, "fsync", side_effect=full), pytest.raises(RestoreError, match="it goes on"):
        kept.restore(backup, lab_dir / "to")
    kept.restore(backup, lab_dir / "to")
    kept.judge(backup, lab_dir / "to")


def stopped(kept: Kept, backup: str, to: Path) -> None:
    """A restore that is stopped in the middle."""
    restore = Restore(RestoreRequest(backup, to), lambda: open_repository(kept.repo), lambda event: None)
    with (
        nth_time(Target, "_save_state", 6, lambda *_: restore.stop()),
        pytest.raises(RestoreError, match=r"interrupted\. What was restored is kept"),
    ):
        restore.run()


def test_only_the_same_work_goes_on(kept: Kept, backup: str, lab_dir: Path) -> None:
    to = lab_dir / "to"
    other = kept.store({"vda": some_disk(3 * MIB + 512, 5), "vdb": some_disk(MIB, 6)})
    stopped(kept, backup, to)
    before = {path: path.read_bytes() for path in to.iterdir()}
    with pytest.raises(TargetExists, match=f"unfinished restore of backup {backup[:8]}"):
        kept.restore(other, to)
    assert {path: path.read_bytes() for path in to.iterdir()} == before
    kept.restore(other, to, overwrite=True)
    kept.judge(other, to)


@pytest.mark.fault(Fault.KILLED_IN_A_RESTORE)
def test_another_file_in_its_place_is_not_gone_on_with(kept: Kept, backup: str, lab_dir: Path) -> None:
    to = lab_dir / "to"
    stopped(kept, backup, to)
    part = to / "vda.qcow2.partial"
    content = part.read_bytes()
    (to / "copy").write_bytes(content)
    (to / "copy").replace(part)
    with pytest.raises(TargetExists, match="is not the file that the unfinished restore made"):
        kept.restore(backup, to)
    assert part.read_bytes() == content
    (to / "vda.qcow2.partial.json").unlink()
    with pytest.raises(TargetExists, match="not known to be of an unfinished restore"):
        kept.restore(backup, to)
    kept.restore(backup, to, overwrite=True)
    kept.judge(backup, to)


@pytest.mark.fault(Fault.KILLED_IN_A_RESTORE)
def test_a_damaged_partial_image_is_made_anew(kept: Kept, backup: str, lab_dir: Path) -> None:
    to = lab_dir / "to"
    stopped(kept, backup, to)
    with (to / "vda.qcow2.partial").open("r+b") as file:
        file.seek(0)
        file.write(bytes(64 * KIB))
    told: list[Event] = []
    kept.restore(backup, to, told.append)
    assert any(isinstance(event, Note) and "made anew" in event.message for event in told)
    kept.judge(backup, to)


@pytest.mark.fault(Fault.KILLED_IN_A_RESTORE)
def test_an_image_that_was_used_after_the_kill_is_not_taken_for_ours(kept: Kept, backup: str, lab_dir: Path) -> None:
    """Killed between the names of two disks: the first one may have been booted by now."""
    to = lab_dir / "to"
    assert dies(kept, backup, to, dying.at_call(Target, "publish", 2), "qcow2")
    assert (to / "vda.qcow2").exists()
    run(["qemu-io", "-c", "write -P 7 0 4096", str(to / "vda.qcow2")])
    content = (to / "vda.qcow2").read_bytes()
    with pytest.raises(TargetExists, match=r"vda\.qcow2 exists already"):
        kept.restore(backup, to)
    assert (to / "vda.qcow2").read_bytes() == content
