# SPDX-License-Identifier: Apache-2.0
"""What restic says a policy keeps, where restic says something else than it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pullback.engine.forgetting import by_policy
from pullback.errors import RepositoryError
from tests.support.backups import new_repository

GOOD = {"id": "a" * 64, "hostname": "web", "time": "2026-05-04T03:02:01Z"}


@pytest.mark.parametrize(
    "group",
    [
        {"remove": [{**GOOD, "id": None, "time": "once"}]},
        {"remove": [{"hostname": "web"}]},
        {"remove": ["a" * 64]},
        {"keep": [GOOD], "reasons": []},
        {"keep": [GOOD], "reasons": [{"matches": 1}]},
        "group",
    ],
)
def test_an_answer_that_is_not_understood_forgets_nothing(tmp_path: Path, group: Any) -> None:
    asked: list[Any] = []

    def call(command: Any) -> list[Any]:
        asked.append(command)
        return [[group]]

    with pytest.raises(RepositoryError, match="cannot be understood") as raised:
        by_policy(call, new_repository(tmp_path / "repo"), ["--keep-last", "1"], None, print)
    assert raised.value.exit_code == 14
    assert str(raised.value).endswith("Nothing was forgotten.")
    assert ["--dry-run" in command for command in asked] == [True]
