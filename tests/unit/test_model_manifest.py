# SPDX-License-Identifier: Apache-2.0
"""The manifest: written, read back, and read from someone who means ill."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from pullback.errors import Damaged, RepositoryUnsupported
from pullback.model.manifest import BaseRef, DiskEntry, parse_manifest
from tests.support.values import MOMENT, entry, manifest

FULL = manifest(
    entry("vda"),
    DiskEntry("vdb", 1 << 40, None, "full", "a raw image cannot store dirty bitmaps", None, "raw", 1, 2, 3),
    DiskEntry("vdc", 4096, "C", "incremental", "", BaseRef("f" * 64, "B"), "qcow2", 4, 5, 6),
    skipped=(("cd0", "the drive is empty"),),
    definition="<domain>äöü</domain>\n",
    consistency="frozen",
)


def document(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(FULL.to_bytes())
    return {**made, **changes}


def parse(value: Any) -> Any:
    return parse_manifest(json.dumps(value).encode())


@pytest.mark.parametrize("made", [FULL, manifest()])
def test_it_is_read_as_it_was_written(made: Any):
    assert parse_manifest(made.to_bytes()) == made


def test_it_is_json_for_people():
    text = FULL.to_bytes().decode()
    assert text.startswith('{\n  "format": 1,\n  "domain": "web"')
    assert text.endswith("}\n")
    assert "äöü" in text
    assert document()["skipped"] == [{"target": "cd0", "reason": "the drive is empty"}]


def test_the_time_is_kept_in_utc():
    there = timezone(timedelta(hours=5, minutes=30))
    made = manifest(time=datetime(2026, 1, 1, 2, 0, tzinfo=there))
    assert json.loads(made.to_bytes())["time"] == "2025-12-31T20:30:00+00:00"
    assert parse_manifest(made.to_bytes()).time == made.time
    assert parse(document(time="2026-05-04T03:02:01")).time == MOMENT.astimezone(UTC)


def test_the_time_does_not_depend_on_the_zone_of_the_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TZ", "XYZ-9")
    time.tzset()
    try:
        assert json.loads(FULL.to_bytes())["time"] == "2026-05-04T03:02:01+00:00"
        for text in ("2026-05-04T03:02:01", "2026-05-04T01:02:01-02:00"):
            read = parse(document(time=text)).time
            assert (read, read.utcoffset()) == (MOMENT, timedelta(0))
    finally:
        monkeypatch.undo()
        time.tzset()


def test_what_a_newer_pullback_adds_is_no_trouble():
    assert parse(document(more={"of": "this"})) == FULL


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_format_is_not_guessed_at(version: int):
    with pytest.raises(RepositoryUnsupported, match=f"format {version}"):
        parse({"format": version})


DISK = document()["disks"][0]
NO_TARGET = {key: value for key, value in DISK.items() if key != "target"}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"format": True}, "top.format"),
        ({"format": "1"}, "top.format"),
        ({"domain": None}, "top.domain"),
        ({"domain": 3}, "top.domain"),
        ({"domain": "\ud800"}, "top.domain of the manifest is not Unicode"),
        ({"domain": "\udfff"}, "top.domain of the manifest is not Unicode"),
        ({"time": "yesterday"}, "time"),
        ({"time": 0}, "top.time"),
        ({"time": "0001-01-01T00:00:00+23:59"}, "time"),
        ({"consistency": "hopefully"}, "hopefully"),
        ({"segment_size": -1}, "segment_size of the manifest is out of range"),
        ({"segment_size": 1 << 63}, "segment_size of the manifest is out of range"),
        ({"segment_size": 1.5}, "top.segment_size"),
        ({"disks": {}}, "top.disks"),
        ({"disks": [1]}, "top.disks[0] of the manifest is not an object"),
        ({"disks": [NO_TARGET]}, "top.disks[0].target"),
        ({"disks": [{**DISK, "virtual_size": "big"}]}, "top.disks[0].virtual_size"),
        ({"disks": [DISK, {**DISK, "virtual_size": True}]}, "top.disks[1].virtual_size"),
        ({"disks": [{**DISK, "mode": "differential"}]}, "differential"),
        ({"disks": [{**DISK, "checkpoint": 1}]}, "top.disks[0].checkpoint"),
        ({"disks": [{**DISK, "base": []}]}, "top.disks[0].base"),
        ({"disks": [{**DISK, "base": {"backup": "x"}}]}, "disks.base.checkpoint"),
        ({"disks": [DISK, DISK]}, "names a disk twice"),
        ({"skipped": [["cd0", "empty"]]}, "top.skipped[0]"),
        ({"definition": {}}, "top.definition"),
    ],
)
def test_a_wrong_value_is_damage_with_its_place(changes: dict[str, Any], where: str):
    with pytest.raises(Damaged) as caught:
        parse(document(**changes))
    assert where in str(caught.value)


@pytest.mark.parametrize("target", ["", ".", "..", "/", "../x", "a/b", "/etc/x", "a\0b", "\0"])
def test_a_disk_that_cannot_be_the_name_of_a_file_is_damage(target: str):
    with pytest.raises(Damaged, match="calls a disk"):
        parse(document(disks=[{**DISK, "target": target}]))


@pytest.mark.parametrize("target", ["...", ".x", "x.", "virtio0", "a b", "ä"])
def test_any_other_name_is_a_disks(target: str):
    assert parse(document(disks=[{**DISK, "target": target}])).disk(target) is not None


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe\xfd", b"[" * 100_000, b"9" * 5000, b"[]", b"null", b"NaN", b'""']
)
def test_what_is_no_manifest_is_damage(data: bytes):
    with pytest.raises(Damaged):
        parse_manifest(data)
