# SPDX-License-Identifier: Apache-2.0
"""Chains from any heap of bitmaps: an answer is sound, or it is Unknown."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pullback.model.chain import Unknown, bitmap_name, is_checkpoint_name, read_chain
from pullback.model.facts import Bitmap

points = st.sampled_from("ABCD")
FOREIGN = ("libvirt-1", "pullback-", "pullback-A^B^C")
names = st.builds(bitmap_name, points, st.none() | points) | st.sampled_from(
    ["libvirt-1", "pullback-", "pullback-A^B^C"]
)
heaps = st.lists(
    st.builds(Bitmap, names, st.just(65536), st.just(0), st.booleans(), st.just(True), st.just(False), st.booleans()),
    unique_by=lambda bitmap: bitmap.name,
    max_size=7,
)


@given(heap=heaps)
def test_a_chain_is_unbroken_and_ends_recording(heap: list[Bitmap]) -> None:
    chain = read_chain(heap)
    assert len(set(chain.points)) == len(chain.points)
    for before, after in pairwise(chain.edges):
        assert after.parent == before.checkpoint
    assert not any(edge.bitmap.inconsistent for edge in chain.edges)
    if chain.edges:
        assert chain.edges[-1].bitmap.recording
        claims = [
            one for one in heap if one.name.partition("^")[0] == f"pullback-{chain.last}" and one.name not in FOREIGN
        ]
        assert len(claims) == 1, "two bitmaps claim the last point"


@given(heap=heaps)
def test_every_bitmap_of_ours_is_used_or_broken(heap: list[Bitmap]) -> None:
    chain = read_chain(heap)
    ours = {one.name for one in heap if one.name not in FOREIGN}
    used, broken = {edge.name for edge in chain.edges}, {one.name for one, _ in chain.broken}
    assert used | broken == ours
    assert not used & broken


@given(heap=heaps, point=points)
def test_changes_reach_from_the_point_to_now(heap: list[Bitmap], point: str) -> None:
    chain = read_chain(heap)
    edges = chain.since(point)
    if isinstance(edges, Unknown):
        assert point not in chain.points
        assert edges.reason
    else:
        assert edges[0].checkpoint == point
        assert edges[-1] == chain.edges[-1]


@given(heap=heaps, order=st.randoms(use_true_random=False))
def test_the_order_of_the_list_does_not_matter(heap: list[Bitmap], order: object) -> None:
    shuffled = list(heap)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert read_chain(shuffled).edges == read_chain(heap).edges


@given(name=st.text(max_size=12), parent=st.none() | st.text(max_size=12))
def test_names_go_round(name: str, parent: str | None) -> None:
    bitmap = Bitmap(bitmap_name(name, parent), 65536, 0, True, True)
    chain = read_chain([bitmap])
    if is_checkpoint_name(name) and (parent is None or is_checkpoint_name(parent)) and name != parent:
        assert chain.points == (name,)
        assert chain.edges[0].parent == parent
    else:
        assert chain.points != (name,) or not is_checkpoint_name(name)
