# SPDX-License-Identifier: Apache-2.0
"""Names of checkpoints, and which ones a backup merges away."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone

import pytest

from pullback.model.chain import is_checkpoint_name
from pullback.plan.retention import checkpoint_name, checkpoints_to_remove, made_by_backups

MINE, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4
MOMENT = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)


def own(number: int, repository: str = MINE) -> str:
    return checkpoint_name(repository, MOMENT + timedelta(days=number), f"{number:04x}")


def test_the_name_says_whose_and_when():
    there = timezone(timedelta(hours=-3))
    assert checkpoint_name(MINE, MOMENT.astimezone(there), "beef") == "01234567-20260504T030201Z-beef"
    assert is_checkpoint_name(own(0))


def test_the_name_does_not_depend_on_the_zone_of_the_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TZ", "XYZ-9")
    time.tzset()
    try:
        assert checkpoint_name(MINE, MOMENT, "beef") == "01234567-20260504T030201Z-beef"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("keep", [1, 2, 4, 5, 9])
def test_the_newest_stay(keep: int):
    points = [own(number) for number in range(5)]
    assert checkpoints_to_remove(points, MINE, keep) == set(points[: max(0, 5 - keep)])


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_stays(keep: int):
    points = [own(0), own(1)]
    assert checkpoints_to_remove(points, MINE, keep) == {own(0)}


def test_nothing_of_others_is_touched():
    foreign = [own(0, OTHER), "nightly", f"{MINE[:8]}-mine", f"{own(1)}-x", f"x{own(2)}", f"{own(3)[:-4]}ABCD"]
    assert checkpoints_to_remove([*foreign, own(4), own(5)], MINE, 1) == {own(4)}
    assert checkpoints_to_remove(foreign, MINE, 1) == set()
    assert checkpoints_to_remove([], MINE, 1) == set()


def test_a_clock_that_was_set_back_costs_no_newest_checkpoint():
    points = [own(5), own(9), own(1)]
    assert checkpoints_to_remove(points, MINE, 1) == {own(5), own(9)}


def test_within_one_second_the_chain_tells_the_order():
    points = [checkpoint_name(MINE, MOMENT, salt) for salt in ("ffff", "0000", "8888")]
    assert checkpoints_to_remove(points, MINE, 1) == set(points[:2])


def test_what_backups_made_is_told_from_what_users_named():
    points = [own(0), own(1, OTHER), "nightly", f"{MINE[:8]}-mine", f"{own(1)}-x", f"x{own(2)}"]
    assert made_by_backups(points) == {own(0), own(1, OTHER)}
