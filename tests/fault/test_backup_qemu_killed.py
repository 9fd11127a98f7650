# SPDX-License-Identifier: Apache-2.0
"""QEMU killed at any point of a backup, alone or together with pullback, and started again on its images as they were.

Its dirty bitmaps are then lost or inconsistent: the next backup reads everything, says why, and needs nobody's help.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.qemu import BareQemu
from pullback.engine.pull import Pull
from pullback.errors import DomainUnreachable, PullbackError
from pullback.repository.repository import Repository
from pullback.repository.writer import PackWriter
from tests.support import dying
from tests.support.life import Life
from tests.support.product import references
from tests.support.survival import Fault, points, survives

Start = Callable[..., BareQemu]
BEFORE_THE_COMMIT = [
    dying.at_call(Pull, "run"),
    dying.at_call(PackWriter, "add", 3),
    dying.at_call(PackWriter, "add", 3, after=True),
    dying.at_call(Pull, "finish_segment"),
]
IN_THE_COMMIT = [
    dying.at_call(PackWriter, "flush"),
    dying.at_call(Repository, "save_index"),
    dying.at_call(Repository, "save_index", after=True),
    dying.at_call(Repository, "save_snapshot"),
    dying.at_call(Repository, "save_snapshot", after=True),
]
#: Why the backup after a crash reads everything: the bitmaps are inconsistent, or were never in the image.
REASONS = ("QEMU ended without storing it", "is not in this disk's chain")


class Crashing(Life):
    """A domain that is gone again and again, in the middle of a backup that would be incremental."""

    def __init__(self, place: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(place, start, monkeypatch)
        self._crashes = 0

    def to_be_hit(self) -> dict[str, bytes]:
        """Write something, and sometimes end QEMU well before, so that bitmaps are in the images; what the disks hold.

        Whatever QEMU holds back is flushed: an image after a crash holds what a backup of now does.
        """
        self._crashes += 1
        if self._crashes % 3 == 0:
            self.qemu.shutdown()
            self.qemu.start()
        self.go_on()
        return references(self.qemu)

    def qemu_dies(self, point: dying.Point) -> PullbackError | None:
        """A backup during which QEMU is killed at ``point``; how it ended."""
        state = self.to_be_hit()
        with point(self.qemu.kill):
            error = self.attempt()
        assert not self.qemu.running()
        assert self.adopt(state) == (error is None)
        assert list((self.stage.repo / "locks").iterdir()) == []
        assert list(self.stage.scratch.rglob("*")) == []
        return error

    def host_dies(self, point: dying.Point) -> bool:
        """The same with pullback killed, too; whether there is a backup nevertheless."""
        state, pid = self.to_be_hit(), self.qemu.pid

        def power_cut() -> None:
            os.kill(pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

        assert dying.hit_backup(self.stage, self.qemu, point, power_cut) == -signal.SIGKILL
        self.qemu.kill()
        return self.adopt(state)

    def comes_back(self) -> None:
        """QEMU is started again: the next backup is whole, says why, and the one after it is incremental again."""
        self.qemu.start()
        self.go_on()
        made = self.backup(mode="full")
        for disk in made.disks:
            assert any(reason in disk.reason for reason in REASONS), disk.reason
        self.nothing_left()


@pytest.fixture
def life(lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch) -> Crashing:
    return Crashing(lab_dir, bare_qemu, monkeypatch)


def is_clear(error: PullbackError | None) -> bool:
    """Whether it is exit code 4, in a sentence that says that QEMU is gone."""
    return isinstance(error, DomainUnreachable) and error.exit_code == 4 and "QEMU" in str(error)


def test_qemu_is_killed_around_every_command(life: Crashing) -> None:
    """In turn before a command and right after it was sent."""
    count = len(life.commands())
    assert count > 30
    survivors = 0
    for turn, at in enumerate(points(1, count + 1, 2)):
        with survives(Fault.QEMU_KILLED):
            error = life.qemu_dies((dying.after_sending if turn % 2 else dying.before_command)(at))
            if error is None:
                survivors += 1
            else:
                assert is_clear(error), error
            life.comes_back()
    # Only after the commit: old checkpoints were being merged away.
    assert survivors <= 2
    life.judge_all()


def test_qemu_is_killed_while_data_flows(life: Crashing) -> None:
    for point in BEFORE_THE_COMMIT:
        with survives(Fault.QEMU_KILLED_IN_THE_DATA):
            error = life.qemu_dies(point)
            assert is_clear(error), error
            life.comes_back()
    for point in IN_THE_COMMIT:
        with survives(Fault.QEMU_KILLED_IN_THE_DATA):
            # All was read: the backup is stored without QEMU.
            assert life.qemu_dies(point) is None
            life.comes_back()
    life.judge_all()


def test_the_host_is_gone(life: Crashing) -> None:
    count = len(life.commands())
    commands = [
        (dying.after_sending, dying.before_command)[turn % 2](at) for turn, at in enumerate(points(2, count, 4))
    ]
    for point in [*commands, *BEFORE_THE_COMMIT[::2], *IN_THE_COMMIT]:
        with survives(Fault.HOST_GONE):
            life.host_dies(point)
            life.comes_back()
    life.judge_all()
