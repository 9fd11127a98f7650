# SPDX-License-Identifier: Apache-2.0
"""A proof against a model that looks at every block: all that changed, whole pieces of the rest, each byte once."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pullback.model.extents import Span, merged
from pullback.model.units import CHUNK, HOT_CHUNK, SEGMENT
from pullback.plan.prove import claims_by_segment, parts_by_pack, plan_proof

SIZE = SEGMENT + 5 * CHUNK + 512
SOME = st.lists(st.tuples(st.integers(0, SIZE // HOT_CHUNK), st.integers(1, 9)), max_size=6)


def spans(blocks: list[tuple[int, int]]) -> list[Span]:
    clipped = ((at * HOT_CHUNK, min((at + count) * HOT_CHUNK, SIZE) - at * HOT_CHUNK) for at, count in sorted(blocks))
    return merged(clipped)


@given(fetch=SOME.map(spans), random=st.randoms(use_true_random=False), cuts=st.sets(st.integers(1, SIZE - 1)))
def test_a_proof_compares_what_it_says_and_each_byte_once(fetch, random, cuts) -> None:
    proof = plan_proof("sample", fetch, SIZE, lambda among, count: random.sample(range(among), min(count, 7)))
    assert list(proof.changed) == fetch
    inside = merged(sorted([*proof.changed, *proof.unchanged]))
    assert sum(span.length for span in inside) == proof.proved.changed + proof.proved.unchanged
    for span in proof.unchanged:
        assert span.offset % HOT_CHUNK == 0
        assert span.end % HOT_CHUNK == 0 or span.end == SIZE
    compared = []
    for number, claims in claims_by_segment(proof):
        start, end = number * SEGMENT, min((number + 1) * SEGMENT, SIZE)
        bounds = [start, *sorted(cut for cut in cuts if start < cut < end), end]
        content = [(at.to_bytes(8, "big"), after - at) for at, after in pairwise(bounds)]
        for pack, blobs in parts_by_pack(content, start, claims, lambda blob: blob[-1:]).items():
            for blob, parts in blobs.items():
                assert blob[-1:] == pack
                for part in parts:
                    assert part.offset == int.from_bytes(blob, "big") + part.start
                    touching = [
                        one for one in fetch if one.offset < part.offset + part.length and part.offset < one.end
                    ]
                    assert bool(touching) == part.changed
                    compared.append((part.offset, part.length))
    assert merged(sorted(compared)) == inside
    assert sum(length for _, length in compared) == sum(span.length for span in inside)
