# SPDX-License-Identifier: Apache-2.0
"""Full and incremental backups of a running domain: what comes back is what was there at the freezing instant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.qemu import BareQemu
from pullback.engine.events import DiskPlanned, Event, Frozen
from pullback.qemu.monitor import Monitor
from tests.support.dying import changes_something
from tests.support.product import KIB, MIB, Stage, chain, leftovers, reference, references, same

Start = Callable[..., BareQemu]
ODD = 8 * MIB + 5 * 512


def test_two_disks_full_then_incremental(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", ODD), stage.disk("vdb", 3 * MIB)], running=True)
    qemu.device_write("vda", 0, 3 * MIB, 0x11)
    qemu.device_write("vda", ODD - 512, 512, 0x12)
    qemu.device_write("vdb", 70 * KIB, 100 * KIB, 0x13)
    first_state = references(qemu)
    first = stage.backup(qemu)

    qemu.device_write("vda", MIB + 1024, 2048, 0x21)
    qemu.device_write("vdb", 0, 512, 0x22)
    second_state = references(qemu)
    second = stage.backup(qemu)

    assert {disk.mode for disk in first.manifest.disks} == {"full"}
    assert {disk.mode for disk in second.manifest.disks} == {"incremental"}
    same(stage.contents(first.id), first_state)
    same(stage.contents(second.id), second_state)
    assert stage.listed() == [first.id, second.id]
    assert leftovers(qemu, stage.scratch) == []
    stage.restic.check()


@pytest.mark.parametrize("bus", ["virtio", "scsi", "ide", "usb", "nvme", "drive"])
def test_every_kind_of_device(lab_dir: Path, bare_qemu: Start, bus: str) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("d0", 2 * MIB, bus=bus)], running=True)
    qemu.device_write("d0", 0, MIB, 0x31)

    def write(event: Event) -> None:
        if isinstance(event, Frozen):
            qemu.device_write("d0", 700 * KIB, 4096, 0x33)

    first_state = references(qemu)
    first = stage.backup(qemu, write)
    qemu.device_write("d0", 512 * KIB, 4096, 0x32)
    second_state = references(qemu)
    second = stage.backup(qemu)
    assert [(disk.target, disk.mode) for disk in second.manifest.disks] == [("d0", "incremental")]
    assert second.bytes_read == 256 * KIB
    assert first_state != second_state
    same(stage.contents(first.id), first_state)
    same(stage.contents(second.id), second_state)
    assert leftovers(qemu, stage.scratch) == []


def test_writes_during_a_backup_are_in_the_next_one(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda"), stage.disk("vdb")], running=True)
    for disk in ("vda", "vdb"):
        qemu.device_write(disk, 0, 4 * MIB, 0x41)
    states: list[dict[str, bytes]] = []
    fill = 0x50

    def write_when_frozen(event: Event) -> None:
        nonlocal fill
        if isinstance(event, Frozen):
            fill += 1
            for disk in ("vda", "vdb"):
                qemu.device_write(disk, 256 * KIB + 1536, 300 * KIB, fill)
                qemu.device_zero(disk, 2 * MIB, 128 * KIB, unmap=True)
                qemu.device_discard(disk, 3 * MIB, 64 * KIB)
                qemu.device_write(disk, 7 * MIB, 4096, fill)

    backups = []
    for _ in range(3):
        states.append(references(qemu))
        backups.append(stage.backup(qemu, write_when_frozen))
    assert states[0] != states[1] != states[2]
    states.append(references(qemu))
    backups.append(stage.backup(qemu))
    for backup, state in zip(backups, states, strict=True):
        same(stage.contents(backup.id), state)
    assert [backup.manifest.disks[0].mode for backup in backups] == ["full", *["incremental"] * 3]


@pytest.mark.parametrize("disks", [("vda",), ("vda", "vdb")])
def test_a_write_between_any_two_commands_is_never_lost(
    lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch, disks: tuple[str, ...]
) -> None:
    """Every granule is written once only: a bit that is not set at that moment is set at no other."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk(disk) for disk in disks], running=True)
    frozen_by = "stop" if len(disks) > 1 else "qom-set"
    execute, slot, paused = Monitor.execute, 0, False
    states: list[dict[str, bytes]] = []

    async def write_before(self: Monitor, command: str, *arguments: Any) -> Any:
        nonlocal slot, paused
        if changes_something(command) and not paused:
            for disk in disks:
                qemu.device_write(disk, slot * 64 * KIB + 512, 512, slot % 250 + 1)
            slot += 1
        if command == frozen_by and len(states) == len(backups):
            states.append(references(qemu))
        paused = command == "stop" or (paused and command != "cont")
        return await execute(self, command, *arguments)

    backups: list[str] = []
    monkeypatch.setattr(Monitor, "execute", write_before)
    for _ in range(3):
        made = stage.backup(qemu)
        backups.append(made.id)
    assert 50 < slot < 128
    states.append(references(qemu))
    monkeypatch.setattr(Monitor, "execute", execute)
    backups.append(stage.backup(qemu).id)
    for backup, state in zip(backups, states, strict=True):
        same(stage.contents(backup), state)


def test_reads_what_changed_and_stores_what_is_new(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 16 * MIB)])
    noise = bytes((i * 7919 >> 3) & 0xFF for i in range(64 * KIB))
    for at in range(8):
        qemu.device_write("vda", at * MIB, MIB, bytes([at]) * 512 + noise)
    first = stage.backup(qemu)
    assert first.bytes_read == 8 * MIB  # unallocated ranges are known to be zero: never read
    nothing = stage.backup(qemu)
    assert (nothing.bytes_read, nothing.bytes_stored) == (0, pytest.approx(0, abs=4 * KIB))
    qemu.device_write("vda", 100 * KIB, 512, 0x71)
    qemu.device_write("vda", 12 * MIB, 512, 0x72)
    some = stage.backup(qemu)
    assert some.bytes_read == 2 * 256 * KIB
    again = stage.backup(qemu, full=True)
    assert again.bytes_read == 8 * MIB + 256 * KIB
    assert again.bytes_stored < 4 * KIB < first.bytes_stored
    assert again.manifest.disks[0].bytes_new == 0
    same(stage.contents(again.id), references(qemu))
    same(stage.contents(some.id), references(qemu))


def test_every_reason_is_told_and_kept(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu(
        [stage.disk("vda"), stage.disk("raw", 2 * MIB, "raw"), stage.disk("old", options={"compat": "0.10"})]
    )
    qemu.device_write("raw", 0, MIB, 0x81)

    def reasons(*arguments: str) -> dict[str, str]:
        """The reasons as printed; the manifest, the listing and the result must say the same."""
        told: dict[str, str] = {}
        done = stage.cli_backup(qemu, "--json", *arguments)
        assert done.code == 0, done
        told = {event["disk"]: event["reason"] for event in done.events if event["event"] == "disk"}
        backup = done.event("backup")
        dumped = json.loads(stage.restic.run("dump", backup["id"], "/lab/domain.json"))
        listed = stage.cli("list", "--json").event("backups")["backups"][-1]
        assert listed["id"] == backup["id"]
        for source in (backup, dumped, listed):
            for disk in source["disks"]:
                if disk["mode"] == "full":
                    assert disk["reason"] == told[disk["target"]]
                else:
                    assert disk["base"]["checkpoint"] in told[disk["target"]]
        assert dumped["disks"] == backup["disks"]
        return told

    first = reasons()
    assert first["vda"] == "this is the first backup of the disk in this repository"
    assert "raw" in first["raw"]
    assert "0.10" in first["old"]
    assert reasons("--full")["vda"] == "asked for with --full"
    assert reasons()["vda"].startswith("since ")
    for name in chain(qemu):
        qemu.qmp("block-dirty-bitmap-remove", node="node-vda", name=name)
    assert "is not in this disk's chain" in reasons()["vda"]
    qemu.qmp("block_resize", node_name="node-vda", size=9 * MIB)
    assert "size changed" in reasons()["vda"]
    assert reasons()["vda"].startswith("since ")
    text = stage.cli_backup(qemu)
    assert "vda: incremental (since " in text.err
    assert "raw: full (a raw image cannot store dirty bitmaps (only qcow2 can))" in text.err
    same(stage.contents("latest"), references(qemu))


def test_a_shrink_and_a_growth_do_not_bring_old_data_back(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 4 * MIB)])
    qemu.device_write("vda", 0, 4 * MIB, 0x91)
    stage.backup(qemu)
    qemu.qmp("block_resize", node_name="node-vda", size=2 * MIB)
    state = references(qemu)
    shrunk = stage.backup(qemu)
    same(stage.contents(shrunk.id), state)
    qemu.qmp("block_resize", node_name="node-vda", size=4 * MIB)
    state = references(qemu)
    assert state["vda"][2 * MIB :] == bytes(2 * MIB)
    grown = stage.backup(qemu)
    same(stage.contents(grown.id), state)
    assert grown.manifest.disks[0].mode == "full"


@pytest.mark.parametrize("size", [2 * MIB, 2 * MIB + 100 * KIB, 512])
def test_a_shrink_and_a_growth_between_two_backups(lab_dir: Path, bare_qemu: Start, size: int) -> None:
    """Nothing is dirty then, and the end of the disk is zero."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 4 * MIB)])
    qemu.device_write("vda", 0, 3 * MIB, 0x91)
    stage.backup(qemu)
    qemu.qmp("block_resize", node_name="node-vda", size=size)
    qemu.qmp("block_resize", node_name="node-vda", size=4 * MIB)
    qemu.device_write("vda", 2 * MIB + 700 * KIB, 4096, 0x92)
    state = references(qemu)
    assert sum(bitmap["count"] for bitmap in qemu.bitmaps("vda").values()) <= 64 * KIB
    backup = stage.backup(qemu)
    same(stage.contents(backup.id), state)
    assert backup.manifest.disks[0].mode == "full"
    assert "shrinking" in backup.manifest.disks[0].reason
    qemu.device_write("vda", 0, 4096, 0x93)
    state = references(qemu)
    again = stage.backup(qemu)
    assert again.manifest.disks[0].mode == "incremental"
    same(stage.contents(again.id), state)


def test_the_plan_is_told_before_the_freeze(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)])
    told: list[Event] = []
    stage.backup(qemu, told.append)
    assert [type(event) for event in told[:2]] == [DiskPlanned, Frozen]


def test_a_disk_larger_than_a_segment(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    size = 600 * MIB + 3 * 512
    qemu = bare_qemu([stage.disk("vda", size)])
    for at in (0, 256 * MIB - 1024, 512 * MIB, size - 512):
        qemu.device_write("vda", at, 512 if at + 512 == size else 2048, 0xA1)
    stage.backup(qemu)
    qemu.device_write("vda", 511 * MIB, 4096, 0xA2)
    second = stage.backup(qemu)
    assert second.bytes_read == 256 * KIB
    assert stage.contents(second.id)["vda"] == reference(qemu)
