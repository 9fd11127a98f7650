# SPDX-License-Identifier: Apache-2.0
"""The index with a cache, against the same without one: whatever happens to index files and to the cache file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import obstore.store
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pullback.repository import index_loader
from pullback.repository.blob import BlobId, BlobKind, BlobLocation, PackId, blob_id
from pullback.repository.cache_folder import CacheFolder
from pullback.repository.crypto import OVERHEAD, Key
from pullback.repository.documents import save_document
from pullback.repository.index import Index, encode_index
from pullback.repository.index_cache import PSEUDONYM, IndexCache, Secrets
from pullback.repository.index_cache_builder import FILE
from pullback.repository.index_loader import IndexLoader
from pullback.repository.object_store import ObjectStore
from pullback.repository.pack import PackedBlob
from pullback.repository.store import FileKind

ID = "5" * 64
BLOBS = [blob_id(bytes([number])) for number in range(60)]


@pytest.fixture(autouse=True)
def early_folds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache is written for what real repositories just read."""
    with monkeypatch.context() as patch:
        patch.setattr(index_loader, "_TAIL_BYTES", 100)
        patch.setattr(index_loader, "_TAIL_FILES", 2)
        yield


def pack_of(number: int) -> PackId:
    return PackId(blob_id(b"pack %d" % number))


@st.composite
def packs(draw: st.DrawFn) -> dict[PackId, list[PackedBlob]]:
    """Contents of an index file: packs out of a dozen, so that they meet again in other files."""
    found: dict[PackId, list[PackedBlob]] = {}
    for pack in draw(st.sets(st.integers(0, 11), min_size=1, max_size=4)):
        blobs = []
        for number in draw(st.sets(st.integers(0, len(BLOBS) - 1), max_size=12)):
            # A blob lies at one place of a pack, whichever index file says so.
            kind = BlobKind((number + pack) % 3 == 0)
            plain = None if number % 2 else number + 1
            blobs.append(PackedBlob(BLOBS[number], kind, number * 1000 + pack, OVERHEAD + 500 + number, plain))
        found[pack_of(pack)] = blobs
    return found


def same(one: Index, other: Index) -> None:
    assert one.packs == other.packs
    for kind in BlobKind:
        for blob in BLOBS:
            assert places(one, kind, blob) == places(other, kind, blob)
            assert one.has(kind, blob) == other.has(kind, blob)
            assert (one.lookup(kind, blob) is None) == (other.lookup(kind, blob) is None)
        found = other.lengths(kind, BLOBS)
        for blob, length in zip(BLOBS, one.lengths(kind, BLOBS), strict=True):
            assert (length is None) == (found[BLOBS.index(blob)] is None)
            assert length is None or length in {place.uncompressed_length for place in other.lookup_all(kind, blob)}


def places(index: Index, kind: BlobKind, blob: BlobId) -> list[BlobLocation]:
    return sorted(index.lookup_all(kind, blob), key=lambda place: place.pack_id)


class Machine(RuleBasedStateMachine):
    place: Path

    @initialize()
    def start(self) -> None:
        self.store = ObjectStore(obstore.store.MemoryStore(), "memory")
        self.key = Key(b"1" * 32, b"2" * 16, b"3" * 16)
        self.names: list[str] = []  # in the order they were made: names themselves are random
        self.cache = self.place / os.urandom(8).hex()

    @rule(contents=packs(), data=st.data())
    def add(self, contents: dict[PackId, list[PackedBlob]], data: st.DataObject) -> None:
        supersedes = data.draw(st.lists(st.integers(0, len(self.names) - 1), max_size=1)) if self.names else []
        document = encode_index(contents, [self.names[number] for number in supersedes])
        self.names.append(save_document(self.store, self.key, 2, FileKind.INDEX, document))

    @rule(data=st.data())
    @precondition(lambda self: self.names)
    def remove(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.names) - 1))
        self.store.remove(FileKind.INDEX, self.names.pop(number))

    @rule(data=st.data())
    @precondition(lambda self: self.cached().is_file())
    def spoil(self, data: st.DataObject) -> None:
        size = self.cached().stat().st_size
        at = data.draw(st.integers(0, size - 1))
        with self.cached().open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << data.draw(st.integers(0, 7))]))

    @rule(data=st.data())
    @precondition(lambda self: self.cached().is_file())
    def truncate(self, data: st.DataObject) -> None:
        os.truncate(self.cached(), data.draw(st.integers(0, self.cached().stat().st_size)))

    def cached(self) -> Path:
        return self.cache / ID / FILE

    def load(self, cache: bool) -> Index:
        def renew(broken: IndexCache) -> None:
            loader.drop_cache()
            index.adopt(loader.load())

        folder = CacheFolder(self.cache, ID) if cache else None
        loader = IndexLoader(self.store, self.key, ID, folder, renew)
        index = loader.load()
        return index

    @invariant()
    def both_know_the_same(self) -> None:
        if hasattr(self, "store"):
            same(self.load(cache=True), self.load(cache=False))


@pytest.mark.timeout(280)
def test_a_cached_index_says_what_the_files_say(tmp_path: Path) -> None:
    machine = type("PlacedMachine", (Machine,), {"place": tmp_path})
    machine.TestCase.settings = settings(max_examples=8, stateful_step_count=8)
    machine.TestCase("runTest").runTest()


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=20))
def test_pseudonyms_in_bulk_are_those_one_by_one(blobs: list[bytes]) -> None:
    secrets = Secrets(Key(b"1" * 32, b"2" * 16, b"3" * 16))
    for kind in BlobKind:
        bulk = secrets.pseudonyms(kind, b"".join(blobs))
        assert [bulk[at + PSEUDONYM : at + 32] for at in range(0, len(bulk), 32)] == [
            secrets.pseudonym(kind, blob) for blob in blobs
        ]


def test_a_pseudonym_depends_on_all_of_the_id_on_the_kind_and_on_the_key() -> None:
    one, other = Secrets(Key(b"1" * 32, b"2" * 16, b"3" * 16)), Secrets(Key(b"4" * 32, b"2" * 16, b"3" * 16))
    ids = [bytes(32), *(bytes(at) + b"\1" + bytes(31 - at) for at in range(32))]
    found = {secrets.pseudonym(kind, blob) for secrets in (one, other) for kind in BlobKind for blob in ids}
    assert len(found) == 4 * 33
