# SPDX-License-Identifier: Apache-2.0
"""docs/transactions.md: its stories, told again to a real QEMU, are what the page has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pullback.plan.method import Method
from tests.qemu.transactions import PAGE, STORIES, block_of, for_version, tell


def shown(method: Method) -> str:
    found = block_of(method).search(PAGE.read_text())
    assert found is not None
    return found[2]


@pytest.mark.parametrize("method", STORIES)
def test_the_story_is_the_one_of_the_page(method: Method, tmp_path: Path) -> None:
    told, version = tell(method, tmp_path)
    assert told.splitlines() == for_version(shown(method), version).splitlines()


def test_the_page_shows_every_removal_as_one_transaction() -> None:
    calls = re.split(r"\n\n", shown("filter"))
    removals = [call.splitlines() for call in calls if call.startswith("delete_checkpoint")]
    assert [lines[0] for lines in removals] == [f"delete_checkpoint(name={name})" for name in "BADC"]
    for lines in removals:
        assert [line for line in lines if line.startswith("  > ") and not line.startswith("  >     ")] == [
            "  > transaction"
        ]


def test_newer_versions_need_fewer_nodes() -> None:
    story = shown("filter")
    assert "-view" in story
    newer = for_version(story, (8, 0))
    assert "pullback-saved" in story
    assert not re.search(r"-(view|align|deny|void|saved)\b", newer)
    assert "node-name=pb-B-0-access name=vda" in newer
    assert for_version(story, (7, 2)) == story
    assert "on-cbw-error=break-snapshot\n" in for_version(shown("job"), (10, 1))
