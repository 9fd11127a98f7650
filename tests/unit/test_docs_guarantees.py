# SPDX-License-Identifier: Apache-2.0
"""What is promised under each fault is shown by the tests that are named for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.markdown import named, plain, rows, sections
from tests.support.survival import Fault

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "guarantees.md").read_text()


def promises(page: str) -> dict[str, list[str]]:
    """Each fault with the files that are said to show what holds after it."""
    return {plain(fault): named(shown) for fault, _, shown in rows(sections(page)["Fault by fault"])}


def test_every_fault_that_is_tried_has_its_promise() -> None:
    assert list(promises(PAGE)) == [str(fault) for fault in Fault]


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name)
def test_it_is_tried_where_the_page_says_so(fault: Fault) -> None:
    files = promises(PAGE)[fault]
    counted = [name for name in files if f"Fault.{fault.name}" in (ROOT / name).read_text()]
    assert counted, f"{fault.name} is not counted in any of {files}"


def test_every_test_that_is_named_is_there() -> None:
    for name in re.findall(r"`(tests/\S+)`", PAGE):
        assert (ROOT / name).is_file(), name
