# SPDX-License-Identifier: Apache-2.0
"""What pullback will not do to a domain, and what it says of disks it cannot track or leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.disks import DiskSpec
from lab.qemu import BareQemu, qemu_version
from tests.support.api import Api, by_nbdcopy
from tests.support.product import KIB, MIB, Stage, leftovers, references, run_state, same, server_left

Start = Callable[..., BareQemu]


def state_of(qemu: BareQemu) -> Any:
    """All of QEMU's block layer that a backup could have touched."""
    nodes = qemu.qmp("query-named-block-nodes", flat=True)
    return (
        sorted(node["node-name"] for node in nodes),
        {node["node-name"]: node.get("dirty-bitmaps") for node in nodes},
        qemu.qmp("query-jobs"),
        qemu.qmp("query-block-exports"),
        run_state(qemu),
    )


@pytest.mark.parametrize("bus", ["virtio", "scsi"])
def test_a_disk_on_an_io_thread(lab_dir: Path, bare_qemu: Start, bus: str) -> None:
    """Before 9.0 an export of it can end QEMU: it is pushed, and exporting it is refused."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB, bus=bus, iothread=True), stage.disk("vdb", MIB)], running=True)
    exportable = qemu_version() >= (9, 0, 0)
    for number, modes in enumerate(({"full"}, {"incremental"})):
        for disk in ("vda", "vdb"):
            qemu.device_write(disk, number * 100 * KIB, 4096, number + 1)
        state = references(qemu)
        done = stage.cli_backup(qemu, "--json", "--trace")
        assert done.code == 0, done.err
        assert {disk["mode"] for disk in done.event("backup")["disks"]} == modes
        sent = [event["command"] for event in done.events if event["event"] == "trace"]
        assert ("block-export-add" in sent) == exportable
        same(stage.contents("latest"), state)
    api = Api(stage, qemu)
    api.snapshot("s")
    before = state_of(qemu)
    if exportable:
        uris = api.export("s", "--disk", "vda")
        assert len(list(uris.values())) == 1
        assert by_nbdcopy(*uris.values()) == references(qemu)["vda"]
    else:
        refused = api.refused(5, "I/O thread", "export", "start", "--snapshot", "s", "--socket", lab_dir / "nbd")
        for word in ("vda", "7.2", "9.0", "iothread=", "Nothing was exported"):
            assert word in refused.err
        assert state_of(qemu) == before
    api.do("snapshot", "delete", "s")
    assert qemu.running()
    assert leftovers(qemu, stage.scratch) == []


def test_a_raw_disk_is_read_whole_each_time(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("raw", 4 * MIB, "raw")], running=True)
    qemu.device_write("raw", 0, MIB, bytes(range(256)) * 16)
    first, second = stage.backup(qemu), stage.backup(qemu)
    for backup in (first, second):
        assert backup.manifest.disks[0].mode == "full"
        assert backup.manifest.disks[0].reason == "a raw image cannot store dirty bitmaps (only qcow2 can)"
        assert backup.manifest.disks[0].checkpoint is None
        assert backup.bytes_read >= MIB
        same(stage.contents(backup.id), references(qemu))
    assert first.manifest.disks[0].bytes_new > 0
    assert second.manifest.disks[0].bytes_new == 0
    assert second.bytes_stored < 4096
    assert qemu.bitmaps("raw") == {}
    assert leftovers(qemu, stage.scratch) == []


def test_a_raw_disk_beside_a_tracked_one(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("raw", MIB, "raw"), stage.disk("vda", MIB)], running=True)
    stage.backup(qemu)
    qemu.device_write("raw", 0, 4096, 1)
    qemu.device_write("vda", 0, 4096, 2)
    state = references(qemu)
    second = stage.backup(qemu)
    assert {disk.target: disk.mode for disk in second.manifest.disks} == {"raw": "full", "vda": "incremental"}
    same(stage.contents(second.id), state)


def test_drives_that_are_left_out_are_named(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    cd = ["-device", "ide-cd,id=cd0,bus=ide.3"]
    disks = [stage.disk("vda", MIB), stage.disk("ro", MIB, read_only=True)]
    qemu = bare_qemu(disks, running=True, extra_args=cd)
    done = stage.cli_backup(qemu, "--json")
    assert done.code == 0
    made = done.event("backup")
    assert [disk["target"] for disk in made["disks"]] == ["vda"]
    assert {one["target"]: one["reason"] for one in made["skipped"]} == {
        "ro": "the drive is read-only",
        "cd0": "the drive is empty",
    }
    text = stage.cli_backup(qemu).err
    assert "Leaving out ro: the drive is read-only." in text
    assert "Leaving out cd0: the drive is empty." in text
    before = state_of(qemu)
    for target, reason in (("ro", "read-only"), ("cd0", "empty"), ("nope", "It has cd0, vda, ro")):
        refused = stage.cli_backup(qemu, "--disk", target)
        assert refused.code == 2
        assert target in refused.err
        assert reason in refused.err
    assert state_of(qemu) == before


def test_nothing_to_back_up(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    assert stage.cli_backup(bare_qemu([])).code == 2
    done = stage.cli_backup(bare_qemu([stage.disk("ro", MIB, read_only=True)]))
    assert done.code == 2
    assert "read-only" in done.err


@pytest.mark.parametrize("exporting", [True, False])
def test_somebody_elses_nbd_server(lab_dir: Path, bare_qemu: Start, exporting: bool) -> None:
    """QEMU has only one: the disks are pushed, and the server and its export are left alone."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB), stage.disk("vdb", MIB, read_only=True)], running=True)
    qemu.device_write("vda", 0, 4096, 1)
    stage.backup(qemu)
    qemu.device_write("vda", 0, 4096, 2)
    qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(lab_dir / "theirs")}})
    if exporting:
        qemu.qmp("block-export-add", {"type": "nbd", "id": "theirs", "node-name": "node-vdb"})
    exports, state = qemu.qmp("query-block-exports"), references(qemu)["vda"]
    beside = stage.backup(qemu)
    assert beside.manifest.disks[0].mode == "incremental"
    assert stage.contents(beside.id)["vda"] == state
    assert qemu.qmp("query-block-exports") == exports
    assert server_left(qemu)
    assert list(stage.scratch.iterdir()) == []
    if exporting:
        qemu.qmp("block-export-del", id="theirs")
        qemu.monitor.wait_event("BLOCK_EXPORT_DELETED", id="theirs")
    qemu.qmp("nbd-server-stop")
    again = stage.backup(qemu)
    assert again.manifest.disks[0].mode == "incremental"
    assert stage.contents(again.id)["vda"] == state
    assert leftovers(qemu, stage.scratch) == []


def test_a_disk_that_another_job_works_on(lab_dir: Path, bare_qemu: Start) -> None:
    """A mirror of somebody else's runs: the backup is right or refused, and the job goes on."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, 4096, 1)
    target: DiskSpec = stage.disk("copy", MIB)
    qemu.qmp(
        "blockdev-add",
        {"driver": "qcow2", "node-name": "copy", "file": {"driver": "file", "filename": str(target.path)}},
    )
    qemu.qmp("blockdev-mirror", job_id="theirs", device="node-vda", target="copy", sync="full")
    qemu.monitor.wait_event("BLOCK_JOB_READY", device="theirs")
    done = stage.cli_backup(qemu)
    assert done.code in (0, 4, 5)
    assert [job["id"] for job in qemu.qmp("query-jobs")] == ["theirs"]
    if done.code == 0:
        same(stage.contents("latest"), references(qemu))
    qemu.qmp("block-job-cancel", device="theirs", force=True)
    qemu.monitor.wait_event("BLOCK_JOB_CANCELLED")
    qemu.device_write("vda", 64 << 10, 4096, 2)
    state = references(qemu)
    same(stage.contents(stage.backup(qemu).id), state)
    assert leftovers(qemu, stage.scratch) == []
