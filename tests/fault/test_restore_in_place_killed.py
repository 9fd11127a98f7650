# SPDX-License-Identifier: Apache-2.0
"""A restore in place that dies: unless the disks are whole they are marked, no backup is made, and it is completed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lab import images
from lab.disks import DiskSpec
from lab.processes import wait_for
from lab.qemu import BareQemu
from pullback.cli.interrupts import Interrupted, run_interruptible
from pullback.engine.domain import DomainAddress
from pullback.engine.events import Event, Note, silent
from pullback.engine.in_place import InPlaceRequest, InPlaceResult, restore_in_place
from pullback.engine.source import DiskSource
from pullback.errors import DomainUnreachable, PullbackError, Refused, RepositoryError
from pullback.nbd.blocking import NbdConnection
from tests.support import dying
from tests.support.api import inside
from tests.support.backups import open_repository
from tests.support.product import KIB, MIB, Stage, forked, references, same
from tests.support.survival import Fault, survives


class Halfway:
    """A stopped domain with a backup of what its disks were, and other contents since."""

    def __init__(self, stage: Stage, start: Callable[..., BareQemu]) -> None:
        self.stage = stage
        self.disks: list[DiskSpec] = [stage.disk("vda", 4 * MIB), stage.disk("vdb", MIB)]
        self.qemu = start(self.disks, name="lab")
        self.fill(1)
        self.wanted = references(self.qemu)
        self.backup = stage.backup(self.qemu).id
        self.fill(50)
        self.before = references(self.qemu)
        self.qemu.shutdown()
        self.images = ",".join(f"{disk.id}={disk.path}" for disk in self.disks)
        self.address = DomainAddress(images=self.images, name="lab")

    def fill(self, first: int) -> None:
        """Differently for each ``first``."""
        for disk, count in zip(self.disks, (12, 4), strict=True):
            for number in range(count):
                self.qemu.device_write(disk.id, number * 256 * KIB + 512, 70 * KIB, first + number)
        self.qemu.device_zero("vda", MIB, 64 * KIB, unmap=True)

    def restore(self, emit: Callable[[Event], None] = silent) -> InPlaceResult:
        """The restore, in this process."""
        return asyncio.run(self._work(emit))

    def _work(self, emit: Callable[[Event], None]) -> Any:
        request = InPlaceRequest(self.backup, self.address)
        return restore_in_place(request, lambda: open_repository(self.stage.repo), emit)

    def hit(self, point: dying.Point, number: signal.Signals = signal.SIGKILL) -> bool:
        """A restore in a child that gets a signal at ``point``; whether it came there."""

        def work() -> int:
            with point(number):
                try:
                    run_interruptible(self._work(silent))
                except Interrupted:
                    return 130
            return 0

        code = forked(work)
        assert code in (0, 130, -number)
        if self.address.images:
            wait_for(lambda: not self.daemons(), "the daemon's end", timeout=30)
        return code != 0

    def daemons(self) -> list[int]:
        """Processes that have the first image open."""
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                try:
                    if any(os.path.samefile(handle, self.disks[0].path) for handle in (process / "fd").iterdir()):
                        found.append(int(process.name))
                except OSError:
                    continue
        return found

    def contents(self) -> dict[str, bytes]:
        return {disk.id: images.raw_bytes(disk.path) for disk in self.disks}

    def marked(self) -> bool:
        """Whether all disks are marked; never only some."""
        found = [any(name.startswith("pullback-restoring:") for name in images.bitmaps(d.path)) for d in self.disks]
        assert len(set(found)) == 1
        return found[0]

    def told(self, *words: str) -> Any:
        """What a command on the stopped domain comes to."""
        return inside([words[0], *words[1:], f"disk:{self.images}"], self.stage.environment())

    def is_marked_or_whole(self) -> bool:
        """What must hold whenever it died; whether it is marked."""
        if not self.marked():
            assert self.contents() in (self.before, self.wanted)
            return False
        refused = self.told("backup")
        assert refused.code == 5
        assert "between two states" in refused.err
        assert "between two states" in self.told("domain", "show").out
        return True

    def completes(self, mode: str = "incremental") -> None:
        """The same command completes it, and the next backup is right."""
        self.restore()
        assert not self.marked()
        same(self.contents(), self.wanted)
        self.qemu.start()
        self.qemu.device_write("vda", 3 * MIB + 512, 1024, 200)
        state = references(self.qemu)
        made = self.stage.backup(self.qemu)
        self.qemu.shutdown()
        assert {disk.mode for disk in made.manifest.disks} == {mode}
        same(self.stage.contents(made.id), state)


@pytest.fixture
def halfway(tmp_path: Path, bare_qemu: Callable[..., BareQemu]) -> Iterator[Halfway]:
    made = Halfway(Stage(tmp_path), bare_qemu)
    yield made
    for pid in made.daemons():
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not made.daemons(), "the daemon's end")


def test_killed_before_any_command(halfway: Halfway) -> None:
    """Each life begins where the last one was killed; the last one has no such command any more."""
    marked, count = 0, 1
    while halfway.hit(dying.before_command(count)):
        with survives(Fault.KILLED_IN_PLACE):
            marked += halfway.is_marked_or_whole()
            count += 2
    assert count > 10
    assert marked > 3
    halfway.completes()


@pytest.mark.fault(Fault.KILLED_IN_PLACE)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_hit_while_it_writes(halfway: Halfway, number: signal.Signals) -> None:
    for at in (1, 5, 9):
        assert halfway.hit(dying.at_call(NbdConnection, "submit_write", at, after=True), number)
        assert halfway.is_marked_or_whole()
    # Until a signal that is heeded is, everything may have been written.
    assert number != signal.SIGKILL or halfway.contents() not in (halfway.before, halfway.wanted)
    halfway.completes()


def nth_write(do: Callable[[], None], count: int = 6) -> Any:
    """At the ``count``-th write ``do`` comes first."""
    method, left = NbdConnection.submit_write, [count]

    def hit(*arguments: Any, **keywords: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            do()
        return method(*arguments, **keywords)

    return mock.patch.object(NbdConnection, "submit_write", hit)


def fails(halfway: Halfway, kind: type[PullbackError]) -> None:
    """A restore that fails half-way, and says so."""
    told: list[Event] = []
    with pytest.raises(kind):
        halfway.restore(told.append)
    assert any(isinstance(event, Note) and "Between two states" in event.message for event in told)
    assert halfway.is_marked_or_whole()


@pytest.mark.fault(Fault.QEMU_KILLED_IN_THE_DATA)
def test_qemu_gone(halfway: Halfway) -> None:
    """The marks were stored before the first write, so they are there whatever became of the bitmaps."""

    def kill() -> None:
        (daemon,) = [pid for pid in halfway.daemons() if pid != os.getpid()]
        os.kill(daemon, signal.SIGKILL)

    with nth_write(kill):
        fails(halfway, DomainUnreachable)
    # Its bitmaps were lost with it, which the next backup says and makes good.
    halfway.completes("full")


@pytest.mark.fault(Fault.REPOSITORY_FAILS)
def test_the_repository_gone(halfway: Halfway) -> None:
    load = DiskSource.load

    def broken(self: DiskSource, *arguments: Any) -> Iterator[Any]:
        for number, one in enumerate(load(self, *arguments)):
            if number == 3:
                raise RepositoryError("the store is gone")
            yield one

    with mock.patch.object(DiskSource, "load", broken):
        fails(halfway, RepositoryError)
    assert halfway.contents() not in (halfway.before, halfway.wanted)
    halfway.completes()


@pytest.mark.fault(Fault.REPOSITORY_FAILS)
def test_a_restore_that_wrote_nothing_leaves_no_mark(halfway: Halfway) -> None:
    with (
        mock.patch("pullback.engine.in_place.changed_spans", side_effect=RepositoryError("no")),
        pytest.raises(RepositoryError),
    ):
        halfway.restore()
    assert not halfway.marked()
    same(halfway.contents(), halfway.before)
    halfway.completes()


@pytest.mark.fault(Fault.KILLED_IN_PLACE)
def test_killed_while_it_writes_into_a_waiting_domain(halfway: Halfway, bare_qemu: Callable[..., BareQemu]) -> None:
    """What it left in QEMU is cleared, and the mark is there also after QEMU ended in order."""
    waiting = bare_qemu(halfway.disks, name="lab", extra_args=["-incoming", "defer"])
    halfway.address = DomainAddress(str(waiting.qmp_path))
    assert halfway.hit(dying.at_call(NbdConnection, "submit_write", 5, after=True))
    assert len(waiting.qmp("query-block-exports")) == 2
    with pytest.raises(Refused, match="between two states"):
        halfway.stage.backup(waiting)
    halfway.restore()
    assert not waiting.qmp("query-block-exports")
    assert not any("restoring" in name for disk in ("vda", "vdb") for name in waiting.bitmaps(disk))
    assert halfway.hit(dying.at_call(NbdConnection, "submit_write", 3, after=True))
    waiting.shutdown()
    halfway.address = DomainAddress(images=halfway.images, name="lab")
    assert halfway.is_marked_or_whole()
    halfway.completes()
