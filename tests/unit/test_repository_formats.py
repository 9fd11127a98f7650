# SPDX-License-Identifier: Apache-2.0
"""Packs, index files, trees, snapshot files and the config's polynomial, as bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
import zstandard

from pullback.errors import BackupNotFound, Damaged
from pullback.repository import pack as pack_module
from pullback.repository.blob import (
    BlobId,
    BlobKind,
    CompressionBroken,
    PackId,
    blob_id,
    decompress,
    decompress_document,
)
from pullback.repository.crypto import OVERHEAD, Key
from pullback.repository.index import Index, IndexBroken, decode_index, encode_index
from pullback.repository.pack import PackBroken, PackBuilder, PackedBlob, decode_header, encode_header, parse_pack
from pullback.repository.polynomial import is_irreducible, random_polynomial
from pullback.repository.snapshots import (
    Snapshot,
    SnapshotBroken,
    SnapshotFiles,
    decode_snapshot,
    encode_snapshot,
    find_snapshot,
)
from pullback.repository.tree import (
    EPOCH,
    TreeBroken,
    decode_tree,
    directory_node,
    encode_tree,
    file_node,
    go_time,
    parse_time,
    quote,
    unquote,
)

ONE, TWO = BlobId(b"\x01" * 32), BlobId(b"\x02" * 32)
PACK = PackId(b"\xaa" * 32)


# -- compression -------------------------------------------------------------------------------------------------


def unsized(data: bytes) -> bytes:
    """A frame that does not state its size."""
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


@pytest.mark.parametrize("make", [zstandard.compress, unsized])
def test_a_frame_expands_to_the_size_that_was_promised_or_not_at_all(make: object) -> None:
    assert callable(make)
    data = bytes(3_000_000)
    assert decompress(make(data), len(data)) == data
    assert decompress_document(make(data)) == data
    for size in (0, 1, len(data) - 1, len(data) + 1, 1 << 40):
        with pytest.raises(CompressionBroken):
            decompress(make(data), size)


def test_a_frame_that_claims_the_world_is_not_believed() -> None:
    frame = bytearray(zstandard.compress(bytes(100_000)))
    # A frame header with an eight byte size field (RFC 8878, 3.1.1.1): 16 TiB.
    bomb = frame[:4] + bytes([0b11100000]) + (1 << 44).to_bytes(8, "little") + frame[9:]
    assert zstandard.frame_content_size(bytes(bomb)) == 1 << 44
    with pytest.raises(CompressionBroken, match="claims"):
        decompress(bomb, 100_000)
    with pytest.raises(CompressionBroken, match="claims"):
        decompress_document(bomb)


@pytest.mark.parametrize("frame", [b"", b"{}", b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd\x20"])
def test_half_a_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(CompressionBroken):
        decompress(frame, 10)


# -- packs -------------------------------------------------------------------------------------------------------


def test_a_header_is_spelt_as_the_format_says() -> None:
    blobs = [
        PackedBlob(ONE, BlobKind.DATA, 0, 0x102, None),
        PackedBlob(TWO, BlobKind.TREE, 0x102, 0x50, 0x304),
    ]
    assert encode_header(blobs) == (
        b"\x00\x02\x01\x00\x00" + ONE + b"\x03\x50\x00\x00\x00\x04\x03\x00\x00" + TWO
    )  # fmt: skip
    assert list(decode_header(encode_header(blobs), 0x152)) == blobs


def test_a_pack_lists_what_is_in_it() -> None:
    key = Key.generate()
    builder = PackBuilder(key, BlobKind.DATA)
    contents = [b"", b"one", bytes(30 << 20)]
    for data in contents:
        builder.add(blob_id(data), data, None)
    pack = builder.finish()
    assert pack is not None
    assert parse_pack(pack.content, key) == list(pack.blobs)
    for data, blob in zip(contents, pack.blobs, strict=True):
        assert key.open(pack.content[blob.offset : blob.offset + blob.length]) == data
    assert builder.finish() is None


def test_a_pack_is_full_at_its_size_or_when_the_header_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = PackBuilder(Key.generate(), BlobKind.DATA)
    builder.add(ONE, bytes(pack_module.PACK_SIZE - OVERHEAD - 1), None)
    assert not builder.full
    builder.add(ONE, b"", None)
    assert builder.full
    monkeypatch.setattr(pack_module, "MAX_BLOBS", 3)
    builder = PackBuilder(Key.generate(), BlobKind.DATA)
    for expected in (False, False, True):
        builder.add(ONE, b"", None)
        assert builder.full is expected


@pytest.mark.parametrize(
    "header",
    [
        b"\x04" + bytes(36),
        b"\x00",
        b"\x00" + (31).to_bytes(4, "little") + ONE,
        b"\x00" + (101).to_bytes(4, "little") + ONE,
        b"\x02" + (100).to_bytes(4, "little") + b"\xff" * 4 + ONE,
        b"",
    ],
)
def test_a_senseless_header_is_refused(header: bytes) -> None:
    with pytest.raises(PackBroken):
        list(decode_header(header, 100))


@pytest.mark.parametrize("content", [b"", bytes(3), b"\xff" * 100, bytes(100), bytes(96) + b"\x60\x00\x00\x00"])
def test_what_is_no_pack_is_refused(content: bytes) -> None:
    with pytest.raises(PackBroken):
        parse_pack(content, Key.generate())


# -- index files -------------------------------------------------------------------------------------------------


def test_an_index_file_is_spelt_as_the_format_says() -> None:
    blobs = [PackedBlob(ONE, BlobKind.DATA, 0, 38, None), PackedBlob(TWO, BlobKind.TREE, 38, 112, 511)]
    document = encode_index({PACK: blobs}, ["bb" * 32])
    assert json.loads(document) == {
        "supersedes": ["bb" * 32],
        "packs": [
            {
                "id": "aa" * 32,
                "blobs": [
                    {"id": "01" * 32, "type": "data", "offset": 0, "length": 38},
                    {"id": "02" * 32, "type": "tree", "offset": 38, "length": 112, "uncompressed_length": 511},
                ],
            }
        ],
    }
    assert decode_index(document) == ([(PACK, blobs)], ["bb" * 32])
    assert b"supersedes" not in encode_index({PACK: blobs})


def test_an_index_file_of_the_oldest_form_and_with_new_fields() -> None:
    entry = {"id": "01" * 32, "type": "data", "offset": 0, "length": 38, "colour": "blue"}
    packs = [{"id": "aa" * 32, "blobs": [entry], "new": {}}]
    expected = [(PACK, [PackedBlob(ONE, BlobKind.DATA, 0, 38, None)])]
    assert decode_index(json.dumps(packs).encode())[0] == expected
    assert decode_index(json.dumps({"packs": packs, "extra": 1}).encode())[0] == expected
    assert decode_index(b'{"packs":null}') == ([], [])


@pytest.mark.parametrize(
    "change",
    [
        {"length": 31},
        {"length": 1 << 40},
        {"length": -1},
        {"length": "38"},
        {"length": 38.0},
        {"offset": -1},
        {"offset": 1 << 32},
        {"type": "file"},
        {"id": "01"},
        {"id": 7},
        {"id": "01" * 31 + "  "},
        {"length": True},
        {"uncompressed_length": None},
        {"uncompressed_length": 1 << 31},
        {"uncompressed_length": -5},
    ],
)
def test_a_senseless_index_entry_is_refused(change: dict[str, object]) -> None:
    entry = {"id": "01" * 32, "type": "data", "offset": 0, "length": 38} | change
    sound = {"id": "02" * 32, "type": "tree", "offset": 38, "length": 38, "uncompressed_length": 6}
    for blobs in ([entry], [sound, entry], [entry, sound]):
        with pytest.raises(IndexBroken):
            decode_index(json.dumps({"packs": [{"id": "aa" * 32, "blobs": blobs}]}).encode())


def test_ids_of_wrong_lengths_do_not_make_up_for_each_other() -> None:
    entries = [{"id": "01" * length, "type": "data", "offset": 0, "length": 38} for length in (31, 33)]
    with pytest.raises(IndexBroken):
        decode_index(json.dumps({"packs": [{"id": "aa" * 32, "blobs": entries}]}).encode())


def packed(number: int, kind: BlobKind = BlobKind.DATA) -> PackedBlob:
    plain = None if number % 3 == 0 else 1000 + number
    return PackedBlob(blob_id(b"%d" % number), kind, number * 100, OVERHEAD + number, plain)


def test_an_index_finds_everything_and_nothing_else() -> None:
    index, packs = (
        Index(),
        {PackId(bytes([number]) * 32): range(number * 1000, number * 1000 + 1000) for number in range(9)},
    )
    for pack, numbers in packs.items():
        index.add_pack(pack, map(packed, numbers))
    assert len(index) == 9000
    assert index.packs == set(packs)
    for pack, numbers in packs.items():
        for number in numbers:
            place, blob = index.lookup(BlobKind.DATA, packed(number).id), packed(number)
            assert place is not None
            assert (place.pack_id, place.offset, place.length) == (pack, blob.offset, blob.length)
            assert place.compressed is (blob.uncompressed_length is not None)
            assert place.uncompressed_length == (blob.uncompressed_length or number)
    assert index.lookup(BlobKind.DATA, ONE) is None
    assert index.lookup(BlobKind.TREE, packed(5).id) is None


def test_a_blob_in_two_packs_is_found_in_both() -> None:
    index, other = Index(), PackId(b"\xbb" * 32)
    for pack in (PACK, other, PACK, other):
        index.add_pack(pack, [packed(7)])
    assert [place.pack_id for place in index.lookup_all(BlobKind.DATA, packed(7).id)] == [PACK, other]


def test_a_pack_listed_in_parts_is_known_in_whole() -> None:
    index = Index()
    index.add_pack(PACK, [packed(1)])
    index.add_pack(PACK, [packed(1), packed(2)])
    assert len(index) == 2
    assert index.has(BlobKind.DATA, packed(2).id)


def test_one_index_adopts_another() -> None:
    mine, loaded, shared = Index(), Index(), PackId(b"\xcc" * 32)
    mine.add_pack(PACK, map(packed, range(3)))
    mine.add_pack(shared, [packed(50)])
    loaded.add_pack(shared, [packed(50), packed(51)])
    mine.adopt(loaded)
    assert len(mine) == 5
    for number, pack in [(0, PACK), (2, PACK), (50, shared), (51, shared)]:
        place = mine.lookup(BlobKind.DATA, packed(number).id)
        assert place is not None
        assert place.pack_id == pack
        assert place.offset == packed(number).offset
    mine.clear()
    assert len(mine) == 0
    assert not mine.has(BlobKind.DATA, packed(0).id)


def test_a_blob_costs_less_than_a_hundred_bytes() -> None:
    index, count = Index(), 100_000
    index.add_pack(PACK, (PackedBlob(blob_id(b"%d" % n), BlobKind.DATA, n, 100, 99) for n in range(count)))
    assert index.memory() / count < 70


# -- trees -------------------------------------------------------------------------------------------------------


def test_a_tree_is_spelt_as_restic_does() -> None:
    nodes = [directory_node("b", TWO, EPOCH), file_node("a<&>", 5, [ONE, TWO], "2026-01-02T03:04:05.5Z")]
    assert encode_tree(nodes) == (
        b'{"nodes":[{"name":"a\\u003c\\u0026\\u003e","type":"file","mode":384,"mtime":"2026-01-02T03:04:05.5Z",'
        b'"atime":"2026-01-02T03:04:05.5Z","ctime":"2026-01-02T03:04:05.5Z","uid":0,"gid":0,"size":5,"content":["'
        + b"01" * 32 + b'","' + b"02" * 32 + b'"]},'
        b'{"name":"b","type":"dir","mode":2147484096,"mtime":"1970-01-01T00:00:00Z","atime":"1970-01-01T00:00:00Z",'
        b'"ctime":"1970-01-01T00:00:00Z","uid":0,"gid":0,"content":null,"subtree":"' + b"02" * 32 + b'"}]}\n'
    )  # fmt: skip
    assert list(decode_tree(encode_tree(nodes)).nodes) == nodes[::-1]
    assert encode_tree([]) == b'{"nodes":[]}\n'


def test_nodes_stand_in_the_order_of_their_bytes() -> None:
    # U+FFFD sorts after U+10000 in UTF-16, before it in UTF-8; z before both.
    names = ["z", "\ufffd", "\U00010000", "A"]
    tree = decode_tree(encode_tree([file_node(name, 0, [], EPOCH) for name in names]))
    assert [node.name for node in tree.nodes] == ["A", "z", "\ufffd", "\U00010000"]
    with pytest.raises(ValueError, match="two nodes"):
        encode_tree([file_node("x", 0, [], EPOCH), directory_node("x", ONE, EPOCH)])


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("sda", "sda"),
        ("päth €", "päth €"),
        ('a"b', 'a\\"b'),
        ("a\\b", "a\\\\b"),
        ("tab\t", "tab\\t"),
        ("\x01\x7f\x85", "\\x01\\x7f\\u0085"),
        ("\u200b\u2028\U000e0001", "\\u200b\\u2028\\U000e0001"),
        ("\udcff", "\\xff"),
        ("'", "'"),
    ],
)
def test_names_are_quoted_as_go_does(name: str, stored: str) -> None:
    assert quote(name) == stored
    assert unquote(stored) == name


@pytest.mark.parametrize("stored", ["\\", "\\q", "\\x1", "\\u12", "\\xzz", "\\U99999999"])
def test_a_name_that_go_would_not_read_is_refused(stored: str) -> None:
    document = json.dumps({"nodes": [{"name": stored, "type": "file"}]}).encode()
    with pytest.raises(TreeBroken):
        decode_tree(document)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"{}",
        b'{"nodes":[{}]}',
        b'{"nodes":[{"name":"a","type":3}]}',
        b"[" * 9000,
        b'{"nodes":7}',
        b'{"nodes":[{"name":"a","type":"file","content":["aa"]}]}',
    ],
)
def test_what_is_no_tree_is_refused(document: bytes) -> None:
    with pytest.raises(TreeBroken):
        decode_tree(document)


@pytest.mark.parametrize(
    ("text", "again"),
    [
        ("2026-05-04T03:02:01Z", "2026-05-04T03:02:01Z"),
        ("2026-05-04T03:02:01.5Z", "2026-05-04T03:02:01.5Z"),
        ("2026-05-04T03:02:01.123456789+02:00", "2026-05-04T01:02:01.123456Z"),
        ("0001-01-01T00:00:00Z", None),
    ],
)
def test_times(text: str, again: str | None) -> None:
    moment = parse_time(text)
    if again is not None:
        assert go_time(moment) == again
    with pytest.raises(ValueError, match="time zone"):
        parse_time("2026-05-04T03:02:01")


# -- snapshot files ----------------------------------------------------------------------------------------------

MOMENT = datetime(2026, 5, 4, 3, 2, 1, 250_000, tzinfo=timezone(timedelta(hours=2)))
SNAPSHOT = Snapshot(MOMENT, ONE, ("/web",), "web", id="ab" * 32)


def test_a_snapshot_file_is_spelt_as_restic_does() -> None:
    bare = encode_snapshot(SNAPSHOT)
    assert bare == (
        b'{"time":"2026-05-04T01:02:01.25Z","tree":"' + b"01" * 32 + b'","paths":["/web"],"hostname":"web"}'
    )
    full = replace(
        SNAPSHOT, parent="cd" * 32, username="root", uid=1, gid=2, tags=("pullback", "a&b"), excludes=("x",),
        original="ef" * 32, program_version="pullback 1",
    )  # fmt: skip
    assert list(json.loads(encode_snapshot(full))) == [
        "time", "parent", "tree", "paths", "hostname", "username", "uid", "gid", "excludes", "tags", "original",
        "program_version",
    ]  # fmt: skip
    assert decode_snapshot(encode_snapshot(full), "ab" * 32) == full
    assert decode_snapshot(bare, "99" * 32).id == "99" * 32


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b'{"time":"x","tree":"00"}', b"{" * 9])
def test_what_is_no_snapshot_is_refused(document: bytes) -> None:
    with pytest.raises(SnapshotBroken):
        decode_snapshot(document, "x")


def several() -> list[Snapshot]:
    def make(day: int, domain: str, name: str) -> Snapshot:
        return replace(SNAPSHOT, time=datetime(2026, 1, day, tzinfo=UTC), hostname=domain, id=name * 32)

    return [make(3, "web", "a1"), make(1, "db", "a2"), make(2, "web", "b3")]


@pytest.mark.parametrize(
    ("spec", "name"),
    [("latest", "a1"), ("web@latest", "a1"), ("db@latest", "a2"), ("b", "b3"), ("a2a2", "a2"), ("a1" * 32, "a1"),
     ("A2", "a2"), ("web@a", "a1")],
)  # fmt: skip
def test_finding_a_backup(spec: str, name: str) -> None:
    assert find_snapshot(several(), spec).id == name * 32


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("a", "names 2 backups: a2a2a2a2 .*, a1a1a1a1"),
        ("c", "no backup 'c' here.*a1a1a1a1"),
        ("", "no backup"),
        ("mail@latest", "'mail' here.*db, web"),
        ("db@", "no backup 'db@'"),
    ],
)
def test_not_finding_a_backup_says_what_there_is(spec: str, words: str) -> None:
    with pytest.raises(BackupNotFound, match=words):
        find_snapshot(several(), spec)


@pytest.mark.parametrize(
    ("spec", "name"),
    [("latest", None), ("web@latest", None), ("db@latest", None), ("b", "b3"), ("a2", "a2"), ("a1a", "a1"),
     ("a1f", None), ("A1", None), ("web@a1", None), ("a1f" + "0" * 61, None), ("web@b", "b3")],
)  # fmt: skip
def test_what_may_be_a_broken_file_is_not_taken_for_another(spec: str, name: str | None) -> None:
    files = SnapshotFiles(tuple(several()), {"a1f" + "0" * 61: Damaged("snapshots/a1f0 is broken")})
    if name is None:
        with pytest.raises(Damaged, match="a1f0 is broken"):
            files.find(spec)
    else:
        assert files.find(spec).id == name * 32
    assert SnapshotFiles(tuple(several()), {}).of("web").find("latest").id == "a1" * 32
    with pytest.raises(BackupNotFound, match="no backup 'c'"):
        files.find("c")


@pytest.mark.parametrize("domain", ["a@b", "web@latest", "@", "x@"])
def test_an_at_in_a_domains_name_is_no_trap(domain: str) -> None:
    """The last @ is the one that parts name and backup: what stands behind it holds none."""
    odd = replace(SNAPSHOT, time=datetime(2026, 1, 9, tzinfo=UTC), hostname=domain, id="c0" * 32)
    assert find_snapshot([*several(), odd], f"{domain}@latest") == odd
    assert find_snapshot([*several(), odd], f"{domain}@c0") == odd
    assert find_snapshot(several(), "web@latest").hostname == "web"


def test_an_empty_repository_says_so() -> None:
    for spec in ("latest", "abc", "web@latest"):
        with pytest.raises(BackupNotFound, match="no backup"):
            find_snapshot([], spec)


# -- the chunker polynomial --------------------------------------------------------------------------------------


def test_polynomials() -> None:
    assert is_irreducible(0x3DA3358B4DC173)  # the one of restic's own chunker tests
    assert not is_irreducible((1 << 52 | 1) ^ (1 << 52 | 1) << 1)  # (x + 1)(x^52 + 1)
    assert not is_irreducible(1 << 53)
    assert is_irreducible(random_polynomial())
    with pytest.raises(ValueError, match="degree"):
        is_irreducible(0b111)


def test_the_bytes_of_a_pack_cannot_be_mistaken_for_the_next_one() -> None:
    builder = PackBuilder(Key.generate(), BlobKind.DATA)
    builder.add(ONE, b"one", None)
    pack = builder.finish()
    assert pack is not None
    assert blob_id(pack.content) == pack.id
    builder.add(TWO, b"two", None)
    with pytest.raises(ValueError, match="released"):
        bytes(pack.content)
    second = builder.finish()
    assert second is not None
    assert blob_id(second.content) == second.id
