# SPDX-License-Identifier: Apache-2.0
"""BareQemu: what is written through a device is in the image, and QEMU saw it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import images
from lab.disks import KINDS, DiskSpec
from lab.monitor import QmpError
from lab.processes import LabError
from lab.qemu import BareQemu

MIB = 1 << 20
Start = Callable[..., BareQemu]


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
    assert [thread["id"] for thread in vm.qmp("query-iothreads")] == ["thread-vda"]


def test_read_only_and_raw_disks(bare_qemu: Start, tmp_path: Path) -> None:
    raw = images.create(tmp_path / "raw", MIB, "raw")
    vm = bare_qemu(
        [DiskSpec(raw, format="raw"), DiskSpec(images.create(tmp_path / "ro", MIB), id="vdb", read_only=True)]
    )
    vm.device_write("vda", 0, 512, 1)
    with pytest.raises(LabError):
        vm.device_write("vdb", 0, 512, 1)


def test_both_monitors_answer_and_errors_are_qemus_own(bare_qemu: Start, image: Path) -> None:
    from lab.monitor import Monitor

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


def test_start_up_is_fast(bare_qemu: Start, image: Path) -> None:
    before = time.monotonic()
    bare_qemu([DiskSpec(image)])
    assert time.monotonic() - before < 2
