# SPDX-License-Identifier: Apache-2.0
"""A proof that is cut off, or loses the frozen disks: no backup, nothing left in QEMU, and the next one is right."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.processes import LabError, wait_for
from lab.qemu import BareQemu
from pullback.engine.prove import Proving
from pullback.engine.storing import Storing
from pullback.errors import DomainUnreachable, SnapshotBroken
from pullback.nbd.blocking import NbdConnection
from tests.support import dying
from tests.support.product import KIB, MIB, Stage, chain, leftovers, mounted_tmpfs, references, run_state, same
from tests.support.survival import Fault

Start = Callable[..., BareQemu]


POINTS = {
    "before what is stored": dying.at_call(Storing, "prove"),
    "before the first comparison": dying.at_call(Proving, "run"),
    "between comparisons": dying.at_call(Proving, "compared", 5),
    "after the last one": dying.at_call(Proving, "run", after=True),
}


@pytest.mark.fault(Fault.KILLED_IN_A_PROOF)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_proof_that_is_cut_off_leaves_no_backup(
    lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    stage = Stage(lab_dir)
    for module in ("backup", "freezing"):
        monkeypatch.setattr(f"pullback.engine.{module}.DEFAULT_BASE", str(stage.scratch))
    qemu = bare_qemu([stage.disk("vda"), stage.disk("vdb", MIB)], running=True)
    qemu.device_write("vda", 0, 4 * MIB, os.urandom(256))
    state, first = references(qemu), stage.backup(qemu, prove="all")
    same(stage.contents(first.id), state)
    made = [first.id]
    for fill, point in enumerate(POINTS.values(), 1):
        qemu.device_write("vda", fill * MIB, 70 * KIB, fill)
        before = [chain(qemu, disk.id) for disk in qemu.disks]
        code = dying.hit_backup(stage, qemu, point, number, prove="all")
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        assert stage.listed() == made
        if number != signal.SIGKILL:
            assert [chain(qemu, disk.id) for disk in qemu.disks] == before
            assert leftovers(qemu, stage.scratch) == []
        state = references(qemu)
        next_one = stage.backup(qemu, prove="all")
        made.append(next_one.id)
        assert {disk.mode for disk in next_one.manifest.disks} == {"incremental"}
        same(stage.contents(next_one.id), state)
        assert leftovers(qemu, stage.scratch) == []
        assert list((stage.repo / "locks").iterdir()) == []
        assert run_state(qemu) == "running"


@pytest.mark.fault(Fault.SCRATCH_FULL)
def test_a_scratch_that_fills_up_during_a_proof(
    lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        with mounted_tmpfs(lab_dir / "tiny", "2m") as tiny:
            stage = Stage(lab_dir)
            qemu = bare_qemu([stage.disk("vda", 16 * MIB)], running=True)
            qemu.device_write("vda", 0, 16 * MIB, 1)
            run = Proving.run

            def overwrite(self: Proving, threads: int) -> None:
                for at in range(0, 16 * MIB, 512 * KIB):
                    qemu.device_write("vda", at, 512 * KIB, 2)
                run(self, threads)

            with monkeypatch.context() as patched:
                patched.setattr(Proving, "run", overwrite)
                with pytest.raises(SnapshotBroken) as raised:
                    stage.backup(qemu, scratch=str(tiny), prove="sample")
            assert "the frozen view of vda was lost" in str(raised.value)
            assert "--scratch" in str(raised.value)
            qemu.device_read_check("vda", 0, 16 * MIB, 2)
            assert (run_state(qemu), chain(qemu), stage.listed()) == ("running", {}, [])
            assert leftovers(qemu, stage.scratch, tiny) == []
            state = references(qemu)
            same(stage.contents(stage.backup(qemu, prove="sample").id), state)
            qemu.shutdown()
    except LabError as error:
        if "mount" in str(error):
            pytest.skip(f"cannot mount: {error}")
        raise


def test_what_is_compared_is_let_go(lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the domain overwrites behind the proof takes no scratch."""
    try:
        with mounted_tmpfs(lab_dir / "tiny", "2m") as tiny:
            stage = Stage(lab_dir)
            qemu = bare_qemu([stage.disk("vda", 16 * MIB)], running=True)
            qemu.device_write("vda", 0, 16 * MIB, os.urandom(16 * MIB))
            state = references(qemu)
            compared, behind = Proving.compared, 0

            def follow(self: Proving, target: str, part: Any, different: Any) -> None:
                nonlocal behind
                compared(self, target, part, different)
                if self.done > 8 * MIB and not behind:
                    # One connection, in order: all but what is under way was let go.
                    for at in range(0, 7 * MIB, 512 * KIB):
                        qemu.device_write("vda", at, 512 * KIB, 2)
                    behind += 1

            with monkeypatch.context() as patched:
                patched.setattr(Proving, "compared", follow)
                made = stage.backup(qemu, scratch=str(tiny), prove="all", threads=1)
            assert behind
            same(stage.contents(made.id), state)
            qemu.shutdown()
    except LabError as error:
        if "mount" in str(error):
            pytest.skip(f"cannot mount: {error}")
        raise


@pytest.mark.fault(Fault.QEMU_KILLED_IN_THE_DATA)
def test_qemu_is_killed_during_a_proof(lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, 1)
    connect = NbdConnection.connect
    proving = False
    run = Proving.run

    def kill(*arguments: Any, **keywords: Any) -> NbdConnection:
        connection = connect(*arguments, **keywords)
        if proving and qemu.running():
            qemu.kill()
        return connection

    def noted(self: Proving, threads: int) -> None:
        nonlocal proving
        proving = True
        run(self, threads)

    with monkeypatch.context() as patched:
        patched.setattr(NbdConnection, "connect", kill)
        patched.setattr(Proving, "run", noted)
        with pytest.raises(DomainUnreachable, match="QEMU ended during the backup"):
            stage.backup(qemu, prove="sample")
    wait_for(lambda: not qemu.running(), "QEMU to be gone")
    assert stage.listed() == []
    assert list((stage.repo / "locks").iterdir()) == []
