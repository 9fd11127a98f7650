# SPDX-License-Identifier: Apache-2.0
"""The demo: it tells its story to the end, sees what is wrong, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import demo
from demo.narration import DemoFailed
from demo.reference import BLOCK, Reference, changed_bytes, check_restored, sha256
from lab import images
from lab.processes import run, wait_for

TOP = Path(demo.__file__).parent.parent
MIB = 1 << 20


@pytest.fixture
def start_demo(lab_dir: Path) -> Callable[[], subprocess.Popen[str]]:
    """A factory of demos whose temporary files, and whose guests' sockets, are in ``lab_dir``."""

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "demo"],
            cwd=TOP,
            env={**os.environ, "TMPDIR": str(lab_dir)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def _processes_of(place: Path) -> list[str]:
    """The command lines that name ``place``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:  # gone meanwhile
            continue
        if str(place).encode() in command:
            found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_the_whole_story(start_demo: Callable[[], subprocess.Popen[str]], lab_dir: Path) -> None:
    with start_demo() as process:
        output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    assert output.count("equal, byte for byte") == 2
    assert "All as it has to be" in output.splitlines()[-1]
    assert list(lab_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "moment", "step"), [(signal.SIGINT, "2. It writes", 2), (signal.SIGTERM, "$ pullback backup", 4)]
)
def test_an_interrupted_demo_leaves_nothing(
    start_demo: Callable[[], subprocess.Popen[str]], lab_dir: Path, number: signal.Signals, moment: str, step: int
) -> None:
    with start_demo() as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if moment in line:
                break
        assert any("qemu-system" in command for command in _processes_of(lab_dir))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"interrupted in step {step} " in errors
    assert list(lab_dir.iterdir()) == []
    wait_for(lambda: not _processes_of(lab_dir), "the end of all that the demo had started", timeout=5)


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    copy = tmp_path / "vda.raw"
    copy.write_bytes(os.urandom(MIB) + bytes(MIB))
    return Reference({"vda": copy}, {"vda": sha256(copy)}, "")


def _restored(tmp_path: Path, content: bytes) -> dict[str, Path]:
    (tmp_path / "raw").write_bytes(content)
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "raw", tmp_path / "vda.qcow2"])
    return {"vda": tmp_path / "vda.qcow2"}


def test_equal_content_passes(reference: Reference, tmp_path: Path) -> None:
    check_restored(reference, _restored(tmp_path, reference.copies["vda"].read_bytes()))


@pytest.mark.parametrize("place", [0, MIB - 1, 2 * MIB - 1])
def test_one_wrong_bit_in_what_was_restored_is_seen(reference: Reference, tmp_path: Path, place: int) -> None:
    content = bytearray(reference.copies["vda"].read_bytes())
    content[place] ^= 1
    with pytest.raises(DemoFailed, match=rf"vda .* at offset {place - place % BLOCK}$"):
        check_restored(reference, _restored(tmp_path, content))


def test_a_disk_of_another_size_is_seen(reference: Reference, tmp_path: Path) -> None:
    content = reference.copies["vda"].read_bytes()
    with pytest.raises(DemoFailed, match=f"{MIB} bytes instead of {2 * MIB}"):
        check_restored(reference, _restored(tmp_path, content[:MIB]))


def test_the_guest_is_believed_as_well_as_qemu_img(reference: Reference, tmp_path: Path) -> None:
    restored = _restored(tmp_path, reference.copies["vda"].read_bytes())
    with pytest.raises(DemoFailed, match="SHA-256"):
        check_restored(replace(reference, disk_sums={"vda": "0" * 64}), restored)


def test_changes_are_counted_in_blocks(reference: Reference, tmp_path: Path) -> None:
    content = bytearray(reference.copies["vda"].read_bytes())
    for at in (5, BLOCK - 1, BLOCK, -1):
        content[at] ^= 1
    after = images.create(tmp_path / "after.raw", 2 * MIB, "raw")
    after.write_bytes(content)
    assert changed_bytes(reference, replace(reference, copies={"vda": after})) == 3 * BLOCK
