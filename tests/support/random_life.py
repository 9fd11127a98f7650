# SPDX-License-Identifier: Apache-2.0
"""Random lives of a domain: it writes, restarts, crashes, changes its disks; it is backed up, restored and backed up
again, and whoever does that is killed at times.

What must hold: every backup holds what the disks held at its instant, as long as it is kept; a restore gives that back;
and a backup is incremental whenever nothing has happened that tracking cannot survive.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from lab import images
from lab.processes import wait_for
from pullback.engine.backup import BackupRequest, BackupResult, run_backup
from pullback.engine.events import Event, Frozen, silent
from pullback.engine.in_place import InPlaceRequest, restore_in_place
from pullback.engine.pull import Pull
from pullback.engine.storing import Storing
from pullback.nbd.blocking import NbdConnection
from pullback.qemu import guard
from pullback.repository.local_store import LocalStore
from pullback.repository.repository import Repository
from tests.support import dying
from tests.support.backups import new_repository, open_repository, read_disk
from tests.support.domain_model import SIZES, DomainModel, Parked, Start
from tests.support.judging import judge
from tests.support.product import forked, leftovers, run_state, same
from tests.support.survival import Fault, survives

#: Where data moves: a method, and how many of its calls a small backup makes.
_CALLS = [
    (NbdConnection, "submit_reads", 8),
    (NbdConnection, "submit_write", 8),
    (Pull, "finish_segment", 2),
    (LocalStore, "save", 4),
    (Repository, "save_index", 1),
    (Repository, "save_snapshot", 1),
    (Storing, "commit", 1),
]


@dataclass
class Kept:
    """A backup that has not been forgotten, and what it must hold."""

    repo: Path
    id: str
    state: dict[str, bytes]


class RandomLife:
    """One life; ``done`` counts what was done in it."""

    def __init__(self, place: Path, start: Start, seed: int) -> None:
        self.chance = random.Random(seed)
        self.model = DomainModel(place, start, self.chance)
        self.repos = [
            self.model.stage.repo,
            *(place / f"other-{number}" for number in range(self.chance.choice([1, 2]))),
        ]
        for repo in self.repos[1:]:
            new_repository(repo)
        self.kept: list[Kept] = []
        self.done: Counter[str] = Counter()
        # By repository and disk: its next backup there has to be an incremental one.
        self.followed: set[tuple[Path, str]] = set()
        if self.chance.random() < 0.7:
            self.model.start(self.chance.random() < 0.7)

    def step(self) -> None:
        """One thing that happens, of those that can happen now."""
        always: dict[Callable[[], None], float] = {
            self.write: 8,
            self.back_up: 5,
            self.kill_a_backup: 0.7,
            self.restore: 0.5,
            self.forget: 0.4,
            self.snapshot: 1,
            self.resize: 1,
        }
        running = {self.stop: 1.5, self.crash: 0.3}
        stopped = {self.start: 3.0, self.change_disks: 3.0, self.restore_in_place: 1.2}
        now = always | (running if self.model.qemu is not None else stopped)
        what = self.chance.choices(list(now), list(now.values()))[0]
        self.done[what.__name__] += 1
        what()

    def end(self) -> None:
        """Every backup still holds what it held, restored as well, and restic finds nothing wrong."""
        if self.model.qemu is not None:
            self.stop()
        for name in list(self.model.snapshots):
            self.model.delete_snapshot(name)
        self.model.look()
        for one in self.kept:
            self._judge(one)
        if self.kept:
            self.restore()
            judge(self.chance.choice(self.kept).repo)

    # -- the domain -----------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Snapshots of a stopped domain let nobody write."""
        if self.model.qemu is None and self.model.snapshots:
            return
        self.model.write([self.model.some_change() for _ in range(self.chance.randrange(1, 4))])

    def start(self) -> None:
        self.model.start(self.chance.random() < 0.7)

    def stop(self) -> None:
        """Somebody may take a copy of an image then."""
        self.model.stop()
        if self.chance.random() < 0.9:
            self.model.parked.append(self.model.copy(self.chance.choice(list(self.model.bytes))))

    def crash(self) -> None:
        """What bitmaps held is lost, so everything is read whole once."""
        self.model.stop(crash=True, flush=self.chance.random() < 0.5)
        self._lost_track(*self.model.bytes)

    def resize(self) -> None:
        """Grown, shrunk, or shrunk and grown again so that it is as large as before."""
        if self.model.snapshots:
            return
        self.model.recover()
        disk = self.chance.choice(list(self.model.bytes))
        now = len(self.model.bytes[disk])
        sizes = [size for size in SIZES if size != now]
        smaller = [size for size in sizes if size < now]
        if smaller and self.chance.random() < 0.6:
            self.model.resize(disk, [self.chance.choice(smaller), now])
        else:
            self.model.resize(disk, [self.chance.choice(sizes)])
        self._lost_track(disk)
        self._tempt(disk)

    def change_disks(self) -> None:
        """A new one, one that is lost and may come back, or one that is put back to an older copy."""
        for name in list(self.model.snapshots):
            self.model.delete_snapshot(name)
        what = self.chance.choice(["new", "lose", *["back"] * 5])
        disk = self.chance.choice(["vda", "vdb", "vdc"])
        if what == "new" or (what == "back" and not self.model.parked):
            spec = self.model.new_disk(disk)
            self._attach(Parked(spec, bytes(images.info(spec.path)["virtual-size"])))
        elif what == "back":
            self._attach(self.model.parked.pop(self.chance.randrange(len(self.model.parked))))
        elif len(self.model.bytes) > 1:
            disk = self.chance.choice(list(self.model.bytes))
            self.model.parked.append(self.model.detach(disk))
            self._lost_track(disk)

    def _attach(self, parked: Parked) -> None:
        self.model.attach(parked)
        self._lost_track(parked.spec.id)
        self._tempt(parked.spec.id)

    def _tempt(self, disk: str) -> None:
        """A backup where the last one of this disk is, before anything else happens to it."""
        repos = [one.repo for one in self.kept if disk in one.state]
        if repos and self.chance.random() < 0.8:
            self.done["back_up"] += 1
            self._back_up(repos[-1], self._request())

    def _lost_track(self, *disks: str) -> None:
        self.followed = {(repo, disk) for repo, disk in self.followed if disk not in disks}

    # -- its snapshots --------------------------------------------------------------------------------------------

    def snapshot(self) -> None:
        """One is read, deleted or made."""
        model, some = self.model, list(self.model.snapshots)
        model.recover()
        if some and self.chance.random() < 0.6:
            name = self.chance.choice(some)
            model.judge_snapshot(name)
            if self.chance.random() < 0.5:
                model.delete_snapshot(name)
        elif len(some) < 3:
            disks = self._some_disks()
            tracked = set(disks or model.bytes) <= set(model.tracked_disks)
            name = f"mine-{model.number()}" if tracked and self.chance.random() < 0.5 else None
            model.judge_snapshot(model.make_snapshot(disks, name))

    def _some_disks(self) -> tuple[str, ...]:
        return (self.chance.choice(list(self.model.bytes)),) if self.chance.random() < 0.3 else ()

    # -- its backups ----------------------------------------------------------------------------------------------

    def _request(self, disks: tuple[str, ...] = ()) -> BackupRequest:
        return BackupRequest(
            self.model.address,
            disks,
            full=self.chance.random() < 0.1,
            scratch=str(self.model.stage.scratch),
            method="job" if self.chance.random() < 0.1 else None,
            keep_checkpoints=self.chance.choice([1, 2, 4]),
            prove=self.chance.choice(["sample", "all"]) if self.chance.random() < 0.15 else None,
        )

    def back_up(self) -> None:
        self._back_up(self.chance.choice(self.repos), self._request(self._some_disks()))

    def _back_up(self, repo: Path, request: BackupRequest) -> None:
        state = {
            disk: data for disk, data in self.model.contents().items() if not request.disks or disk in request.disks
        }
        meanwhile = self.chance.randrange(4) if self.model.qemu is not None else 0

        def frozen(event: Event) -> None:
            if isinstance(event, Frozen) and meanwhile:
                self.model.write([self.model.some_change() for _ in range(meanwhile)])

        self.model.log.append(f"back up into {repo.name}: {request}")
        made: BackupResult = asyncio.run(run_backup(request, lambda: open_repository(repo), frozen))
        self.model.log.append(f"= {made.id[:8]} {[(one.target, one.mode, one.reason) for one in made.manifest.disks]}")
        for one in made.manifest.disks:
            assert one.mode == "incremental" or request.full or (repo, one.target) not in self.followed, one.reason
            if one.checkpoint is not None:
                self.followed.add((repo, one.target))
        self._keep(repo, made.id, state)
        if not self.model.snapshots and self.model.qemu is not None:
            assert leftovers(self.model.qemu, self.model.stage.scratch) == []

    def _keep(self, repo: Path, backup: str, state: dict[str, bytes]) -> None:
        self.kept.append(Kept(repo, backup, state))
        self._judge(self.kept[-1])

    def _judge(self, one: Kept) -> None:
        repository = open_repository(one.repo)
        same({disk: read_disk(repository, one.id, disk) for disk in one.state}, one.state)

    def _blow(self) -> tuple[str, dying.Point]:
        """A point to die at, which may be beyond the end."""
        if self.chance.random() < 0.5:
            count = self.chance.randrange(1, 40)
            how = self.chance.choice([dying.before_command, dying.after_sending])
            return f"{how.__name__} (command {count})", how(count)
        owner, name, most = self.chance.choice(_CALLS)
        count, after = self.chance.randrange(1, most + 1), self.chance.random() < 0.5
        return f"at {name} {count}, after {after}", dying.at_call(owner, name, count, after)

    def kill_a_backup(self) -> None:
        """Whatever it left, what follows copes with; it may have been stored, and counts then."""
        repo, request = self.chance.choice(self.repos), self._request()
        told, point = self._blow()
        self.model.log.append(f"a backup into {repo.name} is killed {told}: {request}")
        before = set(self.model.stage.listed(repo))

        def work() -> int:
            with point(signal.SIGKILL):
                asyncio.run(run_backup(request, lambda: open_repository(repo), silent))
            return 0

        code = forked(work)
        self.model.log.append(f"= {code}")
        assert code in (0, -signal.SIGKILL)
        fault = Fault.KILLED_AT_A_COMMAND if "command" in told else Fault.KILLED_IN_THE_DATA
        with survives(fault) if code else nullcontext():
            for backup in set(self.model.stage.listed(repo)) - before:
                self._keep(repo, backup, self.model.contents())
            if self.model.qemu is not None and self.model.qemu._cont:
                qemu = self.model.qemu
                wait_for(lambda: run_state(qemu) == "running", "the domain to run again", timeout=guard.PERSISTENCE + 5)

    def forget(self) -> None:
        """Some backups of one repository, the newest or any; what is left holds what it held."""
        repo = self.chance.choice(self.repos)
        mine = [one for one in self.kept if one.repo == repo]
        gone = [one for one in mine if self.chance.random() < 0.3]
        if not gone:
            return
        self.model.log.append(f"forget {[one.id[:8] for one in gone]} of {repo.name}")
        place = {"RESTIC_REPOSITORY": str(repo)}
        # restic does nothing beside the lock of a backup that was killed, until it is told to.
        assert self.model.stage.cli("unlock", env=place).code == 0
        done = self.model.stage.cli("forget", *(one.id for one in gone), "--prune", env=place)
        assert done.code == 0, done.err
        self.kept = [one for one in self.kept if one not in gone]
        self.followed = {(place, disk) for place, disk in self.followed if place != repo}
        for one in mine:
            if one not in gone:
                self._judge(one)

    # -- restores -------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """To new images."""
        if not self.kept:
            return
        one = self.chance.choice(self.kept)
        format = self.chance.choice(["qcow2", "raw"])
        self.model.log.append(f"restore {one.id[:8]} to {format}")
        made = self.model.stage.restore(one.id, repo=one.repo, format=format)
        same({disk.target: images.raw_bytes(Path(disk.path), format) for disk in made.disks}, one.state)
        for disk in made.disks:
            Path(disk.path).unlink()

    def restore_in_place(self) -> None:
        """Into the stopped domain's disks; killed before, at times."""
        for name in list(self.model.snapshots):
            self.model.delete_snapshot(name)
        fitting = [(one, disks) for one in self.kept if (disks := self._fitting(one))]
        if not fitting:
            return
        one, disks = self.chance.choice(fitting)
        request = InPlaceRequest(one.id, self.model.address, disks, verify=self.chance.random() < 0.5)
        told, point = self._blow()
        code = 0

        def work() -> int:
            with point(signal.SIGKILL):
                asyncio.run(restore_in_place(request, lambda: open_repository(one.repo), silent))
            return 0

        if self.chance.random() < 0.3:
            self.model.log.append(f"restore {one.id[:8]} in place, killed {told}")
            code = forked(work)
            assert code in (0, -signal.SIGKILL)
        self.model.log.append(f"restore {one.id[:8]} in place: {disks}")
        with survives(Fault.KILLED_IN_PLACE) if code else nullcontext():
            made = asyncio.run(restore_in_place(request, lambda: open_repository(one.repo), silent))
            self.model.log.append(f"= {[(disk.target, disk.way, disk.reason) for disk in made.disks]}")
            for disk in disks:
                self.model.bytes[disk] = bytearray(one.state[disk])
            self.model.look()

    def _fitting(self, one: Kept) -> tuple[str, ...]:
        now = self.model.bytes
        return tuple(disk for disk, data in one.state.items() if disk in now and len(now[disk]) == len(data))
