# SPDX-License-Identifier: Apache-2.0
"""``backup --limit-rate`` on a real QEMU: no sooner done than it allows, pulled, proved and pushed, and right."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.qemu import BareQemu
from pullback.engine.rate import CREDIT, Rate
from tests.support.product import KIB, MIB, Stage, references, same

Start = Callable[..., BareQemu]
RATE = 2 * MIB


def test_a_limit_holds_over_all_disks_threads_and_ways(
    lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 2 * MIB), stage.disk("vdb", 2 * MIB)], running=True)
    for disk in ("vda", "vdb"):
        qemu.device_write(disk, MIB, 512 * KIB, os.urandom(512 * KIB))
    state = references(qemu)
    (config := lab_dir / "config.toml").write_text(f'[domain.web]\nqmp = "{qemu.qmp_path}"\nlimit-rate = "2M"\n')
    done = stage.cli("backup", "web", "--config", config, "--scratch", stage.scratch, "--prove", "--json")
    told = done.event("backup")
    assert told["limit_rate"] == RATE
    assert told["bytes_read"] >= MIB
    assert told["proved"]["changed"] == 4 * MIB
    assert told["seconds"] >= (told["bytes_read"] + told["proved"]["changed"]) / RATE - CREDIT, "read, and read again"
    same(stage.contents(told["id"]), state)

    # Somebody else's server: QEMU pushes, and our server takes no more than the limit.
    qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(qemu.directory / "theirs")}})
    qemu.qmp("blockdev-add", driver="null-co", **{"node-name": "theirs", "size": MIB})
    qemu.qmp("block-export-add", type="nbd", id="theirs", **{"node-name": "theirs"})
    taken: list[int] = []
    take = Rate.take

    def counted(self: Rate, length: int) -> None:
        taken.append(length)
        take(self, length)

    monkeypatch.setattr(Rate, "take", counted)
    pushed = stage.backup(qemu, full=True, limit_rate=4 * MIB)
    assert sum(taken) >= pushed.bytes_read >= MIB
    assert max(taken) <= 256 * KIB

    assert stage.cli("backup", "web", "--config", config, "--limit-rate", "1K").code == 2
