# SPDX-License-Identifier: Apache-2.0
"""Other programs' bitmaps are left alone; and what is wrong with a chain is said, each with what it costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lab import images
from lab.disks import DiskSpec
from lab.processes import run
from lab.qemu import BareQemu
from tests.support.api import Api, inside
from tests.support.product import KIB, MIB, Stage

Start = Callable[..., BareQemu]
#: libvirt's, a backup job's, two that look a little like ours, and one with the name of a checkpoint to come.
FOREIGN = ("libvirt-1", "backup-0", "pullback", "pullbackA", "monday")


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_foreign_bitmaps_are_left_alone_by_every_command(stage: Stage, bare_qemu: Start) -> None:
    qemu = bare_qemu([stage.disk("vda"), stage.disk("vdb", MIB)], running=True)
    for disk in qemu.disks:
        for number, name in enumerate(FOREIGN):
            qemu.qmp("block-dirty-bitmap-add", node=disk.node, name=name, persistent=True, disabled=number == 1)
    qemu.device_write("vda", MIB, 64 * KIB, 1)

    def seen() -> list[tuple[str, bool, int]]:
        return [
            (name, bitmap["recording"], bitmap["count"])
            for disk in qemu.disks
            for name, bitmap in qemu.bitmaps(disk.id).items()
            if name in FOREIGN
        ]

    before = seen()
    assert len(before) == 2 * len(FOREIGN)
    api = Api(stage, qemu)
    api.snapshot("one", "--checkpoint", "monday")
    api.export("one", "--all-checkpoints")
    api.do("export", "stop")
    api.do("snapshot", "delete", "one")
    api.snapshot("two", "--checkpoint", "tuesday")
    api.do("snapshot", "delete", "two")
    for _ in range(2):
        assert stage.cli_backup(qemu).code == 0
    api.do("checkpoint", "delete", "monday")
    api.do("recover", "")
    assert seen() == before
    for disk in api.show()["disks"]:
        assert set(disk["foreign"]) == set(FOREIGN)
    qemu.shutdown()
    spec = "disk:" + ",".join(str(disk.path) for disk in qemu.disks)
    for words in (["domain", "show", spec], ["recover", spec], ["checkpoint", "delete", spec, "tuesday"]):
        assert inside(words, stage.environment()).code == 0
    for disk in qemu.disks:
        stored = images.bitmaps(disk.path)
        assert {name: stored[name] for name in FOREIGN} == {
            name: [] if number == 1 else ["auto"] for number, name in enumerate(FOREIGN)
        }


def test_a_gap_a_new_disk_and_a_lost_bitmap_are_told_with_their_cost(stage: Stage, bare_qemu: Start) -> None:
    first = stage.disk("vda")
    qemu = bare_qemu([first], running=True)
    api = Api(stage, qemu)
    for name in "ABC":
        api.snapshot(name, "--checkpoint", name)
        api.do("snapshot", "delete", name)
    qemu.qmp("block-dirty-bitmap-remove", node=first.node, name="pullback-B^A")
    said = api.attempt("domain", "show").out
    assert "C --(0 B)-- now" in said
    assert (
        "pullback-A is of no use: a bitmap between this checkpoint and now is missing or inconsistent; changes since"
        " before it are unknown; backups that need them read the disk whole" in said
    )
    assert "not known, a bitmap between" in api.attempt("checkpoint", "size", "A").out
    assert "the whole disk would be read, 8.00 MiB" in api.attempt("checkpoint", "size", "A").out
    qemu.shutdown()

    added = bare_qemu([first, stage.disk("vdb", MIB)], running=True, name="added")
    said = Api(stage, added).attempt("domain", "show").out
    assert "disk vdb: qcow2, 1.00 MiB" in said
    assert "no checkpoint yet; the next backup reads it whole" in said
    assert (
        "vdb: not known, checkpoint C is not in this disk's chain"
        in Api(stage, added).attempt("checkpoint", "size", "C").out
    )
    added.kill()
    killed = bare_qemu([first], running=True, name="killed")
    said = Api(stage, killed).attempt("domain", "show").out
    assert (
        "is of no use: its bitmap is inconsistent: QEMU ended without storing it; the next backup reads the disk whole;"
        " pullback recover removes it" in said
    )
    assert (
        "cleared bitmap pullback-C^B of vda, which QEMU could not store"
        in Api(stage, killed).attempt("recover", "").out
    )


def test_a_disk_that_left_or_changed_its_size(stage: Stage) -> None:
    """A disk that left keeps its chain and goes on where it was; one that shrank is read whole, and that is said."""
    disks = [stage.disk("vda"), stage.disk("vdb", 2 * MIB)]

    def backup(*images_: DiskSpec) -> dict[str, tuple[str, str]]:
        spec = "disk:" + ",".join(str(disk.path) for disk in images_)
        done = inside(["backup", spec, "--name", "lab", "--json"], stage.environment())
        assert done.code == 0, done.err
        planned = [event for event in done.events if event["event"] == "disk"]
        return {event["disk"]: (event["mode"], event["reason"]) for event in planned}

    assert {mode for mode, _ in backup(*disks).values()} == {"full"}
    assert backup(disks[0])["vda"][0] == "incremental"
    again = backup(*disks)
    assert [again[target][0] for target in ("vda", "vdb")] == ["incremental"] * 2
    run(["qemu-img", "resize", "-q", disks[1].path, str(3 * MIB)])
    mode, reason = backup(*disks)["vdb"]
    assert (mode, "size" in reason) == ("full", True), reason
