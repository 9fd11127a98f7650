# SPDX-License-Identifier: Apache-2.0
"""``backup --prove``: right backups pass, a bitmap that lied and storage that alters data are found, and said."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from lab.qemu import BareQemu
from pullback.engine.events import Event, Frozen
from pullback.plan.prove import Proved
from tests.support.product import KIB, MIB, Stage, leftovers, references, same

Start = Callable[..., BareQemu]
ODD = 8 * MIB + 5 * 512
HOW = ["sample", "all"]


@pytest.mark.parametrize("how", HOW)
def test_right_backups_are_proved(lab_dir: Path, bare_qemu: Start, how: Literal["sample", "all"]) -> None:
    """Full and incremental, two disks, zeroes and discards, and a domain that overwrites all of it meanwhile."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", ODD), stage.disk("vdb", 3 * MIB)], running=True)
    qemu.device_write("vda", 0, 6 * MIB, os.urandom(256))
    qemu.device_write("vdb", 70 * KIB, 100 * KIB, 0x13)

    def overwrite(event: Event) -> None:
        if isinstance(event, Frozen):
            for disk, size in (("vda", 8 * MIB), ("vdb", 3 * MIB)):
                qemu.device_write(disk, 0, 100 * KIB, 0x41)
                qemu.device_zero(disk, 256 * KIB + 512, size - 512 * KIB, unmap=True)
                qemu.device_write(disk, size - MIB + 1024, 512 * KIB, 0x42)

    states, backups = [references(qemu)], [stage.backup(qemu, overwrite, prove=how)]
    qemu.device_write("vda", 3 * MIB + 4096, 4096, 0x51)
    qemu.device_discard("vda", 7 * MIB, 128 * KIB)
    states.append(references(qemu))
    backups.append(stage.backup(qemu, overwrite, prove=how))
    for _ in range(2):
        qemu.device_write("vdb", 2 * MIB, 512, 0x61)
        states.append(references(qemu))
        backups.append(stage.backup(qemu, prove=how))
    assert states[0] != states[1] != states[2]
    for backup, state in zip(backups, states, strict=True):
        same(stage.contents(backup.id), state)
        assert backup.proved is not None
        assert backup.proved.changed + backup.proved.unchanged == ODD + 3 * MIB
        assert backup.proved.of_unchanged == backup.proved.unchanged
    assert backups[0].proved == Proved(ODD + 3 * MIB, 0, 0)
    assert backups[3].proved == Proved(256 * KIB, ODD + 2816 * KIB, ODD + 2816 * KIB)
    assert [backup.manifest.disks[0].mode for backup in backups] == ["full", *["incremental"] * 3]
    assert leftovers(qemu, stage.scratch) == []


def test_the_command_proves_and_says_how_much(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 4 * MIB)], running=True)
    qemu.device_write("vda", 0, MIB, 0x11)
    domain, scratch = f"qmp:{qemu.qmp_path}", ("--scratch", stage.scratch)
    # Alone in front of the domain, which is not its value.
    first = stage.cli("backup", "--prove", domain, *scratch)
    assert first.code == 0, first.err
    assert (
        "proved: 4.00 MiB that changed and 0 B of 0 B that did not change are stored as they were frozen" in first.out
    )
    qemu.device_write("vda", 0, 512, 0x12)
    second = stage.cli_backup(qemu, "--prove=all", "--json")
    assert second.code == 0
    rest = 4 * MIB - 256 * KIB
    assert second.event("backup")["proved"] == {"changed": 256 * KIB, "unchanged": rest, "of_unchanged": rest}
    assert second.event("progress") == {"event": "progress", "work": "prove", "done": 4 * MIB, "total": 4 * MIB}
    assert stage.cli_backup(qemu, "--json").event("backup")["proved"] is None
    wrong = stage.cli_backup(qemu, "--prove=most")
    assert wrong.code == 2
    assert "--prove=most" in wrong.err
    for how, said in (("--prove", "1,024 random unchanged ones of each disk"), ("--prove=all", "all unchanged ones")):
        dry = stage.cli_backup(qemu, how, "--dry-run")
        assert dry.code == 0
        assert f"all changed chunks and {said} are read back and compared" in dry.err
    assert leftovers(qemu, stage.scratch) == []
