# SPDX-License-Identifier: Apache-2.0
"""What is written is read, whatever it is."""

from __future__ import annotations

from datetime import UTC, datetime

import obstore.store
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.repository.blob import BlobId, BlobKind, PackId, blob_id
from pullback.repository.crypto import OVERHEAD, Key
from pullback.repository.index import Index, decode_index, encode_index
from pullback.repository.object_store import ObjectStore
from pullback.repository.pack import PackBuilder, PackedBlob, parse_pack
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot, decode_snapshot, encode_snapshot
from pullback.repository.tree import Node, Tree, decode_tree, encode_tree, go_time, parse_time, quote, unquote
from tests.support.backups import CHEAP

ids = st.binary(min_size=32, max_size=32)
kinds = st.sampled_from(BlobKind)
KEY = Key.generate()

# Any bytes that a Linux file name may hold, as Python shows them.
names = st.one_of(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20),
    st.binary(min_size=1, max_size=20).map(lambda raw: raw.decode(errors="surrogateescape")),
).filter(lambda name: not set("/\0") & set(name))

times = st.datetimes(datetime(1000, 1, 1), datetime(9999, 1, 1), timezones=st.just(UTC))


@given(st.binary(max_size=2000))
def test_seals(data: bytes) -> None:
    assert KEY.open(KEY.seal(data)) == data


@given(kinds, st.lists(st.tuples(st.binary(max_size=200), st.none() | st.integers(1, 1 << 28)), min_size=1))
def test_packs(kind: BlobKind, contents: list[tuple[bytes, int | None]]) -> None:
    builder = PackBuilder(KEY, kind)
    for data, plain in contents:
        builder.add(blob_id(data), data, plain)
    pack = builder.finish()
    assert pack is not None
    parsed = parse_pack(pack.content, KEY)
    assert parsed == list(pack.blobs)
    for (data, plain), blob in zip(contents, parsed, strict=True):
        assert (blob.id, blob.kind, blob.uncompressed_length) == (blob_id(data), kind, plain)
        assert KEY.open(pack.content[blob.offset : blob.offset + blob.length]) == data


packed_blobs = st.builds(
    PackedBlob,
    ids.map(BlobId),
    kinds,
    st.integers(0, (1 << 32) - 1),
    st.integers(OVERHEAD, 1 << 29),
    st.none() | st.integers(1, 1 << 29),
)
indexes = st.dictionaries(ids.map(PackId), st.lists(packed_blobs, max_size=8), max_size=8)


@given(indexes)
def test_index_files(packs: dict[PackId, list[PackedBlob]]) -> None:
    assert decode_index(encode_index(packs)) == (list(packs.items()), [])


@given(indexes, indexes, st.lists(ids, max_size=5))
def test_an_index_knows_what_a_dictionary_knows(
    one: dict[PackId, list[PackedBlob]], two: dict[PackId, list[PackedBlob]], strangers: list[bytes]
) -> None:
    index, other = Index(), Index()
    expected: dict[tuple[BlobKind, BlobId], set[tuple[PackId, int]]] = {}
    first: dict[tuple[PackId, BlobKind, BlobId], PackedBlob] = {}
    for target, packs in ((index, one), (other, two)):
        for pack, drawn in packs.items():
            # A blob lies at one place of a pack, whichever index file says so.
            blobs = [first.setdefault((pack, blob.kind, blob.id), blob) for blob in drawn]
            target.add_pack(pack, blobs)
            for blob in blobs:
                expected.setdefault((blob.kind, blob.id), set()).add((pack, blob.offset))
    index.adopt(other)
    for (kind, name), places in expected.items():
        assert {(place.pack_id, place.offset) for place in index.lookup_all(kind, name)} == places
    for stranger in strangers:
        for kind in BlobKind:
            assert index.has(kind, BlobId(stranger)) is ((kind, stranger) in expected)


@given(names)
def test_names(name: str) -> None:
    stored = quote(name)
    assert stored.isprintable()
    assert unquote(stored).encode(errors="surrogateescape") == name.encode(errors="surrogateescape")


nodes = st.builds(
    Node,
    name=names,
    type=st.sampled_from(["file", "dir", "symlink"]),
    mode=st.integers(0, (1 << 32) - 1),
    mtime=times.map(go_time),
    uid=st.integers(0, (1 << 32) - 1),
    gid=st.integers(0, (1 << 32) - 1),
    size=st.integers(0, (1 << 64) - 1),
    content=st.none() | st.lists(ids.map(BlobId), max_size=3).map(tuple),
    subtree=st.none() | ids.map(BlobId),
)


@given(st.lists(nodes, max_size=6, unique_by=lambda node: unquote(quote(node.name))))
def test_trees(some: list[Node]) -> None:
    text = encode_tree(some)
    tree = decode_tree(text)
    assert sorted(tree.nodes, key=lambda node: node.name) == sorted(some, key=lambda node: node.name)
    assert encode_tree(tree.nodes) == text
    assert [node.name.encode(errors="surrogateescape") for node in tree.nodes] == sorted(
        node.name.encode(errors="surrogateescape") for node in some
    )
    assert Tree(tree.nodes) == tree


@given(times)
def test_times(moment: datetime) -> None:
    assert parse_time(go_time(moment)) == moment


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)


@given(
    st.builds(
        Snapshot,
        time=times,
        tree=ids.map(BlobId),
        paths=st.lists(texts, max_size=3).map(tuple),
        hostname=texts,
        username=texts,
        uid=st.integers(0, 1 << 31),
        tags=st.lists(texts, max_size=3).map(tuple),
        parent=st.none() | ids.map(bytes.hex),
    )
)
def test_snapshots(snapshot: Snapshot) -> None:
    assert decode_snapshot(encode_snapshot(snapshot), "") == snapshot


@settings(max_examples=30)
@given(st.lists(st.tuples(kinds, st.binary(max_size=3000)), max_size=20), st.sampled_from([1, 2]), st.integers(1, 3))
def test_blobs_through_a_whole_repository(blobs: list[tuple[BlobKind, bytes]], version: int, writers: int) -> None:
    store = ObjectStore(obstore.store.MemoryStore(), "memory")
    repository = Repository.init(store, "p", version=version, cost=CHEAP)
    made = [repository.new_writer() for _ in range(writers)]
    for number, (kind, data) in enumerate(blobs):
        assert made[number % writers].add(kind, data) == blob_id(data)
    for writer in made:
        writer.flush()
    repository.save_index()
    again = Repository.open(store, "p")
    for kind, data in blobs:
        assert again.load_blob(kind, blob_id(data)) == data
    assert len(again.index) == len(set(blobs)) == repository.blobs_stored
