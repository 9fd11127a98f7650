# SPDX-License-Identifier: Apache-2.0
"""docs/qemu.md: every behaviour names a test that there is, and every test of QEMU's behaviour is named."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.markdown import named, rows

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "qemu.md").read_text()


def names_in(*folders: str) -> set[str]:
    sources = [path.read_text() for folder in folders for path in (ROOT / "tests").glob(f"{folder}")]
    return {name for source in sources for name in re.findall(r"^(?:async )?def (test_\w+)", source, re.MULTILINE)}


def check_tests(text: str) -> list[str]:
    real = names_in("*/test_*.py")
    cited = {name for name in named(text) if name.startswith("test_")}
    facts = names_in("qemu/test_docs_qemu_facts.py")
    last = [(row[0], named(row[-1])) for row in rows(text)]
    return [
        *[f"there is no {name}" for name in sorted(cited - real)],
        *[f"{name} is not named" for name in sorted(facts - cited)],
        *[f"{behaviour!r} has no test" for behaviour, names in last if not names or not names[0].startswith("test_")],
    ]


def test_every_behaviour_has_its_test() -> None:
    assert len(rows(PAGE)) > 15
    assert not check_tests(PAGE)


def test_a_page_that_was_altered_is_seen() -> None:
    name = "test_a_snapshot_that_breaks_is_told_by_nobody"
    assert check_tests(PAGE.replace(name, "test_nothing"))
    assert check_tests(PAGE.replace(f"`{name}`", ""))
    line = next(line for line in PAGE.splitlines() if name in line)
    assert check_tests(PAGE.replace(line + "\n", ""))
