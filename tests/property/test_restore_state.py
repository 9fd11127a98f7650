# SPDX-License-Identifier: Apache-2.0
"""The state of an unfinished image, the room of an image, and the order of a restore, against simple models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import images
from pullback.engine.targets import Target
from pullback.errors import TargetExists
from pullback.model.extents import Span, merged
from pullback.model.unfinished import Unfinished, parse_unfinished
from pullback.plan.restore import WINDOW, Place, Segment, holds, image_room, in_turn, pack_reads, windows
from pullback.plan.target import Act, EntryKind, FileFacts, TargetFacts, choose_act

SIZE = 200
spans = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 40)), max_size=12).map(
    lambda pairs: merged(sorted((offset, min(length, SIZE - offset)) for offset, length in pairs))
)
states = st.builds(
    Unfinished,
    repository=st.text(max_size=4),
    backup=st.text(max_size=4),
    disk=st.text(max_size=4),
    format=st.sampled_from(["qcow2", "raw"]),
    virtual_size=st.just(SIZE),
    inode=st.integers(0, 1 << 64),
    modified=st.integers(0, 1 << 64),
    done=spans.map(tuple),
)


@given(states)
def test_a_state_comes_back_as_it_was(state: Unfinished) -> None:
    assert parse_unfinished(state.to_bytes()) == state


@given(st.binary(max_size=40))
def test_somebody_elses_file_is_none(data: bytes) -> None:
    assert parse_unfinished(data) is None


@given(
    states,
    st.sampled_from(
        ["repository", "backup", "disk", "format", "virtual_size", "inode", "modified", "done", "pullback"]
    ),
    st.sampled_from([None, True, -1, 1.5, "x", [], {}, [[5, 5], [1, 1]], [[0, SIZE + 1]], [[0, 0]], [[0, 1], [1, 1]]]),
)
def test_a_state_that_was_altered_is_none_or_valid(state: Unfinished, key: str, value: object) -> None:
    document = json.loads(state.to_bytes())
    document[key] = value
    found = parse_unfinished(json.dumps(document).encode())
    if found is not None:
        assert parse_unfinished(found.to_bytes()) == found
        assert list(found.done) == merged(sorted(found.done))
        assert all(span.length > 0 and span.end <= found.virtual_size for span in found.done)


@given(spans, st.integers(0, SIZE), st.integers(1, 20))
def test_a_place_is_held_when_every_byte_of_it_is(done: list[Span], offset: int, length: int) -> None:
    held = {byte for span in done for byte in range(span.offset, span.end)}
    assert holds(done, Place("vda", offset, length)) == ({*range(offset, offset + length)} <= held)


@given(done=spans, wrong=spans)
def test_what_is_undone_is_not_done(
    tmp_path_factory: pytest.TempPathFactory, done: list[Span], wrong: list[Span]
) -> None:
    place = tmp_path_factory.mktemp("state")
    target = Target(place, Unfinished("r", "b", "vda", "raw", SIZE, done=tuple(done)))
    target.undo(wrong)
    left = {byte for span in target.state.done for byte in range(span.offset, span.end)}
    bad = {byte for span in wrong for byte in range(span.offset, span.end)}
    assert left == {byte for span in done for byte in range(span.offset, span.end)} - bad
    assert parse_unfinished((place / "vda.raw.partial.json").read_bytes()) == target.state


@given(st.lists(st.lists(st.integers(), max_size=5), max_size=4))
def test_disks_take_turns(lists: list[list[int]]) -> None:
    longest = max(map(len, lists), default=0)
    assert list(in_turn(lists)) == [one[turn] for turn in range(longest) for one in lists if turn < len(one)]


@given(
    st.lists(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c", b"d"]), st.integers(1, 5)), max_size=6), max_size=20)
)
def test_every_place_is_read_once(contents: list[list[tuple[bytes, int]]]) -> None:
    segments = [Segment("vda", number * 100, content) for number, content in enumerate(contents)]
    wanted = sorted(pair for segment in segments for pair in segment.places())
    found = []
    pack_of = {b"a": b"1", b"b": b"2", b"c": b"1", b"d": b"2"}.__getitem__
    for window in windows(segments):
        reads = pack_reads(window, pack_of)
        assert len({read.pack for read in reads}) == len(reads)
        assert all(pack_of(blob) == read.pack for read in reads for blob in read.places)
        found += [(blob, place) for read in reads for blob, places in read.places.items() for place in places]
    assert sorted(found) == wanted


def test_the_blobs_of_a_segment_follow_one_another() -> None:
    segment = Segment("vdb", 100, [(b"a", 3), (b"b", 5), (b"a", 2)])
    assert list(segment.places()) == [
        (b"a", Place("vdb", 100, 3)),
        (b"b", Place("vdb", 103, 5)),
        (b"a", Place("vdb", 108, 2)),
    ]


def test_so_many_segments_are_planned_at_a_time() -> None:
    segments = [Segment("vda", number, [(b"a", 1)]) for number in range(2 * WINDOW + 1)]
    assert [len(window) for window in windows(segments)] == [WINDOW, WINDOW, 1]


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_the_room_is_never_less_than_what_qemu_takes(tmp_path: Path, image_format: str) -> None:
    size = 5 << 30
    data = [(0, 4096), (70000, 300), (600 << 20, 3 << 20), (size - 512, 512), ((2 << 30) - 512, 2048)]
    path = images.create(tmp_path / "image", size, image_format)
    for offset, length in data:
        offset, length = offset // 512 * 512, -(-length // 512) * 512
        images.run(["qemu-io", "-f", image_format, "-c", f"write -q {offset} {length}", path])
    room = image_room(sorted(data), size, image_format)
    took = path.stat().st_blocks * 512
    assert took <= room <= took + 16 * (64 << 10)
    assert image_room([], size, "raw") == 0


CLUSTER, MAPPED = 64 << 10, 512 << 20


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit)


def qcow2_clusters(size: int, data: int, tables: int) -> int:
    """What a qcow2 file of so many clusters of data and second-level tables has at least (docs/interop/qcow2.txt)."""
    counted = 1 + _ceil(_ceil(size, MAPPED) * 8, CLUSTER) + tables + data
    blocks = _ceil(counted, CLUSTER // 2 - 1)
    return counted + blocks + _ceil(blocks * 8, CLUSTER)


@pytest.mark.parametrize(
    ("size", "data", "clusters", "tables"),
    [
        (1 << 50, [], 0, 0),
        (16 << 40, [(0, 16 << 40)], 16 << 24, 16 << 11),
        (256 << 40, [(0, 256 << 40)], 256 << 24, 256 << 11),
        (1 << 40, [(number * MAPPED - 512, 512) for number in range(1, 2000, 2)], 1000, 1000),
        (1 << 40, [(number * MAPPED - 512, 1024) for number in range(2, 2000, 2)], 1998, 1998),
    ],
    ids=["empty", "full", "huge", "scattered", "across tables"],
)
def test_the_room_of_a_large_qcow2_image(size: int, data: list[tuple[int, int]], clusters: int, tables: int) -> None:
    """Too large to be made here."""
    room = image_room(data, size, "qcow2")
    assert isinstance(room, int)
    least = qcow2_clusters(size, clusters, tables) * CLUSTER
    assert least <= room <= least + 5 * CLUSTER


def test_the_room_of_a_raw_image_is_its_blocks_and_one_for_every_64_pieces() -> None:
    for pieces, more in ((1, 1), (64, 1), (65, 2)):
        data = [(number << 20, 1) for number in range(pieces)]
        assert image_room(data, 1 << 30, "raw") == (pieces + more) * 4096


# -- what becomes of files that are there -------------------------------------------------------------------------

WANTED = Unfinished("repo", "backup", "vda", "qcow2", SIZE)
NOTHING = FileFacts("x")
IMAGE = FileFacts("x", EntryKind.REGULAR, 7, 70)


def begun(**more: object) -> Unfinished:
    return Unfinished("repo", "backup", "vda", "qcow2", SIZE, **{"inode": 7, "done": (Span(0, 5),), **more})  # type: ignore[arg-type]


OTHER = Unfinished("repo", "another", "vda", "qcow2", SIZE, 7, done=(Span(0, 5),))
CASES: list[tuple[TargetFacts, Act | None, Act | None]] = [
    # final, partial, state file, state; without and with overwrite (None: refused)
    (TargetFacts(NOTHING, NOTHING, NOTHING, None), Act.BEGIN, Act.BEGIN),
    (TargetFacts(IMAGE, NOTHING, NOTHING, None), None, Act.BEGIN),
    (TargetFacts(NOTHING, IMAGE, IMAGE, begun()), Act.GO_ON, Act.GO_ON),
    (TargetFacts(NOTHING, IMAGE, IMAGE, begun(done=())), Act.BEGIN, Act.BEGIN),
    (TargetFacts(NOTHING, NOTHING, IMAGE, begun()), Act.BEGIN, Act.BEGIN),
    (TargetFacts(NOTHING, IMAGE, IMAGE, begun(inode=8)), None, Act.BEGIN),
    (TargetFacts(NOTHING, IMAGE, IMAGE, begun(inode=0, done=())), Act.BEGIN, Act.BEGIN),
    (TargetFacts(NOTHING, IMAGE, IMAGE, OTHER), None, Act.BEGIN),
    (TargetFacts(NOTHING, NOTHING, IMAGE, OTHER), Act.BEGIN, Act.BEGIN),
    (TargetFacts(NOTHING, IMAGE, NOTHING, None), None, Act.BEGIN),
    (TargetFacts(NOTHING, NOTHING, IMAGE, None), None, Act.BEGIN),
    (TargetFacts(IMAGE, IMAGE, IMAGE, begun()), None, Act.GO_ON),
    (TargetFacts(IMAGE, NOTHING, IMAGE, begun(modified=70)), Act.FINISH, Act.FINISH),
    (TargetFacts(IMAGE, IMAGE, IMAGE, begun(modified=70)), Act.FINISH, Act.FINISH),
    (TargetFacts(IMAGE, NOTHING, IMAGE, begun(modified=71)), None, Act.BEGIN),
    (TargetFacts(IMAGE, NOTHING, IMAGE, begun(modified=70, inode=8)), None, Act.BEGIN),
    # Modified at time 0: to the state of an image that never was whole, that says nothing.
    (TargetFacts(FileFacts("x", EntryKind.REGULAR, 7, 0), NOTHING, IMAGE, begun()), None, Act.BEGIN),
    (TargetFacts(FileFacts("x", EntryKind.LINK, 7, 70), NOTHING, IMAGE, begun(modified=70)), None, Act.BEGIN),
    (TargetFacts(FileFacts("x", EntryKind.REGULAR, in_use=True), NOTHING, NOTHING, None), None, None),
    (TargetFacts(NOTHING, FileFacts("x", EntryKind.REGULAR, in_use=True), NOTHING, None), None, None),
    (TargetFacts(FileFacts("x", EntryKind.DIRECTORY), NOTHING, NOTHING, None), None, None),
    (TargetFacts(NOTHING, NOTHING, FileFacts("x", EntryKind.OTHER), None), None, None),
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_what_becomes_of_files_that_are_there(number: int, overwrite: bool) -> None:
    facts, without, told = CASES[number]
    expected = told if overwrite else without
    if expected is None:
        with pytest.raises(TargetExists):
            choose_act(facts, WANTED, overwrite)
    else:
        assert choose_act(facts, WANTED, overwrite) is expected


F, P, S = "vda.qcow2", "vda.qcow2.partial", "vda.qcow2.partial.json"


def lying(final: EntryKind, partial: EntryKind, state_file: EntryKind, state: Unfinished | None) -> TargetFacts:
    return TargetFacts(
        FileFacts(F, final, 7, 70, in_use=True),
        FileFacts(P, partial, 7, 70, in_use=True),
        FileFacts(S, state_file),
        state,
    )


@pytest.mark.parametrize(
    ("facts", "overwrite", "said"),
    [
        (lying(EntryKind.REGULAR, EntryKind.REGULAR, EntryKind.DIRECTORY, None), False, f"{S} is a directory"),
        (lying(EntryKind.REGULAR, EntryKind.REGULAR, EntryKind.REGULAR, None), False, f"{F} exists already"),
        (lying(EntryKind.REGULAR, EntryKind.REGULAR, EntryKind.REGULAR, None), True, f"{F} is in use"),
        (lying(EntryKind.NOTHING, EntryKind.REGULAR, EntryKind.REGULAR, None), True, f"{P} is in use"),
        (lying(EntryKind.NOTHING, EntryKind.REGULAR, EntryKind.REGULAR, None), False, f"{P} exists, and is not known"),
        (lying(EntryKind.NOTHING, EntryKind.NOTHING, EntryKind.REGULAR, None), False, f"{S} exists, and is not known"),
        (lying(EntryKind.NOTHING, EntryKind.REGULAR, EntryKind.REGULAR, begun(inode=8)), False, f"{P} is not the file"),
        (lying(EntryKind.NOTHING, EntryKind.REGULAR, EntryKind.REGULAR, OTHER), False, f"{P} is an unfinished restore"),
    ],
)
def test_a_refusal_names_what_is_in_the_way(facts: TargetFacts, overwrite: bool, said: str) -> None:
    with pytest.raises(TargetExists) as caught:
        choose_act(facts, WANTED, overwrite)
    assert caught.value.what.startswith(said)
