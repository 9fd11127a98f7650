# SPDX-License-Identifier: Apache-2.0
"""Two of ours and restic at work in one repository at the same time; restic prunes and forgets between and beside."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.processes import wait_for
from lab.qemu import BareQemu
from pullback.engine.events import Event, Frozen, Note
from pullback.errors import RepositoryLocked
from tests.support.backups import new_repository, open_repository, read_disk, store_backup
from tests.support.product import KIB, MIB, Stage, forked, references, same
from tests.support.restic import Restic, needs_restic

pytestmark = needs_restic
Start = Callable[..., BareQemu]


def writes(place: Path, domain: str, seed: int) -> list[bytes]:
    """What the backups of a domain hold that :func:`write_backups` stores: half of each is in the next one, too."""
    chance = random.Random(seed)
    shared = random.Random(99).randbytes(512 * KIB)
    return [shared + chance.randbytes(512 * KIB) for _ in range(3)]


def write_backups(place: Path, domain: str, seed: int, retry: float = 150.0) -> None:
    for day, data in enumerate(writes(place, domain, seed)):
        repository = open_repository(place)
        with repository.lock(retry=retry):
            store_backup(repository, {"vda": [data]}, domain=domain, day=day)


@contextlib.contextmanager
def in_process(work: Callable[[], None]) -> Iterator[None]:
    """Do ``work`` in a process of its own meanwhile; it must end well."""
    codes: list[int] = []

    def child() -> int:
        work()
        return 0

    thread = threading.Thread(target=lambda: codes.append(forked(child, timeout=240)))
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert codes == [0]


def test_two_of_ours_and_restic_write_at_once(tmp_path: Path) -> None:
    place, files = tmp_path / "repo", tmp_path / "files"
    new_repository(place)
    restic = Restic(place)
    files.mkdir()
    (files / "file").write_bytes(os.urandom(3 * MIB))
    with (
        in_process(lambda: write_backups(place, "one", 1)),
        in_process(lambda: write_backups(place, "two", 2)),
    ):
        for _ in range(3):
            restic.run("backup", str(files), "--host", "theirs")
    restic.check()
    restic.run("prune", "--max-unused", "0")
    restic.check()
    repository = open_repository(place)
    for domain, seed in (("one", 1), ("two", 2)):
        found = [read_disk(repository, snapshot.id, "vda") for snapshot in repository.snapshots(domain)]
        assert found == writes(place, domain, seed)
    restic.run("restore", "latest", "--host", "theirs", "--target", str(tmp_path / "out"))
    assert (tmp_path / "out" / str(files)[1:] / "file").read_bytes() == (files / "file").read_bytes()


def test_a_prune_in_a_loop_while_we_write(tmp_path: Path) -> None:
    """It finds our lock and gives up, or we find its lock and wait; either way nothing that is needed goes."""
    place = tmp_path / "repo"
    new_repository(place)
    restic = Restic(place)
    outcomes: list[int] = []
    ended = threading.Event()

    def prune() -> None:
        while not ended.is_set():
            done = restic.attempt("prune", "--max-unused", "0")
            assert done.returncode == 0 or b"already locked" in done.stderr, done.stderr
            outcomes.append(done.returncode)
            ended.wait(0.1)  # or it would hold its lock nine tenths of the time

    with in_process(lambda: write_backups(place, "one", 1)):
        pruning = threading.Thread(target=prune)
        pruning.start()
        try:
            write_backups(place, "two", 2)
        finally:
            wait_for(lambda: outcomes, "a prune's end", timeout=60)
            ended.set()
            pruning.join()
    restic.run("prune", "--max-unused", "0")
    restic.check()
    repository = open_repository(place)
    for domain, seed in (("one", 1), ("two", 2)):
        found = [read_disk(repository, snapshot.id, "vda") for snapshot in repository.snapshots(domain)]
        assert found == writes(place, domain, seed)


@pytest.fixture
def life(lab_dir: Path, bare_qemu: Start) -> tuple[Stage, BareQemu]:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 4 * MIB)], running=True)
    qemu.device_write("vda", 0, 4 * MIB, os.urandom(64 * KIB))
    return stage, qemu


def test_a_prune_while_a_domain_is_frozen_is_turned_away(life: tuple[Stage, BareQemu]) -> None:
    stage, qemu = life
    first, said = stage.backup(qemu).id, []

    def prune(event: Event) -> None:
        if isinstance(event, Frozen):
            said.append(stage.restic.attempt("forget", first, "--prune"))
            said.append(stage.restic.attempt("prune", "--max-unused", "0"))

    state = references(qemu)
    made = stage.backup(qemu, prune)
    assert made.manifest.disks[0].mode == "incremental"
    assert [done.returncode != 0 and b"already locked" in done.stderr for done in said] == [True, True]
    same(stage.contents(made.id), state)


def test_a_backup_waits_for_restic_and_says_so(life: tuple[Stage, BareQemu]) -> None:
    """restic stands still with its exclusive lock, and goes on when we said that we wait."""
    stage, qemu = life
    stage.backup(qemu)
    with _standing_restic(stage.restic, stage.repo) as standing:
        with pytest.raises(RepositoryLocked, match=f"process {standing.pid} ") as raised:
            stage.backup(qemu)
        assert raised.value.exit_code == 11
        notes: list[str] = []

        def go_on(event: Event) -> None:
            if isinstance(event, Note):
                notes.append(event.message)
                _let_go(standing)

        state = references(qemu)
        made = stage.backup(qemu, go_on, lock_retry=60)
    assert f"process {standing.pid} " in notes[0]
    assert notes[0].startswith("Waiting for the repository")
    same(stage.contents(made.id), state)


@contextlib.contextmanager
def _standing_restic(restic: Restic, place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """restic in the middle of a check, which takes the same lock as a prune."""
    with subprocess.Popen(
        ["restic", "--no-cache", "check", "--read-data", "--limit-download", "16"],
        env=restic.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_for(lambda: any(len(path.name) == 64 for path in (place / "locks").iterdir()), "its lock", timeout=30)
            process.send_signal(signal.SIGSTOP)
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """End it, as by a terminal: it takes its lock back."""
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.wait(timeout=30)


def test_forgetting_between_two_increments(life: tuple[Stage, BareQemu]) -> None:
    """The next one builds on what is left; when nothing is left it reads all again.  Each is right."""
    stage, qemu = life
    ids = [stage.backup(qemu).id]
    for number in range(4):
        qemu.device_write("vda", number * 512 * KIB, 64 * KIB, os.urandom(4096))
        ids.append(stage.backup(qemu).id)
        # The newest one goes, its own base, then all but the first.
        gone = {0: [ids[-1]], 1: [ids[0]], 2: ids[1:], 3: ids}[number]
        gone = [one for one in gone if one in stage.listed()]
        stage.restic.run("forget", *gone, "--prune", "--max-unused", "0")
        left = stage.listed()
        qemu.device_write("vda", (7 - number) * 512 * KIB, 4096, number + 1)
        state = references(qemu)
        made = stage.backup(qemu)
        ids.append(made.id)
        disk = made.manifest.disks[0]
        assert disk.mode == ("incremental" if left else "full")
        if disk.base is not None:
            assert disk.base.backup == left[-1]
        same(stage.contents(made.id), state)
    stage.restic.check()
