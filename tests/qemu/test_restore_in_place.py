# SPDX-License-Identifier: Apache-2.0
"""Restoring into a domain's own disks: stopped, waiting and paused ones, by changes and by comparison."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import images
from lab.disks import DiskSpec
from lab.processes import run
from lab.qemu import BareQemu
from pullback.engine.domain import DomainAddress
from pullback.engine.events import Emit, Event, Note, silent
from pullback.engine.in_place import InPlaceRequest, InPlaceResult, restore_in_place
from pullback.engine.reader_lock import acquire_for_reading
from pullback.errors import Refused, UsageError
from pullback.repository.locks import RepositoryLock
from tests.support.api import inside
from tests.support.backups import open_repository
from tests.support.product import KIB, MIB, Stage, references, same

Start = Callable[..., BareQemu]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.fixture
def disks(stage: Stage) -> list[DiskSpec]:
    return [stage.disk("vda", 8 * MIB), stage.disk("vdb", 3 * MIB)]


def images_of(disks: list[DiskSpec]) -> str:
    return ",".join(f"{disk.id}={disk.path}" for disk in disks)


def contents(disks: list[DiskSpec]) -> dict[str, bytes]:
    return {disk.id: images.raw_bytes(disk.path, disk.format) for disk in disks}


def into(
    stage: Stage,
    backup: str,
    address: DomainAddress,
    emit: Callable[[Event], None] = silent,
    *,
    only: tuple[str, ...] = (),
    verify: bool = True,
    dry: bool = False,
) -> InPlaceResult:
    """Restore in place, in this process."""
    request = InPlaceRequest(backup, address, only, verify=verify, dry=dry)
    return asyncio.run(restore_in_place(request, lambda: open_repository(stage.repo), emit))


class Lab:
    """A domain that runs for a moment at a time, and the state of its disks at each backup."""

    def __init__(self, stage: Stage, disks: list[DiskSpec], start: Start) -> None:
        self.stage, self.disks = stage, disks
        self.qemu = start(disks, name="lab")
        self.qemu.shutdown()
        self.states: dict[str, dict[str, bytes]] = {}
        self._random = random.Random(7)

    @property
    def stopped(self) -> DomainAddress:
        return DomainAddress(images=images_of(self.disks), name="lab")

    def scribble(self, count: int = 6) -> None:
        """Writes at odd places, zeroes and trims."""
        for disk in self.disks:
            size = images.info(disk.path)["virtual-size"]
            for _ in range(count):
                offset = self._random.randrange(size // 512 - 200) * 512
                self.qemu.device_write(
                    disk.id, offset, self._random.randrange(1, 200) * 512, self._random.randrange(256)
                )
            self.qemu.device_zero(disk.id, self._random.randrange(size // MIB) * MIB, 128 * KIB, unmap=True)

    def run(self, *, backup: bool = True) -> str:
        """The domain runs, writes, and is backed up; the backup's id."""
        self.qemu.start()
        self.scribble()
        made = ""
        if backup:
            state = references(self.qemu)
            made = self.stage.backup(self.qemu).id
            self.states[made] = state
        self.qemu.shutdown()
        return made

    def next_backup(self) -> dict[str, str]:
        """A backup of the running domain, which restores to what its disks are; how each disk was read."""
        self.qemu.start()
        self.scribble(2)
        state = references(self.qemu)
        made = self.stage.backup(self.qemu)
        self.qemu.shutdown()
        same(self.stage.contents(made.id), state)
        return {disk.target: disk.mode for disk in made.manifest.disks}


@pytest.fixture
def lab(stage: Stage, disks: list[DiskSpec], bare_qemu: Start) -> Lab:
    return Lab(stage, disks, bare_qemu)


def ways(result: InPlaceResult) -> dict[str, str]:
    return {disk.target: disk.way for disk in result.disks}


def written(result: InPlaceResult) -> int:
    return sum(disk.bytes_written for disk in result.disks)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_back_to_any_backup_by_its_changes_and_on_incrementally(lab: Lab, which: int) -> None:
    backups = [lab.run() for _ in range(3)]
    lab.run(backup=False)
    result = into(lab.stage, backups[which], lab.stopped)
    assert ways(result) == {"vda": "changes", "vdb": "changes"}
    same(contents(lab.disks), lab.states[backups[which]])
    for disk in lab.disks:
        images.check(disk.path)
        assert all(
            "restoring" not in name and "in-use" not in flags for name, flags in images.bitmaps(disk.path).items()
        )
    assert lab.next_backup() == {"vda": "incremental", "vdb": "incremental"}
    # And back once more, over what was restored.
    into(lab.stage, backups[which], lab.stopped)
    same(contents(lab.disks), lab.states[backups[which]])


def test_what_is_written_is_little(lab: Lab) -> None:
    first = lab.run()
    lab.qemu.start()
    lab.qemu.device_write("vda", 5 * MIB + 512, 1024, 99)
    lab.qemu.shutdown()
    looked = into(lab.stage, first, lab.stopped, dry=True)
    assert [(disk.way, disk.most) for disk in looked.disks] == [("changes", 64 * KIB), ("changes", 0)]
    result = into(lab.stage, first, lab.stopped)
    assert [disk.bytes_written for disk in result.disks] == [64 * KIB, 0]
    same(contents(lab.disks), lab.states[first])


def test_without_a_chain_the_disk_is_compared(lab: Lab) -> None:
    first = lab.run()
    lab.run(backup=False)
    for disk in lab.disks:
        for name in images.bitmaps(disk.path):
            run(["qemu-img", "bitmap", "--remove", disk.path, name])
    result = into(lab.stage, first, lab.stopped, verify=False)
    assert ways(result) == {"vda": "compare", "vdb": "compare"}
    assert 0 < written(result) < 11 * MIB
    same(contents(lab.disks), lab.states[first])
    again = into(lab.stage, first, lab.stopped)
    assert written(again) == 0
    assert lab.next_backup() == {"vda": "full", "vdb": "full"}


def test_bitmaps_that_lie_are_not_believed(lab: Lab) -> None:
    # Shrunk and grown again: its end is zero now, and no bit says so.
    disk = lab.disks[0]
    lab.qemu.start()
    lab.qemu.device_write("vda", 8 * MIB - 64 * KIB, 64 * KIB, 5)
    lab.states["last"] = references(lab.qemu)
    last = lab.stage.backup(lab.qemu).id
    lab.qemu.shutdown()
    run(["qemu-img", "resize", "-q", "--shrink", disk.path, str(7 * MIB)])
    run(["qemu-img", "resize", "-q", disk.path, str(8 * MIB)])
    notes: list[str] = []
    result = into(lab.stage, last, lab.stopped, lambda event: notes.append(str(event)))
    assert ways(result) == {"vda": "compare", "vdb": "changes"}
    assert any("no dirty bitmap says so" in note for note in notes)
    same(contents(lab.disks), lab.states["last"])


def test_one_disk_of_several(lab: Lab) -> None:
    first = lab.run()
    lab.run(backup=False)
    before = contents(lab.disks)
    into(lab.stage, first, lab.stopped, only=("vdb",))
    same(contents(lab.disks), {"vda": before["vda"], "vdb": lab.states[first]["vdb"]})


def test_raw_images_are_compared(stage: Stage, bare_qemu: Start) -> None:
    lab = Lab(stage, [stage.disk("vda", 2 * MIB, "raw")], bare_qemu)
    first = lab.run()
    lab.run(backup=False)
    notes: list[Event] = []
    assert ways(into(stage, first, lab.stopped, notes.append)) == {"vda": "compare"}
    assert any(isinstance(note, Note) and "cannot be marked" in note.message for note in notes)
    same(contents(lab.disks), lab.states[first])


@pytest.mark.parametrize("kind", ["incoming", "shared"])
def test_a_domain_that_has_not_started(stage: Stage, bare_qemu: Start, kind: str) -> None:
    more = {"device_options": {"share-rw": True}} if kind == "shared" else {}
    lab = Lab(stage, [stage.disk("vda", 4 * MIB, **more)], bare_qemu)
    first = lab.run()
    lab.run(backup=False)
    extra = ["-incoming", "defer"] if kind == "incoming" else []
    waiting = bare_qemu(lab.disks, name="lab", extra_args=extra)
    result = into(stage, first, DomainAddress(str(waiting.qmp_path)))
    assert ways(result) == {"vda": "changes"}
    assert not waiting.qmp("query-block-exports")
    assert all("restoring" not in name for name in waiting.bitmaps("vda"))
    waiting.shutdown()
    same(contents(lab.disks), lab.states[first])
    assert lab.next_backup() == {"vda": "incremental"}


def test_what_is_refused_before_anything_is_touched(lab: Lab, stage: Stage, bare_qemu: Start) -> None:
    first = lab.run()
    before = contents(lab.disks)
    other = stage.disk("vdc", 2 * MIB)
    larger = DiskSpec(images.create(stage.place / "larger.qcow2", 9 * MIB), "vda")
    with pytest.raises(UsageError, match="no disk vda"):
        into(stage, first, DomainAddress(images=images_of([other])))
    with pytest.raises(Refused, match="8388608 in the backup"):
        into(stage, first, DomainAddress(images=images_of([larger])), only=("vda",))
    with pytest.raises(UsageError, match="no disk nonsense"):
        into(stage, first, lab.stopped, only=("nonsense",))
    qemu = bare_qemu(lab.disks, name="lab")
    with pytest.raises(Refused, match="in use by another process"):
        into(stage, first, lab.stopped)
    with pytest.raises(Refused, match="does not let another writer"):
        into(stage, first, DomainAddress(str(qemu.qmp_path)))
    assert all("restoring" not in name for name in qemu.bitmaps("vda"))
    qemu.qmp("cont")
    with pytest.raises(Refused, match="runs"):
        into(stage, first, DomainAddress(str(qemu.qmp_path)))
    qemu.shutdown()
    same(contents(lab.disks), before)
    assert not images.bitmaps(larger.path)


def test_a_snapshot_or_export_keeps_a_restore_away(lab: Lab) -> None:
    first = lab.run()
    spec = f"disk:{images_of(lab.disks)}"
    environment = lab.stage.environment()
    assert inside(["snapshot", "create", spec, "kept"], environment).code == 0
    try:
        with pytest.raises(Refused, match="has snapshot kept"):
            into(lab.stage, first, lab.stopped)
    finally:
        assert inside(["snapshot", "delete", spec, "kept"], environment).code == 0


def test_as_a_command(lab: Lab) -> None:
    first = lab.run()
    lab.run(backup=False)
    environment, spec = lab.stage.environment(), f"disk:{images_of(lab.disks)}"
    before = [disk.path.read_bytes() for disk in lab.disks]
    dry = inside(["restore", first, "--into", spec, "--dry-run", "--json"], environment)
    assert dry.code == 0, dry.err
    told = dry.event("restore_in_place")
    assert told["dry_run"] and all(disk["most"] and not disk["bytes_written"] for disk in told["disks"])
    assert [disk.path.read_bytes() for disk in lab.disks] == before
    done = inside(["restore", first, "--into", spec, "--verify"], environment)
    assert done.code == 0, done.err
    assert "by its changes since" in done.out and "read again and compared" in done.out
    same(contents(lab.disks), lab.states[first])
    for wrong in (["--to", "x", "--into", spec], ["--into", spec, "--overwrite"], [], ["--to", "x", "--dry-run"]):
        assert inside(["restore", first, *wrong], environment).code == 2


@pytest.mark.parametrize("late", [False, True], ids=["while it waits", "when it was just taken"])
async def test_cut_off_at_its_lock_it_leaves_none(stage: Stage, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    waits, given_up = asyncio.Event(), threading.Event()

    def taken_late(lock: RepositoryLock, doing: str, emit: Emit) -> None:
        emit(Note("waits"))
        assert given_up.wait(10)
        acquire_for_reading(lock, doing, emit)

    if late:
        monkeypatch.setattr("pullback.engine.in_place.acquire_for_reading", taken_late)
        monkeypatch.setattr(RepositoryLock, "give_up", lambda self: given_up.set())
    loop = asyncio.get_running_loop()
    repository = open_repository(stage.repo)
    with repository.lock(exclusive=not late):
        held = set((stage.repo / "locks").iterdir())
        request = InPlaceRequest("latest", DomainAddress(images="/nowhere"), lock_retry=60)
        restoring = asyncio.ensure_future(
            restore_in_place(
                request, lambda: open_repository(stage.repo), lambda event: loop.call_soon_threadsafe(waits.set)
            )
        )
        async with asyncio.timeout(20):
            await waits.wait()
            restoring.cancel()
            with pytest.raises(asyncio.CancelledError):
                await restoring
        assert set((stage.repo / "locks").iterdir()) == held


def test_a_backup_of_another_domain_is_refused(stage: Stage, disks: list[DiskSpec], bare_qemu: Start) -> None:
    """Unless its disks know the backup (it was called otherwise then), or its images are named themselves."""
    lab = Lab(stage, disks, bare_qemu)
    first = lab.run()
    foreign = [
        images.create(stage.place / f"other-{disk.id}.qcow2", images.info(disk.path)["virtual-size"]) for disk in disks
    ]
    paths = ",".join(f"{disk.id}={path}" for disk, path in zip(disks, foreign, strict=True))
    for dry in (True, False):
        with pytest.raises(UsageError, match="is of domain lab, and this is domain db"):
            into(stage, first, DomainAddress(images=paths, name="db"), dry=dry)
    assert not any(any(images.raw_bytes(path)) for path in foreign)
    lab.run(backup=False)
    into(stage, first, DomainAddress(images=images_of(disks), name="db"))
    same(contents(disks), lab.states[first])
    into(stage, first, DomainAddress(images=paths))
    same({disk.id: images.raw_bytes(path) for disk, path in zip(disks, foreign, strict=True)}, lab.states[first])
