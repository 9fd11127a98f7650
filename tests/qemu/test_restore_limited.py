# SPDX-License-Identifier: Apache-2.0
"""``restore --limit-rate`` through QEMU: no sooner done than it allows, to new images and in place, and right."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lab import images
from lab.qemu import BareQemu
from pullback.engine.rate import CREDIT
from tests.support.product import KIB, MIB, Stage

Start = Callable[..., BareQemu]
RATE = 512 * KIB


def test_a_limit_holds_for_what_is_written(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    spec = stage.disk("vda", 4 * MIB)
    qemu = bare_qemu([spec], running=True)
    data = os.urandom(MIB + 512 * KIB)
    qemu.device_write("vda", MIB, len(data), data)
    backup = stage.backup(qemu)
    expected = bytes(MIB) + data + bytes(4 * MIB - MIB - len(data))

    done = stage.cli("restore", backup.id, "--to", lab_dir / "new", "--limit-rate", "512K", "--json").event("restore")
    (disk,) = done["disks"]
    assert disk["bytes_written"] >= len(data)
    assert done["seconds"] >= disk["bytes_written"] / RATE - CREDIT
    assert images.raw_bytes(lab_dir / "new/vda.qcow2") == expected

    qemu.device_write("vda", MIB, len(data), 0)
    qemu.shutdown()
    image = f"disk:vda={spec.path}"
    told = stage.cli("restore", backup.id, "--into", image, "--limit-rate", "512K", "--json").event("restore_in_place")
    assert told["seconds"] >= len(data) / RATE - CREDIT
    assert images.raw_bytes(spec.path) == expected

    refused = stage.cli("restore", backup.id, "--to", lab_dir / "no", "--limit-rate", "1K")
    assert (refused.code, (lab_dir / "no").exists()) == (2, False)
    assert stage.cli("restore", backup.id, "--to", lab_dir / "no", "--limit-rate", "2M", "--instant").code == 2
