# SPDX-License-Identifier: Apache-2.0
"""A writer that is killed at any system call: restic finds nothing wrong, every backup is whole, the next one works.

The calls are counted, not listed: what the store does today is what is tried.  All points are tried one after the
other on one repository, so that every recovery has to cope with what the ones before it left; now and then restic
forgets and prunes there.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pullback.repository import pack, writer
from tests.support.backups import new_repository, open_repository, read_disk, store_backup
from tests.support.restic import Restic, needs_restic
from tests.support.store_calls import calls_of, killed_at
from tests.support.survival import Fault, survives

pytestmark = needs_restic
CHUNK = 4 << 10


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several packs and index files in a backup of a few chunks."""
    monkeypatch.setattr(pack, "MAX_BLOBS", 4)
    monkeypatch.setattr(writer, "MAX_INDEX_BLOBS", 8)
    yield


class Life:
    """A repository, and what each backup in it must hold."""

    def __init__(self, place: Path) -> None:
        self.place = place
        new_repository(place)
        self.restic = Restic(place)
        self.states: dict[str, bytes] = {}
        self._chance = random.Random(5)
        self._disk = bytearray(self._chance.randbytes(8 * CHUNK))
        self._day = 0
        self.backup()

    def go_on(self) -> None:
        """The disk changes in two places; the first segment stays as it is once in a while."""
        self._day += 1
        for half in (0, 4) if self._day % 3 else (4,):
            at = (half + self._chance.randrange(4)) * CHUNK
            self._disk[at : at + CHUNK] = self._chance.randbytes(CHUNK)

    def store(self) -> str:
        """One backup, from lock to unlock, as another process would make it."""
        repository = open_repository(self.place)
        segments = [bytes(self._disk[: 4 * CHUNK]), bytes(self._disk[4 * CHUNK :])]
        with repository.lock():
            return store_backup(repository, {"vda": segments}, day=self._day, chunk=CHUNK)

    def backup(self) -> None:
        """A backup that nothing happens to."""
        self.go_on()
        self.states[self.store()] = bytes(self._disk)

    def judge(self) -> None:
        """All backups that are there must be known, and right; a new one is right if it is the current disk."""
        repository = open_repository(self.place)
        found = {snapshot.id for snapshot in repository.snapshots()}
        assert found >= set(self.states)
        extra = found - set(self.states)
        assert len(extra) <= 1
        self.states |= {backup: bytes(self._disk) for backup in extra}
        for backup, state in self.states.items():
            assert read_disk(repository, backup, "vda") == state

    def recovers(self) -> None:
        """Right after the kill restic finds nothing wrong; the next backup works and clears the dead one's lock."""
        assert b"no errors were found" in self.restic.run("check", "--no-lock")
        self.judge()
        self.backup()
        self.judge()
        assert self.locks() == []

    def locks(self) -> list[str]:
        """The locks, without what never became one."""
        return [path.name for path in (self.place / "locks").iterdir() if "-tmp-" not in path.name]

    def tidy(self) -> None:
        """restic forgets all but a few backups, and removes what the dead left."""
        self.restic.run("forget", "--keep-last", "4", "--prune", "--max-unused", "0")
        self.restic.check()
        kept = {snapshot.id for snapshot in open_repository(self.place).snapshots()}
        assert kept == set(list(self.states)[-4:])
        self.states = {backup: state for backup, state in self.states.items() if backup in kept}

    def ends_well(self, out: Path) -> None:
        """restic cleans up, and restores the first and the last backup with the same bytes."""
        self.tidy()
        self.judge()
        names = list(self.states)
        for name in (names[0], names[-1]):
            self.restic.run("restore", name, "--target", str(out / name))
            files = sorted((out / name / "web/vda").glob("*/*.raw"))
            assert b"".join(path.read_bytes() for path in files) == self.states[name]


def kill_everywhere(life: Life, work: Callable[[], object]) -> list[str]:
    """Kill ``work`` at every one of its calls; their names."""
    hit: list[str] = []
    while True:
        with survives(Fault.KILLED_AT_A_STORE_CALL):
            life.go_on()
            name = killed_at(work, len(hit) + 1)
            life.recovers()
        if not name:
            return hit
        hit.append(name)
        if len(hit) % 10 == 0:
            life.tidy()


def test_killed_at_every_call_of_a_backup(tmp_path: Path) -> None:
    life = Life(tmp_path / "repo")
    life.go_on()
    calls = calls_of(lambda: life.states.update({life.store(): bytes(life._disk)}))
    files = calls.count("rename")
    # Lock, two packs or more, index, snapshot file: else this test shows less than it says.
    assert files >= 5
    assert calls.count("writev") == files
    assert calls.count("fsync") > 2 * files
    hit = kill_everywhere(life, life.store)
    assert {"open", "writev", "fchmod", "fsync", "rename", "unlink"} <= set(hit)
    assert len(hit) > 5 * 5
    life.ends_well(tmp_path / "out")


def test_killed_at_every_call_while_the_lock_is_refreshed(tmp_path: Path) -> None:
    life = Life(tmp_path / "repo")

    def refresh() -> None:
        with open_repository(life.place).lock() as lock:
            lock._refresh()

    assert kill_everywhere(life, refresh).count("rename") == 2
    life.ends_well(tmp_path / "out")


def test_killed_where_directories_are_missing(tmp_path: Path) -> None:
    """As after a copy with a tool that drops empty ones: the store makes them on the way."""
    life = Life(tmp_path / "repo")
    hit: list[tuple[int, str]] = []
    # Packs are called by chance: now and then, where one goes is there already, whenever one is stored.
    while len(hit) < 24 or (not any(at > 3 and name == "mkdir" for at, name in hit) and len(hit) < 240):
        at = len(hit) % 24 + 1
        with survives(Fault.KILLED_AT_A_STORE_CALL):
            life.go_on()
            for folder in sorted(life.place.rglob("*"), reverse=True):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            hit.append((at, killed_at(life.store, at)))
            (life.place / "locks").mkdir(exist_ok=True)  # which restic does not do without
            life.recovers()
    made = [at for at, name in hit if name == "mkdir"]
    assert made[0] <= 3 < made[-1]
    life.ends_well(tmp_path / "out")


@pytest.mark.fault(Fault.KILLED_AT_A_STORE_CALL)
def test_a_lock_of_the_dead_costs_its_successor_nothing(tmp_path: Path) -> None:
    """An exclusive one, even: whoever was pruning is no more."""
    life = Life(tmp_path / "repo")

    def prune() -> None:
        with open_repository(life.place).lock(exclusive=True):
            (life.place / "a pack").unlink(missing_ok=True)

    for at in range(1, 20):
        if killed_at(prune, at) == "unlink":
            break
    assert len(life.locks()) == 1
    life.recovers()


def test_init_killed_at_every_call(tmp_path: Path) -> None:
    """There is no repository, and it can be made; or there is one, and it works."""
    calls = calls_of(lambda: new_repository(tmp_path / "calls"))
    # One of the many directories is like the other.
    points = [at for at, name in enumerate(calls, 1) if name != "mkdir" or at < 10]
    assert len(points) > 15
    for at in [*points, len(calls) + 1]:
        with survives(Fault.KILLED_AT_A_STORE_CALL):
            place = tmp_path / f"repo-{at}"
            name = killed_at(functools.partial(new_repository, place), at)
            assert name == (calls[at - 1] if at <= len(calls) else "")
            if not (place / "config").exists():
                new_repository(place)
            open_repository(place)
            Restic(place).check()
