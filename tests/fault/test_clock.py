# SPDX-License-Identifier: Apache-2.0
"""The clock set back or forward, between backups and in the middle of one.

Which backup is built on is told by checkpoints, never by times; what is listed as the newest is a matter of times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest

from lab.qemu import BareQemu
from pullback.engine import backup, freezing
from pullback.engine.pull import Pull
from pullback.errors import RepositoryLocked
from pullback.repository import locks
from pullback.repository.repository import Repository
from tests.support import dying
from tests.support.backups import new_repository, open_repository
from tests.support.life import Life
from tests.support.product import MIB, references
from tests.support.survival import Fault, survives

Start = Callable[..., BareQemu]
DAY = timedelta(days=1)


class Clock:
    """What every module of pullback that asks for the time is told: the true one, and ``off``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.off = timedelta()
        clock, true_now, true_time = self, datetime.now, time.time

        class Now(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Any:
                return true_now(tz) + clock.off

        for module in (backup, freezing, locks):
            monkeypatch.setattr(module, "datetime", Now)
        monkeypatch.setattr(time, "time", lambda: true_time() + clock.off.total_seconds())

    def set(self, off: timedelta) -> None:
        self.off = off


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def life(lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Life:
    return Life(lab_dir, bare_qemu, monkeypatch)


def test_between_backups(life: Life, clock: Clock) -> None:
    """Each backup is incremental and right, and the same few checkpoints stay, whatever order the times say."""
    for off in (-DAY, 400 * DAY, -400 * DAY, timedelta(), timedelta(hours=-1), 3650 * DAY, timedelta(seconds=-1)):
        with survives(Fault.CLOCK_JUMP):
            clock.set(off)
            life.go_on()
            life.backup()
            life.nothing_left()
            assert all(len(bitmaps) <= 4 for bitmaps in life.chains())
    life.judge_all()
    repository = open_repository(life.stage.repo)
    times = [one.time for one in sorted(repository.snapshots(), key=lambda one: one.time)]
    assert repository.find("latest").time == times[-1] > datetime.now(UTC) + 3649 * DAY
    assert [repository.find(one).time for one in life.stage.listed()] == times


def test_a_disk_that_shrank_yesterday_and_grew_today(life: Life, clock: Clock) -> None:
    """The backup that knows the smaller size is not the newest by its time: no base is wrong for that."""
    life.qemu.device_write("vda", 0, 2 * MIB, 200)
    life.backup()
    clock.set(-DAY)
    with survives(Fault.CLOCK_JUMP):
        node = "node-vda"
        life.qemu.qmp("block_resize", node_name=node, size=MIB)
        state = references(life.qemu)
        made = life.stage.backup(life.qemu)
        life.states[made.id] = state
        life.qemu.qmp("block_resize", node_name=node, size=2 * MIB + 512)
        clock.set(timedelta())
        state = references(life.qemu)
        again = life.stage.backup(life.qemu)
        life.states[again.id] = state
        life.judge_all()


def test_in_the_middle_of_a_backup(life: Life, clock: Clock) -> None:
    """Set back it changes nothing; set far forward, our lock looks dead to others, who may delete what we rely on."""
    count = len(life.commands())
    points = [
        dying.before_command(1),
        dying.before_command(count // 3),
        dying.at_call(Pull, "run"),
        dying.at_call(Repository, "save_index"),
        dying.at_call(Repository, "save_index", after=True),
    ]
    for number, point in enumerate(points):
        for off in (-DAY, DAY) if number % 2 else (DAY,):
            with survives(Fault.CLOCK_JUMP):
                clock.set(timedelta())
                life.go_on()
                before, state = life.chains(), references(life.qemu)
                with point(lambda off=off: clock.set(off)):
                    failed = life.attempt()
                assert clock.off == off
                assert life.adopt(state) == (failed is None) == (off < timedelta())
                if failed is not None:
                    assert isinstance(failed, RepositoryLocked), failed
                    assert "clock" in str(failed)
                    assert life.chains() == before
                life.nothing_left()
    life.backup()
    life.judge_all()


@pytest.mark.fault(Fault.CLOCK_JUMP)
def test_a_lock_is_lost_when_others_may_take_it_for_stale(tmp_path: Path, clock: Clock) -> None:
    new_repository(tmp_path / "repo")
    with open_repository(tmp_path / "repo").lock() as ours:
        for off in (timedelta(minutes=29), -365 * DAY):
            clock.set(off)
            ours.check()
            with pytest.raises(RepositoryLocked):
                open_repository(tmp_path / "repo").lock(exclusive=True).acquire()
        clock.set(timedelta(minutes=31))
        with open_repository(tmp_path / "repo").lock(exclusive=True), pytest.raises(RepositoryLocked, match="clock"):
            ours.check()
        # Nor does a refresh hide it.
        ours._refresh()
        clock.set(timedelta())
        with pytest.raises(RepositoryLocked, match="clock"):
            ours.check()
