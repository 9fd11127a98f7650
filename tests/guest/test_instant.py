# SPDX-License-Identifier: Apache-2.0
"""One instant over several disks, judged by a guest that writes numbered records to two of them in turn.

Record n+1 is only begun when record n is durable.  So of any instant, whatever the highest record is, all before it
are there.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from lab.processes import wait_for
from lab.vm import Vm
from pullback.engine import freezing
from pullback.engine.domain import Domain, DomainAddress, open_domain
from pullback.engine.events import Event, Frozen
from pullback.nbd.address import UnixAddress
from pullback.plan.command import Paused, Plan
from pullback.plan.method import Method
from pullback.qemu.monitor import Monitor
from tests.support.backups import open_repository, read_disk
from tests.support.product import MIB, Stage

RECORD = 512
POINTS = 20
# Backups of a history, which begins with empty disks: what the guest writes meanwhile has to fit them.
HISTORIES, ROUNDS = 4, 5
# Records that are written during each backup of a history.
MEANWHILE = 200
BASE, HEADERS = 0x400000, 64 + 56


def _open(path: int) -> bytes:
    # open(path, O_RDWR | O_DSYNC)
    return b"\xb8\x02\0\0\0" + b"\xbf" + struct.pack("<I", path) + b"\xbe\x02\x10\0\0" + b"\x31\xd2\x0f\x05"


def program() -> bytes:
    """An ELF program for x86-64, since busybox has nothing that is fast enough.

    For n = 1, 2, …: write n, as 8 bytes of a record, at record n // 2 of /dev/vda (odd) or /dev/vdb (even), O_DSYNC.
    """
    paths = b"/dev/vda\0/dev/vdb\0"
    text = BASE + HEADERS + len(paths)
    record = BASE + 0x2000
    begin = _open(BASE + HEADERS) + b"\x41\x89\xc4" + _open(BASE + HEADERS + 9) + b"\x41\x89\xc5"  # r12, r13
    begin += b"\x45\x31\xf6"  # r14 = 0
    loop = b"\x49\xff\xc6" + b"\x4c\x89\x34\x25" + struct.pack("<I", record)  # r14 += 1; [record] = r14
    loop += b"\x44\x89\xef" + b"\x41\xf6\xc6\x01" + b"\x74\x03" + b"\x44\x89\xe7"  # edi = r14 even ? r13 : r12
    loop += b"\xbe" + struct.pack("<I", record) + b"\xba" + struct.pack("<I", RECORD)
    loop += b"\x4d\x89\xf2" + b"\x49\xd1\xea" + b"\x49\xc1\xe2\x09"  # r10 = r14 / 2 * 512
    loop += b"\xb8\x12\0\0\0" + b"\x0f\x05" + b"\x3d" + struct.pack("<I", RECORD)  # pwrite64
    loop += b"\x74" + struct.pack("b", -(len(loop) + 2))  # again, if all was written
    code = paths + begin + loop + b"\xb8\x3c\0\0\0" + b"\x31\xff" + b"\x0f\x05"  # exit
    size = HEADERS + len(code)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, text, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 7, 0, BASE, BASE, size, 0x4000, 0x1000) + code


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Vm, Stage]]:
    """A guest with two empty disks and the program."""
    stage = Stage(tmp_path_factory.mktemp("instant"))
    with Vm([stage.disk("vda", 64 * MIB), stage.disk("vdb", 64 * MIB)], name="lab") as vm:
        vm.run(f"echo {base64.b64encode(program()).decode()} | base64 -d >/run/records; chmod +x /run/records")
        yield vm, stage


@pytest.fixture
def writing(world: tuple[Vm, Stage]) -> Iterator[None]:
    """The program writes."""
    with the_program_writing(world[0]):
        yield


@contextmanager
def the_program_writing(vm: Vm) -> Iterator[None]:
    """It writes from the start, over disks that are empty."""
    vm.run("blkdiscard /dev/vda; blkdiscard /dev/vdb; echo 3 >/proc/sys/vm/drop_caches")
    job = vm.start_background("exec /run/records")
    try:
        yield
    finally:
        job.stop()


def records(uri: str) -> list[int]:
    """The numbers on a disk, by place."""
    done = subprocess.run(["nbdcopy", uri, "-"], capture_output=True, check=True)
    return numbers(done.stdout)


def numbers(disk: bytes) -> list[int]:
    """The numbers in what a disk holds, by place."""
    return memoryview(disk).cast("Q")[:: RECORD // 8].tolist()


def missing(odd: list[int], even: list[int]) -> list[int]:
    """The records that are not there although a later one is; and the latest."""
    latest = max(*odd, *even)
    there = {*odd, *even}
    return [number for number in range(1, latest) if number not in there]


async def points(vm: Vm, stage: Stage, method: Method, count: int) -> list[tuple[int, int, float]]:
    """Make snapshots; of each the latest record, how many before it are missing, and for how long the guest stood."""
    async with open_domain(DomainAddress(socket=str(vm.qmp_path))) as domain:
        return [await _point(domain, stage, method, f"p{number}") for number in range(count)]


async def _point(domain: Domain, stage: Stage, method: Method, name: str) -> tuple[int, int, float]:
    snapshot = await domain.create_snapshot(name=name, scratch=str(stage.scratch), method=method)
    try:
        exports = await domain.start_export(snapshot, address=UnixAddress(str(stage.place / "nbd")))
        odd, even = [await asyncio.to_thread(records, export.uri) for export in exports]
    finally:
        await snapshot.delete()
    return max(*odd, *even), len(missing(odd, even)), snapshot.paused_seconds


@pytest.mark.usefixtures("writing")
@pytest.mark.parametrize("method", ["filter", "job"])
def test_no_point_holds_a_record_without_the_one_before(world: tuple[Vm, Stage], method: Method) -> None:
    found = asyncio.run(points(*world, method, POINTS))
    assert [lost for _, lost, _ in found] == [0] * POINTS
    latest = [number for number, _, _ in found]
    assert all(after > before for before, after in itertools.pairwise(latest)), "the guest stood still"
    pauses = sorted(round(paused * 1000, 1) for _, _, paused in found)
    print(f"{method}: {latest[-1]} records, paused for {pauses[0]} to {pauses[-1]} ms, median {pauses[POINTS // 2]}")
    assert (pauses[-1] == 0) == (method == "job")


@pytest.mark.usefixtures("writing")
def test_the_judge_sees_a_gap_between_the_disks(world: tuple[Vm, Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pause, and with a moment between the two filters, records get lost."""
    freeze, execute = freezing.freeze, Monitor.execute

    def without_pause(*arguments: Any, **keywords: Any) -> Plan:
        actions = freeze(*arguments, **keywords).actions
        return Plan(tuple(step for one in actions for step in (one.steps if isinstance(one, Paused) else (one,))))

    async def slow(self: Monitor, command: str, *more: Any, **keywords: Any) -> Any:
        if command == "qom-set":
            await asyncio.sleep(0.1)
        return await execute(self, command, *more, **keywords)

    monkeypatch.setattr(freezing, "freeze", without_pause)
    with mock.patch.object(Monitor, "execute", slow):
        found = asyncio.run(points(*world, "filter", 3))
    assert any(lost for _, lost, _ in found)


def held(stage: Stage, backup: str) -> tuple[list[int], list[int]]:
    """The numbers on both disks of a backup, by place."""
    repository = open_repository(stage.repo)
    odd, even = (numbers(read_disk(repository, backup, disk)) for disk in ("vda", "vdb"))
    return odd, even


def wait_for_records(vm: Vm, count: int) -> None:
    """Wait until the program has written so many more."""
    before = writes(vm)
    # The first of these writes may have begun before.
    wait_for(lambda: writes(vm) > before + count, f"{count} more records", timeout=120)


def writes(vm: Vm) -> int:
    """How many writes of the guest QEMU has done."""
    return sum(block["stats"]["wr_operations"] for block in vm.qmp("query-blockstats") if "qdev" in block)


@pytest.mark.parametrize("history", range(HISTORIES))
def test_every_backup_is_a_prefix_of_what_was_written(world: tuple[Vm, Stage], history: int) -> None:
    """Full and incremental ones, one after the other while the guest writes; the first one of a history may be an
    incremental one, too, over disks that were discarded."""
    vm, stage = world

    def write_on(event: Event) -> None:
        if isinstance(event, Frozen):
            wait_for_records(vm, MEANWHILE)

    if history % 2:
        stage.backup(vm)
    made: list[tuple[str, set[str]]] = []
    with the_program_writing(vm):
        for number in range(ROUNDS):
            backup = stage.backup(vm, write_on, full=history % 2 == 0 and number == 0)
            made.append((backup.id, {disk.mode for disk in backup.manifest.disks}))
    assert [kinds for _, kinds in made[1:]] == [{"incremental"}] * (ROUNDS - 1)
    assert made[0][1] == {"incremental" if history % 2 else "full"}
    points = [held(stage, backup) for backup, _ in made]
    assert [missing(*point) for point in points] == [[]] * ROUNDS
    latest = [max(*odd, *even) for odd, even in points]
    assert all(after >= before + MEANWHILE for before, after in itertools.pairwise(latest)), "the guest stood still"
    print(f"{ROUNDS} backups while {latest[-1]} records were written")


def test_the_judge_counts_what_is_missing() -> None:
    assert missing([1, 3, 5], [2, 4, 0]) == []
    assert missing([1, 3, 0], [2, 0, 6]) == [4, 5]
