# SPDX-License-Identifier: Apache-2.0
"""Values that no writer of ours writes, for what is read from others; and how many of them are tried."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

#: PULLBACK_FUZZ is how many times as many examples are tried.
MORE = int(os.environ.get("PULLBACK_FUZZ", "1"))


def fuzz(examples: int) -> settings:
    """So many examples, times PULLBACK_FUZZ; the machine may be busy."""
    few = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=examples * MORE, deadline=None, suppress_health_check=few)


#: Values that stand for many, each of which broke some program once.
ODD = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        1 << 31,
        1 << 63,
        10**400,
        0.5,
        float("inf"),
        float("nan"),
        "",
        "..",
        "a/b",
        "\0",
        "\ud800",
        "\\x",
        "7" * 5000,
        "f" * 63,
        "f" * 64,
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59-23:59",
        "2026-05-04T03:02:01",
        [],
        {},
        [[]],
        [None],
        {"": None},
    ]
)
#: Any JSON.
ANYTHING = st.one_of(
    ODD,
    st.recursive(
        ODD | st.integers() | st.text(st.characters(), max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ),
)


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every part of a JSON value."""
    yield ()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        for rest in places(inner):
            yield (key, *rest)


def changed(value: Any, place: tuple[Any, ...], new: Any, drop: bool) -> Any:
    """The value with another part at this place, or without it."""
    if not place:
        return new
    result = copy.deepcopy(value)
    inner = result
    for key in place[:-1]:
        inner = inner[key]
    if drop:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return result


def mutated(value: Any) -> st.SearchStrategy[Any]:
    """A JSON value with one to three of its parts changed or left out."""
    one = st.tuples(st.sampled_from(list(places(value))), ANYTHING, st.booleans())

    def apply(changes: list[tuple[tuple[Any, ...], Any, bool]]) -> Any:
        result = value
        for place, new, drop in changes:
            if place in set(places(result)):
                result = changed(result, place, new, drop)
        return result

    return st.lists(one, min_size=1, max_size=3).map(apply)
