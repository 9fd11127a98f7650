# SPDX-License-Identifier: Apache-2.0
"""On which backup the next one builds: whatever happened to domain, repository and client, the next one is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from lab.qemu import BareQemu
from pullback.engine.domain import Domain, DomainAddress
from pullback.engine.events import DiskPlanned, Event, Note
from pullback.errors import CommandFailed, UsageError
from tests.support.backups import open_repository, read_disk
from tests.support.product import KIB, MIB, Stage, chain, references, same

Start = Callable[..., BareQemu]


def stored(repo: Path, backup: str, *disks: str) -> dict[str, bytes]:
    """What a backup holds, read without an image."""
    repository = open_repository(repo)
    return {disk: read_disk(repository, backup, disk) for disk in disks}


def modes(told: list[Event]) -> dict[str, str]:
    """What was said of every disk: its mode and, of a full one, the reason."""
    return {
        event.disk: event.mode if event.mode == "incremental" else event.reason
        for event in told
        if isinstance(event, DiskPlanned)
    }


def test_some_disks_then_all(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB), stage.disk("vdb", MIB)], running=True)
    plans: list[dict[str, str]] = []
    for number, disks in enumerate([("vda",), (), ("vdb",), ("vda",), (), ()]):
        for disk in ("vda", "vdb"):
            qemu.device_write(disk, number * 100 * KIB, 4096, number + 1)
        state = references(qemu)
        told: list[Event] = []
        backup = stage.backup(qemu, told.append, disks=disks)
        plans.append(modes(told))
        names = disks or ("vda", "vdb")
        assert [disk.target for disk in backup.manifest.disks] == list(names)
        same(stored(stage.repo, backup.id, *names), {disk: state[disk] for disk in names})
    first = "this is the first backup of the disk in this repository"
    both = {"vda": "incremental", "vdb": "incremental"}
    assert plans == [
        {"vda": first},
        {"vda": "incremental", "vdb": first},
        {"vdb": "incremental"},
        {"vda": "incremental"},
        both,
        both,
    ]


def test_a_disk_added_later_is_read_whole_alone(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    old, new = stage.disk("vda", MIB), stage.disk("vdb", MIB)
    with bare_qemu([old], running=True) as qemu:
        qemu.device_write("vda", 0, 4096, 1)
        stage.backup(qemu)
        qemu.device_write("vda", 0, 4096, 2)
        qemu.shutdown()
    qemu = bare_qemu([old, new], running=True)
    qemu.device_write("vdb", 0, 4096, 3)
    told: list[Event] = []
    state = references(qemu)
    backup = stage.backup(qemu, told.append)
    assert modes(told) == {"vda": "incremental", "vdb": "this is the first backup of the disk in this repository"}
    same(stored(stage.repo, backup.id, "vda", "vdb"), state)


def test_a_clean_restart_keeps_the_chain(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 2 * MIB)], running=True)
    qemu.device_write("vda", 0, MIB, 1)
    stage.backup(qemu)
    for round in range(3):
        qemu.device_write("vda", round * 300 * KIB, 4096, 2 + round)
        qemu.shutdown()
        qemu.start()
        qemu.device_write("vda", MIB + round * 300 * KIB, 4096, 12 + round)
        state = references(qemu)
        backup = stage.backup(qemu)
        assert backup.manifest.disks[0].mode == "incremental"
        assert backup.bytes_read == 2 * 256 * KIB
        same(stored(stage.repo, backup.id, "vda"), state)


def test_a_crash_of_qemu_costs_one_full_backup(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 2 * MIB)], running=True)
    qemu.device_write("vda", 0, MIB, 1)
    stage.backup(qemu)
    qemu.shutdown()
    qemu.start()
    stage.backup(qemu)
    qemu.device_write("vda", 0, 4096, 2)
    qemu.device_flush("vda")
    qemu.kill()
    qemu.start()
    assert any(bitmap.get("inconsistent") for bitmap in qemu.bitmaps("vda").values())
    state = references(qemu)
    told: list[Event] = []
    backup = stage.backup(qemu, told.append)
    assert "inconsistent" in modes(told)["vda"] or "no bitmap of the chain is recording" in modes(told)["vda"]
    assert backup.manifest.disks[0].reason == modes(told)["vda"]
    same(stored(stage.repo, backup.id, "vda"), state)
    assert not any(bitmap.get("inconsistent") for bitmap in qemu.bitmaps("vda").values())
    assert list(chain(qemu).values()) == [True]
    qemu.device_write("vda", MIB, 4096, 3)
    state = references(qemu)
    assert stage.backup(qemu).manifest.disks[0].mode == "incremental"
    same(stage.contents("latest"), state)


def test_a_base_that_cannot_be_read_is_passed_over(lab_dir: Path, bare_qemu: Start) -> None:
    """Somebody stored something else under our tag, later than all of ours."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 2 * MIB)], running=True)
    qemu.device_write("vda", 0, MIB, 1)
    first = stage.backup(qemu).id
    foreign = lab_dir / "foreign"
    foreign.mkdir()
    (foreign / "domain.json").write_text('{"format": 1}')
    stage.restic.run("backup", str(foreign), "--host", "lab", "--tag", "pullback")
    told: list[Event] = []
    backup = stage.backup(qemu, told.append)
    assert backup.manifest.disks[0].base is not None
    assert backup.manifest.disks[0].base.backup == first
    assert any("cannot be read" in event.message for event in told if isinstance(event, Note))
    same(stored(stage.repo, backup.id, "vda"), references(qemu))


def test_checkpoints_are_merged_away_and_those_of_others_stay(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 2 * MIB)], running=True)
    qemu.qmp("block-dirty-bitmap-add", node="node-vda", name="libvirt-x", persistent=True)
    qemu.device_write("vda", 0, MIB, 1)
    stage.backup(qemu)
    # A checkpoint that a user named, in the middle of ours, made as the chain wants it.
    last = next(name for name, recording in chain(qemu).items() if recording)
    mine = f"pullback-mine^{last.removeprefix('pullback-').partition('^')[0]}"
    actions = [
        {"type": "block-dirty-bitmap-add", "data": {"node": "node-vda", "name": mine, "persistent": True}},
        {"type": "block-dirty-bitmap-disable", "data": {"node": "node-vda", "name": last}},
    ]
    qemu.qmp("transaction", actions=actions)
    for number in range(7):
        qemu.device_write("vda", number * 260 * KIB, 4096, number + 10)
        state = references(qemu)
        backup = stage.backup(qemu)
        assert backup.manifest.disks[0].mode == "incremental"
        same(stored(stage.repo, backup.id, "vda"), state)
        names = chain(qemu)
        assert sum(names.values()) == 1
        assert len(names) <= 4 + 1
        assert [name for name in names if name.startswith("pullback-mine")]
        assert qemu.bitmaps("vda")["libvirt-x"]["recording"]
    assert len(chain(qemu)) == 5
    assert qemu.bitmaps("vda")["libvirt-x"]["count"] >= 7 * 64 * KIB
    # A base older than the newest: what was merged still tells the difference.
    newest = stage.listed()[-3:]
    stage.restic.run("forget", *newest)
    state = references(qemu)
    backup = stage.backup(qemu)
    assert backup.manifest.disks[0].mode == "incremental"
    same(stored(stage.repo, backup.id, "vda"), state)


def test_keep_checkpoints(lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    for number in range(4):
        qemu.device_write("vda", number * 100 * KIB, 4096, number + 1)
        state = references(qemu)
        backup = stage.backup(qemu, keep_checkpoints=1)
        assert len(chain(qemu)) == 1
        same(stored(stage.repo, backup.id, "vda"), state)
    told: list[Event] = []
    with monkeypatch.context() as patched:
        patched.setattr(Domain, "prune", mock.AsyncMock(side_effect=CommandFailed("transaction", "GenericError", "no")))
        backup = stage.backup(qemu, told.append, keep_checkpoints=1)
    (note,) = [event.message for event in told if isinstance(event, Note) and "merged" in event.message]
    assert "The backup is stored, but older checkpoints could not be merged away: QEMU refused transaction: no" in note
    assert stage.listed()[-1] == backup.id
    assert len(chain(qemu)) == 2
    base = stage.backup(qemu, keep_checkpoints=1).manifest.disks[0].base
    assert base is not None
    assert base.backup == backup.id
    assert len(chain(qemu)) == 1


def test_domains_of_one_name_do_not_mix(lab_dir: Path, bare_qemu: Start) -> None:
    """Two domains called the same in one repository: never each other's base."""
    stage = Stage(lab_dir)
    one = bare_qemu([stage.disk("vda", MIB)], running=True)
    (lab_dir / "b").mkdir()
    two = bare_qemu([Stage(lab_dir / "b").disk("vda", MIB)], running=True)
    for number in range(3):
        for qemu in (one, two):
            qemu.device_write("vda", number * 100 * KIB, 4096, number + (1 if qemu is one else 101))
            state = references(qemu)
            backup = stage.backup(qemu)
            same(stored(stage.repo, backup.id, "vda"), state)


def test_a_name_that_cannot_be_a_directory(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)])
    before = qemu.bitmaps("vda")
    with pytest.raises(UsageError):
        stage.backup(qemu, domain=DomainAddress(str(qemu.qmp_path), name="a/b"))
    assert qemu.bitmaps("vda") == before
