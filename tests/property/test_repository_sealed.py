# SPDX-License-Identifier: Apache-2.0
"""What was sealed with the right key and is nonsense all the same: a documented error, in little time and memory."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.engine.walking import walk
from pullback.errors import Damaged, RepositoryError
from pullback.repository import index
from pullback.repository.blob import MAX_DOCUMENT, BlobId, BlobKind, PackId
from pullback.repository.crypto import Key, SealBroken
from pullback.repository.documents import load_document, save_document
from pullback.repository.index import Index, IndexBroken, decode_index
from pullback.repository.key_file import KeyFileInvalid
from pullback.repository.layout import MANIFEST, StoredBackup
from pullback.repository.locks import LockFile, current_account
from pullback.repository.pack import MAX_HEADER, PackBroken, PackedBlob, parse_pack
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot
from pullback.repository.store import FileKind
from pullback.repository.tree import MAX_TREE, TreeBroken, decode_tree
from tests.property.test_repository_damage import GOOD, DictStore
from tests.property.test_repository_damage import MANIFEST as MANIFEST_BYTES
from tests.support.backups import MOMENT, open_key_file
from tests.support.fuzzing import ANYTHING, fuzz, mutated

KEY = Repository.open(GOOD, "p")._key
NAMES = {kind: next(name for one, name in GOOD.files if one is kind) for kind in FileKind if kind is not FileKind.DATA}
SEALED = [FileKind.CONFIG, FileKind.INDEX, FileKind.SNAPSHOTS, FileKind.LOCKS]
WORDS = {kind: json.loads(load_document(GOOD, KEY, kind, NAMES[kind])) for kind in SEALED}


def copy_of_good() -> DictStore:
    store = DictStore()
    store.files = dict(GOOD.files)
    return store


def use(store: DictStore) -> None:
    """All that reads: what is shown of backups, their disks by both ways, who holds the lock."""
    repository = Repository.open(store, "p")
    for name, _ in list(store.list(FileKind.LOCKS)):
        lock = LockFile.decode(load_document(store, KEY, FileKind.LOCKS, name), name)
        lock.describe()
        lock.is_stale(MOMENT, socket.gethostname())
    for snapshot in repository.snapshots():
        assert repository.find(snapshot.id) == repository.find("latest")
        f"{snapshot.time.astimezone():%Y-%m-%d %H:%M %Z} {snapshot.hostname} {snapshot.short_id}"
        list(walk(repository, snapshot))
        stored = StoredBackup(repository, snapshot)
        stored.manifest_bytes()
        for disk in stored.disks():
            for segment in stored.segments(disk):
                for blob, length in stored.content(segment):
                    assert len(repository.load_blob(BlobKind.DATA, blob)) == length
    list(repository.index.pack_sizes())


def test_what_is_good_is_used() -> None:
    """Else nothing below says anything."""
    use(copy_of_good())
    broken = copy_of_good()
    replace_document(broken, FileKind.INDEX, {"packs": []})
    with pytest.raises(Damaged, match="is in no index file"):
        use(broken)


def replace_document(store: DictStore, kind: FileKind, words: Any) -> None:
    del store.files[kind, NAMES[kind]]
    save_document(store, KEY, 2, kind, json.dumps(words).encode())


@pytest.mark.parametrize("kind", SEALED, ids=[kind.value for kind in SEALED])
@fuzz(50)
@given(data=st.data())
def test_a_sealed_document_may_say_anything(kind: FileKind, data: st.DataObject) -> None:
    store = copy_of_good()
    replace_document(store, kind, data.draw(mutated(WORDS[kind])))
    try:
        use(store)
    except RepositoryError as error:
        str(error).encode(errors="backslashreplace")


INFINITE, LARGE, YEAR_0 = float("inf"), 10**30, "0001-01-01T00:00:00+00:01"
READ = [(FileKind.LOCKS, "uid", LARGE), (FileKind.LOCKS, "pid", LARGE), (FileKind.SNAPSHOTS, "uid", LARGE)]
REFUSED = [
    (FileKind.CONFIG, "version", INFINITE),
    (FileKind.CONFIG, "id", "ab"),
    (FileKind.CONFIG, "id", "../" * 22),
    (FileKind.LOCKS, "pid", INFINITE),
    (FileKind.LOCKS, "time", YEAR_0),
    (FileKind.SNAPSHOTS, "uid", INFINITE),
    (FileKind.SNAPSHOTS, "time", YEAR_0),
    (FileKind.SNAPSHOTS, "parent", 7),
]


@pytest.mark.parametrize(("kind", "field", "value"), [*READ, *REFUSED])
def test_values_that_python_cannot_count_on(kind: FileKind, field: str, value: Any) -> None:
    store = copy_of_good()
    replace_document(store, kind, WORDS[kind] | {"hostname": socket.gethostname(), field: value})
    if (kind, field, value) in READ:
        use(store)
        if field == "pid":  # no process has such a number: its owner is dead
            with Repository.open(store, "p").lock(exclusive=True) as held:
                assert held.held
    else:
        with pytest.raises(Damaged):
            use(store)


@fuzz(60)
@given(words=mutated(json.loads(KEY.to_json())) | ANYTHING)
def test_a_key_file_may_hold_anything(words: Any) -> None:
    fields = json.loads(GOOD.files[FileKind.KEYS, NAMES[FileKind.KEYS]])
    fields["salt"] = fields["salt"] if isinstance(words, dict) else words
    try:
        open_key_file(json.dumps(fields).encode(), "p")
        Key.from_json(json.dumps(words).encode())
    except (KeyFileInvalid, SealBroken):
        pass


def trees_of_good() -> list[dict[str, Any]]:
    """The trees of a backup, top down to one segment's."""
    repository = Repository.open(GOOD, "p")
    (snapshot,) = repository.snapshots()
    found, place = [], snapshot.tree
    for name in ("web", "sda", "0000", None):
        found.append(json.loads(repository.load_blob(BlobKind.TREE, place)))
        if name is not None:
            place = BlobId(bytes.fromhex(next(one for one in found[-1]["nodes"] if one["name"] == name)["subtree"]))
    return found


TREES = trees_of_good()


def store_trees(documents: list[Any]) -> DictStore:
    """A repository with one backup whose directories are these, top down, each held by the one before."""
    store = copy_of_good()
    del store.files[FileKind.SNAPSHOTS, NAMES[FileKind.SNAPSHOTS]]
    repository = Repository.open(store, "p")
    below: tuple[str, str] | None = None
    with repository.new_writer() as writer:
        for level, document in reversed(list(enumerate(documents))):
            text = json.dumps(document)
            if below is not None:
                text = text.replace(*below)
            if level:
                old = next(one["subtree"] for one in TREES[level - 1]["nodes"] if one.get("subtree"))
                below = (old, writer.add(BlobKind.TREE, text.encode()).hex())
            else:
                top = writer.add(BlobKind.TREE, text.encode())
    repository.save_index()
    repository.save_snapshot(Snapshot(MOMENT, top, ("/web",), "web"))
    return store


def test_trees_can_be_stored_anew() -> None:
    store = store_trees(TREES)
    use(store)
    (snapshot,) = Repository.open(store, "p").snapshots()
    assert StoredBackup(Repository.open(store, "p"), snapshot).manifest_bytes() == MANIFEST_BYTES


@fuzz(30)
@given(level=st.integers(0, 3), data=st.data())
def test_a_tree_may_say_anything(level: int, data: st.DataObject) -> None:
    documents: list[Any] = list(TREES)
    documents[level] = data.draw(mutated(TREES[level]))
    try:
        use(store_trees(documents))
    except RepositoryError as error:
        str(error).encode(errors="backslashreplace")


@fuzz(60)
@given(
    header=st.lists(
        st.builds(
            lambda kind, length, plain, name: struct.pack("<BI", kind, length) + plain + name,
            st.integers(0, 5),
            st.sampled_from([0, 31, 32, 40, 100, 1 << 31, (1 << 32) - 1]),
            st.sampled_from([b"", bytes(4), b"\xff" * 4]),
            st.binary(min_size=30, max_size=33),
        ),
        max_size=4,
    ).map(b"".join),
    body=st.integers(0, 200),
)
def test_a_pack_header_may_say_anything(header: bytes, body: int) -> None:
    sealed = bytes(KEY.seal(header))
    try:
        found = parse_pack(bytes(body) + sealed + struct.pack("<I", len(sealed)), KEY)
    except PackBroken:
        return
    assert sum(blob.length for blob in found) == body


@pytest.mark.parametrize("claim", [(1 << 32) - 1, MAX_HEADER + 1, 101])
def test_a_pack_header_as_long_as_nothing_is(claim: int) -> None:
    with pytest.raises(PackBroken, match="claims a header"):
        parse_pack(bytes(100) + struct.pack("<I", claim), KEY)


@pytest.mark.parametrize(("field", "value"), [("length", 1 << 32), ("uncompressed_length", (1 << 29) + 1)])
def test_an_index_that_lists_a_giant_is_refused(field: str, value: int) -> None:
    blob = {"id": "a" * 64, "type": "data", "offset": 0, "length": 40, field: value}
    with pytest.raises(IndexBroken):
        decode_index(json.dumps({"packs": [{"id": "b" * 64, "blobs": [blob]}]}).encode())


@pytest.mark.parametrize("alike", [8, 32])
def test_ids_that_collide_take_no_hours(monkeypatch: pytest.MonkeyPatch, alike: int) -> None:
    """All begin with the same bytes, or are the same: as many as one index file may list would be 10^9 steps."""
    monkeypatch.setattr(index, "MAX_SEARCH", 512)
    names = [bytes(8) + number.to_bytes(24, "big") if alike == 8 else bytes(32) for number in range(1024)]
    blobs = [PackedBlob(BlobId(name), BlobKind.DATA, 0, 40, None) for name in names]
    with pytest.raises(IndexBroken, match="alike"):
        Index().add_pack(PackId(bytes(32)), blobs)
    store = copy_of_good()
    listed = [{"id": name.hex(), "type": "data", "offset": 0, "length": 40} for name in names]
    replace_document(store, FileKind.INDEX, {"packs": [{"id": "b" * 64, "blobs": listed}]})
    with pytest.raises(Damaged, match="ids are alike"):
        Repository.open(store, "p").load_index()


def test_a_manifest_that_names_one_large_blob_again_and_again() -> None:
    """A gigabyte, were it put together; the error comes from its length alone."""
    repository = Repository.open(copy_of_good(), "p")
    with repository.new_writer() as writer:
        large = writer.add(BlobKind.DATA, bytes(1 << 20)).hex()
    documents = json.loads(json.dumps(TREES))
    node = next(one for one in documents[1]["nodes"] if one["name"] == MANIFEST)
    node["content"] = [large] * 1024
    store = store_trees(documents)
    store.files |= {one: content for one, content in repository.store.files.items() if one[0] is FileKind.DATA}  # type: ignore[attr-defined]
    repository = Repository.open(store, "p")
    repository.index.add_pack(
        PackId(bytes(32)), [PackedBlob(BlobId(bytes.fromhex(large)), BlobKind.DATA, 0, 99, 1 << 20)]
    )
    (snapshot,) = repository.snapshots()
    with pytest.raises(Damaged, match=f"{1 << 30} bytes"):
        StoredBackup(repository, snapshot).manifest_bytes()


def test_a_tree_larger_than_any_is_not_parsed() -> None:
    with pytest.raises(TreeBroken, match="at most make sense"):
        decode_tree(b" " * (MAX_TREE + 1))


@pytest.mark.parametrize("name", [[], ["0000"], 7, None])
def test_a_name_that_is_no_text(name: Any) -> None:
    with pytest.raises(TreeBroken):
        decode_tree(json.dumps({"nodes": [TREES[2]["nodes"][0] | {"name": name}]}).encode())


@pytest.mark.parametrize("name", ["9" * 5000, "0000\n", "٠٠٠٠", "00"])
def test_a_segment_with_a_number_that_is_none(name: str) -> None:
    documents = json.loads(json.dumps(TREES))
    documents[2]["nodes"][0]["name"] = name
    store = store_trees(documents)
    with pytest.raises(Damaged, match="holds a directory"):
        use(store)


BOMBS = f"""
import resource, sys, zstandard
from pullback.repository.blob import CompressionBroken, decompress_document
from pullback.repository.tree import TreeBroken, decode_tree
many = zstandard.ZstdCompressor(level=1).compressobj()
unsized = b"".join(many.compress(bytes(1 << 20)) for _ in range({(MAX_DOCUMENT >> 20) * 4})) + many.flush()
stated = b"\\x28\\xb5\\x2f\\xfd\\xe0" + (1 << 60).to_bytes(8, "little") + bytes(3)
window = b"\\x28\\xb5\\x2f\\xfd\\x00\\xff" + bytes(3)
resource.setrlimit(resource.RLIMIT_AS, ({MAX_DOCUMENT * 4 + (512 << 20)},) * 2)
for bomb in (unsized, stated, window):
    try:
        decompress_document(bomb)
        sys.exit("taken")
    except CompressionBroken:
        pass
"""


def test_compressed_bombs_take_little_memory() -> None:
    """Sizes stated, not stated, and a window of terabytes; in a process of its own, whose memory has an end."""
    done = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_compressed_document_that_is_none_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    store = copy_of_good()
    sealed = bytes(KEY.seal(b"\2" + bytes(20)))
    name = hashlib.sha256(sealed).hexdigest()
    store.save(FileKind.SNAPSHOTS, name, sealed)
    with pytest.raises(Damaged, match=name):
        load_document(store, KEY, FileKind.SNAPSHOTS, name)

    def no_memory() -> None:
        raise MemoryError

    monkeypatch.setattr("zstandard.ZstdDecompressor", no_memory)
    with pytest.raises(Damaged, match="more memory than there is"):
        load_document(GOOD, KEY, FileKind.INDEX, NAMES[FileKind.INDEX])


def test_an_owner_without_a_name_and_one_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    def not_ours(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert current_account().username == str(current_account().uid)
    monkeypatch.setattr("os.kill", not_ours)
    lock = LockFile(MOMENT, True, "here", "other", 7, 0, 0)
    assert not lock.owner_died("here")
