# SPDX-License-Identifier: Apache-2.0
"""A running domain with two disks that goes on from fault to fault, its backups, and what each of them must hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.qemu import BareQemu
from pullback.engine.backup import BackupRequest, run_backup
from pullback.engine.events import silent
from pullback.errors import PullbackError
from pullback.model.manifest import Manifest
from pullback.repository.repository import Repository
from tests.support.backups import open_repository, read_disk
from tests.support.dying import changes_something
from tests.support.product import KIB, MIB, Stage, chain, leftovers, references, same

Start = Callable[..., BareQemu]
DISKS = ("vda", "vdb")


class Life:
    """The domain, which is given one full backup to begin with."""

    def __init__(self, place: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stage = Stage(place)
        for module in ("backup", "freezing"):
            monkeypatch.setattr(f"pullback.engine.{module}.DEFAULT_BASE", str(self.stage.scratch))
        disks = [self.stage.disk("vda", 2 * MIB + 512), self.stage.disk("vdb", MIB)]
        self.qemu = start(disks, running=True)
        self.states: dict[str, dict[str, bytes]] = {}
        self._fill = 0
        self.go_on()
        self.backup(mode="full")

    def go_on(self) -> None:
        """The domain writes something."""
        self._fill = self._fill % 250 + 1
        self.qemu.device_write("vda", (self._fill * 37) % 30 * 64 * KIB, 70 * KIB, self._fill)
        self.qemu.device_write("vdb", (self._fill * 11) % 15 * 64 * KIB, 4096, self._fill)
        self.qemu.device_zero("vda", (self._fill * 53) % 30 * 64 * KIB, 64 * KIB, unmap=True)

    def backup(self, mode: str = "incremental") -> Manifest:
        """A backup that works, of this kind, and holds what the disks hold."""
        state = references(self.qemu)
        made = self.stage.backup(self.qemu)
        assert {disk.mode for disk in made.manifest.disks} == {mode}, made.manifest.disks
        self.states[made.id] = state
        self.judge(made.id)
        return made.manifest

    def attempt(self, request: BackupRequest | None = None, trace: Any = None) -> PullbackError | None:
        """A backup, whatever comes of it, as long as that is one error of ours."""
        wanted = request or self.stage.request(self.qemu)
        try:
            asyncio.run(run_backup(wanted, lambda: open_repository(self.stage.repo), silent, trace))
        except PullbackError as error:
            return error
        return None

    def commands(self, request: BackupRequest | None = None) -> list[str]:
        """The commands that a backup sends now, and that change something; that backup counts as one."""
        sent: list[str] = []
        state = references(self.qemu)
        error = self.attempt(request, lambda command, arguments, reply: sent.append(command))
        assert error is None, error
        assert self.adopt(state)
        return list(filter(changes_something, sent))

    def judge(self, backup: str) -> None:
        """It holds what the disks held at its instant."""
        self._judge(open_repository(self.stage.repo), backup)

    def _judge(self, repository: Repository, backup: str) -> None:
        same({disk: read_disk(repository, backup, disk) for disk in DISKS}, self.states[backup])

    def judge_all(self) -> None:
        """Every backup that ever was committed is there, and holds what it held."""
        assert sorted(self.stage.listed()) == sorted(self.states)
        repository = open_repository(self.stage.repo)
        for backup in self.states:
            self._judge(repository, backup)

    def adopt(self, state: dict[str, bytes]) -> bool:
        """Whether an attempt made a backup after all; then it has to hold ``state``."""
        extra = set(self.stage.listed()) - set(self.states)
        assert len(extra) <= 1
        for backup in extra:
            self.states[backup] = state
            self.judge(backup)
        return bool(extra)

    def chains(self) -> list[dict[str, bool]]:
        """Each disk's bitmaps, and which of them record."""
        return [chain(self.qemu, disk) for disk in DISKS]

    def nothing_left(self) -> None:
        """No node, export, job, file or lock, and one bitmap records for each disk."""
        assert leftovers(self.qemu, self.stage.scratch) == []
        assert list((self.stage.repo / "locks").iterdir()) == []
        for names in self.chains():
            assert sum(names.values()) == 1
