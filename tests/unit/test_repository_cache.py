# SPDX-License-Identifier: Apache-2.0
"""The cache: what it saves, and that whatever is wrong with it harms nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import obstore.store
import pytest

from pullback.repository import index_cache, index_loader
from pullback.repository.blob import BlobId, BlobKind, blob_id
from pullback.repository.cache_folder import UNUSED_SECONDS, CacheFolder, default_cache_directory
from pullback.repository.cached_store import CachedStore
from pullback.repository.documents import save_document
from pullback.repository.index import encode_index
from pullback.repository.index_cache import CacheBroken, IndexCache, Secrets
from pullback.repository.local_store import LocalStore
from pullback.repository.object_store import ObjectStore
from pullback.repository.pack import parse_pack
from pullback.repository.repository import Repository
from pullback.repository.store import FileKind
from tests.support.backups import new_repository
from tests.support.product import mounted_tmpfs
from tests.support.restic import PASSWORD, Restic, needs_restic

CONTENT = [os.urandom(2000) for _ in range(40)]


@pytest.fixture(autouse=True)
def early_folds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache is written for the first index file already."""
    monkeypatch.setattr(index_loader, "_TAIL_BYTES", 10)
    yield


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A repository of 40 blobs in four index files."""
    repository = new_repository(tmp_path / "repo")
    for start in range(0, 40, 10):
        store(repository, CONTENT[start : start + 10])
    return tmp_path


def store(repository: Repository, content: list[bytes]) -> None:
    with repository.lock(), repository.new_writer() as writer:
        for data in content:
            writer.add(BlobKind.DATA, data)
    repository.save_index()


class Opened:
    """The repository as a new process sees it, the index files it reads, and the warnings."""

    def __init__(self, place: Path, cache: Path | None = None) -> None:
        self.read: list[str] = []
        self.warnings: list[str] = []
        self.cache = cache or place / "cache"
        opened = self

        class Watched(LocalStore):
            def load(self, kind: FileKind, name: str, offset: int = 0, length: int | None = None) -> bytes:
                if kind is FileKind.INDEX:
                    opened.read.append(name)
                return super().load(kind, name, offset, length)

        self.repository = Repository.open(
            Watched(place / "repo"), PASSWORD, cache=self.cache, warn=self.warnings.append
        )

    @property
    def file(self) -> Path:
        return self.cache / self.repository.id / "index"

    def knows_all(self) -> bool:
        index = self.repository.index
        lengths = index.lengths(BlobKind.DATA, [blob_id(data) for data in CONTENT])
        assert all(self.repository.load_blob(BlobKind.DATA, blob_id(data)) == data for data in CONTENT)
        assert not index.has(BlobKind.TREE, blob_id(CONTENT[0]))
        assert not index.has(BlobKind.DATA, BlobId(bytes(32)))
        return lengths == [2000] * 40


@pytest.mark.parametrize("records_each", [1, 1000])
def test_who_asks_for_many_blobs_reads_the_file_in_one_go_and_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, records_each: int
) -> None:
    Opened(place).knows_all()
    pieces: list[int] = []
    pread = os.preadv

    def watched(file: int, buffers: list[bytearray], offset: int) -> int:
        pieces.append(pread(file, buffers, offset))
        return pieces[-1]

    monkeypatch.setattr(index_cache, "_MANY", records_each)
    monkeypatch.setattr(index_cache, "_PIECE", 1000)
    monkeypatch.setattr(os, "preadv", watched)
    again = Opened(place)
    one = blob_id(CONTENT[0])
    again.repository.index.lengths(BlobKind.DATA, [one])
    assert (not pieces) == (records_each == 1)
    assert again.knows_all() and again.knows_all()
    assert sum(pieces) == again.file.stat().st_size


def test_index_files_are_read_once(place: Path) -> None:
    first = Opened(place)
    assert first.knows_all()
    assert len(first.read) == 4
    again = Opened(place)
    assert again.knows_all()
    assert again.read == []
    assert len(again.repository.index) == 40
    assert len(again.repository.index.packs) == 4


def test_only_what_is_new_is_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Opened(place).knows_all()
    monkeypatch.setattr(index_loader, "_TAIL_BYTES", 1 << 20)
    store(Opened(place).repository, [b"one more"])
    later = Opened(place)
    assert later.repository.load_blob(BlobKind.DATA, blob_id(b"one more")) == b"one more"
    assert len(later.read) == 1
    assert later.knows_all()


def test_what_is_known_is_not_stored_again(place: Path) -> None:
    assert Opened(place).knows_all()
    opened = Opened(place)
    with opened.repository.lock():
        opened.repository.load_index()
        with opened.repository.new_writer() as writer:
            for data in CONTENT:
                writer.add(BlobKind.DATA, data)
    assert opened.repository.blobs_stored == 0


def test_an_index_file_that_went_takes_its_blobs_along(place: Path) -> None:
    """Believed to be stored, they would be missing from the next backup."""
    opened = Opened(place)
    assert opened.knows_all()
    gone = next(iter(opened.repository.store.list(FileKind.INDEX)))[0]
    with opened.repository.lock():  # from here on no prune can delete anything, but one may just have
        opened.repository.load_index()
    (place / "repo" / "index" / gone).unlink()
    for repository in (opened.repository, Opened(place).repository):
        with repository.lock():
            index = repository.load_index()
            assert sum(index.has(BlobKind.DATA, blob_id(data)) for data in CONTENT) == 30
            assert len(index) == 30


@needs_restic
def test_restic_prunes_between_two_runs(place: Path) -> None:
    assert Opened(place).knows_all()
    Restic(place / "repo").run("prune", "--max-unused", "0")
    index = Opened(place).repository.load_index()
    assert not any(index.has(BlobKind.DATA, blob_id(data)) for data in CONTENT)


def test_the_cache_tells_nobody_what_is_stored(place: Path) -> None:
    opened = Opened(place)
    assert opened.knows_all()
    content = opened.file.read_bytes()
    assert not any(blob_id(data)[:8] in content or blob_id(data)[16:24] in content for data in CONTENT)
    assert opened.cache.stat().st_mode & 0o777 == 0o700
    assert opened.file.parent.stat().st_mode & 0o777 == 0o700
    assert opened.file.stat().st_mode & 0o777 == 0o600
    assert (opened.cache / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


def test_what_breaks_while_it_is_in_use_is_made_anew(place: Path) -> None:
    opened = Opened(place)
    opened.repository.load_index()
    with opened.file.open("r+b") as file:
        size = opened.file.stat().st_size
        file.write(b"\xff" * size)  # the same file that is open: as if the disk had done it
    assert opened.knows_all()
    assert len(opened.read) == 8
    assert not opened.warnings
    assert Opened(place).knows_all()


def test_what_broke_before_new_entries_are_folded_in_is_made_anew(place: Path) -> None:
    first = Opened(place)
    assert first.knows_all()
    store(Repository.open(LocalStore(place / "repo"), PASSWORD), more := [os.urandom(50) for _ in range(20)])
    with first.file.open("r+b") as file:
        file.seek(index_cache.HEADER.size)  # header and directory stay right, the first bucket does not
        file.write(b"\xff" * 4)
    later = Opened(place)
    assert later.knows_all()
    assert all(later.repository.index.has(BlobKind.DATA, blob_id(data)) for data in more)
    assert len(set(later.read)) == 5
    assert not later.warnings
    again = Opened(place)
    assert again.knows_all() and again.read == []


def test_a_cache_that_cannot_be_opened_is_made_anew(place: Path) -> None:
    opened = Opened(place)
    assert opened.knows_all()
    opened.file.unlink()
    opened.file.symlink_to(opened.file)
    again = Opened(place)
    assert again.knows_all()
    assert len(again.read) == 4
    assert not again.warnings
    assert again.file.is_file() and not again.file.is_symlink()


@pytest.mark.parametrize("when", ["while it is opened", "while it is asked"])
def test_a_disk_that_fails_to_read_the_cache_costs_time_only(
    place: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Three times, and it is used no more."""
    assert Opened(place).knows_all()
    opened = Opened(place)
    if when == "while it is asked":
        opened.repository.load_index()
    pread, file = os.pread, opened.file
    inodes = {file.stat().st_ino}

    def failing(handle: int, size: int, offset: int) -> bytes:
        if file.exists():
            inodes.add(file.stat().st_ino)
        if os.fstat(handle).st_ino in inodes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(handle, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert opened.knows_all()
    assert len(opened.repository.index) == 40
    (warning,) = opened.warnings
    assert "cannot be read back" in warning and "nothing is wrong with the backups" in warning
    assert not file.exists()


def test_a_cache_of_another_repository_is_not_believed(place: Path, tmp_path: Path) -> None:
    opened = Opened(place)
    assert opened.knows_all()
    other = new_repository(tmp_path / "other" / "repo")
    (opened.cache / other.id).mkdir(mode=0o700)
    opened.file.rename(opened.cache / other.id / "index")
    index = Opened(tmp_path / "other", opened.cache).repository.load_index()
    assert len(index) == 0


def test_a_cache_of_another_repository_with_the_same_keys_is_not_believed(place: Path) -> None:
    opened = Opened(place)
    assert opened.knows_all()
    secrets = Secrets(opened.repository._key)
    assert len(IndexCache(opened.file, secrets, opened.repository.id)) == 40
    with pytest.raises(CacheBroken, match="another repository"):
        IndexCache(opened.file, secrets, "0" * 64)


def test_a_pack_that_two_index_files_name_is_folded_in_once(place: Path) -> None:
    opened = Opened(place)
    assert opened.knows_all()
    (pack, *_) = opened.repository.index.packs
    blobs = parse_pack((place / "repo" / "data" / pack.hex()[:2] / pack.hex()).read_bytes(), opened.repository._key)
    document = encode_index({pack: blobs})
    save_document(opened.repository.store, opened.repository._key, 2, FileKind.INDEX, document)
    again = Opened(place)
    assert len(again.repository.index) == 40
    assert len(again.read) == 1
    assert all(len(list(again.repository.index.lookup_all(one.kind, one.id))) == 1 for one in blobs)


@pytest.mark.parametrize("how", ["a file stands there", "no room", "others may write there", "nobody may"])
def test_a_cache_that_cannot_be_used_is_said_once(place: Path, how: str) -> None:
    cache = place / "unusable"
    if how == "no room":
        with mounted_tmpfs(cache, "4k"):
            _is_said_once(place, cache)
        return
    if how == "a file stands there":
        cache.write_bytes(b"")
    elif how == "others may write there":
        folder = cache / Opened(place).repository.id
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    else:
        cache = Path("/proc/nothing")
    _is_said_once(place, cache)


def _is_said_once(place: Path, cache: Path) -> None:
    opened = Opened(place, cache)
    assert opened.knows_all()
    store(opened.repository, [b"more"])
    assert opened.knows_all()
    (warning,) = opened.warnings
    assert str(cache) in warning
    assert "nothing is wrong with the backups" in warning


_AT_ONCE = """
import sys
from pathlib import Path
from pullback.repository import index_loader
from pullback.repository.blob import BlobId, BlobKind
from pullback.repository.local_store import LocalStore
from pullback.repository.repository import Repository
index_loader._TAIL_BYTES = 10
place, password, *blobs = sys.argv[1:]
for attempt in range(10):
    repository = Repository.open(LocalStore(Path(place) / "repo"), password, cache=Path(place) / "cache", warn=sys.exit)
    assert all(repository.index.has(BlobKind.DATA, BlobId(bytes.fromhex(blob))) for blob in blobs), attempt
    (Path(place) / "cache" / repository.id / "index").unlink(missing_ok=True)
"""


def test_two_processes_at_once(place: Path) -> None:
    command = [sys.executable, "-c", _AT_ONCE, str(place), PASSWORD, *(blob_id(data).hex() for data in CONTENT)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert Opened(place).knows_all()


def test_folders_not_used_for_long_are_removed_but_no_other_programs(tmp_path: Path) -> None:
    CacheFolder(tmp_path, old := "0" * 64).usable  # noqa: B018
    CacheFolder(tmp_path, recent := "1" * 64).usable  # noqa: B018
    (tmp_path / (restic := "2" * 64) / "snapshots").mkdir(parents=True)
    long_ago = (tmp_path / recent / "pullback").stat().st_mtime - UNUSED_SECONDS - 60
    for path in (tmp_path / old / "pullback", tmp_path / old, tmp_path / restic):
        os.utime(path, (long_ago, long_ago))
    assert CacheFolder(tmp_path, "3" * 64).usable
    assert {path.name for path in tmp_path.iterdir()} == {recent, restic, "3" * 64, "CACHEDIR.TAG"}


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PULLBACK_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert default_cache_directory() == Path("/a")
    monkeypatch.delenv("PULLBACK_CACHE_DIR")
    assert default_cache_directory() == Path("/b/pullback")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_directory() == Path("/c/.cache/pullback")


# -- snapshot files of a remote store ----------------------------------------------------------------------------


class Counted(ObjectStore):
    def __init__(self) -> None:
        super().__init__(obstore.store.MemoryStore(), "memory")
        self.loads = 0

    def load(self, kind: FileKind, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self.loads += 1
        return super().load(kind, name, offset, length)


def test_snapshot_files_are_fetched_once(tmp_path: Path) -> None:
    inner = Counted()
    names = {data: blob_id(data).hex() for data in (b"one", b"two", b"three")}
    for data, name in names.items():
        inner.save(FileKind.SNAPSHOTS, name, data)
    for _ in range(2):
        cached = CachedStore(inner, CacheFolder(tmp_path, "0" * 64))
        assert {data for data in names if cached.load(FileKind.SNAPSHOTS, names[data]) == data} == set(names)
    assert inner.loads == 3
    copies = tmp_path / ("0" * 64) / "snapshots"
    (copies / names[b"one"]).write_bytes(b"another")
    assert cached.load(FileKind.SNAPSHOTS, names[b"one"]) == b"one"
    assert inner.loads == 4
    inner.remove(FileKind.SNAPSHOTS, names[b"two"])
    assert {name for name, _ in cached.list(FileKind.SNAPSHOTS)} == {names[b"one"], names[b"three"]}
    assert {path.name for path in copies.iterdir()} == {names[b"one"], names[b"three"]}
