# SPDX-License-Identifier: Apache-2.0
"""Random lives of a domain against a model of bytes: every backup holds what the disk held at its freezing instant.

PULLBACK_TEST_SECONDS sets for how long (25 s by default), PULLBACK_TEST_SEED the first seed; a failure prints its own.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.qemu import BareQemu
from pullback.engine.events import Event, Frozen
from pullback.repository import locks
from tests.support.backups import new_repository, open_repository, read_disk
from tests.support.product import KIB, MIB, Stage, chain, forked, leftovers, reference

Start = Callable[..., BareQemu]

SECONDS = float(os.environ.get("PULLBACK_TEST_SECONDS", "25"))
SEED = int(os.environ.get("PULLBACK_TEST_SEED", "0")) or random.randrange(1 << 32)
STEPS = 40
SIZES = [512, 64 * KIB + 512, 256 * KIB - 512, 256 * KIB + 1024, MIB + 7 * 512, 2 * MIB, 3 * MIB + 513 * 512]


class Model:
    """A domain with two disks of odd sizes, what they hold byte by byte, and what every backup must hold."""

    def __init__(self, place: Path, start: Start, chance: random.Random) -> None:
        self.chance = chance
        self.stage = Stage(place)
        self.repos = [self.stage.repo, place / "other"]
        new_repository(self.repos[1])
        detect = chance.choice(["off", "on", "unmap"])
        disks = [
            self.stage.disk(name, chance.choice(SIZES), bus=chance.choice(["virtio", "scsi"]), detect_zeroes=detect)
            for name in ("vda", "vdb")
        ]
        self.qemu = start(disks, running=chance.random() < 0.7)
        self.running = self.qemu._cont
        self.bytes = {disk.id: bytearray(reference(self.qemu, disk.id)) for disk in disks}
        self.backups: list[tuple[Path, str, dict[str, bytes]]] = []
        self.log: list[str] = []

    def step(self) -> None:
        """One thing that happens."""
        what = self.chance.choices(
            [self.write, self.zero, self.discard, self.back_up, self.restart, self.look], [8, 4, 3, 4, 0.5, 1]
        )[0]
        what()

    def _range(self) -> tuple[str, int, int]:
        disk = self.chance.choice(list(self.bytes))
        sectors = len(self.bytes[disk]) // 512
        start = self.chance.randrange(sectors)
        if self.chance.random() < 0.5:
            start = start // 128 * 128
        length = min(self.chance.choice([1, 3, 8, 127, 128, 129, 512, 1000]), sectors - start)
        return disk, start * 512, length * 512

    def write(self) -> None:
        disk, offset, length = self._range()
        value = self.chance.choice([0, 1, 2, self.chance.randrange(256)])
        self.log.append(f"write {disk} {offset} {length} {value}")
        self.qemu.device_write(disk, offset, length, value)
        self.bytes[disk][offset : offset + length] = bytes([value]) * length

    def zero(self) -> None:
        disk, offset, length = self._range()
        unmap = self.chance.random() < 0.5
        self.log.append(f"zero {disk} {offset} {length} {unmap}")
        self.qemu.device_zero(disk, offset, length, unmap=unmap)
        self.bytes[disk][offset : offset + length] = bytes(length)

    def discard(self) -> None:
        """What a discarded range holds afterwards is QEMU's to say."""
        disk, offset, length = self._range()
        self.log.append(f"discard {disk} {offset} {length}")
        self.qemu.device_discard(disk, offset, length)
        before = self.bytes[disk][:]
        self.bytes[disk] = bytearray(reference(self.qemu, disk))
        before[offset : offset + length] = self.bytes[disk][offset : offset + length]
        assert before == self.bytes[disk]

    def back_up(self) -> None:
        repo = self.chance.choice(self.repos)
        disks = self.chance.choice([(), (), (), ("vda",), ("vdb",)])
        full, keep = self.chance.random() < 0.1, self.chance.choice([1, 2, 4])
        meanwhile = self.chance.randrange(4)
        state = {disk: bytes(data) for disk, data in self.bytes.items() if not disks or disk in disks}

        def frozen(event: Event) -> None:
            if isinstance(event, Frozen):
                for _ in range(meanwhile):
                    self.chance.choice([self.write, self.zero, self.discard])()

        if self.chance.random() < 0.1:
            self._die(repo)
        self.log.append(f"back up {disks} into {repo.name}, full {full}, keep {keep}, {meanwhile} meanwhile")
        made = self.stage.backup(self.qemu, frozen, repo=repo, disks=disks, full=full, keep_checkpoints=keep)
        self.log.append(f"= {made.id[:8]} {[disk.mode for disk in made.manifest.disks]}")
        self.backups.append((repo, made.id, state))
        self.judge(len(self.backups) - 1)
        assert leftovers(self.qemu, self.stage.scratch) == []

    def _die(self, repo: Path) -> None:
        """A backup that is killed when the disks are frozen."""
        self.log.append(f"die into {repo.name}")

        def killed(event: Event) -> None:
            if isinstance(event, Frozen):
                os.kill(os.getpid(), 9)

        def work() -> int:
            self.stage.backup(self.qemu, killed, repo=repo)
            return 0

        assert forked(work) == -9

    def restart(self) -> None:
        crash = self.chance.random() < 0.3
        self.log.append(f"restart, crash {crash}")
        for disk in self.bytes:
            self.qemu.device_flush(disk)
        if crash:
            self.qemu.kill()
        else:
            self.qemu.shutdown()
        self.qemu.start()
        self.look()

    def look(self) -> None:
        """The model is what the disks hold."""
        for disk, data in self.bytes.items():
            assert reference(self.qemu, disk) == data, disk
            assert sum(chain(self.qemu, disk).values()) <= 2

    def judge(self, number: int) -> None:
        repo, backup, state = self.backups[number]
        repository = open_repository(repo)
        for disk, data in state.items():
            held = read_disk(repository, backup, disk)
            if held != data:
                at = next(i for i, (a, b) in enumerate(zip(held, data, strict=True)) if a != b)
                raise AssertionError(f"backup {backup[:8]}, {disk} differs from byte {at}")

    def end(self) -> None:
        """Every backup still holds what it held, and a real restore of the last one gives the same."""
        for number in range(len(self.backups)):
            self.judge(number)
        if self.backups:
            repo, backup, state = self.backups[-1]
            assert self.stage.contents(backup, repo=repo) == state


@pytest.mark.timeout(int(SECONDS * 4) + 120)
def test_random_lives(lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "SETTLE", 0.0)
    monkeypatch.setattr("pullback.engine.backup.DEFAULT_BASE", str(lab_dir / "sockets"))
    (lab_dir / "sockets").mkdir()
    end = time.monotonic() + SECONDS
    seed = SEED
    while time.monotonic() < end:
        place = lab_dir / str(seed)
        place.mkdir()
        model = Model(place, bare_qemu, random.Random(seed))
        try:
            for _ in range(STEPS):
                model.step()
                if time.monotonic() > end:
                    break
            model.end()
        except BaseException:
            print(f"PULLBACK_TEST_SEED={seed}", *model.log, sep="\n")
            raise
        model.qemu.close()
        seed += 1
