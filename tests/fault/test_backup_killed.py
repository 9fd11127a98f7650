# SPDX-License-Identifier: Apache-2.0
"""A backup that dies or is interrupted at any point: the next one is by itself right and incremental, nothing is left.

All points of one kind are tried one after the other on one domain, which goes on being written to: so every recovery
also has to cope with what the ones before it left.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.processes import wait_for
from lab.qemu import BareQemu
from pullback.engine.pull import Pull
from pullback.repository.layout import BackupBuilder
from pullback.repository.local_store import LocalStore
from pullback.repository.repository import Repository
from pullback.repository.writer import PackWriter
from tests.support import dying
from tests.support.life import Life
from tests.support.product import MIB, Stage, chain, leftovers, references, run_state, same
from tests.support.survival import Fault, points, survives

Start = Callable[..., BareQemu]
IN_THE_DATA = [
    dying.at_call(PackWriter, "add", 3),
    dying.at_call(Pull, "finish_segment"),
    dying.at_call(BackupBuilder, "finish"),
    dying.at_call(PackWriter, "flush"),
    dying.at_call(LocalStore, "save", 2),
    dying.at_call(Repository, "save_index"),
    dying.at_call(Repository, "save_index", after=True),
    dying.at_call(Repository, "save_snapshot"),
    dying.at_call(Repository, "save_snapshot", after=True),
]


class Killed(Life):
    """A domain whose backups get signals."""

    def hit(self, point: dying.Point, number: signal.Signals) -> tuple[int, bool]:
        """A backup hit at ``point``: its exit code, and whether the backup is there nevertheless, and then right."""
        self.go_on()
        code = dying.hit_backup(self.stage, self.qemu, point, number)
        return code, self.adopt(references(self.qemu))

    def recovers(self, fault: Fault, point: dying.Point) -> None:
        """Killed at ``point``; the domain runs on, and the next backup mends everything."""
        with survives(fault):
            code, _ = self.hit(point, signal.SIGKILL)
            assert code == -signal.SIGKILL
            wait_for(lambda: run_state(self.qemu) == "running", "the domain to run again", timeout=5)
            self.go_on()
            self.backup()
            self.nothing_left()
            assert [len(names) <= 4 for names in self.chains()] == [True, True]

    def takes_back(self, fault: Fault, point: dying.Point, number: signal.Signals) -> bool:
        """Interrupted at ``point``; all is as it was at once, or the backup was made.  Whether it was taken back."""
        with survives(fault):
            before, begun = self.chains(), time.monotonic()
            code, made = self.hit(point, number)
            assert code == (0 if made else 130)
            # Half a minute is what the guard of a domain that stands still tries for, if nobody lets go of the monitor.
            assert time.monotonic() - begun < 25
            assert run_state(self.qemu) == "running"
            self.nothing_left()
            if not made:
                assert self.chains() == before
            return not made


@pytest.fixture
def life(lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch) -> Killed:
    return Killed(lab_dir, bare_qemu, monkeypatch)


def test_killed_before_every_command(life: Killed) -> None:
    count = len(life.commands())
    assert count > 30
    for at in range(1, count):
        life.recovers(Fault.KILLED_AT_A_COMMAND, dying.before_command(at))
    life.stage.restic.check()


def test_killed_while_qemu_works_on_a_command(life: Killed) -> None:
    count = len(life.commands())
    for at in points(1, count, 2):
        life.recovers(Fault.KILLED_AT_A_COMMAND, dying.after_sending(at))


def test_killed_while_data_flows(life: Killed) -> None:
    for point in IN_THE_DATA:
        life.recovers(Fault.KILLED_IN_THE_DATA, point)
    life.stage.restic.check()


def test_interrupted_at_every_command(life: Killed) -> None:
    count = len(life.commands())
    taken_back = [
        life.takes_back(
            Fault.STOPPED_AT_A_COMMAND, dying.before_command(at), signal.SIGINT if turn % 2 else signal.SIGTERM
        )
        for turn, at in enumerate(points(1, count, 2))
    ]
    assert taken_back.count(True) >= len(taken_back) - 4
    life.go_on()
    life.backup()


def test_interrupted_while_data_flows(life: Killed) -> None:
    taken_back = [life.takes_back(Fault.STOPPED_IN_THE_DATA, point, signal.SIGTERM) for point in IN_THE_DATA]
    # The third point is in the commit, which is carried to its end.
    assert taken_back == [True] * 2 + [False] * 7
    life.go_on()
    life.backup()
    life.stage.restic.check()


@pytest.mark.fault(Fault.STOPPED_IN_THE_DATA)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_is_hit_in_full_flow(lab_dir: Path, bare_qemu: Start, number: signal.Signals) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 64 * MIB), stage.disk("vdb", MIB)], running=True)
    qemu.device_write("vda", 0, 64 * MIB, os.urandom(MIB + 512))
    qemu.device_write("vdb", 0, 4096, 1)
    with stage.running("backup", f"qmp:{qemu.qmp_path}", "--scratch", stage.scratch) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("frozen"):
            assert process.poll() is None
        process.send_signal(number)
        said = process.stderr.read()
        code = process.wait(timeout=30)
    made = len(stage.listed())
    if number == signal.SIGKILL:
        assert (code, made) in ((-signal.SIGKILL, 0), (-signal.SIGKILL, 1), (0, 1))
    else:
        # Hit when all is done: the interpreter is on its way out, and has no handlers any more.
        assert (code, made) in ((130, 0), (0, 1), (-number, 1))
        assert leftovers(qemu, stage.scratch) == []
    if code == 130:
        assert said == "pullback: interrupted; what was begun was taken back.\n"
        assert chain(qemu) == {}
    assert len(stage.restic.json("snapshots")) == made
    state = references(qemu)
    same(stage.contents(stage.backup(qemu).id), state)
    assert leftovers(qemu, stage.scratch) == []
