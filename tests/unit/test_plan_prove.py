# SPDX-License-Identifier: Apache-2.0
"""What a proof compares, and what its error says."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from pullback.model.extents import Span
from pullback.model.units import CHUNK, HOT_CHUNK, MIB, SEGMENT, TIB
from pullback.plan import prove
from pullback.plan.prove import (
    SAMPLE,
    Claim,
    Difference,
    Part,
    Proved,
    chains_dropped,
    chains_stay,
    claims_by_segment,
    parts_by_pack,
    plan_proof,
    proof_failed,
)

ODD = SEGMENT + CHUNK + 512


def drawn(*numbers: int):
    def draw(among: int, count: int) -> Iterable[int]:
        assert count == min(SAMPLE, among)
        return numbers

    return draw


def all_of(among: int, count: int) -> Iterable[int]:
    return range(among)[:count]


def test_all_is_everything():
    proof = plan_proof("all", [Span(CHUNK, CHUNK)], ODD, drawn())
    assert proof.changed == (Span(CHUNK, CHUNK),)
    assert proof.unchanged == (Span(0, CHUNK), Span(2 * CHUNK, ODD - 2 * CHUNK))
    assert proof.spans == [Span(0, ODD)]
    assert proof.proved == Proved(CHUNK, ODD - CHUNK, ODD - CHUNK)


def test_a_sample_of_a_small_disk_is_everything():
    fetch = [Span(CHUNK + HOT_CHUNK, HOT_CHUNK)]
    assert plan_proof("sample", fetch, 200 * MIB, all_of) == plan_proof("all", fetch, 200 * MIB, drawn())


def test_a_sample_of_a_large_disk_is_so_many_chunks():
    proof = plan_proof("sample", [Span(0, MIB)], TIB, lambda among, count: range(0, among, among // count)[:count])
    assert proof.proved == Proved(MIB, SAMPLE * CHUNK, TIB - MIB)


@pytest.mark.parametrize(
    ("number", "piece"),
    [
        (0, Span(0, HOT_CHUNK)),  # before the fetched piece, in the same slot
        (1, Span(2 * HOT_CHUNK, 2 * HOT_CHUNK)),  # behind it
        (2, Span(CHUNK, CHUNK)),
        (1024, Span(SEGMENT - CHUNK, CHUNK)),
        (1025, Span(SEGMENT + CHUNK, 512)),  # the slot before is fetched, the last one is short
    ],
)
def test_each_number_is_a_piece_of_what_was_not_fetched(number: int, piece: Span):
    fetch = [Span(HOT_CHUNK, HOT_CHUNK), Span(SEGMENT, CHUNK)]
    assert plan_proof("sample", fetch, ODD, drawn(number)).unchanged == (piece,)


def test_every_piece_can_be_drawn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prove, "SAMPLE", 1)
    fetch = [Span(HOT_CHUNK, HOT_CHUNK), Span(4 * CHUNK, 2 * CHUNK)]
    seen: list[Span] = []
    for number in range(8):
        seen += plan_proof("sample", fetch, 8 * CHUNK + 512, lambda among, count, number=number: [number]).unchanged
    assert sum(span.length for span in seen) + HOT_CHUNK + 2 * CHUNK == 8 * CHUNK + 512
    assert len(set(seen)) == 8


def test_a_disk_read_whole_has_nothing_unchanged():
    assert plan_proof("sample", [Span(0, ODD)], ODD, drawn()).proved == Proved(ODD, 0, 0)
    assert plan_proof("sample", [], 0, drawn()).proved == Proved()


def test_claims_are_cut_at_segments():
    proof = plan_proof("all", [Span(SEGMENT - CHUNK, 2 * CHUNK)], ODD, drawn())
    assert list(claims_by_segment(proof)) == [
        (0, [Claim(0, SEGMENT - CHUNK, False), Claim(SEGMENT - CHUNK, CHUNK, True)]),
        (1, [Claim(SEGMENT, CHUNK, True), Claim(SEGMENT + CHUNK, 512, False)]),
    ]


def test_segments_without_claims_are_not_looked_at():
    proof = plan_proof("sample", [Span(3 * SEGMENT, CHUNK)], 5 * SEGMENT, drawn(1024))
    assert [number for number, _ in claims_by_segment(proof)] == [1, 3]


def test_blobs_cut_anywhere_are_compared_in_parts():
    content = [(b"a", 1000), (b"b", CHUNK), (b"a", 1000), (b"c", CHUNK)]
    claims = [Claim(500, 100, True), Claim(900, 200, False), Claim(CHUNK + 1500, 1000, True)]
    packs = parts_by_pack(content, 0, claims, {b"a": b"1", b"b": b"2", b"c": b"1"}.__getitem__)
    assert packs == {
        b"1": {
            b"a": [Part(500, 500, 100, True), Part(900, 900, 100, False), Part(CHUNK + 1500, 500, 500, True)],
            b"c": [Part(CHUNK + 2000, 0, 500, True)],
        },
        b"2": {b"b": [Part(1000, 0, 100, False)]},
    }


def test_a_blob_that_a_claim_only_touches_is_not_read():
    content = [(b"a", 1000), (b"b", 1000), (b"c", 1000)]
    packs = parts_by_pack(content, 0, [Claim(1000, 1000, False)], lambda blob: blob)
    assert packs == {b"b": {b"b": [Part(1000, 0, 1000, False)]}}


def test_an_error_says_where_and_what_it_means():
    found = [Difference("vda", Span(at * MIB, 512), False) for at in (5, 1, 3, 7, 9)]
    error = proof_failed([*found, Difference("vdb", Span(0, 512), True)], more=False)
    assert error.exit_code == 16
    assert (
        "vda at bytes 1,048,576-1,049,087, 3,145,728-3,146,239, 5,242,880-5,243,391 and 2 more, which did not"
        " change by the dirty bitmap; and vdb at bytes 0-511, which changed since the base"
    ) in error.what
    assert "earlier incremental backups of vda since its last full one may be wrong" in error.means
    assert "What was read of vdb" in error.means
    assert "--full" in error.todo
    assert "memory" in error.todo


def test_an_error_says_that_there_may_be_more():
    one = Difference("vda", Span(0, 512), False)
    assert "0-511, which" in proof_failed([one], more=False).what
    assert "0-511 and perhaps others, which" in proof_failed([one], more=True).what
    assert "memory" not in str(proof_failed([one], more=True))
    many = [Difference("vda", Span(at * MIB, 512), True) for at in range(5)]
    assert "and at least 2 more" in proof_failed(many, more=True).what
    assert "dirty bitmap" not in str(proof_failed(many, more=True))


@pytest.mark.parametrize(("count", "left"), [(3, "2,097,152-2,097,663, which"), (4, "-2,097,663 and 1 more, which")])
def test_an_error_hides_no_range(count: int, left: str):
    found = [Difference("vda", Span(at * MIB, 512), True) for at in range(count)]
    assert left in proof_failed(found, more=False).what


def test_an_error_says_what_became_of_the_checkpoints():
    error = proof_failed([Difference("vda", Span(0, 512), False), Difference("vdb", Span(0, 512), True)], more=False)
    assert error.lied == ("vda",)
    dropped = chains_dropped(error, {"two", "one"})
    assert (dropped.what, dropped.lied) == (error.what, error.lied)
    assert dropped.means.endswith("checkpoints of vda that backups had made were removed: the next one reads it whole.")
    assert "Do not trust changes since one, two, either" in dropped.todo
    assert "Do not trust" not in str(chains_dropped(error, ()))
    assert dropped.todo.startswith(error.todo)
    stay = chains_stay(error, "it is gone")
    assert "could not be removed (it is gone), so that an incremental backup may" in stay.means
    assert (stay.what, stay.todo, stay.lied) == (error.what, error.todo, error.lied)
    assert proof_failed([Difference("vdb", Span(0, 512), True)], more=False).lied == ()
