# SPDX-License-Identifier: Apache-2.0
"""What a backup makes of failures of its repository's, on the way in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest

from pullback.engine import push
from pullback.engine.events import silent
from pullback.engine.push import PushedDisk, Writers
from pullback.engine.rate import Rate
from pullback.engine.storing import Prepared, Storing
from pullback.errors import RepositoryError, TransferError
from pullback.model.units import CHUNK
from pullback.plan.base import Base, Full
from pullback.plan.grid import cold_grid
from pullback.repository.layout import StoredBackup
from tests.support.backups import new_repository, open_repository, store_backup
from tests.support.serving import spoil


class FullStore:
    """A writer whose store has no room; it says which time it was."""

    bytes_added = 0

    def __init__(self) -> None:
        self.count = 0

    def add(self, *arguments: Any) -> None:
        self.count += 1
        raise RepositoryError(f"no space left, {self.count}")


def pushed() -> PushedDisk:
    size = 8 * CHUNK
    return PushedDisk("vda", size, Writers([cast(Any, FullStore())]), lambda number: cold_grid(size), Rate())


def test_the_first_failure_of_ours_is_kept_for_qemu_only_says_that_its_server_failed() -> None:
    disk = pushed()
    for number in (1, 2):
        with pytest.raises(RepositoryError, match=f"no space left, {number}"):
            disk.write(number * CHUNK, memoryview(os.urandom(CHUNK)))
    assert isinstance(disk.failure, RepositoryError)
    assert disk.failure.what == "no space left, 1"
    assert (disk.count.read, disk.spans()) == (0, []), "what was not stored does not count"


def test_a_qemu_that_finishes_nothing_is_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "_MOST_OPEN", 2)
    disk = pushed()
    for number in (0, 1):
        disk.write(number * CHUNK, memoryview(b"x" * 512))
    with pytest.raises(TransferError, match="more than 2 chunks of vda unfinished"):
        disk.write(2 * CHUNK, memoryview(b"x" * 512))
    assert isinstance(disk.failure, TransferError)


def test_a_backup_to_be_cut_like_may_be_forgotten_or_broken_meanwhile(tmp_path: Path) -> None:
    """A whole backup must be possible whatever became of the last one."""
    new_repository(tmp_path / "repo")
    repository = open_repository(tmp_path / "repo")
    with repository.lock():
        kept, broken = (store_backup(repository, {"vda": [b"x"]}, day=day) for day in (0, 1))
    spoil(tmp_path / "repo" / "snapshots" / broken, 30)
    likes = {"kept": kept, "broken": broken, "forgotten": "ab" * 32, "new": None}
    bases: dict[str, Base] = {target: Full("for a test", like) for target, like in likes.items()}
    nothing = cast(Any, None)
    prepared = Prepared("web", nothing, nothing, bases, None)
    storing = Storing(repository, prepared, 1, silent, lambda: repository, Rate())
    assert [target for target in likes if isinstance(storing._like(target), StoredBackup)] == ["kept"]
