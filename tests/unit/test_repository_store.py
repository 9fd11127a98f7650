# SPDX-License-Identifier: Apache-2.0
"""One suite for every store."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import obstore.store
import pytest

from lab.s3 import S3Address
from pullback.errors import Damaged, RepositoryError, RepositoryUnsupported, UsageError
from pullback.repository import local_store
from pullback.repository.cache_folder import CacheFolder
from pullback.repository.cached_store import CachedStore
from pullback.repository.local_store import LocalStore
from pullback.repository.location import open_store
from pullback.repository.object_store import ObjectStore
from pullback.repository.store import FileKind, Store, relative_path


def _local(path: Path) -> Store:
    return LocalStore(path / "repo")


def _memory(path: Path) -> Store:
    return ObjectStore(obstore.store.MemoryStore(), "memory")


def _real_s3(s3: S3Address, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return open_store(f"s3:{s3.endpoint}/{s3.make_bucket()}/some/where")


def _directory(path: Path) -> Store:
    return ObjectStore(obstore.store.LocalStore(path / "objects", mkdir=True), "objects")


def _cached(path: Path) -> Store:
    return CachedStore(_memory(path), CacheFolder(path / "cache", "0" * 64))


_KINDS: dict[str, Callable[[Path], Store]] = {
    "local": _local,
    "obstore-memory": _memory,
    "obstore-directory": _directory,
    "cached": _cached,
}


@pytest.fixture(params=[*_KINDS, "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "s3":
        made = _real_s3(request.getfixturevalue("s3"), monkeypatch)
    else:
        made = _KINDS[request.param](tmp_path)
    made.create()
    return made


def name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(store: Store, data: bytes, kind: FileKind = FileKind.DATA) -> str:
    store.save(kind, name_of(data), data)
    return name_of(data)


@pytest.mark.parametrize("kind", [kind for kind in FileKind if kind is not FileKind.CONFIG])
def test_what_is_saved_is_loaded_and_listed(store: Store, kind: FileKind) -> None:
    contents = [b"", b"x", os.urandom(70_000)]
    names = [put(store, data, kind) for data in contents]
    assert sorted(store.list(kind)) == sorted((name, len(data)) for name, data in zip(names, contents, strict=True))
    for name, data in zip(names, contents, strict=True):
        assert store.exists(kind, name)
        assert store.load(kind, name) == data
    for other in FileKind:
        if other is not kind:
            assert list(store.list(other)) == []


def test_the_config_has_a_name_of_its_own(store: Store) -> None:
    assert not store.exists(FileKind.CONFIG, "config")
    store.save(FileKind.CONFIG, "anything", b"configuration")
    assert store.exists(FileKind.CONFIG, "config")
    assert store.load(FileKind.CONFIG, "") == b"configuration"
    assert [name for name, _ in store.list(FileKind.CONFIG)] == ["config"]


def test_a_file_may_come_in_pieces(store: Store) -> None:
    pieces = [b"one", bytearray(b"two"), memoryview(b"-three-")[1:-1], b"", *[b"."] * 2000]
    whole = b"onetwothree" + b"." * 2000
    store.save(FileKind.DATA, name_of(whole), pieces)
    assert store.load(FileKind.DATA, name_of(whole)) == whole


def test_parts_of_a_file(store: Store) -> None:
    name = put(store, bytes(range(100)))
    assert store.load(FileKind.DATA, name, 10, 5) == bytes(range(10, 15))
    assert store.load(FileKind.DATA, name, 95, 5) == bytes(range(95, 100))
    assert store.load(FileKind.DATA, name, 90) == bytes(range(90, 100))
    assert store.load(FileKind.DATA, name, 0, 0) == b""


@pytest.mark.parametrize(("offset", "length"), [(0, 101), (95, 6), (100, 1), (5000, 1)])
def test_a_short_file_is_damage_not_a_short_answer(store: Store, offset: int, length: int) -> None:
    name = put(store, bytes(range(100)))
    with pytest.raises(Damaged, match=name):
        store.load(FileKind.DATA, name, offset, length)


@pytest.mark.parametrize(("offset", "length"), [(0, None), (0, 1), (7, None)])
def test_a_missing_file_is_damage(store: Store, offset: int, length: int | None) -> None:
    with pytest.raises(Damaged, match=f"{'0' * 64} is missing"):
        store.load(FileKind.INDEX, "0" * 64, offset, length)


def test_removing(store: Store) -> None:
    name = put(store, b"x", FileKind.LOCKS)
    store.remove(FileKind.LOCKS, name)
    assert not store.exists(FileKind.LOCKS, name)
    assert list(store.list(FileKind.LOCKS)) == []
    store.remove(FileKind.LOCKS, name)


def test_names_that_are_no_ids_never_reach_the_store(store: Store) -> None:
    for name in ("../config", "A" * 64, "0" * 63, "", "0" * 64 + "\n"):
        with pytest.raises(ValueError, match="does not name"):
            store.save(FileKind.DATA, name, b"")


def test_many_threads_at_once(store: Store) -> None:
    contents = [os.urandom(20_000) for _ in range(24)]

    def work(mine: list[bytes]) -> None:
        for data in mine:
            assert store.load(FileKind.DATA, put(store, data)) == data

    threads = [threading.Thread(target=work, args=(contents[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name for name, _ in store.list(FileKind.DATA)} == set(map(name_of, contents))


# -- the local directory only ------------------------------------------------------------------------------------


def test_modes_are_those_of_restic(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "new" / "repo")
    store.create()
    name = put(store, b"x")
    path = store.root / relative_path(FileKind.DATA, name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(list((store.root / "data").iterdir())) == 256


def test_a_repository_that_a_group_may_read_stays_so(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create()
    store.save(FileKind.CONFIG, "", b"c")
    (tmp_path / "config").chmod(0o440)
    name = put(store, b"x")
    assert stat.S_IMODE((tmp_path / relative_path(FileKind.DATA, name)).stat().st_mode) == 0o440


def test_a_directory_that_a_copy_lost_is_made_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create()
    name = name_of(b"x")
    (tmp_path / "data" / name[:2]).rmdir()
    assert store.load(FileKind.DATA, put(store, b"x")) == b"x"


def test_a_vanished_repository_is_not_made_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "unmounted")
    with pytest.raises(RepositoryError, match="not there") as caught:
        put(store, b"x")
    assert "mounted" in str(caught.value)
    assert not (tmp_path / "unmounted").exists()


def test_leftovers_are_not_listed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create()
    name = put(store, b"x", FileKind.SNAPSHOTS)
    (tmp_path / "snapshots" / f"{name}-tmp-123").write_bytes(b"half")
    (tmp_path / "data" / "README").write_bytes(b"not a directory")
    assert list(store.list(FileKind.SNAPSHOTS)) == [(name, 1)]
    assert list(store.list(FileKind.DATA)) == []


def test_a_file_that_is_removed_while_the_directory_is_read_is_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program's lock, or a pack that a prune removes."""
    store = LocalStore(tmp_path)
    store.create()
    stays, goes = put(store, b"stays", FileKind.LOCKS), put(store, b"goes", FileKind.LOCKS)
    scan = local_store._scan

    def scan_then_lose(folder: Path) -> list[os.DirEntry[str]]:
        entries = scan(folder)
        (folder / goes).unlink()
        return entries

    monkeypatch.setattr(local_store, "_scan", scan_then_lose)
    assert list(store.list(FileKind.LOCKS)) == [(stays, 5)]


def test_the_file_is_synced_before_it_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.create()
    seen: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{handle}"))
        seen.append(("fsync", "folder" if target.is_dir() else "file"))
        if not target.is_dir():
            assert target.read_bytes() == b"content"
        real_fsync(handle)

    def rename(source: Path, target: Path) -> None:
        seen.append(("rename", ""))
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    put(store, b"content")
    assert seen == [("fsync", "file"), ("rename", ""), ("fsync", "folder")]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "input/output"),
        (errno.EACCES, "permission is denied"),
    ],
)
def test_a_failing_write_leaves_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    store = LocalStore(tmp_path)
    store.create()

    def writev(handle: int, pieces: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "writev", writev)
    with pytest.raises(RepositoryError, match=words):
        put(store, b"content")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_failing_sync_is_a_failing_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.create()

    def fsync(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RepositoryError):
        put(store, b"content")
    assert list(store.list(FileKind.DATA)) == []


_SAVER = """
import hashlib, os, sys
from pathlib import Path
from pullback.repository.location import open_store
from pullback.repository.local_store import LocalStore
from pullback.repository.store import FileKind
store = LocalStore(Path(sys.argv[1]))
store.create()
whole, half = os.urandom(1 << 20), os.urandom(1 << 20)
store.save(FileKind.DATA, hashlib.sha256(whole).hexdigest(), whole)
step, real = sys.argv[2], getattr(os, sys.argv[2])

def stop_there(*arguments):
    if step == "writev":
        os.write(arguments[0], half[: 1 << 19])
    elif step == "rename":
        real(*arguments)
    print(hashlib.sha256(whole).hexdigest(), flush=True)
    sys.stdin.read()

setattr(os, step, stop_there)
store.save(FileKind.DATA, hashlib.sha256(half).hexdigest(), half)
"""


@pytest.mark.parametrize("step", ["writev", "fsync", "rename"])
def test_a_writer_killed_at_any_step_leaves_no_half_file(tmp_path: Path, step: str) -> None:
    command = [sys.executable, "-c", _SAVER, str(tmp_path), step]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline().decode().strip()
        finally:
            process.send_signal(signal.SIGKILL)
    store = LocalStore(tmp_path)
    names = [name for name, _ in store.list(FileKind.DATA)]
    assert first in names
    # Renamed, it is whole; before that it has no name at all.
    assert len(names) == (2 if step == "rename" else 1)
    for name in names:
        assert name_of(store.load(FileKind.DATA, name)) == name


# -- locations ---------------------------------------------------------------------------------------------------


def test_a_path_is_a_directory() -> None:
    for location in ("/srv/x", "local:/srv/x"):
        store = open_store(location)
        assert isinstance(store, LocalStore)
        assert store.root == Path("/srv/x")


@pytest.mark.parametrize(
    "location", ["s3:https://host/bucket/some/prefix", "s3:http://127.0.0.1:9/b", "s3:host/bucket"]
)
def test_an_s3_location(location: str) -> None:
    store = open_store(location)
    assert isinstance(store, ObjectStore)
    assert store.location == location


@pytest.mark.parametrize("location", ["", "local:", "s3:", "s3:https://host", "s3:https://host/", "s3:///bucket"])
def test_half_a_location_is_refused(location: str) -> None:
    with pytest.raises(UsageError):
        open_store(location)


@pytest.mark.parametrize("location", ["sftp:user@host:/x", "rest:http://h/", "rclone:a:b", "b2:x", "swift:x:/y"])
def test_other_schemes_are_refused_with_what_works(location: str) -> None:
    with pytest.raises(RepositoryUnsupported, match="s3:"):
        open_store(location)


def test_a_dead_server_gives_a_repository_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setattr("pullback.repository.object_store._TRIES", 0)
    store = open_store("s3:http://127.0.0.1:9/bucket")
    with pytest.raises(RepositoryError, match=r"127\.0\.0\.1:9") as caught:
        store.exists(FileKind.CONFIG, "config")
    assert "very-secret" not in str(caught.value)
