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
from pullback.plan.restore import Place, Segment, holds, image_room, in_turn, pack_reads, windows
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
    for window in windows(segments):
        reads = pack_reads(window, lambda blob: bytes([blob[0] % 2]))
        assert len({read.pack for read in reads}) == len(reads)
        found += [(blob, place) for read in reads for blob, places in read.places.items() for place in places]
    assert sorted(found) == wanted


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
