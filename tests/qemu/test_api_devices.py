# SPDX-License-Identifier: Apache-2.0
"""Every kind of device, both methods, I/O threads: right, or refused with a sentence; QEMU lives through all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lab.qemu import BareQemu
from pullback.errors import Refused, SnapshotBroken
from pullback.nbd.address import parse_uri
from pullback.nbd.blocking import NbdConnection
from tests.support.api import Api, by_nbdcopy, scribble, state_of
from tests.support.product import KIB, MIB, Stage, mounted_tmpfs, reference, references, same

Start = Callable[..., BareQemu]
SIZE = 2 * MIB
ODD = 3 * MIB + 5 * 512


@pytest.mark.parametrize("method", ["filter", "job"])
def test_every_kind_of_device(lab_dir: Path, bare_qemu: Start, method: str) -> None:
    kinds = ["virtio", "scsi", "ide", "usb", "drive", "nvme"]
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk(f"d-{kind}", SIZE, bus=kind) for kind in kinds], running=True)
    api = Api(stage, qemu)
    for number, disk in enumerate(qemu.disks):
        qemu.device_write(disk.id, 0, MIB, 0x31 + number)
    frozen = references(qemu)
    api.snapshot("s", "--method", method)
    uris = api.export("s")
    assert set(uris) == set(frozen)
    for disk in qemu.disks:
        scribble(qemu, disk.id, {1, 20})
    for target, uri in uris.items():
        assert by_nbdcopy(uri) == frozen[target], target
    first_state = references(qemu)
    if method == "job":  # a backup's filters must not go over it
        api.do("snapshot", "delete", "s")
    first = stage.backup(qemu, method=method)
    for disk in qemu.disks:
        scribble(qemu, disk.id, {3})
    second_state = references(qemu)
    second = stage.backup(qemu, method=method)
    assert {disk.mode for disk in second.manifest.disks} == {"incremental"}
    same(stage.contents(first.id), first_state)
    same(stage.contents(second.id), second_state)
    if method == "filter":
        assert by_nbdcopy(uris["d-nvme"]) == frozen["d-nvme"]
        api.do("snapshot", "delete", "s")
    assert api.clean() == []


def test_methods_over_each_other(lab_dir: Path, bare_qemu: Start) -> None:
    """A filter over a job's is refused (QEMU would abort); a job's under a filter is fine, ended in either order."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", SIZE), stage.disk("vdb", SIZE)], running=True)
    api = Api(stage, qemu)
    for disk in ("vda", "vdb"):
        qemu.device_write(disk, 0, SIZE, 0x11)
    api.snapshot("job", "--method", "job")
    before = state_of(qemu)
    api.refused(5, "was frozen with a job", "snapshot", "create", "other", "--method", "filter")
    with pytest.raises(Refused, match="snapshot job of domain"):
        stage.backup(qemu, method="filter")
    assert state_of(qemu) == before
    api.do("snapshot", "delete", "job")
    for order in (("filter", "job"), ("job", "filter")):
        states, uris = {}, {}
        for name in ("filter", "job"):
            states[name] = references(qemu)
            api.snapshot(name, "--method", name)
            for disk in ("vda", "vdb"):
                scribble(qemu, disk, {1, 7})
        for name in ("filter", "job"):
            uris[name] = api.export(name, "--export-name", f"vda={name}a", "--export-name", f"vdb={name}b")
        for name in order:
            for left in order[order.index(name) :]:
                assert by_nbdcopy(uris[left][f"{left}a"]) == states[left]["vda"]
                assert by_nbdcopy(uris[left][f"{left}b"]) == states[left]["vdb"]
            api.do("snapshot", "delete", name)
            scribble(qemu, "vda", {2, 7})
        assert api.clean() == []
    assert qemu.running()


def test_a_job_s_freeze_is_one_transaction_without_a_pause(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", SIZE), stage.disk("vdb", SIZE)], running=True)
    api = Api(stage, qemu)
    words = ("--scratch", stage.scratch, "--method", "job", "--checkpoint", "one", "--trace")
    done = api.attempt("snapshot", "create", "s", *words)
    assert done.code == 0
    sent = [line for line in done.err.splitlines() if line.startswith("  -> ")]
    assert sum('"blockdev-backup"' in line for line in sent) == 1
    (freeze,) = [line for line in sent if '"transaction"' in line]
    assert freeze.count('"blockdev-backup"') == 2 and freeze.count("block-dirty-bitmap-add") == 2
    assert not any('"stop"' in line for line in sent)
    api.do("snapshot", "delete", "s")
    assert api.clean() == []


def _before_9(qemu: BareQemu) -> bool:
    return bool(qemu.qmp("query-version")["qemu"]["major"] < 9)


def test_io_threads(lab_dir: Path, bare_qemu: Start) -> None:
    """Pushed before QEMU 9: full and incremental, dirty zeroes, odd sizes; exports refused; killed and broken ones."""
    stage = Stage(lab_dir)
    disks = [
        stage.disk("vda", ODD, iothread=True),
        stage.disk("sda", SIZE, bus="scsi", iothread=True),
        stage.disk("vdb", SIZE + 512),
    ]
    qemu = bare_qemu(disks, running=True)
    api = Api(stage, qemu)
    for disk in qemu.disks:
        qemu.device_write(disk.id, 0, MIB, 0x41)
        qemu.device_write(disk.id, MIB + 64 * KIB, 300 * KIB, 0x42)
    qemu.device_write("vda", ODD - 512, 512, 0x43)
    first_state = references(qemu)
    first = stage.backup(qemu)
    for disk in qemu.disks:
        scribble(qemu, disk.id, {5})
        if disk.iothread:  # the monitor's own write of zeroes to it ends QEMU 7.2, snapshot or not
            qemu.device_write(disk.id, 128 * KIB, 256 * KIB, 0)
        else:
            qemu.device_zero(disk.id, 128 * KIB, 256 * KIB, unmap=True)
        qemu.device_discard(disk.id, 512 * KIB, 64 * KIB)
    qemu.device_write("vda", ODD - 1024, 1024, 0)
    second_state = references(qemu)
    second = stage.backup(qemu)
    assert {disk.mode for disk in second.manifest.disks} == {"incremental"}
    same(stage.contents(first.id), first_state)
    same(stage.contents(second.id), second_state)
    if not _before_9(qemu):
        return
    api.snapshot("s")
    words = ("export", "start", "--snapshot", "s", "--socket", lab_dir / "nbd")
    api.refused(5, "can abort when an export of such a disk is closed", *words)
    assert api.do("snapshot", "list")["snapshots"][0]["broken"] == []
    api.snapshot("above")
    for name in ("s", "above"):  # the lower one first: all its ranges are let go
        api.do("snapshot", "delete", name)
    assert api.clean() == [] and qemu.running()
    api.refused(5, "can abort when a job's frozen view", "snapshot", "create", "s", "--method", "job")
    with mounted_tmpfs(lab_dir / "small", "256k") as small, pytest.raises(SnapshotBroken):
        # A tiny scratch, and the domain writes as soon as the disks are frozen.
        def write(event: object) -> None:
            if type(event).__name__ == "Frozen":
                qemu.device_write("vda", 0, MIB, 0x51)

        stage.backup(qemu, write, scratch=str(small), full=True)
    assert api.clean() == []
    third_state = references(qemu)
    third = stage.backup(qemu)
    assert {disk.mode for disk in third.manifest.disks} == {"incremental"}
    same(stage.contents(third.id), third_state)
    assert api.clean() == [] and qemu.running()


def test_a_foreign_export_makes_it_a_push(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", ODD)], running=True)
    theirs = lab_dir / "theirs"
    qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(theirs)}})
    for served in (False, True):
        if served:
            qemu.qmp("block-export-add", id="theirs", type="nbd", node_name="node-vda", name="theirs")
        scribble(qemu, "vda", {1, 5 + served})
        state = reference(qemu)
        backup = stage.backup(qemu)
        assert stage.contents(backup.id) == {"vda": state}
    assert by_nbdcopy(f"nbd+unix:///theirs?socket={theirs}") == state
    assert [export["id"] for export in qemu.qmp("query-block-exports")] == ["theirs"]


def test_writable_exports(lab_dir: Path, bare_qemu: Start) -> None:
    """Refused while the domain uses the disk; where it may be shared, writes land and mark bits."""
    stage = Stage(lab_dir)
    disks = [stage.disk("vda", SIZE), stage.disk("vdb", SIZE, device_options={"share-rw": True})]
    qemu = bare_qemu(disks, running=True)
    api = Api(stage, qemu)
    words = ("--writable", "--socket", lab_dir / "nbd")
    before = state_of(qemu)
    api.refused(5, "does not let another writer", "export", "start", "-d", "vda", *words)
    api.refused(2, "no snapshot was named", "export", "start", "--socket", lab_dir / "nbd")
    assert state_of(qemu) == before
    api.snapshot("s", "--checkpoint", "one", "-d", "vdb")
    api.do("snapshot", "delete", "s")
    (export,) = api.do("export", "start", "-d", "vdb", *words)["exports"]
    where = parse_uri(export["uri"])
    with NbdConnection.connect(where.address, where.export) as connection:
        connection.write(192 * KIB, b"\x66" * 4096)
        connection.flush()
    qemu.device_read_check("vdb", 192 * KIB, 4096, 0x66)
    assert api.do("checkpoint", "size", "one")["disks"][1]["most"] == 64 * KIB
    api.do("export", "stop")
    assert api.clean() == []
    incoming = bare_qemu([stage.disk("vdc", SIZE)], extra_args=["-incoming", "defer"])
    there = Api(stage, incoming)
    (export,) = there.do("export", "start", "--writable", "--socket", lab_dir / "in")["exports"]
    where = parse_uri(export["uri"])
    with NbdConnection.connect(where.address, where.export) as connection:
        connection.write(0, b"\x67" * 4096)
        assert connection.read(0, 1) == b"\x67"
    there.do("export", "stop")
    assert there.clean() == []
