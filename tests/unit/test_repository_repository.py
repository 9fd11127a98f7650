# SPDX-License-Identifier: Apache-2.0
"""The repository as a whole, in a directory."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pullback.errors import (
    BackupNotFound,
    Damaged,
    RepositoryError,
    RepositoryExists,
    RepositoryMissing,
    RepositoryUnsupported,
    UsageError,
    WrongPassword,
)
from pullback.repository import writer as writer_module
from pullback.repository.blob import BlobId, BlobKind, PackId, blob_id
from pullback.repository.crypto import Key, make_key_file
from pullback.repository.documents import save_document
from pullback.repository.index import encode_index
from pullback.repository.layout import BackupBuilder, StoredBackup
from pullback.repository.local_store import LocalStore
from pullback.repository.pack import parse_pack
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot
from pullback.repository.store import Bytes, FileKind
from pullback.repository.tree import directory_node, encode_tree, file_node
from tests.support.backups import CHEAP, CHUNK, MOMENT, new_repository, open_repository, read_disk, store_backup
from tests.support.restic import PASSWORD

MIB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "repo"


@pytest.fixture
def repository(place: Path) -> Repository:
    return new_repository(place)


def files(place: Path, kind: FileKind) -> list[Path]:
    return sorted(path for path in (place / kind.value).rglob("*") if path.is_file())


# -- making and opening ------------------------------------------------------------------------------------------


def test_open_finds_what_init_made(place: Path, repository: Repository) -> None:
    again = open_repository(place)
    assert (again.id, again.version) == (repository.id, 2)
    assert len(bytes.fromhex(again.id)) == 32


def test_there_must_be_a_repository(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RepositoryMissing, match=str(path)):
            open_repository(path)


def test_init_leaves_a_repository_alone(place: Path, repository: Repository) -> None:
    with repository.new_writer() as writer:
        writer.add(BlobKind.DATA, b"what is not to be lost")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(RepositoryExists):
        new_repository(place)
    # A lost config must not be papered over either: with a new key nothing could ever be read again.
    (place / "config").unlink()
    with pytest.raises(RepositoryExists):
        new_repository(place)
    del before[place / "config"]
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_an_empty_password_is_refused(place: Path) -> None:
    with pytest.raises(UsageError):
        Repository.init(LocalStore(place), "")
    assert not place.exists()


def test_a_wrong_password_is_called_so_and_not_repeated(place: Path, repository: Repository) -> None:
    with pytest.raises(WrongPassword) as caught:
        open_repository(place, "hunter2hunter2")
    assert "hunter2" not in str(caught.value) + repr(caught.value)


def test_each_of_several_passwords_opens(place: Path, repository: Repository) -> None:
    for path in files(place, FileKind.KEYS):
        master = json.loads(path.read_text())
        assert master["N"] == CHEAP.n
    key = repository._key
    name, content = make_key_file(key, "second", created="2026-01-01T00:00:00Z", username="", hostname="", cost=CHEAP)
    repository.store.save(FileKind.KEYS, name, content)
    assert open_repository(place, "second").id == open_repository(place).id == repository.id


def test_a_broken_key_file_does_not_keep_out_who_has_another(place: Path, repository: Repository) -> None:
    repository.store.save(FileKind.KEYS, "0" * 64, b"{}")
    assert open_repository(place).id == repository.id
    with pytest.raises(Damaged, match=f"keys/{'0' * 64}"):
        open_repository(place, "wrong")


def test_a_version_of_the_future_is_refused(place: Path, repository: Repository) -> None:
    (place / "config").unlink()
    document = json.dumps({"version": 3, "id": "00" * 32, "chunker_polynomial": "1"}).encode()
    save_document(repository.store, repository._key, 3, FileKind.CONFIG, document)
    with pytest.raises(RepositoryUnsupported, match="version 3"):
        open_repository(place)


def test_an_encoding_of_the_future_is_refused(place: Path, repository: Repository) -> None:
    sealed = repository._key.seal(b"\x03whatever")
    name = blob_id(sealed).hex()
    repository.store.save(FileKind.SNAPSHOTS, name, sealed)
    with pytest.raises(RepositoryUnsupported, match=name):
        repository.snapshots()


# -- writing and reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_a_backup_comes_back(tmp_path: Path, version: int) -> None:
    repository = new_repository(tmp_path / "repo", version)
    segments = [os.urandom(2 * MIB), b"text" * (MIB // 2), bytes(MIB) + os.urandom(70_000)]
    name = store_backup(repository, {"sda": segments, "empty": []})
    again = open_repository(tmp_path / "repo")
    assert read_disk(again, name[:9], "sda") == b"".join(segments)
    stored = StoredBackup(again, again.find("latest"))
    assert stored.disks() == ["empty", "sda"]
    assert stored.segments("empty") == []
    assert stored.manifest_bytes() == b'{"format": 1}'


def test_text_shrinks_and_noise_does_not_grow(place: Path, repository: Repository) -> None:
    noise, text = os.urandom(MIB), b"text" * (MIB // 4)
    with repository.new_writer() as writer:
        for data in (noise, text):
            writer.add(BlobKind.DATA, data)
    one = repository.index.lookup(BlobKind.DATA, blob_id(noise))
    two = repository.index.lookup(BlobKind.DATA, blob_id(text))
    assert one is not None
    assert two is not None
    assert (one.compressed, one.length, one.uncompressed_length) == (False, MIB + 32, MIB)
    assert two.compressed
    assert two.length < MIB // 100
    assert two.uncompressed_length == MIB
    assert writer.bytes_added == 2 * MIB
    assert writer.bytes_stored == repository.bytes_stored == sum(p.stat().st_size for p in files(place, FileKind.DATA))


def test_trees_are_always_compressed_and_empty_blobs_never(repository: Repository) -> None:
    with repository.new_writer() as writer:
        tree = writer.add(BlobKind.TREE, os.urandom(100))
        empty = writer.add(BlobKind.DATA, b"")
    for kind, blob, compressed in ((BlobKind.TREE, tree, True), (BlobKind.DATA, empty, False)):
        place = repository.index.lookup(kind, blob)
        assert place is not None
        assert place.compressed is compressed
    assert repository.load_blob(BlobKind.DATA, empty) == b""


def test_data_and_trees_stand_in_packs_of_their_own(repository: Repository) -> None:
    with repository.new_writer() as writer:
        data = writer.add(BlobKind.DATA, b"same")
        tree = writer.add(BlobKind.TREE, b"same")
    assert data == tree
    one, two = repository.index.lookup(BlobKind.DATA, data), repository.index.lookup(BlobKind.TREE, tree)
    assert one is not None
    assert two is not None
    assert one.pack_id != two.pack_id


def test_a_blob_is_stored_once_by_any_number_of_threads(place: Path, repository: Repository) -> None:
    blobs = [os.urandom(1000) for _ in range(50)]
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        with repository.new_writer() as writer:
            for data in blobs:
                writer.add(BlobKind.DATA, data)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    repository.save_index()
    assert repository.blobs_stored == len(blobs)
    again = open_repository(place)
    assert all(again.load_blob(BlobKind.DATA, blob_id(data)) == data for data in blobs)
    with again.new_writer() as writer:  # and not by a later process that knows the index
        writer.add(BlobKind.DATA, blobs[0])
    assert again.blobs_stored == 0


def test_packs_end_at_their_size(place: Path, repository: Repository) -> None:
    with repository.new_writer() as writer:
        for _ in range(40):
            writer.add(BlobKind.DATA, os.urandom(MIB))
    sizes = sorted(path.stat().st_size for path in files(place, FileKind.DATA))
    assert len(sizes) == 3
    assert all(16 * MIB <= size < 18 * MIB for size in sizes[1:])


def test_index_files_are_written_on_the_way(
    place: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "MAX_INDEX_BLOBS", 100)
    for _ in range(10):
        with repository.new_writer() as writer:
            for _ in range(30):
                writer.add(BlobKind.DATA, os.urandom(50))
    assert len(files(place, FileKind.INDEX)) == 3
    repository.save_index()
    repository.save_index()
    assert len(files(place, FileKind.INDEX)) == 4
    assert len(open_repository(place).index) == 300


def test_an_abandoned_writer_promises_nothing(place: Path, repository: Repository) -> None:
    data = os.urandom(CHUNK)
    with pytest.raises(KeyError), repository.new_writer() as writer:
        writer.add(BlobKind.DATA, data)
        raise KeyError
    with repository.new_writer() as writer:
        writer.add(BlobKind.DATA, data)
    repository.save_index()
    assert open_repository(place).load_blob(BlobKind.DATA, blob_id(data)) == data


class FailingStore(LocalStore):
    """Fails to save files of one kind."""

    fail: FileKind | None = None

    def save(self, kind: FileKind, name: str, data: object) -> None:
        if kind is self.fail:
            raise RepositoryError("It burns")
        super().save(kind, name, data)  # type: ignore[arg-type]


def test_what_could_not_be_stored_is_stored_by_the_next_one(place: Path) -> None:
    store = FailingStore(place)
    repository = Repository.init(store, PASSWORD, cost=CHEAP)
    store.fail, data = FileKind.DATA, os.urandom(CHUNK)
    with pytest.raises(RepositoryError), repository.new_writer() as writer:
        writer.add(BlobKind.DATA, data)
        writer.add(BlobKind.TREE, data)
    writer.abandon()
    store.fail = FileKind.INDEX
    with repository.new_writer() as writer:
        writer.add(BlobKind.DATA, data)
    with pytest.raises(RepositoryError):
        repository.save_index()
    store.fail = None
    repository.save_index()
    assert open_repository(place).load_blob(BlobKind.DATA, blob_id(data)) == data


def test_no_snapshot_file_while_a_writer_holds_something_back(repository: Repository) -> None:
    writer = repository.new_writer()
    tree = writer.add(BlobKind.TREE, encode_tree([]))
    with pytest.raises(RuntimeError, match="flushed"):
        repository.save_snapshot(Snapshot(MOMENT, tree, ("/x",)))
    writer.flush()
    repository.save_snapshot(Snapshot(MOMENT, tree, ("/x",)))


def test_the_order_is_packs_index_snapshot(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, kinds = new_repository(place), []
    real = LocalStore.save

    def save(self: LocalStore, kind: FileKind, name: str, data: Bytes) -> None:
        kinds.append(kind)
        real(self, kind, name, data)

    monkeypatch.setattr(LocalStore, "save", save)
    store_backup(repository, {"sda": [bytes(CHUNK)]})
    assert kinds == [FileKind.DATA, FileKind.DATA, FileKind.INDEX, FileKind.SNAPSHOTS]


# -- reading what is not in order --------------------------------------------------------------------------------


def test_a_second_copy_of_a_blob_is_used_when_the_first_is_broken(place: Path, repository: Repository) -> None:
    data = os.urandom(CHUNK)
    with repository.new_writer() as writer:
        writer.add(BlobKind.DATA, data)
    repository.save_index()
    (first,) = files(place, FileKind.DATA)
    other = open_repository(place)  # does not load the index, as an incremental need not
    with other.new_writer() as writer:
        writer.add(BlobKind.DATA, data)
    other.save_index()
    assert len(files(place, FileKind.DATA)) == 2

    for broken in files(place, FileKind.DATA):
        content = broken.read_bytes()
        broken.chmod(0o600)
        broken.write_bytes(b"\xff" + content[1:])
        reader = open_repository(place)
        assert reader.load_blob(BlobKind.DATA, blob_id(data)) == data
        for path in files(place, FileKind.DATA):
            assert list(reader.load_blobs_of_pack(_pack(path), [blob_id(data)])) == [(blob_id(data), data)]
        broken.write_bytes(content)
    for path in files(place, FileKind.DATA):
        path.chmod(0o600)
        path.write_bytes(bytes(10))
    with pytest.raises(Damaged, match=f"data/{first.name}|too short"):
        open_repository(place).load_blob(BlobKind.DATA, blob_id(data))


def _pack(path: Path) -> PackId:
    return PackId(bytes.fromhex(path.name))


def test_a_blob_that_is_another_is_damage(place: Path, repository: Repository) -> None:
    """An index with two entries mixed up: every MAC is right, and the bytes are wrong."""
    with repository.new_writer() as writer:
        one, two = (writer.add(BlobKind.DATA, os.urandom(1000)) for _ in range(2))
    (path,) = files(place, FileKind.DATA)
    blobs = parse_pack(path.read_bytes(), repository._key)
    swapped = [blobs[0]._replace(id=blobs[1].id), blobs[1]._replace(id=blobs[0].id)]
    save_document(repository.store, repository._key, 2, FileKind.INDEX, encode_index({_pack(path): swapped}))
    again = open_repository(place)
    for blob in (one, two):
        with pytest.raises(Damaged, match=f"{path.name}.*{blob.hex()}.*SHA-256"):
            again.load_blob(BlobKind.DATA, blob)
        with pytest.raises(Damaged):
            list(again.load_blobs_of_pack(_pack(path), [blob]))


def test_an_unknown_blob_is_damage(repository: Repository) -> None:
    with pytest.raises(Damaged, match="in no index file"):
        repository.load_blob(BlobKind.DATA, BlobId(b"\x07" * 32))


def test_an_index_file_that_replaces_another(place: Path, repository: Repository) -> None:
    store_backup(repository, {"sda": [os.urandom(CHUNK)]})
    (old,) = files(place, FileKind.INDEX)
    save_document(repository.store, repository._key, 2, FileKind.INDEX, encode_index({}, [old.name]))
    assert len(open_repository(place).index) == 0


def test_an_index_file_that_vanishes_while_it_is_read(place: Path, repository: Repository) -> None:
    store_backup(repository, {"sda": [os.urandom(CHUNK)]})
    ghosts = ["0" * 64]

    class Haunted(LocalStore):
        def list(self, kind: FileKind) -> Iterator[tuple[str, int]]:
            if kind is FileKind.INDEX and ghosts:
                yield ghosts.pop(), 1
            else:
                yield from super().list(kind)

    assert len(Repository.open(Haunted(place), PASSWORD).index) == 6


def test_a_snapshot_forgotten_while_the_list_is_read(place: Path, repository: Repository) -> None:
    name = store_backup(repository, {"sda": []})

    class Haunted(LocalStore):
        def list(self, kind: FileKind) -> Iterator[tuple[str, int]]:
            yield from super().list(kind)
            if kind is FileKind.SNAPSHOTS:
                yield "0" * 64, 1

    assert [one.id for one in Repository.open(Haunted(place), PASSWORD).snapshots()] == [name]


def test_blobs_of_a_pack_come_in_its_order_in_few_reads(
    place: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = [os.urandom(CHUNK) for _ in range(60)]
    with repository.new_writer() as writer:
        ids = [writer.add(BlobKind.DATA, data) for data in blobs]
    (path,) = files(place, FileKind.DATA)
    repository.load_index()
    reads: list[tuple[int, int | None]] = []
    real = LocalStore.load

    def load(self: LocalStore, kind: FileKind, name: str, offset: int = 0, length: int | None = None) -> bytes:
        reads.append((offset, length))
        return real(self, kind, name, offset, length)

    monkeypatch.setattr(LocalStore, "load", load)
    wanted = [5, 3, 4, 40, 41, 3]
    got = list(repository.load_blobs_of_pack(_pack(path), [ids[number] for number in wanted]))
    assert got == [(ids[number], blobs[number]) for number in (3, 4, 5, 40, 41)]
    sealed = CHUNK + 32
    assert reads == [(3 * sealed, 3 * sealed), (40 * sealed, 2 * sealed)]


# -- the layout --------------------------------------------------------------------------------------------------


def test_an_unchanged_segment_is_shared_whole(place: Path, repository: Repository) -> None:
    one, two, three = (os.urandom(CHUNK) for _ in range(3))
    first = repository.find(store_backup(repository, {"sda": [one, two]}))
    before = repository.blobs_stored
    kept, _ = StoredBackup(repository, first).segments("sda")
    with repository.new_writer() as writer:
        builder = BackupBuilder(repository, writer, "web", MOMENT)
        builder.add_segment("sda", 1, len(three), [writer.add(BlobKind.DATA, three)])
        builder.keep_segment("sda", 0, kept.subtree_id)
        tree = builder.finish(b'{"format": 1}')
    name = repository.save_snapshot(Snapshot(MOMENT, tree, (builder.path,), "web"))
    # the chunk, its segment, the disk, the domain, the root
    assert repository.blobs_stored - before == 5
    assert read_disk(open_repository(place), name, "sda") == one + three


def test_equal_disks_have_equal_trees_whenever_they_are_stored(repository: Repository) -> None:
    disks = {"sda": [os.urandom(CHUNK), bytes(CHUNK)]}
    snapshots = [repository.find(store_backup(repository, disks, day=day)) for day in (0, 9)]
    one, two = (StoredBackup(repository, snapshot).segments("sda") for snapshot in snapshots)
    assert one == two
    assert snapshots[0].tree != snapshots[1].tree  # the manifest's time


def test_a_large_disk_keeps_the_order_of_names(repository: Repository) -> None:
    with repository.new_writer() as writer:
        builder = BackupBuilder(repository, writer, "web", MOMENT)
        blob = writer.add(BlobKind.DATA, b"x")
        subtree = builder.add_segment("sda", 0, 1, [blob])
        for number in range(1, 10_001):
            builder.keep_segment("sda", number, subtree)
        tree = builder.finish(b"{}")
    repository.save_snapshot(Snapshot(MOMENT, tree, (builder.path,), "web"))
    stored = StoredBackup(repository, repository.find("latest"))
    assert [segment.number for segment in stored.segments("sda")] == list(range(10_001))
    (disk,) = (node for node in stored._root.nodes if node.name == "sda")
    assert disk.subtree is not None
    names = [node.name for node in repository.load_tree(disk.subtree).nodes]
    assert (names[0], names[-1]) == ("00000", "10000")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "/", "ä" * 128])
def test_names_that_cannot_be_directories_are_refused(repository: Repository, name: str) -> None:
    writer = repository.new_writer()
    with pytest.raises(UsageError):
        BackupBuilder(repository, writer, name, MOMENT)
    builder = BackupBuilder(repository, writer, "web", MOMENT)
    with pytest.raises(UsageError):
        builder.add_segment(name, 0, 0, [])


def test_a_disk_cannot_be_called_as_the_manifest(repository: Repository) -> None:
    with pytest.raises(UsageError), repository.new_writer() as writer:
        BackupBuilder(repository, writer, "web", MOMENT).add_disk("domain.json")


def test_a_gap_between_segments_is_a_defect_here_and_damage_there(repository: Repository) -> None:
    with repository.new_writer() as writer:
        builder = BackupBuilder(repository, writer, "web", MOMENT)
        subtree = builder.add_segment("sda", 1, 0, [])
        with pytest.raises(ValueError, match="segment 0 of sda is missing"):
            builder.finish(b"{}")
        with pytest.raises(ValueError, match="twice"):
            builder.keep_segment("sda", 1, subtree)
        disk = writer.add(BlobKind.TREE, encode_tree([directory_node("0001", subtree, "1970-01-01T00:00:00Z")]))
        root = writer.add(BlobKind.TREE, encode_tree([directory_node("sda", disk, "1970-01-01T00:00:00Z")]))
    repository.save_snapshot(Snapshot(MOMENT, root, ("/",), "web"))
    with pytest.raises(Damaged, match="segments of the disk sda are missing"):
        StoredBackup(repository, repository.find("latest")).segments("sda")


def test_a_segment_whose_blobs_do_not_add_up_is_damage(repository: Repository) -> None:
    with repository.new_writer() as writer:
        builder = BackupBuilder(repository, writer, "web", MOMENT)
        builder.add_segment("sda", 0, 5, [writer.add(BlobKind.DATA, b"four")])
        tree = builder.finish(b"{}")
    repository.save_snapshot(Snapshot(MOMENT, tree, (builder.path,), "web"))
    stored = StoredBackup(repository, repository.find("latest"))
    with pytest.raises(Damaged, match="4 bytes instead of 5"):
        stored.content(stored.segments("sda")[0])


def test_another_programs_backup_is_told_apart(repository: Repository) -> None:
    with repository.new_writer() as writer:
        tree = writer.add(BlobKind.TREE, encode_tree([file_node("passwd", 0, [], "1970-01-01T00:00:00Z")]))
    for paths in (("/etc",), ("/a", "/b"), ()):
        snapshot = repository.find(repository.save_snapshot(Snapshot(MOMENT, tree, paths, "host")))
        with pytest.raises(Damaged, match="not laid out"):
            StoredBackup(repository, snapshot)
    snapshot = repository.find(repository.save_snapshot(Snapshot(MOMENT, tree, ("/",), "host")))
    with pytest.raises(Damaged, match=r"no domain\.json"):
        StoredBackup(repository, snapshot).manifest_bytes()


def test_listing_by_domain(repository: Repository) -> None:
    second = store_backup(repository, {"sda": []}, day=2)
    first = store_backup(repository, {"sda": []}, day=1)
    other = store_backup(repository, {"sda": []}, domain="db")
    assert [one.id for one in repository.snapshots()] == [other, first, second]
    assert [one.id for one in repository.snapshots("web")] == [first, second]
    assert repository.find("web@latest").id == second
    with pytest.raises(BackupNotFound):
        repository.find("nobody@latest")


def test_master_keys_differ(tmp_path: Path) -> None:
    one, two = new_repository(tmp_path / "1"), new_repository(tmp_path / "2")
    assert one._key.encrypt != two._key.encrypt
    assert isinstance(one._key, Key)
