# SPDX-License-Identifier: Apache-2.0
"""Our locks and restic's, honoured both ways."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pullback.errors import RepositoryLocked
from pullback.repository.repository import Repository
from pullback.repository.store import FileKind
from tests.support.backups import new_repository, open_repository, read_disk, store_backup
from tests.support.restic import Restic, needs_restic

pytestmark = needs_restic


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return new_repository(tmp_path / "repo")


@pytest.fixture
def restic(tmp_path: Path, repository: Repository) -> Restic:
    return Restic(tmp_path / "repo")


def test_a_prune_refuses_beside_either_lock_of_ours(repository: Repository, restic: Restic) -> None:
    for exclusive in (False, True):
        with repository.lock(exclusive):
            done = restic.attempt("prune")
            assert done.returncode != 0
            assert b"already locked" in done.stderr
    restic.run("prune")


def test_a_backup_works_beside_our_shared_lock_only(repository: Repository, restic: Restic, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with repository.lock():
        restic.run("backup", str(tmp_path / "file"))
    with repository.lock(exclusive=True):
        done = restic.attempt("backup", str(tmp_path / "file"))
    assert done.returncode != 0
    assert b"exclusively" in done.stderr


@pytest.fixture
def running_backup(restic: Restic, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `restic backup` that waits for its standard input, and so holds a shared lock."""
    command = ["restic", "--no-cache", "backup", "--stdin", "--host", "h"]
    environment = restic.environment()
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            deadline = time.monotonic() + 60
            locks = tmp_path / "repo/locks"
            while not any(len(path.name) == 64 for path in locks.iterdir()):
                assert time.monotonic() < deadline
                assert process.poll() is None
            yield process
        finally:
            process.kill()


def test_restics_shared_lock_excludes_our_exclusive_one(
    repository: Repository, running_backup: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(RepositoryLocked, match=f"process {running_backup.pid} "):
        repository.lock(exclusive=True).acquire()
    with repository.lock():
        store_backup(repository, {"sda": [b"x" * 1000]})


def test_a_killed_restic_does_not_lock_us_out(repository: Repository, running_backup: subprocess.Popen[bytes]) -> None:
    running_backup.kill()
    running_backup.wait()
    assert len(list(repository.store.list(FileKind.LOCKS))) == 1
    with repository.lock(exclusive=True):
        assert len(list(repository.store.list(FileKind.LOCKS))) == 1


def test_restic_lists_our_lock_as_its_own(repository: Repository, restic: Restic) -> None:
    with repository.lock(exclusive=True):
        ((name, _),) = repository.store.list(FileKind.LOCKS)
        lock = restic.json("cat", "lock", name, "--no-lock")
        assert lock["exclusive"] is True
        assert set(lock) <= {"time", "exclusive", "hostname", "username", "pid", "uid", "gid"}


_HOLDER = """
import sys
from pathlib import Path
from pullback.repository.locks import survive_restic_probe
from tests.support.backups import open_repository, store_backup
survive_restic_probe()
repository = open_repository(Path(sys.argv[1]))
with repository.lock():
    print("held", flush=True)
    sys.stdin.readline()
    store_backup(repository, {"sda": [b"after the probe"]})
"""


def test_we_survive_restic_asking_whether_we_live(tmp_path: Path, repository: Repository, restic: Restic) -> None:
    """`restic unlock` sends SIGHUP to the owner of every lock of its host; the default action is to die."""
    command = [sys.executable, "-c", _HOLDER, str(tmp_path / "repo")]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            restic.run("unlock")
            assert len(list(repository.store.list(FileKind.LOCKS))) == 1
            process.communicate(b"go on\n", timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert read_disk(open_repository(tmp_path / "repo"), "latest", "sda") == b"after the probe"
