# SPDX-License-Identifier: Apache-2.0
"""Locks, with other holders played by lock files."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import pytest

from pullback.errors import Damaged, RepositoryError, RepositoryLocked
from pullback.repository import locks as locks_module
from pullback.repository.blob import BlobKind
from pullback.repository.documents import save_document
from pullback.repository.locks import LockFile, RepositoryLock, survive_restic_probe
from pullback.repository.repository import Repository
from pullback.repository.store import FileKind
from pullback.repository.tree import encode_tree
from tests.support.backups import MOMENT, new_repository, open_repository, store_backup

HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for nobody long."""
    monkeypatch.setattr(locks_module, "RETRY_EVERY", 0.01)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return new_repository(tmp_path)


def other_lock(**changes: object) -> LockFile:
    lock = LockFile(datetime.now(UTC), False, "elsewhere", "alice", 4711, 1000, 1000)
    return replace(lock, **changes)  # type: ignore[arg-type]


def plant(repository: Repository, **changes: object) -> str:
    """A lock of somebody else's."""
    return save_document(repository.store, repository._key, 2, FileKind.LOCKS, other_lock(**changes).encode())


def names(repository: Repository) -> set[str]:
    return {name for name, _ in repository.store.list(FileKind.LOCKS)}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        threading.Event().wait(0.005)


def test_a_lock_is_spelt_as_restic_does() -> None:
    moment = datetime(2026, 5, 4, 3, 2, 1, 5, tzinfo=UTC)
    lock = LockFile(moment, True, "h", "u", 42, 0, 7)
    assert lock.encode() == (
        b'{"time":"2026-05-04T03:02:01.000005Z","exclusive":true,"hostname":"h","username":"u","pid":42,"gid":7}'
    )
    assert LockFile.decode(lock.encode(), "x") == lock


def test_a_lock_is_there_while_it_is_held(repository: Repository) -> None:
    with repository.lock() as lock:
        (name,) = names(repository)
        found = LockFile.decode(_document(repository, name), name)
        assert (found.hostname, found.pid, found.exclusive) == (HOST, os.getpid(), False)
        lock.check()
    assert names(repository) == set()
    with pytest.raises(ZeroDivisionError), repository.lock():
        raise ZeroDivisionError
    assert names(repository) == set()


def _document(repository: Repository, name: str) -> bytes:
    from pullback.repository.documents import load_document

    return load_document(repository.store, repository._key, FileKind.LOCKS, name)


@pytest.mark.parametrize(
    ("ours", "theirs", "blocked"), [(False, False, False), (False, True, True), (True, False, True), (True, True, True)]
)
def test_who_excludes_whom(repository: Repository, ours: bool, theirs: bool, blocked: bool) -> None:
    planted = plant(repository, exclusive=theirs)
    if blocked:
        with pytest.raises(RepositoryLocked, match="alice on elsewhere, since 20") as caught:
            repository.lock(ours).acquire()
        assert "4711" in caught.value.what
    else:
        with repository.lock(ours):
            assert len(names(repository)) == 2
    assert names(repository) == {planted}


def test_of_two_at_once_one_gives_way(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one's lock appears after we looked and before we wrote."""
    real, planted = RepositoryLock._write, []

    def write(self: RepositoryLock) -> str:
        planted.append(plant(repository))
        return real(self)

    monkeypatch.setattr(RepositoryLock, "_write", write)
    with pytest.raises(RepositoryLocked):
        repository.lock(exclusive=True).acquire()
    assert names(repository) == set(planted)


@pytest.fixture
def unsettled(repository: Repository) -> Iterator[RepositoryLock]:
    """A shared lock that nobody stood in the way of, so far."""
    lock = repository.lock()
    lock.acquire(settle=False)
    try:
        yield lock
    finally:
        lock.release()


def store_one(repository: Repository) -> None:
    with repository.new_writer() as writer:
        writer.add(BlobKind.DATA, b"one")


def test_before_anything_is_stored_the_moment_is_waited_out(
    repository: Repository, unsettled: RepositoryLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a store where the other one's lock may show a moment later only."""
    monkeypatch.setattr(repository.store, "shows_late", True)
    monkeypatch.setattr(locks_module, "SETTLE", 60.0)
    other = repository.lock()
    other.acquire(settle=False)
    try:
        with mock.patch.object(other._stop, "wait", wraps=lambda seconds: False) as waited:
            store_one(repository)
            other.check()
    finally:
        other.release()
    (seconds,) = [call.args[0] for call in waited.call_args_list if call.args[0] < 100]
    assert 30 < seconds <= 60


def test_who_came_at_the_same_time_is_seen_before_anything_is_stored(
    repository: Repository, unsettled: RepositoryLock
) -> None:
    """The other one's lock was written before ours and shows only now: it did not see ours and may be deleting."""
    plant(repository, exclusive=True)
    for _ in range(2):
        with pytest.raises(RepositoryLocked) as refused:
            store_one(repository)
        # Disks were frozen and read by then.
        assert refused.value.means == "This backup was not stored; those stored earlier are untouched."
    with pytest.raises(RepositoryLocked):
        unsettled.check()
    assert not list(repository.store.list(FileKind.DATA))


def test_who_came_and_went_at_the_same_time_is_seen_by_what_was_deleted(repository: Repository) -> None:
    with repository.lock():
        store_backup(repository, {"vda": [b"1" * 4096]})
    lock = repository.lock()
    lock.acquire(settle=False)
    try:
        (index,) = [name for name, _ in repository.store.list(FileKind.INDEX)]
        repository.store.remove(FileKind.INDEX, index)
        with pytest.raises(RepositoryLocked, match="deleted"):
            store_one(repository)
    finally:
        lock.release()
    assert not names(repository)


def test_a_directory_shows_a_lock_at_once(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks_module, "SETTLE", 60.0)
    begin = time.monotonic()
    with repository.lock():
        store_one(repository)
    assert time.monotonic() - begin < 30


def test_a_store_that_shows_late_is_given_a_moment(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository.store, "shows_late", True)
    lock = repository.lock()
    with mock.patch.object(lock._stop, "wait", wraps=lambda seconds: False) as waited:
        lock.acquire()
    lock.release()
    assert waited.call_args_list[0].args == (locks_module.SETTLE,)


def test_of_two_at_the_same_time_at_most_one_has_it(repository: Repository, tmp_path: Path) -> None:
    """In a directory, where nobody waits: an exclusive lock and a shared one, begun at the same moment."""
    together, outcomes = threading.Barrier(2), set()
    other = open_repository(tmp_path)

    def attempt(one: Repository, exclusive: bool) -> bool:
        lock = one.lock(exclusive=exclusive)
        together.wait(30)
        try:
            lock.acquire()
        except RepositoryLocked:
            got = False
        else:
            got = True
        together.wait(30)
        lock.release()
        return got

    with ThreadPoolExecutor(2) as pool:
        for _ in range(100):
            prune, backup = pool.submit(attempt, repository, True), pool.submit(attempt, other, False)
            outcomes.add((prune.result(), backup.result()))
    assert (True, True) not in outcomes
    assert len(outcomes) > 1, "they met always alike"
    assert not names(repository)


def test_others_who_only_add_are_not_in_the_way(repository: Repository, unsettled: RepositoryLock) -> None:
    plant(repository)
    other = open_repository(Path(repository.store.location))
    with other.lock():
        store_backup(other, {"vda": [b"1" * 4096]})
    unsettled.check()


@pytest.mark.parametrize("settle", [True, False])
def test_who_was_there_when_ours_was_written_is_seen_at_once(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, settle: bool
) -> None:
    real = RepositoryLock._write

    def write(self: RepositoryLock) -> str:
        plant(repository, exclusive=True)
        return real(self)

    monkeypatch.setattr(RepositoryLock, "_write", write)
    with pytest.raises(RepositoryLocked):
        repository.lock().acquire(settle)
    assert len(names(repository)) == 1


def test_waiting_for_another_tells_once_and_goes_on_when_it_is_gone(repository: Repository) -> None:
    planted, told = plant(repository, exclusive=True), []

    def waiting(sentence: str) -> None:
        told.append(sentence)
        repository.store.remove(FileKind.LOCKS, planted)

    with repository.lock(retry=60, waiting=waiting):
        assert len(told) == 1
        assert "exclusively by process 4711 of alice on elsewhere" in told[0]


def test_waiting_ends(repository: Repository) -> None:
    plant(repository, exclusive=True)
    told: list[str] = []
    with pytest.raises(RepositoryLocked, match="exclusively"):
        repository.lock(retry=0.05, waiting=told.append).acquire()
    assert len(told) == 1


def test_a_silent_lock_counts_for_nothing_but_is_left_to_restic_unlock(repository: Repository) -> None:
    planted = plant(repository, exclusive=True, time=datetime.now(UTC) - timedelta(minutes=31))
    with repository.lock(exclusive=True):
        pass
    assert names(repository) == {planted}
    plant(repository, exclusive=True, time=datetime.now(UTC) - timedelta(minutes=29))
    with pytest.raises(RepositoryLocked):
        repository.lock().acquire()


@pytest.fixture
def dead_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


def test_what_a_killed_process_of_this_host_left_is_removed(repository: Repository, dead_pid: int) -> None:
    plant(repository, exclusive=True, hostname=HOST, pid=dead_pid)
    with repository.lock(exclusive=True):
        assert len(names(repository)) == 1
    planted = plant(repository, exclusive=True, hostname="another", pid=dead_pid)
    with pytest.raises(RepositoryLocked):
        repository.lock().acquire()
    alive = plant(repository, exclusive=True, hostname=HOST, pid=os.getppid())
    with pytest.raises(RepositoryLocked):
        repository.lock().acquire()
    assert names(repository) == {planted, alive}


def test_staleness_as_restic_judges_it(dead_pid: int) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    for changes, stale in [
        ({"time": now - timedelta(minutes=30)}, False),
        ({"time": now - timedelta(minutes=30, seconds=1)}, True),
        ({"time": now, "hostname": HOST, "pid": dead_pid}, True),
        ({"time": now, "hostname": HOST, "pid": 1}, False),
        ({"time": now, "hostname": "another", "pid": dead_pid}, False),
    ]:
        assert other_lock(**changes).is_stale(now, HOST) is stale


def test_an_empty_lock_file_is_passed_over_a_broken_one_is_not(repository: Repository) -> None:
    repository.store.save(FileKind.LOCKS, "1" * 64, b"")
    with repository.lock(exclusive=True):
        pass
    repository.store.save(FileKind.LOCKS, "2" * 64, b"what is this")
    with pytest.raises(Damaged, match=f"locks/{'2' * 64}"):
        repository.lock().acquire()


@pytest.mark.parametrize("document", [b"", b"[]", b'{"time":"then"}', b'{"time":7}', b'{"pid":"x","time":"y"}'])
def test_what_is_no_lock_is_damage(document: bytes) -> None:
    with pytest.raises(Damaged, match="locks/x"):
        LockFile.decode(document, "x")


def holder(repository: Repository) -> RepositoryLock:
    """A lock that is refreshed all the time."""
    return RepositoryLock(repository.store, repository._key, 2, refresh_every=0.005)


def test_a_lock_is_refreshed_and_at_no_time_is_there_none(repository: Repository) -> None:
    seen: set[str] = set()
    with holder(repository) as lock:

        def three_generations() -> bool:
            now = names(repository)
            # A listing is no instant: between two files of it the name may change. There is never nothing twice.
            assert now or names(repository)
            seen.update(now)
            return len(seen) >= 3

        wait_until(three_generations)
        lock.check()
    assert names(repository) == set()


def test_a_lock_that_somebody_removed_is_lost(repository: Repository) -> None:
    with holder(repository) as lock:

        def removed() -> bool:
            for name in names(repository):
                repository.store.remove(FileKind.LOCKS, name)
            try:
                lock.check()
            except RepositoryLocked as error:
                assert "removed it" in str(error)
                return True
            return False

        wait_until(removed)


def test_without_its_lock_a_backup_is_not_stored(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks_module, "REFRESH_EVERY", 0.005)
    with repository.lock() as lock:
        lock._lost = "it was removed"
        with pytest.raises(RepositoryLocked, match="lost"):
            store_backup(repository, {"sda": []})
    assert repository.snapshots() == []


def test_a_lock_that_cannot_be_refreshed_is_lost_in_time(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = threading.Event()
    with holder(repository) as lock:

        def write(self: RepositoryLock) -> str:
            tried.set()
            raise RepositoryError("It burns")

        monkeypatch.setattr(RepositoryLock, "_write", write)
        assert tried.wait(20)
        lock.check()
        monkeypatch.setattr(locks_module, "LOST_AFTER", -1.0)
        lock._confirmed -= 24 * 3600
        with pytest.raises(RepositoryLocked, match=r"not refreshed in time|could not be refreshed"):
            lock.check()


def test_a_lock_that_slept_too_long_is_lost_even_if_it_could_be_refreshed(repository: Repository) -> None:
    with repository.lock() as lock:
        before = names(repository)
        lock._confirmed -= 31 * 60
        lock._refresh()
        assert names(repository) == before
        with pytest.raises(RepositoryLocked, match="not refreshed in time"):
            lock.check()


def test_release_is_prompt(repository: Repository) -> None:
    lock = repository.lock()
    lock.acquire()
    start = time.monotonic()
    lock.release()
    lock.release()
    assert time.monotonic() - start < 5  # and not the five minutes to the next refresh
    assert not any(thread.name == "pullback-lock" for thread in threading.enumerate())


def test_what_was_known_before_the_lock_is_forgotten(repository: Repository, tmp_path: Path) -> None:
    """While nothing was locked a prune may have deleted any blob: a writer must not believe it is stored."""
    tree = encode_tree([])
    with repository.lock(), repository.new_writer() as writer:
        writer.add(BlobKind.TREE, tree)
    repository.save_index()
    assert len(repository.index) == 1
    for kind in (FileKind.INDEX, FileKind.DATA):
        for name, _ in list(repository.store.list(kind)):
            repository.store.remove(kind, name)
    with repository.lock(), repository.new_writer() as writer:
        blob = writer.add(BlobKind.TREE, tree)
    repository.save_index()
    assert open_repository(tmp_path).load_blob(BlobKind.TREE, blob) == tree


def test_a_lock_within_a_lock_keeps_what_is_known(repository: Repository) -> None:
    with repository.lock(), repository.new_writer() as writer:
        blob = writer.add(BlobKind.TREE, b"{}")
        writer.flush()
        with repository.lock():
            assert repository.index.has(BlobKind.TREE, blob)
    assert MOMENT.tzinfo is UTC


@pytest.fixture
def hangup() -> Iterator[None]:
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


def test_surviving_the_probe_keeps_a_handler_that_is_there(hangup: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    survive_restic_probe()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    def handler(number: int, frame: object) -> None:
        raise AssertionError

    signal.signal(signal.SIGHUP, handler)
    survive_restic_probe()
    assert signal.getsignal(signal.SIGHUP) is handler


_KILLED = """
import sys
from pathlib import Path
from unittest import mock
from tests.support.backups import open_repository
open_repository(Path(sys.argv[1])).lock(exclusive=True).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_killed_holder_locks_nobody_out(repository: Repository, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(RepositoryLocked, match=str(process.pid)):
                repository.lock().acquire()
        finally:
            process.kill()
    with repository.lock(exclusive=True):
        (name,) = names(repository)
        assert json.loads(_document(repository, name))["pid"] == os.getpid()
