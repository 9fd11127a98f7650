# SPDX-License-Identifier: Apache-2.0
"""The whole product on a repository in S3: the stage of ``product``, with another store below it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.qemu import Qemu
from lab.s3 import S3Address
from pullback.engine.backup import BackupResult, run_backup
from pullback.engine.events import Event, silent
from pullback.engine.listing import list_stored
from pullback.engine.restore import Restore, RestoreRequest, RestoreResult
from pullback.repository.location import open_store
from pullback.repository.repository import Repository
from tests.support.backups import CHEAP
from tests.support.product import Stage
from tests.support.restic import PASSWORD, Restic


class S3Stage(Stage):
    """A stage whose repository is in a bucket of its own.

    ``via`` says by which endpoint pullback goes, for instance a fault proxy's; ``restic`` and ``direct`` go straight
    to the server.  The account has to be in the environment.
    """

    def __init__(self, place: Path, s3: S3Address, via: str | None = None, made: bool = True) -> None:
        self.place = place
        self.scratch = place / "scratch"
        self.scratch.mkdir()
        self.bucket = s3.make_bucket()
        self.direct = f"s3:{s3.endpoint}/{self.bucket}/some/where"
        self.location = f"s3:{via or s3.endpoint}/{self.bucket}/some/where"
        self.repo = self.location  # type: ignore[assignment]
        self.restic = Restic(self.direct)
        self._restores = 0
        if made:
            Repository.init(open_store(self.direct), PASSWORD, cost=CHEAP)

    def open(self) -> Repository:
        """The repository, by the way that pullback is to go."""
        return Repository.open(open_store(self.location), PASSWORD)

    def backup(
        self, qemu: Qemu, emit: Callable[[Event], None] = silent, repo: Path | None = None, **more: Any
    ) -> BackupResult:
        return asyncio.run(run_backup(self.request(qemu, **more), self.open, emit))

    def restore(self, backup: str, to: Path | None = None, repo: Path | None = None, **more: Any) -> RestoreResult:
        self._restores += 1
        where = to or self.place / f"restored-{self._restores}"
        return Restore(RestoreRequest(backup, where, **more), self.open, silent).run()

    def listed(self, repo: Path | None = None) -> list[str]:
        return [one.id for one in list_stored(self.open())]
