# SPDX-License-Identifier: Apache-2.0
"""The monitor of a running domain cut, late or silent at any point of a backup: one error, the next one is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import pytest

from lab.processes import wait_for
from lab.qemu import BareQemu
from pullback.engine.backup import BackupRequest
from pullback.engine.domain import DomainAddress
from pullback.errors import DomainUnreachable, PullbackError
from tests.support.life import Life
from tests.support.monitor_proxy import How, MonitorProxy, impatient
from tests.support.product import references, run_state
from tests.support.survival import Fault, points, survives

Start = Callable[..., BareQemu]
CUTS = 12


class Listened(Life):
    """A domain whose monitor is reached through a proxy."""

    @contextmanager
    def through(
        self, count: int = 0, how: How = "cut", cut_after: int | None = None
    ) -> Iterator[tuple[MonitorProxy, BackupRequest]]:
        """A proxy, and a backup that goes through it."""
        with MonitorProxy(self.stage.place / "proxy", self.qemu.qmp_path, count, how, cut_after) as proxy:
            yield proxy, self.stage.request(self.qemu, domain=DomainAddress(str(proxy.path)))

    def is_told(self, error: PullbackError | None) -> None:
        """It is exit code 4, says what to do, and the domain runs."""
        assert isinstance(error, DomainUnreachable), error
        assert error.exit_code == 4 and error.todo, error
        assert run_state(self.qemu) == "running"

    def goes_on(self) -> None:
        """The next backup is incremental, right, and clears what was left."""
        assert run_state(self.qemu) == "running"
        self.go_on()
        self.backup()
        self.nothing_left()
        assert [len(names) <= 4 for names in self.chains()] == [True, True]


@pytest.fixture
def life(lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch) -> Listened:
    return Listened(lab_dir, bare_qemu, monkeypatch)


def bytes_to_cut_at(lines: list[int]) -> list[int]:
    """In lines spread over all that went through: after the first byte, in the middle, before the last, in turn."""
    ends = list(accumulate(lines))
    chosen = [number * (len(lines) - 1) // (CUTS - 1) for number in range(CUTS)]
    within = [(1, lines[at] // 2, lines[at] - 1)[turn % 3] for turn, at in enumerate(chosen)]
    return [ends[at] - lines[at] + inside for at, inside in zip(chosen, within, strict=True)]


def test_the_monitor_is_cut_after_any_byte(life: Listened) -> None:
    with life.through() as (proxy, request):
        assert life.commands(request)
    cut = 0
    for after in bytes_to_cut_at(proxy.lines):
        with survives(Fault.MONITOR_CUT):
            life.go_on()
            state = references(life.qemu)
            with life.through(cut_after=after) as (proxy, request):
                error = life.attempt(request)
            assert life.adopt(state) == (error is None)
            if error is not None:
                life.is_told(error)
            cut += proxy.done
            life.goes_on()
    # The last ones are beyond the end when a backup has less to say than the one that was counted.
    assert cut >= CUTS - 2
    life.judge_all()


def hold_back(life: Listened, count: int, how: How) -> None:
    """A backup the reply to whose ``count``-th command is ``how``."""
    life.go_on()
    state = references(life.qemu)
    with life.through(count, how) as (proxy, request), impatient(proxy, count):
        error = life.attempt(request)
        assert proxy.done
        if how == "late":
            wait_for(proxy.answered.is_set, "QEMU to carry the command out")
        else:
            assert not proxy.answered.is_set()
    assert life.adopt(state) == (error is None)
    if error is not None:
        life.is_told(error)
    life.goes_on()


def test_a_reply_comes_after_its_deadline(life: Listened) -> None:
    count = len(life.commands())
    for at in points(1, count + 1, 4):
        with survives(Fault.REPLY_LATE):
            hold_back(life, at, "late")
    life.judge_all()


def test_a_command_is_lost(life: Listened) -> None:
    count = len(life.commands())
    for at in points(3, count + 1, 6):
        with survives(Fault.REPLY_NEVER):
            hold_back(life, at, "lost")
    life.judge_all()
