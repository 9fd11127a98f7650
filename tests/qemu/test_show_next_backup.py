# SPDX-License-Identifier: Apache-2.0
"""``domain show --repo`` says what the next backup does, also of disks that came, went, shrank or grew; it does so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.qemu import BareQemu, Qemu
from pullback.engine.events import DiskPlanned, Event
from tests.support.api import inside, state_of
from tests.support.backups import new_repository
from tests.support.product import KIB, MIB, Stage
from tests.unit.test_docs import check_object, page

Start = Callable[..., BareQemu]
FIRST = "this is the first backup of the disk in this repository"


def shown(stage: Stage, qemu: Qemu, repo: Path | None = None, *more: str) -> dict[str, Any]:
    """What is said of the next backup; QEMU and the repository are only looked at."""
    where = repo or stage.repo
    before = state_of(qemu), sorted(where.rglob("*"))
    words = ["domain", "show", f"qmp:{qemu.qmp_path}", "--repo", str(where), *more, "--json"]
    done = inside(words, stage.environment(RESTIC_REPOSITORY="/nowhere"))
    assert done.code == 0, done.out
    assert (state_of(qemu), sorted(where.rglob("*"))) == before
    view: dict[str, Any] = done.event("domain")["next_backup"]
    assert not check_object(page("json.md"), "a domain's next_backup", view)
    for disk in view["disks"]:
        assert not check_object(page("json.md"), "one of a next backup's disks", disk)
        assert (disk["mode"] == "full") == (disk["backup"] is None) == (disk["checkpoint"] is None)
    return view


def plans(view: dict[str, Any]) -> dict[str, str]:
    return {disk["target"]: disk["reason"] or disk["mode"] for disk in view["disks"]}


def as_it_comes(stage: Stage, qemu: Qemu) -> dict[str, str]:
    """What a backup then does."""
    told: list[Event] = []
    stage.backup(qemu, told.append)
    disks = [event for event in told if isinstance(event, DiskPlanned)]
    return {disk.disk: disk.reason if disk.mode == "full" else disk.mode for disk in disks}


def test_a_disk_is_added_and_one_is_taken_out(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    kept, gone, new = (stage.disk(name, MIB) for name in ("vda", "vdb", "vdc"))
    with bare_qemu([kept, gone], name="web", running=True) as qemu:
        first = shown(stage, qemu)
        assert (first["domain"], first["last"], first["gone"]) == ("web", None, [])
        assert plans(first) == {"vda": FIRST, "vdb": FIRST}
        backup = stage.backup(qemu)
        assert shown(stage, qemu)["gone"] == []
        qemu.shutdown()
    qemu = bare_qemu([kept, new], name="web", running=True)
    qemu.device_write("vda", 64 * KIB, 70 * KIB)
    view = shown(stage, qemu)
    assert (view["last"], view["gone"]) == (backup.id, ["vdb"])
    incremental, _ = view["disks"]
    assert (incremental["backup"], incremental["checkpoint"]) == (backup.id, backup.manifest.disks[0].checkpoint)
    assert [disk["most"] for disk in view["disks"]] == [128 * KIB, MIB]
    words = ["domain", "show", f"qmp:{qemu.qmp_path}", "--repo", str(stage.repo)]
    text = inside(words, stage.environment()).out
    assert f"vda: incremental, since {incremental['checkpoint']} of backup {backup.id[:8]}, at most 128 KiB" in text
    assert f"vdc: full, 1.00 MiB: {FIRST}" in text
    assert "vdb: not in it; the domain has no such disk any more" in text
    assert plans(view) == as_it_comes(stage, qemu) == {"vda": "incremental", "vdc": FIRST}
    assert shown(stage, qemu)["gone"] == []


def test_a_disk_shrank_and_another_grew(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk(name, 4 * MIB) for name in ("vda", "vdb", "vdc")], name="web", running=True)
    stage.backup(qemu)
    qemu.qmp("block_resize", node_name="node-vda", size=2 * MIB)
    qemu.qmp("block_resize", node_name="node-vdb", size=6 * MIB)
    view = shown(stage, qemu)
    changed = f"the disk's size changed from {4 * MIB} to "
    assert plans(view) == {"vda": f"{changed}{2 * MIB} bytes", "vdb": f"{changed}{6 * MIB} bytes", "vdc": "incremental"}
    assert [disk["most"] for disk in view["disks"]] == [2 * MIB, 6 * MIB, 0]
    assert plans(view) == as_it_comes(stage, qemu)
    assert set(plans(shown(stage, qemu)).values()) == {"incremental"}


def test_another_repository_and_another_name_know_nothing_of_it(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    new_repository(lab_dir / "other")
    qemu = bare_qemu([stage.disk("vda", MIB)], name="web", running=True)
    stage.backup(qemu)
    assert plans(shown(stage, qemu)) == {"vda": "incremental"}
    for view in (shown(stage, qemu, lab_dir / "other"), shown(stage, qemu, None, "--name", "other")):
        assert plans(view) == {"vda": FIRST}
        assert view["last"] is None
    missing = ["domain", "show", f"qmp:{qemu.qmp_path}", "--repo", str(lab_dir / "missing")]
    assert inside(missing, stage.environment()).code == 10
    silent = inside(["domain", "show", f"qmp:{qemu.qmp_path}", "--json"], stage.environment())
    assert silent.event("domain")["next_backup"] is None
