# SPDX-License-Identifier: Apache-2.0
"""Manifests: what is written is read back, and anything else ends in a documented error."""

from __future__ import annotations

import json
from datetime import UTC, timedelta, timezone
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pullback.errors import Damaged, RepositoryUnsupported
from pullback.model.manifest import BaseRef, DiskEntry, Manifest, parse_manifest
from tests.support.values import entry, manifest

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
targets = text.filter(lambda name: name not in ("", ".", "..") and not set(name) & {"/", "\0"})
sizes = st.integers(0, (1 << 63) - 1)
zones = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))

entries = st.builds(
    DiskEntry,
    target=targets,
    virtual_size=sizes,
    checkpoint=st.none() | text,
    mode=st.sampled_from(["full", "incremental"]),
    reason=text,
    base=st.none() | st.builds(BaseRef, text, text),
    source_format=text,
    bytes_read=sizes,
    bytes_new=sizes,
    bytes_zero=sizes,
)
manifests = st.builds(
    Manifest,
    domain=text,
    uuid=text,
    # A day away from the first and the last one: every zone has them.
    time=st.datetimes(timezones=st.just(UTC) | zones).filter(lambda time: 1 < time.year < 9999),
    consistency=st.sampled_from(["crash", "frozen"]),
    qemu=text,
    pullback=text,
    segment_size=sizes,
    disks=st.lists(entries, max_size=3, unique_by=lambda disk: disk.target).map(tuple),
    skipped=st.lists(st.tuples(text, text), max_size=2).map(tuple),
    definition=st.none() | text,
)


@given(made=manifests)
def test_what_is_written_is_read_back(made: Manifest) -> None:
    assert parse_manifest(made.to_bytes()) == made


def outcome(data: bytes) -> str:
    """How parsing ends.  Whatever was accepted can also be written and shown."""
    try:
        read = parse_manifest(data)
    except (Damaged, RepositoryUnsupported) as error:
        str(error).encode()
        return type(error).__name__
    assert parse_manifest(read.to_bytes()) == read
    return "read"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(value=anything)
def test_any_json(value: Any) -> None:
    assert outcome(json.dumps(value).encode()) != "read"


@given(data=st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    assert outcome(data) == "Damaged"


PLACES = [
    (place, key) for place, value in (("", manifest()), ("disks", entry())) for key in type(value).__dataclass_fields__
] + [("", "format"), ("base", "backup"), ("base", "checkpoint"), ("skipped", "target"), ("skipped", "reason")]
times = st.from_regex(r"\A\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}([+-]\d{2}:\d{2}|Z)?\Z")


@given(place=st.sampled_from(PLACES), value=anything | times | sizes | text, drop=st.booleans())
def test_one_hostile_member(place: tuple[str, str], value: Any, drop: bool) -> None:
    based = DiskEntry("vda", 1, "B", "incremental", "", BaseRef("x", "A"), "qcow2", 1, 1, 1)
    document = json.loads(manifest(based, skipped=(("cd0", "empty"),)).to_bytes())
    where, key = place
    inner = {
        "": document,
        "disks": document["disks"][0],
        "base": document["disks"][0]["base"],
        "skipped": document["skipped"][0],
    }[where]
    assert key in inner
    if drop:
        del inner[key]
    else:
        inner[key] = value
    result = outcome(json.dumps(document).encode())
    if drop and key not in ("checkpoint", "base", "definition"):
        assert result == "Damaged"
