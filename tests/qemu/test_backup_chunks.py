# SPDX-License-Identifier: Apache-2.0
"""How backups of a real QEMU are cut into chunks: what is stored, and that it stays right."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.qemu import BareQemu
from pullback.engine.backup import BackupResult
from pullback.engine.domain import DomainAddress
from pullback.model.units import CHUNK, HOT_CHUNK
from pullback.repository.layout import StoredBackup
from tests.support.backups import open_repository
from tests.support.product import KIB, MIB, Stage, leftovers, reference, references, same

Start = Callable[..., BareQemu]
SIZE = 40 * MIB + 100 * KIB


def foreign_server(qemu: BareQemu) -> None:
    """Somebody else's export: QEMU's one NBD server is taken, and backups are pushed."""
    qemu.qmp("blockdev-add", driver="null-co", **{"node-name": "theirs", "size": MIB})
    qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(qemu.directory / "theirs")}})
    qemu.qmp("block-export-add", type="nbd", id="theirs", **{"node-name": "theirs"})


@pytest.fixture(params=["pull", "push"])
def domain(request: pytest.FixtureRequest, lab_dir: Path, bare_qemu: Start) -> tuple[Stage, BareQemu]:
    """A domain with a disk of noise, backed up once; pulled, and pushed."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", SIZE)], running=True)
    if request.param == "push":
        foreign_server(qemu)
    for start in range(0, SIZE, 4 * MIB):
        qemu.device_write(
            "vda", start, min(4 * MIB, SIZE - start), random.Random(start).randbytes(min(4 * MIB, SIZE - start))
        )
    assert backup(stage, qemu).manifest.disks[0].mode == "full"
    return stage, qemu


def backup(stage: Stage, qemu: BareQemu, **more: bool) -> BackupResult:
    """A backup, held against what the disk holds."""
    state = references(qemu)
    made = stage.backup(qemu, **more)
    same(stage.contents(made.id), state)
    return made


def lengths(stage: Stage, made: str) -> list[int]:
    """The lengths of the chunks of the disk's first segment."""
    stored = StoredBackup(repository := open_repository(stage.repo), repository.find(made))
    return [length for _, length in stored.content(stored.segments("vda")[0])]


def test_a_disk_begins_in_large_chunks(domain: tuple[Stage, BareQemu]) -> None:
    stage, _ = domain
    assert lengths(stage, *stage.listed()) == [CHUNK] * (SIZE // CHUNK) + [SIZE % CHUNK]


@pytest.mark.parametrize("domain", ["pull"], indirect=True)
def test_a_change_in_part_is_stored_large_once_and_small_from_then_on(domain: tuple[Stage, BareQemu]) -> None:
    stage, qemu = domain
    new = []
    for value in range(3):
        for slot in (3, 100):
            qemu.device_write("vda", slot * CHUNK + 70 * KIB, 4096, value + 1)
        made = backup(stage, qemu)
        new.append(made.manifest.disks[0].bytes_new)
    assert new == [2 * CHUNK, 2 * HOT_CHUNK, 2 * HOT_CHUNK]
    assert lengths(stage, made.id)[2:8] == [CHUNK, *[HOT_CHUNK] * 4, CHUNK]
    stage.restic.check()


@pytest.mark.parametrize("domain", ["pull"], indirect=True)
def test_scattered_changes_cut_all_of_a_segment_the_second_time(domain: tuple[Stage, BareQemu]) -> None:
    stage, qemu = domain
    slots = SIZE // CHUNK
    new = []
    for round in range(3):
        for slot in range(20):
            qemu.device_write("vda", (slot * 8 + round) * CHUNK + 4096, 4096, round + 1)
        made = backup(stage, qemu)
        new.append(made.manifest.disks[0].bytes_new)
    assert new == [20 * CHUNK, (slots - 20) * CHUNK + SIZE % CHUNK, 20 * HOT_CHUNK]
    assert set(lengths(stage, made.id)[:-2]) == {HOT_CHUNK}
    assert leftovers(qemu, stage.scratch) == []


def test_a_whole_backup_stores_only_what_differs(domain: tuple[Stage, BareQemu]) -> None:
    """Whether tracking was lost or it was asked for: what did not change has the chunks it had."""
    stage, qemu = domain
    for value in range(2):
        qemu.device_write("vda", 5 * CHUNK + 70 * KIB, 4096, value + 1)
        backup(stage, qemu)
    again = backup(stage, qemu, full=True)
    assert again.manifest.disks[0].mode == "full"
    assert again.manifest.disks[0].bytes_read == SIZE
    assert again.manifest.disks[0].bytes_new == 0
    assert again.bytes_stored < 64 * KIB
    for name in qemu.bitmaps("vda"):
        qemu.qmp("block-dirty-bitmap-remove", node=qemu.disk("vda").node, name=name)
    qemu.device_write("vda", 20 * CHUNK, 4096, 9)
    lost = backup(stage, qemu)
    assert lost.manifest.disks[0].mode == "full"
    assert lost.manifest.disks[0].bytes_new == CHUNK


def test_what_disks_and_domains_have_in_common_is_stored_once(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    content = random.Random(3).randbytes(MIB)
    disks = [stage.disk(name, 2 * MIB) for name in ("vda", "vdb", "vdc", "vdd")]
    first, second = bare_qemu(disks[:2]), bare_qemu(disks[2:])
    for qemu, names in ((first, ("vda", "vdb")), (second, ("vdc", "vdd"))):
        for number, name in enumerate(names):
            qemu.device_write(name, number * 512 * KIB, MIB, content)
    made = stage.backup(first)
    assert sum(disk.bytes_new for disk in made.manifest.disks) == MIB
    other = stage.backup(second, domain=DomainAddress(str(second.qmp_path), name="other"))
    assert [disk.bytes_new for disk in other.manifest.disks] == [0, 0]
    assert other.bytes_stored < 16 * KIB
    same(stage.contents(other.id), references(second))


@pytest.mark.parametrize("domain", ["pull"], indirect=True)
def test_what_is_written_into_zeroes_is_one_chunk(domain: tuple[Stage, BareQemu]) -> None:
    stage, qemu = domain
    qemu.device_zero("vda", 8 * CHUNK, 4 * CHUNK)
    assert backup(stage, qemu).manifest.disks[0].bytes_new == 0
    qemu.device_write("vda", 9 * CHUNK + 8192, 4096, 1)
    made = backup(stage, qemu)
    assert made.manifest.disks[0].bytes_new == CHUNK
    assert set(lengths(stage, made.id)[:-1]) == {CHUNK}


def test_hot_chunks_when_the_disk_is_pushed(lab_dir: Path, bare_qemu: Start) -> None:
    """Pulled until it is hot; pushed from then on: QEMU sends 256 KiB, of which 64 are new."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 4 * MIB)], running=True)
    qemu.device_write("vda", 0, 4 * MIB, random.Random(7).randbytes(4 * MIB))
    backup(stage, qemu)
    qemu.device_write("vda", 3 * CHUNK + 70 * KIB, 4096, 1)
    backup(stage, qemu)
    foreign_server(qemu)
    qemu.device_write("vda", 3 * CHUNK + 70 * KIB, 4096, 2)
    qemu.device_write("vda", 9 * CHUNK, 4096, 2)
    made = backup(stage, qemu)
    assert made.manifest.disks[0].mode == "incremental"
    assert made.manifest.disks[0].bytes_new == HOT_CHUNK + CHUNK
    assert lengths(stage, made.id)[2:8] == [CHUNK, *[HOT_CHUNK] * 4, CHUNK]
    stage.restic.check()


@pytest.mark.parametrize("size", [2 * MIB, 2 * MIB + 100 * KIB, 512])
def test_a_shrink_and_a_growth_between_two_pushed_backups(lab_dir: Path, bare_qemu: Start, size: int) -> None:
    """Nothing is dirty then, and the end of the disk is zero; the other disk stays incremental."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 4 * MIB), stage.disk("vdb", MIB)])
    foreign_server(qemu)
    qemu.device_write("vda", 0, 3 * MIB, 0x91)
    qemu.device_write("vdb", 0, MIB, 0x91)
    backup(stage, qemu)
    qemu.qmp("block_resize", node_name="node-vda", size=size)
    qemu.qmp("block_resize", node_name="node-vda", size=4 * MIB)
    qemu.device_write("vda", 2 * MIB + 700 * KIB, 4096, 0x92)
    qemu.device_write("vdb", 5 * KIB, 4096, 0x92)
    made = backup(stage, qemu)
    assert {disk.target: disk.mode for disk in made.manifest.disks} == {"vda": "full", "vdb": "incremental"}
    assert "shrinking" in made.manifest.disks[0].reason
    qemu.device_write("vda", 0, 4096, 0x93)
    again = backup(stage, qemu)
    assert {disk.mode for disk in again.manifest.disks} == {"incremental"}
    assert reference(qemu)[:4096] == b"\x93" * 4096
    nodes = [node["node-name"] for node in qemu.qmp("query-named-block-nodes", flat=True)]
    assert not [name for name in nodes if name.startswith("pb-")]
