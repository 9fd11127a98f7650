# SPDX-License-Identifier: Apache-2.0
"""The laboratory itself: what it says it did to a disk is what the image holds, and what QEMU saw."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import images
from lab.disks import KINDS, DiskSpec
from lab.monitor import Monitor, QmpError
from lab.processes import LabError, LabTimeout, run, wait_for
from lab.qemu import BareQemu
from lab.vm import GuestError, Vm

MIB = 1 << 20
Start = Callable[..., BareQemu]
Boot = Callable[..., Vm]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return images.create(tmp_path / "disk, one.qcow2", 8 * MIB)


def test_writes_land_in_the_image_and_mark_a_bitmap(bare_qemu: Start, image: Path) -> None:
    vm = bare_qemu([DiskSpec(image)])
    vm.qmp("block-dirty-bitmap-add", node="node-vda", name="seen", persistent=True)
    vm.device_write("vda", MIB, 65536, 0x5A)
    vm.device_write("vda", 2 * MIB, 65536, b"pattern.")
    vm.device_read_check("vda", MIB, 65536, 0x5A)
    assert vm.bitmaps("vda")["seen"]["count"] == 2 * 65536
    vm.device_flush("vda")
    expected = bytearray(8 * MIB)
    expected[MIB : MIB + 65536] = b"\x5a" * 65536
    expected[2 * MIB : 2 * MIB + 65536] = b"pattern." * 8192
    assert images.raw_bytes(image) == expected
    vm.shutdown()
    assert "seen" in images.bitmaps(image)
    images.check(image)


def test_zeroes_and_discards_read_as_zero_and_mark_a_bitmap(bare_qemu: Start, image: Path) -> None:
    vm = bare_qemu([DiskSpec(image)])
    vm.device_write("vda", 0, 4 * MIB, 0x11)
    vm.qmp("block-dirty-bitmap-add", node="node-vda", name="seen")
    vm.device_zero("vda", 0, MIB)
    vm.device_zero("vda", MIB, MIB, unmap=True)
    vm.device_discard("vda", 2 * MIB, MIB)
    vm.device_read_check("vda", 0, 3 * MIB, 0)
    vm.device_read_check("vda", 3 * MIB, MIB, 0x11)
    assert vm.bitmaps("vda")["seen"]["count"] == 3 * MIB


def test_a_device_operation_that_fails_is_an_error(bare_qemu: Start, image: Path) -> None:
    vm = bare_qemu([DiskSpec(image)])
    with pytest.raises(LabError, match="write failed"):
        vm.device_write("vda", 8 * MIB, 512)
    with pytest.raises(LabError, match="Pattern verification failed"):
        vm.device_read_check("vda", 0, 512, 1)
    with pytest.raises(LabError, match="not a valid pattern"):
        vm.device_write("vda", 0, 512, 300)
    vm.device_write("vda", 0, 512, 1)


def test_what_qemu_says_of_a_lost_client_fails_no_device_operation(
    bare_qemu: Start, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = bare_qemu([DiskSpec(image)])
    lost = "Disconnect client, due to: Failed to send reply: Unable to write to socket: Broken pipe"
    noise = f"{vm.program}: {lost}\n"
    run_line = vm.hmp

    def hmp(line: str) -> str:
        with (vm.directory / "log").open("a") as log:
            log.write(noise)
        return run_line(line)

    monkeypatch.setattr(vm, "hmp", hmp)
    vm.device_write("vda", 0, 512, 1)
    with pytest.raises(LabError, match=r"write failed"):
        vm.device_write("vda", 8 * MIB, 512)
    noise = f"{vm.program}: Failed to write\n"
    with pytest.raises(LabError, match="Failed to write"):
        vm.device_write("vda", 0, 512, 1)


@pytest.mark.parametrize("bus", KINDS)
def test_every_kind_of_disk_takes_writes(bare_qemu: Start, image: Path, bus: str) -> None:
    vm = bare_qemu([DiskSpec(image, bus=bus)])
    vm.device_write("vda", 4 * MIB, 4096, 7)
    vm.device_flush("vda")
    assert images.raw_bytes(image)[4 * MIB : 4 * MIB + 4096] == b"\7" * 4096


@pytest.mark.parametrize("bus", [bus for bus, kind in KINDS.items() if kind.iothread])
def test_a_disk_on_an_iothread_takes_writes(bare_qemu: Start, image: Path, bus: str) -> None:
    vm = bare_qemu([DiskSpec(image, bus=bus, iothread=True)], running=True)
    vm.device_write("vda", 0, 4096, 7)
    vm.device_read_check("vda", 0, 4096, 7)
    holder = {"virtio": "vda", "scsi": "scsi-vda"}[bus]  # for scsi the controller has the thread
    assert vm.qmp("qom-get", path=f"/machine/peripheral/{holder}", property="iothread") == "/objects/thread-vda"


def test_read_only_and_raw_disks(bare_qemu: Start, tmp_path: Path) -> None:
    raw = images.create(tmp_path / "raw", MIB, "raw")
    vm = bare_qemu(
        [DiskSpec(raw, format="raw"), DiskSpec(images.create(tmp_path / "ro", MIB), id="vdb", read_only=True)]
    )
    vm.device_write("vda", 0, 512, 1)
    with pytest.raises(LabError):
        vm.device_write("vdb", 0, 512, 1)


def test_both_monitors_answer_and_errors_are_qemus_own(bare_qemu: Start, image: Path) -> None:
    vm = bare_qemu([DiskSpec(image)], name="two")
    other = Monitor(vm.qmp_path)
    try:
        assert other.command("query-name") == vm.qmp("query-name") == {"name": "two"}
        with pytest.raises(QmpError, match="Cannot find device"):
            other.command("block-dirty-bitmap-add", {"node": "none", "name": "x"})
    finally:
        other.close()
    assert vm.hmp("info status").startswith("VM status: paused")


def test_kill_and_start_again(bare_qemu: Start, image: Path) -> None:
    vm = bare_qemu([DiskSpec(image)])
    vm.qmp("block-dirty-bitmap-add", node="node-vda", name="lost", persistent=True)
    first = vm.pid
    vm.kill()
    assert not Path(f"/proc/{first}").exists()
    assert not vm.running()
    assert images.bitmaps(image) == {}
    vm.start()
    vm.device_write("vda", 0, 512, 3)


def test_a_bad_argument_says_what_qemu_said(image: Path) -> None:
    vm = BareQemu([DiskSpec(image)], extra_args=["-device", "no-such-device"])
    with pytest.raises(LabError, match="no-such-device"), vm:
        pass
    assert not vm.directory.exists()


def test_a_qemu_dies_with_whoever_started_it(image: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lab.disks import DiskSpec\n"
        "from lab.qemu import BareQemu\n"
        "vm = BareQemu([DiskSpec(Path(sys.argv[1]))])\n"
        "vm.start()\n"
        "print(vm.pid, vm.directory, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    top = Path(images.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script, image], cwd=top, capture_output=True, text=True, check=False)
    pid, directory = done.stdout.split()
    try:
        command = Path(f"/proc/{pid}/cmdline")  # empty while nobody has collected the dead process
        wait_for(lambda: not command.exists() or not command.read_bytes(), "the end of the orphan", timeout=5)
    finally:
        shutil.rmtree(directory)


def test_start_up_is_fast(bare_qemu: Start, image: Path) -> None:
    """At its best: one start may come while the machine is busy with something else."""
    vm = bare_qemu([DiskSpec(image)])
    taken = []
    for _ in range(3):
        vm.kill()
        before = time.monotonic()
        vm.start()
        taken.append(time.monotonic() - before)
    assert min(taken) < 2


def test_a_guest_writes_its_file_system_and_the_image_holds_it(guest_vm: Boot, tmp_path: Path) -> None:
    path = images.make_ext4(tmp_path / "ext4.qcow2", 32 * MIB, {"etc/motto": b"made without root\n"})
    vm = guest_vm([DiskSpec(path)])
    assert vm.run("mount /dev/vda /mnt && cat /mnt/etc/motto") == "made without root\n"
    vm.run("dd if=/dev/urandom of=/mnt/random bs=1M count=4 && mkdir /mnt/new && umount /mnt && sync")
    inside = vm.run("sha256sum /dev/vda").split()[0]
    assert images.raw_sha256(path) == inside
    vm.run("mount /dev/vda /mnt && rm /mnt/random && umount /mnt && sync")
    assert images.raw_sha256(path) == vm.run("sha256sum /dev/vda").split()[0] != inside


def test_discards_give_space_back_and_shutdown_stores_bitmaps(guest_vm: Boot, image: Path) -> None:
    vm = guest_vm([DiskSpec(image)])
    vm.run("yes | dd of=/dev/vda bs=1M count=8 iflag=fullblock conv=fsync")
    full = images.info(image)["actual-size"]
    vm.qmp("block-dirty-bitmap-add", node="node-vda", name="kept", persistent=True)
    vm.run(f"blkdiscard -o {2 * MIB} -l {4 * MIB} /dev/vda")
    assert vm.bitmaps("vda")["kept"]["count"] == 4 * MIB
    vm.shutdown()
    assert not vm.running()
    assert full - images.info(image)["actual-size"] >= 3 * MIB
    assert images.raw_bytes(image) == b"y\n" * MIB + bytes(4 * MIB) + b"y\n" * MIB
    assert list(images.bitmaps(image)) == ["kept"]


def test_a_killed_guest_leaves_what_it_synced_and_boots_again(guest_vm: Boot, tmp_path: Path) -> None:
    vm = guest_vm([DiskSpec(images.make_ext4(tmp_path / "ext4.qcow2", 16 * MIB))])
    vm.qmp("block-dirty-bitmap-add", node="node-vda", name="lost", persistent=True)
    vm.run("mount /dev/vda /mnt && echo kept >/mnt/file && sync")
    vm.kill()
    assert not vm.running()
    vm.start()
    assert vm.run("mount /dev/vda /mnt && cat /mnt/file") == "kept\n"
    assert vm.bitmaps("vda") == {}


def test_disks_of_every_kind_the_guest_has_drivers_for(guest_vm: Boot, tmp_path: Path) -> None:
    disks = []
    for number, (bus, iothread) in enumerate(
        [("virtio", True), ("scsi", False), ("scsi", True), ("ide", False), ("nvme", False)]
    ):
        path = tmp_path / f"{number}.qcow2"
        raw = tmp_path / "raw"
        raw.write_bytes(os.urandom(MIB))
        images.create(path, MIB)
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path])
        disks.append(DiskSpec(path, id=f"disk{number}", bus=bus, iothread=iothread))
    vm = guest_vm(disks)
    sums = vm.run("sha256sum /dev/vd? /dev/sd? /dev/nvme?n1 | cut -c1-64").split()
    assert sorted(sums) == sorted(images.raw_sha256(disk.path) for disk in disks)


def test_the_shell_in_the_guest(guest_vm: Boot) -> None:
    vm = guest_vm()
    with pytest.raises(GuestError, match="no such place") as failed:
        vm.run("echo no such place; exit 7")
    assert failed.value.code == 7
    every_byte = bytes(range(256)) * 300
    assert vm.run_bytes("printf '\\377\\000\\r\\n1 0 5\\n'") == b"\xff\0\r\n1 0 5\n"
    script = "i=0; while [ $i -lt 256 ]; do printf \\\\$(printf %o $i); i=$((i + 1)); done >/run/all"
    vm.run(script + "; for i in $(seq 300); do cat /run/all; done >/run/much")
    assert hashlib.sha256(vm.run_bytes("cat /run/much")).digest() == hashlib.sha256(every_byte).digest()
    with pytest.raises(LabTimeout):
        vm.run("sleep 3; echo late", timeout=0.2)
    assert vm.run("echo in time") == "in time\n"
    with pytest.raises(ValueError, match="too long"):
        vm.run("#" * 50000)


def test_background_jobs_in_the_guest(guest_vm: Boot) -> None:
    vm = guest_vm()
    endless = vm.start_background("while :; do echo more >>/run/endless; usleep 1000; done")
    # Whose end must not come between the guest's shell and the next command.
    for _ in range(5):
        assert vm.start_background("echo done").wait() == "done\n"
    with pytest.raises(GuestError, match="oops"):
        vm.start_background("echo oops; false").wait()
    assert endless.code() is None
    endless.stop()
    endless.stop()
    size = vm.run("wc -c </run/endless")
    assert vm.run("wc -c </run/endless") == size != "0\n"


def test_a_guest_that_cannot_boot_shows_its_console(guest_vm: Boot, tmp_path: Path) -> None:
    empty = tmp_path / "initramfs"
    empty.write_bytes(b"")
    with pytest.raises(LabError, match=r"did not boot(.|\n)*Kernel panic"):
        guest_vm(extra_args=["-initrd", str(empty)])
    with pytest.raises(ValueError, match="no driver for usb"):
        guest_vm([DiskSpec(tmp_path / "none", bus="usb")])
