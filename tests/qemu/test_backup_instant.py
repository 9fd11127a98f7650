# SPDX-License-Identifier: Apache-2.0
"""Several disks are one instant; the domain stands still for milliseconds, and only when it has to."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.processes import wait_for
from lab.qemu import BareQemu, qemu_version
from pullback.engine.backup import run_backup
from pullback.engine.events import Event, Frozen, silent
from pullback.qemu.execute import PAUSE_LIMIT
from tests.support.backups import open_repository
from tests.support.product import KIB, MIB, Stage, leftovers, references, run_state, same

Start = Callable[..., BareQemu]


def traced(stage: Stage, qemu: BareQemu) -> list[str]:
    """The commands that a backup sends, in order."""
    sent: list[str] = []
    opener = lambda: open_repository(stage.repo)  # noqa: E731
    asyncio.run(run_backup(stage.request(qemu), opener, silent, lambda command, _, __: sent.append(command)))
    return sent


def test_two_disks_are_frozen_in_one_pause(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB), stage.disk("vdb", MIB), stage.disk("vdc", MIB)], running=True)
    told: list[Event] = []
    result = stage.backup(qemu, told.append)
    frozen = next(event for event in told if isinstance(event, Frozen))
    assert 0 < frozen.paused_ms < PAUSE_LIMIT * 1000
    assert frozen.paused_ms == pytest.approx(result.paused_seconds * 1000, abs=0.1)
    assert run_state(qemu) == "running"
    sent = traced(stage, qemu)
    # What may take long (making scratch images, flushing) is done before; inside there is only the exchange.
    assert sent[sent.index("stop") : sent.index("cont") + 1] == ["stop", *["qom-set"] * 3, "cont"]
    assert (sent.count("stop"), sent.count("cont")) == (1, 1)


def test_one_disk_needs_no_pause(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB), stage.disk("vdb", MIB)], running=True)
    events_before = len(qemu.monitor.events)
    assert stage.backup(qemu, disks=("vdb",)).paused_seconds == 0
    run_state(qemu)
    assert "STOP" not in [event["event"] for event in list(qemu.monitor.events)[events_before:]]


def test_a_paused_domain_stays_paused(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB), stage.disk("vdb", MIB)], running=True)
    qemu.qmp("stop")
    qemu.device_write("vda", 0, 4096, 1)
    state = references(qemu)
    result = stage.backup(qemu)
    assert result.paused_seconds == 0
    assert run_state(qemu) == "paused"
    names = [event["event"] for event in qemu.monitor.events]
    assert "RESUME" not in names[names.index("STOP") :]
    same(stage.contents(result.id), state)


def test_a_domain_that_never_ran_stays_so(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB), stage.disk("vdb", MIB)])
    stage.backup(qemu)
    assert run_state(qemu) == "prelaunch"


def test_the_pause_is_told_in_words(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB), stage.disk("vdb", MIB)], running=True)
    two = stage.cli_backup(qemu)
    assert ", the domain stood still for " in two.err
    one = stage.cli_backup(qemu, "--disk", "vda")
    assert ", the domain was not paused" in one.err
    assert json.loads(stage.cli_backup(qemu, "--json").out.splitlines()[-1])["paused_ms"] > 0


def test_discards_of_the_domain_reach_the_image_during_a_backup(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    disk = stage.disk("vda", 4 * MIB)
    qemu = bare_qemu([disk], running=True)
    qemu.device_write("vda", 0, 4 * MIB, 1)
    state = references(qemu)
    freed: list[int] = []

    def discard(event: Event) -> None:
        if isinstance(event, Frozen):
            before = disk.path.stat().st_blocks
            qemu.device_discard("vda", MIB, 2 * MIB)
            qemu.device_flush("vda")
            freed.append((before - disk.path.stat().st_blocks) * 512)

    backup = stage.backup(qemu, discard)
    assert freed[0] > MIB
    same(stage.contents(backup.id), state)
    after = references(qemu)
    assert after["vda"][MIB : 3 * MIB] == bytes(2 * MIB)
    same(stage.contents(stage.backup(qemu).id), after)


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
def test_preallocated_images(lab_dir: Path, bare_qemu: Start, preallocation: str) -> None:
    """Of such an image block status says data and zero at once, which has aborted some QEMUs under a frozen view."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 4 * MIB, options={"preallocation": preallocation})], running=True)
    qemu.device_write("vda", MIB, 4096, 1)

    def write(event: Event) -> None:
        if isinstance(event, Frozen):
            qemu.device_write("vda", 2 * MIB, 64 * KIB, 2)

    for _ in range(2):
        state = references(qemu)
        same(stage.contents(stage.backup(qemu, write).id), state)
    assert qemu.running()


def test_a_backing_file(lab_dir: Path, bare_qemu: Start) -> None:
    """What only the backing file holds belongs to the disk."""
    stage = Stage(lab_dir)
    below = stage.disk("below", 4 * MIB)
    with bare_qemu([below]) as qemu:
        qemu.device_write("below", 0, 2 * MIB, 7)
        qemu.shutdown()
    top = stage.place / "top.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(below.path), "-F", "qcow2", str(top)]
    subprocess.run(argv, check=True)
    disk = type(below)(top, "vda")
    qemu = bare_qemu([disk], running=True)
    qemu.device_zero("vda", 0, 64 * KIB, unmap=True)
    for number in range(2):
        qemu.device_write("vda", (number + 1) * 512 * KIB, 4096, 9)
        state = references(qemu)
        same(stage.contents(stage.backup(qemu).id), state)
    assert state["vda"][: 64 * KIB] == bytes(64 * KIB)
    assert state["vda"][MIB + 8192 : 2 * MIB] == b"\7" * (MIB - 8192)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start QEMU as somebody else")
def test_qemu_under_another_user(lab_dir: Path, bare_qemu: Start) -> None:
    """QEMU that gave up root after it began to listen can still make its scratch."""
    stage = Stage(lab_dir)
    lab_dir.chmod(0o755)
    stage.scratch.chmod(0o755)
    disk = stage.disk("vda", MIB)
    as_nobody = ["-run-with", "user=nobody"] if qemu_version() >= (9, 1, 0) else ["-runas", "nobody"]
    qemu = bare_qemu([disk], running=True, extra_args=as_nobody)
    wait_for(lambda: "65534" in Path(f"/proc/{qemu.pid}/status").read_text(), "QEMU to be nobody")
    stage.backup(qemu)
    assert leftovers(qemu, stage.scratch) == []
