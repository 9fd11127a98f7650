# SPDX-License-Identifier: Apache-2.0
"""Any change to any file is either noticed, with the file's name, or makes no difference; never a wrong byte."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.errors import Damaged, RepositoryError
from pullback.repository.blob import BlobKind
from pullback.repository.crypto import SealBroken
from pullback.repository.key_file import KeyFileInvalid
from pullback.repository.layout import StoredBackup
from pullback.repository.repository import Repository
from pullback.repository.store import Bytes, FileKind, buffers, describe
from tests.support.backups import CHEAP, open_key_file, store_backup

CHANCE = random.Random(7)
SEGMENTS = [CHANCE.randbytes(3000), b"text " * 600]
MANIFEST = b'{"format": 1}'


class DictStore:
    """A store in a dictionary: quick to copy and to damage."""

    location = "dict"
    shows_late = False

    def __init__(self) -> None:
        self.files: dict[tuple[FileKind, str], bytes] = {}

    def create(self) -> None:
        pass

    def save(self, kind: FileKind, name: str, data: Bytes | Sequence[Bytes]) -> None:
        name = "config" if kind is FileKind.CONFIG else name
        self.files[kind, name] = b"".join(buffers(data))

    def load(self, kind: FileKind, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if (kind, name) not in self.files:
            raise Damaged(f"{describe(kind, name)} is missing")
        content = self.files[kind, name][offset:]
        if length is not None and len(content) < length:
            raise Damaged(f"{describe(kind, name)} is too short")
        return content if length is None else content[:length]

    def list(self, kind: FileKind) -> Iterator[tuple[str, int]]:
        yield from [(name, len(data)) for (one, name), data in self.files.items() if one is kind]

    def exists(self, kind: FileKind, name: str) -> bool:
        return (kind, name) in self.files

    def remove(self, kind: FileKind, name: str) -> None:
        self.files.pop((kind, name), None)


def make() -> DictStore:
    store = DictStore()
    repository = Repository.init(store, "p", cost=CHEAP)
    store_backup(repository, {"sda": SEGMENTS}, manifest=MANIFEST, chunk=1000)
    repository.lock()._write()
    return store


GOOD = make()


def damaged_store(victim: tuple[FileKind, str], content: bytes | None) -> DictStore:
    store = DictStore()
    store.files = dict(GOOD.files)
    if content is None:
        del store.files[victim]
    else:
        store.files[victim] = content
    return store


def read_all(store: DictStore) -> tuple[bytes, bytes]:
    """Everything of the one backup, by way of both kinds of reading."""
    repository = Repository.open(store, "p")
    (snapshot,) = repository.snapshots()
    stored = StoredBackup(repository, snapshot)
    parts = []
    for segment in stored.segments("sda"):
        for blob, length in stored.content(segment):
            place = repository.index.lookup(BlobKind.DATA, blob)
            assert place is not None
            data = repository.load_blob(BlobKind.DATA, blob)
            assert dict(repository.load_blobs_of_pack(place.pack_id, [blob])) == {blob: data}
            assert len(data) == length
            parts.append(data)
    return stored.manifest_bytes(), b"".join(parts)


def test_undamaged_it_reads() -> None:
    assert read_all(GOOD) == (MANIFEST, b"".join(SEGMENTS))
    assert {kind for kind, _ in GOOD.files} == set(FileKind)


def check(victim: tuple[FileKind, str], content: bytes | None) -> None:
    store = damaged_store(victim, content)
    try:
        assert read_all(store) == (MANIFEST, b"".join(SEGMENTS))
    except RepositoryError as error:
        assert victim[0] is not FileKind.LOCKS
        if content is not None:
            assert describe(*victim) in str(error)
    if victim[0] is FileKind.LOCKS and content:
        with pytest.raises(Damaged, match=describe(*victim)):
            Repository.open(store, "p").lock().acquire()


victims = st.sampled_from(sorted(GOOD.files))


@settings(max_examples=400)
@given(victims, st.data())
def test_a_changed_byte(victim: tuple[FileKind, str], data: st.DataObject) -> None:
    content = bytearray(GOOD.files[victim])
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    check(victim, bytes(content))


@settings(max_examples=200)
@given(victims, st.data())
def test_a_cut_a_stretched_or_a_foreign_file(victim: tuple[FileKind, str], data: st.DataObject) -> None:
    content = GOOD.files[victim]
    end = data.draw(st.integers(0, len(content) - 1))
    foreign = GOOD.files[data.draw(victims.filter(lambda other: other != victim))]
    check(victim, data.draw(st.sampled_from([content[:end], content + b"\0", foreign, content[end + 1 :]])))


# Without its snapshot file there is no backup, and without a lock nothing is amiss.
NEEDED = [one for one in sorted(GOOD.files) if one[0] not in (FileKind.SNAPSHOTS, FileKind.LOCKS)]


@pytest.mark.parametrize("victim", NEEDED, ids=[kind.value for kind, _ in NEEDED])
def test_a_missing_file(victim: tuple[FileKind, str]) -> None:
    with pytest.raises(RepositoryError):
        read_all(damaged_store(victim, None))


@pytest.mark.parametrize("kind", [kind for kind in FileKind if kind is not FileKind.LOCKS])
def test_a_flipped_bit_in_every_kind_of_file_is_noticed(kind: FileKind) -> None:
    """So that the property above does not pass because nothing is ever read."""
    victim = max((one for one in GOOD.files if one[0] is kind), key=lambda one: len(GOOD.files[one]))
    content = bytearray(GOOD.files[victim])
    content[20] ^= 1
    with pytest.raises(Damaged):
        read_all(damaged_store(victim, bytes(content)))


@settings(max_examples=100)
@given(st.sampled_from(["N", "r", "p", "salt", "data", "kdf"]), st.data())
def test_a_forged_key_file_costs_nothing(field: str, data: st.DataObject) -> None:
    """Its name fits its bytes, but its numbers are anybody's: no hour of scrypt, no gigabytes."""
    (victim,) = (one for one in GOOD.files if one[0] is FileKind.KEYS)
    fields = json.loads(GOOD.files[victim])
    odd = st.one_of(st.integers(-5, 5), st.integers(1 << 31, 1 << 70), st.text(max_size=5), st.none(), st.booleans())
    fields[field] = data.draw(odd)
    try:
        opened = open_key_file(json.dumps(fields).encode(), "p")
    except (KeyFileInvalid, SealBroken):
        return
    assert opened.encrypt == open_key_file(GOOD.files[victim], "p").encrypt
