# SPDX-License-Identifier: Apache-2.0
"""A live migration between two QEMUs on shared images: the chain goes along, and the next backup is incremental."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.monitor import MonitorClosed
from lab.processes import wait_for
from lab.qemu import BareQemu
from tests.support.product import KIB, MIB, Stage, chain, references, run_state, same

Start = Callable[..., BareQemu]


def migrate(source: BareQemu, target: BareQemu, place: Path, *, bitmaps: bool) -> None:
    """Move the running domain from one QEMU, which then ends, to the other."""
    for qemu in (source, target):
        capabilities = [{"capability": name, "state": bitmaps} for name in ("dirty-bitmaps", "events")]
        qemu.qmp("migrate-set-capabilities", capabilities=capabilities)
    target.qmp("migrate-incoming", uri=f"unix:{place}")
    source.qmp("migrate", uri=f"unix:{place}")

    def status() -> str:
        return str(source.qmp("query-migrate").get("status"))

    wait_for(lambda: status() in ("completed", "failed"), "the end of the migration", timeout=30)
    assert status() == "completed"
    wait_for(lambda: run_state(target) == "paused", "the domain to arrive", timeout=10)
    target.qmp("cont")  # every QEMU of the laboratory is started with -S
    with contextlib.suppress(MonitorClosed):
        source.shutdown()


@pytest.mark.parametrize("bitmaps", [True, False], ids=["with its bitmaps", "through the images"])
def test_the_chain_survives_a_live_migration(bare_qemu: Start, tmp_path: Path, lab_dir: Path, bitmaps: bool) -> None:
    stage = Stage(tmp_path)
    disks = [stage.disk("vda"), stage.disk("vdb", 2 * MIB)]
    source = bare_qemu(disks, name="lab", running=True)
    source.device_write("vda", 0, MIB, 1)
    assert {disk.mode for disk in stage.backup(source).manifest.disks} == {"full"}
    source.device_write("vda", 3 * MIB, 64 * KIB, 2)
    source.device_write("vdb", MIB, 512, 3)
    assert {disk.mode for disk in stage.backup(source).manifest.disks} == {"incremental"}
    source.device_write("vda", 5 * MIB, 64 * KIB, 4)  # known to the recording bitmap alone
    before = [chain(source, disk.id) for disk in disks]

    target = bare_qemu(disks, name="lab", extra_args=["-incoming", "defer"])
    migrate(source, target, lab_dir / "migration", bitmaps=bitmaps)
    assert [chain(target, disk.id) for disk in disks] == before
    target.device_write("vdb", 0, 512, 5)
    state = references(target)
    made = stage.backup(target)
    assert {disk.mode for disk in made.manifest.disks} == {"incremental"}
    assert 0 < made.bytes_read <= 2 * 256 * KIB
    same(stage.contents(made.id), state)
