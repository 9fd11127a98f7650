# SPDX-License-Identifier: Apache-2.0
"""Two that want the same domain, repository or directory; and directories that the dead leave behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lab.qemu import BareQemu
from pullback.engine.backup import BackupRequest, run_backup
from pullback.engine.events import Event, Frozen, silent
from pullback.engine.restore import Restore, RestoreRequest
from pullback.engine.workdir import work_directory
from pullback.errors import RestoreError, TargetExists, UsageError
from pullback.model.manifest import DiskEntry, Manifest
from pullback.model.units import SEGMENT
from pullback.nbd.blocking import NbdConnection
from pullback.qemu.monitor import Peer
from pullback.repository.local_store import LocalStore
from pullback.repository.writer import PackWriter
from tests.fault.test_restore_in_place_killed import Halfway
from tests.support.backups import MOMENT, new_repository, open_repository, store_backup
from tests.support.product import MIB, Done, Stage, forked, leftovers, references, same
from tests.support.restic import needs_restic
from tests.support.survival import Fault, survives

Start = Callable[..., BareQemu]
ME = Peer(os.getpid(), os.geteuid(), os.getegid())


@pytest.mark.fault(Fault.TWO_AT_ONCE)
def test_two_backups_of_one_domain(lab_dir: Path, bare_qemu: Start) -> None:
    """Over two monitors of one QEMU: it is the domain that is held, not the socket."""
    stage = Stage(lab_dir)
    second = ["-qmp", f"unix:{lab_dir}/qmp2,server=on,wait=off"]
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True, extra_args=second)
    qemu.device_write("vda", 0, MIB, 1)
    state = references(qemu)
    others: list[Done] = []

    def try_too(event: Event) -> None:
        if isinstance(event, Frozen):
            sockets = (str(qemu.qmp_path), f"{lab_dir}/qmp2")
            others.extend(stage.cli("backup", f"qmp:{path}", "--scratch", stage.scratch) for path in sockets)

    first = stage.backup(qemu, try_too)
    assert [other.code for other in others] == [4, 4]
    for other in others:
        assert f"another pullback (process {os.getpid()})" in other.err
    assert stage.listed() == [first.id]
    same(stage.contents(first.id), state)
    assert leftovers(qemu, stage.scratch) == []


@pytest.mark.fault(Fault.TWO_AT_ONCE)
def test_two_domains_into_one_repository_at_once(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    one = bare_qemu([stage.disk("a", 4 * MIB)], running=True, name="one")
    two = bare_qemu([stage.disk("b", 4 * MIB)], running=True, name="two")
    for qemu, disk in ((one, "a"), (two, "b")):
        qemu.device_write(disk, 0, 4 * MIB, os.urandom(4096) * 4)

    def meanwhile(event: Event) -> None:
        if isinstance(event, Frozen):
            assert stage.cli_backup(two).code == 0

    stage.backup(one, meanwhile)
    assert len(stage.listed()) == 2
    for qemu, name in ((one, "one"), (two, "two")):
        same(stage.contents(f"{name}@latest"), references(qemu))
    stage.restic.check()


def at_once(stage: Stage, *commands: tuple[str | Path, ...]) -> list[Done]:
    """Run commands side by side, each in a process of its own."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(lambda words: stage.cli(*words), commands))


def test_whatever_else_is_asked_of_a_domain_during_its_backup(lab_dir: Path, bare_qemu: Start) -> None:
    """Over a second monitor: nobody takes the backup's snapshot, its checkpoint or its base away."""
    stage = Stage(lab_dir)
    second = ["-qmp", f"unix:{lab_dir}/qmp2,server=on,wait=off"]
    qemu = bare_qemu([stage.disk("vda", MIB), stage.disk("vdb", MIB)], running=True, extra_args=second)
    qemu.device_write("vda", 0, MIB, 1)
    base = stage.backup(qemu)
    checkpoint, domain = base.manifest.disks[0].checkpoint, f"qmp:{lab_dir}/qmp2"
    assert checkpoint is not None
    qemu.device_write("vda", 0, 64 << 10, 2)
    state = references(qemu)
    others: dict[str, tuple[str | Path, ...]] = {
        "recover": ("recover", domain),
        "checkpoint delete": ("checkpoint", "delete", domain, checkpoint),
        "snapshot create": ("snapshot", "create", domain, "mine", "--scratch", stage.scratch),
        "snapshot delete": ("snapshot", "delete", domain, "mine"),
        "restore in place": ("restore", base.id, "--into", domain),
    }
    told: list[Done] = []

    def meanwhile(event: Event) -> None:
        if isinstance(event, Frozen):
            qemu.device_write("vdb", 0, 64 << 10, 3)
            # One after the other: of those who wait at a QMP socket some may be turned away before they look.
            told.extend(stage.cli(*words) for words in others.values())

    made = stage.backup(qemu, meanwhile)
    for name, done in zip(others, told, strict=True):
        with survives(Fault.TWO_AT_ONCE):
            assert done.code == 4, (name, done.err)
            assert f"another pullback (process {os.getpid()})" in done.err, (name, done.err)
    same(stage.contents(made.id), state)
    assert leftovers(qemu, stage.scratch) == []
    state = references(qemu)
    after = stage.backup(qemu)
    assert {disk.mode for disk in (*made.manifest.disks, *after.manifest.disks)} == {"incremental"}
    same(stage.contents(after.id), state)


def test_whatever_else_is_asked_of_a_stopped_domain_during_its_restore(
    lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second restore, a backup, a clean-up: they say who has the images, and the restore ends as if alone."""
    halfway = Halfway(Stage(lab_dir), bare_qemu)
    stage, domain = halfway.stage, f"disk:{halfway.images}"
    others: dict[str, tuple[str | Path, ...]] = {
        "restore": ("restore", halfway.backup, "--into", domain),
        "backup": ("backup", domain, "--name", "lab", "--scratch", stage.scratch),
        "recover": ("recover", domain),
        "snapshot delete": ("snapshot", "delete", domain, "mine"),
    }
    write, told = NbdConnection.submit_write, list[Done]()

    def meanwhile(self: NbdConnection, *arguments: Any) -> int:
        if not told:
            told.extend(at_once(stage, *others.values()))
        return write(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(NbdConnection, "submit_write", meanwhile)
        halfway.restore()
    for name, done in zip(others, told, strict=True):
        with survives(Fault.TWO_AT_ONCE):
            assert done.code == 4, (name, done.code, done.err)
            assert "process" in done.err, (name, done.err)
    assert not halfway.marked()
    same(halfway.contents(), halfway.wanted)
    halfway.completes()


@pytest.mark.fault(Fault.TWO_AT_ONCE)
def test_a_stopped_domain_is_not_restored_while_it_is_backed_up(
    lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    halfway = Halfway(Stage(lab_dir), bare_qemu)
    stage, add, told = halfway.stage, PackWriter.add, list[Done]()

    def meanwhile(self: PackWriter, *arguments: Any) -> Any:
        if not told:
            told.append(stage.cli("restore", halfway.backup, "--into", f"disk:{halfway.images}"))
        return add(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(PackWriter, "add", meanwhile)
        request = BackupRequest(domain=halfway.address, scratch=str(stage.scratch))
        made = asyncio.run(run_backup(request, lambda: open_repository(stage.repo), silent))
    assert told[0].code == 4, told[0].err
    assert "process" in told[0].err
    same(halfway.contents(), halfway.before)
    same(stage.contents(made.id), halfway.before)
    halfway.completes()


@needs_restic
def test_forget_and_prune_during_a_backup(lab_dir: Path, bare_qemu: Start) -> None:
    """What deletes is told who holds the repository; what is being built on stays."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    for fill in (1, 2):
        qemu.device_write("vda", 0, MIB, fill)
        base = stage.backup(qemu)
    qemu.device_write("vda", 0, 64 << 10, 3)
    state = references(qemu)
    told: list[Done] = []

    def meanwhile(event: Event) -> None:
        if isinstance(event, Frozen):
            told.extend(at_once(stage, ("prune",), ("forget", base.id)))

    made = stage.backup(qemu, meanwhile)
    for done in told:
        with survives(Fault.TWO_AT_ONCE):
            assert done.code == 11, done.err
            assert str(os.getpid()) in done.err
    assert len(stage.listed()) == 3
    assert made.manifest.disks[0].base is not None
    for done in at_once(stage, ("forget", base.id)) + at_once(stage, ("prune",)):
        assert done.code == 0, done.err
    same(stage.contents(made.id), state)


def test_waiting_for_a_repository_can_be_ended(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    stage.backup(qemu)
    waits = [
        ["backup", f"qmp:{qemu.qmp_path}", "--scratch", stage.scratch, "--lock-retry", "100"],
        ["restore", "latest", "--to", lab_dir / "to", "--lock-retry", "100"],
    ]
    with open_repository(stage.repo).lock(exclusive=True):
        held = sorted((stage.repo / "locks").iterdir())
        refused = stage.cli_backup(qemu)
        assert refused.code == 11
        assert f"process {os.getpid()}" in refused.err
        for arguments in waits:
            with stage.running(*arguments) as process:
                assert process.stderr is not None
                assert "Waiting for the repository" in process.stderr.readline()
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=60) == 130
        assert sorted((stage.repo / "locks").iterdir()) == held
    assert not (lab_dir / "to").exists()
    assert leftovers(qemu, stage.scratch) == []


def test_waiting_for_a_repository_ends_well(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    lock = open_repository(stage.repo).lock(exclusive=True)
    lock.acquire()
    with stage.running("backup", f"qmp:{qemu.qmp_path}", "--scratch", stage.scratch, "--lock-retry", "100") as process:
        assert process.stderr is not None
        assert "Waiting for the repository" in process.stderr.readline()
        lock.release()
        assert process.wait(timeout=60) == 0
    assert len(stage.listed()) == 1


@pytest.fixture
def stored(lab_dir: Path) -> Path:
    """A repository with one backup of a disk of 4 MiB."""
    repository = new_repository(lab_dir / "repo")
    disk = DiskEntry("vda", 4 * MIB, None, "full", "a test", None, "raw", 4 * MIB, 4 * MIB, 0)
    manifest = Manifest("web", "", MOMENT, "crash", "7.2.22", "0.1.0", SEGMENT, (disk,))
    with repository.lock():
        store_backup(repository, {"vda": [os.urandom(4 * MIB)]}, manifest=manifest.to_bytes())
    return lab_dir / "repo"


@pytest.mark.fault(Fault.TWO_AT_ONCE)
def test_two_restores_into_one_directory(lab_dir: Path, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = RestoreRequest("latest", lab_dir / "to")
    load = LocalStore.load
    refused: list[str] = []

    def second_one(self: LocalStore, *arguments: object, **keywords: object) -> bytes:
        """A restore that comes while the first one reads its first pack."""
        if not refused and (lab_dir / "to" / "vda.qcow2.partial").exists():
            refused.append("")
            try:
                Restore(request, lambda: open_repository(stored), silent).run()
            except TargetExists as error:
                refused[0] = str(error)
        return load(self, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStore, "load", second_one)
    done = Restore(request, lambda: open_repository(stored), silent).run()
    assert "another restore" in refused[0]
    assert [path.name for path in (lab_dir / "to").iterdir()] == ["vda.qcow2"]
    assert done.disks[0].bytes_written == 4 * MIB


@pytest.mark.fault(Fault.TWO_AT_ONCE)
def test_a_restore_that_died_disturbs_nobody(lab_dir: Path, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pullback.engine.restore.DEFAULT_BASE", str(lab_dir / "work"))
    (lab_dir / "work").mkdir()
    request = RestoreRequest("latest", lab_dir / "to")

    def die() -> int:
        def killed(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr("pullback.engine.restore.publish", killed)
        Restore(request, lambda: open_repository(stored), silent).run()
        return 0

    assert forked(die) == -signal.SIGKILL
    left = {path.name for path in (lab_dir / "to").iterdir()}
    assert left == {"vda.qcow2.partial", "vda.qcow2.partial.json"}
    Restore(request, lambda: open_repository(stored), silent).run()
    assert [path.name for path in (lab_dir / "to").iterdir()] == ["vda.qcow2"]
    assert list((lab_dir / "work").iterdir()) == []


def test_a_stopped_restore_leaves_nothing(lab_dir: Path, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restore = Restore(RestoreRequest("latest", lab_dir / "to"), lambda: open_repository(stored), silent)
    write = NbdConnection.submit_write

    def stop(self: NbdConnection, *arguments: Any) -> int:
        assert (lab_dir / "to" / "vda.qcow2.partial").exists()
        restore.stop()
        return write(self, *arguments)

    monkeypatch.setattr(NbdConnection, "submit_write", stop)
    with pytest.raises(RestoreError, match="interrupted"):
        restore.run()
    assert not (lab_dir / "to").exists()


# -- work directories ---------------------------------------------------------------------------------------------


def test_what_the_dead_left_goes_with_the_next_one(tmp_path: Path) -> None:
    def die() -> int:
        with work_directory(str(tmp_path), ME) as place:
            for name in ("0.scratch", "nbd", "log", "pid"):
                (place / name).write_bytes(b"x")
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    for _ in range(2):
        assert forked(die) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with work_directory(str(tmp_path), ME) as place:
        assert list(tmp_path.iterdir()) == [place]
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    with work_directory(str(tmp_path), ME) as one:
        (one / "0.scratch").write_bytes(b"x")
        with work_directory(str(tmp_path), ME) as two:
            assert sorted(tmp_path.iterdir()) == sorted([one, two])
            assert (one / "0.scratch").exists()
        assert list(tmp_path.iterdir()) == [one]


def test_what_is_somebody_elses_stays(tmp_path: Path) -> None:
    """A repository, say, that lies where the scratch is made, and is called after us."""
    names = ["pullback-repo", "pullback-12345678", ".pullback-mine", ".pullback-work-mine"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_bytes(b"x")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".pullback-work-link").symlink_to(tmp_path / "pullback-repo")
    with work_directory(str(tmp_path), ME):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, ".pullback-work-link"])
    assert all((tmp_path / name / "precious").exists() for name in names)


def test_a_place_that_cannot_be_used(tmp_path: Path) -> None:
    for place in ("relative", str(tmp_path / "missing")):
        with pytest.raises(UsageError), work_directory(place, ME):
            pass
