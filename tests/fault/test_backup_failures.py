# SPDX-License-Identifier: Apache-2.0
"""QEMU, its disks or its scratch fail in the middle: a clear error, the chain as it was, the domain unharmed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lab.processes import LabError, wait_for
from lab.qemu import BareQemu, qemu_version
from pullback.engine.events import Event, Frozen
from pullback.engine.pull import Pull
from pullback.errors import DomainError, DomainUnreachable, PullbackError, Refused, SnapshotBroken
from pullback.qemu.monitor import Monitor
from pullback.repository.writer import PackWriter
from tests.support.dying import changes_something, commands_of
from tests.support.product import KIB, MIB, Stage, chain, leftovers, mounted_tmpfs, references, run_state, same
from tests.support.survival import Fault, survives

Start = Callable[..., BareQemu]


def chains(qemu: BareQemu) -> list[dict[str, bool]]:
    return [chain(qemu, disk.id) for disk in qemu.disks]


def test_qemu_refuses_any_command(lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command in turn is sent without its arguments."""
    stage = Stage(lab_dir)
    monkeypatch.setattr("pullback.engine.backup.DEFAULT_BASE", str(stage.scratch))
    qemu = bare_qemu([stage.disk("vda", MIB), stage.disk("vdb", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, 1)
    stage.backup(qemu)
    count = commands_of(stage, qemu)
    execute = Monitor.execute
    failed = 0
    for at in range(1, count + 1):
        with survives(Fault.QEMU_REFUSES):
            left = at

            async def broken(
                self: Monitor, command: str, arguments: Mapping[str, Any] | None = None, *more: Any
            ) -> Any:
                nonlocal left
                left -= changes_something(command)
                empty = left == 0 and changes_something(command)
                return await execute(self, command, {} if empty else arguments, *more)

            qemu.device_write("vda", at % 16 * 64 * KIB, 4096, at)
            before, listed = chains(qemu), stage.listed()
            with monkeypatch.context() as patched:
                patched.setattr(Monitor, "execute", broken)
                try:
                    stage.backup(qemu)
                except PullbackError as error:
                    failed += 1
                    assert isinstance(error, DomainError | Refused)
                    assert stage.listed() == listed
                    assert chains(qemu) == before
            assert leftovers(qemu, stage.scratch) == []
            assert run_state(qemu) == "running"
    assert failed > count - 8
    state = references(qemu)
    last = stage.backup(qemu)
    assert {disk.mode for disk in last.manifest.disks} == {"incremental"}
    same(stage.contents(last.id), state)


@pytest.mark.fault(Fault.QEMU_KILLED)
def test_qemu_is_killed_while_frozen(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, 1)

    def kill(event: Event) -> None:
        if isinstance(event, Frozen):
            qemu.kill()

    with pytest.raises(DomainUnreachable) as raised:
        stage.backup(qemu, kill)
    assert raised.value.exit_code == 4
    assert stage.listed() == []
    assert list(stage.scratch.iterdir()) == []


@pytest.mark.fault(Fault.QEMU_KILLED_IN_THE_DATA)
def test_qemu_is_killed_while_read(lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 8 * MIB)], running=True)
    qemu.device_write("vda", 0, 8 * MIB, 1)
    add = PackWriter.add

    def kill(self: PackWriter, *arguments: Any) -> Any:
        if qemu.running():
            qemu.kill()
        return add(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(PackWriter, "add", kill)
        with pytest.raises(DomainUnreachable) as raised:
            stage.backup(qemu)
    assert "QEMU ended during the backup" in str(raised.value)
    assert stage.listed() == []
    assert stage.restic.json("snapshots") == []
    assert list((stage.repo / "locks").iterdir()) == []
    qemu.start()
    state = references(qemu)
    same(stage.contents(stage.backup(qemu).id), state)


@pytest.mark.fault(Fault.QEMU_KILLED_IN_THE_DATA)
def test_the_command_tells_that_qemu_was_killed(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 64 * MIB)], running=True)
    qemu.device_write("vda", 0, 64 * MIB, os.urandom(MIB))
    with stage.running("backup", f"qmp:{qemu.qmp_path}", "--scratch", stage.scratch) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("frozen"):
                qemu.kill()
                break
        rest = process.stderr.read()
        code = process.wait(timeout=30)
    # The domain may have been quick: then the backup is there, and it is whole.
    assert (code, len(stage.listed())) in ((4, 0), (0, 1)), rest
    assert "Traceback" not in rest
    if code == 4:
        assert "No backup was stored" in rest or "was lost" in rest


@pytest.mark.fault(Fault.SCRATCH_FULL)
def test_an_unwritable_scratch(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    stage.backup(qemu)
    before = chains(qemu)
    for scratch, words in ((lab_dir / "missing", "No such file"), (stage.repo / "config", "Not a directory")):
        done = stage.cli("backup", f"qmp:{qemu.qmp_path}", "--scratch", scratch)
        assert done.code == 2
        assert words in done.err
        assert str(scratch) in done.err
    relative = stage.cli("backup", f"qmp:{qemu.qmp_path}", "--scratch", "here")
    assert relative.code == 2
    assert "absolute" in relative.err
    assert chains(qemu) == before
    assert leftovers(qemu, stage.scratch) == []


@pytest.mark.fault(Fault.SCRATCH_FULL)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start QEMU as somebody else")
def test_a_scratch_that_qemu_may_not_enter(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    stage.scratch.chmod(0o700)
    as_nobody = ["-run-with", "user=nobody"] if qemu_version() >= (9, 1, 0) else ["-runas", "nobody"]
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True, extra_args=as_nobody)
    wait_for(lambda: "65534" in Path(f"/proc/{qemu.pid}/status").read_text(), "QEMU to be nobody")
    done = stage.cli_backup(qemu)
    assert done.code == 5
    assert f"QEMU cannot make a scratch image in {stage.scratch}: " in done.err
    assert "Permission denied" in done.err
    assert "--scratch" in done.err
    assert chains(qemu) == [{}]
    assert leftovers(qemu, stage.scratch) == []


@pytest.fixture
def tiny(lab_dir: Path) -> Iterator[Path]:
    """A file system of 2 MiB; needs the right to mount."""
    try:
        with mounted_tmpfs(lab_dir / "tiny", "2m") as place:
            yield place
    except LabError as error:
        pytest.skip(f"cannot mount: {error}")


@pytest.mark.fault(Fault.SCRATCH_FULL)
def test_a_full_scratch_costs_the_backup_and_not_the_domain(lab_dir: Path, bare_qemu: Start, tiny: Path) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 16 * MIB)], running=True)
    qemu.device_write("vda", 0, 16 * MIB, 1)
    first = stage.backup(qemu)
    before = chains(qemu)

    def overwrite(event: Event) -> None:
        if isinstance(event, Frozen):
            # Raises when the device sees an error, or anything but the whole length written.
            for at in range(0, 16 * MIB, 512 * KIB):
                qemu.device_write("vda", at, 512 * KIB, 2)

    with pytest.raises(SnapshotBroken) as raised:
        stage.backup(qemu, overwrite, full=True, scratch=str(tiny))
    assert raised.value.exit_code == 6
    assert "--scratch" in str(raised.value)
    qemu.device_read_check("vda", 0, 16 * MIB, 2)
    assert run_state(qemu) == "running"
    assert chains(qemu) == before
    assert leftovers(qemu, stage.scratch, tiny) == []
    assert stage.listed() == [first.id]
    state = references(qemu)
    again = stage.backup(qemu)
    assert again.manifest.disks[0].mode == "incremental"
    assert again.bytes_read == 16 * MIB
    same(stage.contents(again.id), state)


@pytest.mark.fault(Fault.SCRATCH_FULL)
def test_a_scratch_that_fills_up_during_the_pull(
    lab_dir: Path, bare_qemu: Start, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 16 * MIB)], running=True)
    qemu.device_write("vda", 0, 16 * MIB, 1)
    add, hit = PackWriter.add, False

    def overwrite(self: PackWriter, *arguments: Any) -> Any:
        nonlocal hit
        if not hit:
            hit = True
            for at in range(15 * MIB, 4 * MIB, -512 * KIB):
                qemu.device_write("vda", at, 512 * KIB, 2)
        return add(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(PackWriter, "add", overwrite)
        with pytest.raises(SnapshotBroken):
            stage.backup(qemu, scratch=str(tiny))
    assert chains(qemu) == [{}]
    assert leftovers(qemu, tiny) == []
    state = references(qemu)
    same(stage.contents(stage.backup(qemu).id), state)


def test_a_small_scratch_is_enough_when_what_is_clean_is_let_go(
    lab_dir: Path, bare_qemu: Start, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is clean takes no scratch when the domain overwrites it."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 16 * MIB)], running=True)
    qemu.device_write("vda", 0, 16 * MIB, 1)
    stage.backup(qemu)
    qemu.device_write("vda", 0, 64 * KIB, 2)
    state = references(qemu)
    run = Pull.run

    def overwrite(self: Pull, *arguments: Any) -> None:
        for at in range(MIB, 16 * MIB, MIB):
            qemu.device_write("vda", at, MIB, 3)
        run(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Pull, "run", overwrite)
        backup = stage.backup(qemu, scratch=str(tiny))
    assert backup.bytes_read == 256 * KIB
    same(stage.contents(backup.id), state)


@pytest.mark.fault(Fault.REPOSITORY_FULL)
def test_the_repository_fails_in_the_middle(lab_dir: Path, bare_qemu: Start) -> None:
    try:
        with mounted_tmpfs(lab_dir / "small", "4m") as small:
            stage = Stage(small)
            qemu = bare_qemu([stage.disk("vda", 16 * MIB)], running=True)
            before = chains(qemu)
            # The repository shares its file system with the image: what the domain wrote leaves no room.
            qemu.device_write("vda", 0, 2 * MIB, os.urandom(2 * MIB))
            done = stage.cli("backup", f"qmp:{qemu.qmp_path}", "--scratch", lab_dir)
            assert done.code == 14
            assert "no space left" in done.err
            assert chains(qemu) == before
            assert leftovers(qemu) == []
            assert stage.listed() == []
            assert [place.name for place in lab_dir.iterdir()] == ["small"]
            qemu.shutdown()
    except LabError as error:
        if "mount" in str(error):
            pytest.skip(f"cannot mount: {error}")
        raise
