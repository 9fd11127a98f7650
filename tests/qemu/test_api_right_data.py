# SPDX-License-Identifier: Apache-2.0
"""What a public export gives while the domain writes, zeroes and discards around every reader's requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lab.qemu import BareQemu
from pullback.model.snapshots import FROZEN_VIEW_EXACT
from tests.support.api import Api, by_everybody, by_nbdcopy, by_us, reads
from tests.support.product import KIB, MIB, Stage, mounted_tmpfs, reference

Start = Callable[..., BareQemu]
SIZE = 4 * MIB


def _overwrite(qemu: BareQemu) -> None:
    """Within each MiB a write, a zero-write or a discard, with untouched data behind it."""
    for start in range(0, SIZE, MIB):
        qemu.device_write("vda", start, 64 * KIB, 0x77)
        qemu.device_zero("vda", start + 192 * KIB, 64 * KIB, unmap=True)
        qemu.device_discard("vda", start + 320 * KIB, 64 * KIB)
        qemu.device_write("vda", start + 500 * KIB, 3 * KIB, 0x78)


@pytest.mark.parametrize("method", ["filter", "job"])
def test_frozen_under_writes(lab_dir: Path, bare_qemu: Start, method: str) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", SIZE)], running=True)
    api = Api(stage, qemu)
    qemu.device_write("vda", 0, SIZE - MIB // 2, 0x11)
    frozen = reference(qemu)
    made = api.snapshot("s", "--method", method)
    uri = api.export("s")["vda"]
    # What the same clients get from QEMU's own view: the reason for the nodes on top of it.
    access = f"pb-{made['id']}-0-access"
    qemu.qmp("block-export-add", id="plain", type="nbd", node_name=access, name="plain")
    plain = uri.replace("/vda?", "/plain?")
    _overwrite(qemu)
    now = reference(qemu)
    assert now != frozen
    assert by_everybody(uri, lab_dir) == frozen
    version = qemu.qmp("query-version")["qemu"]
    if (version["major"], version["minor"], version["micro"]) < FROZEN_VIEW_EXACT:
        assert by_us(plain) != frozen
    else:
        assert by_us(plain) == frozen
    qemu.qmp("block-export-del", id="plain")
    _overwrite(qemu)
    assert by_nbdcopy(uri) == frozen
    api.do("snapshot", "delete", "s")
    assert reference(qemu) == now
    assert api.clean() == []


def test_a_full_scratch_breaks_the_snapshot_and_not_the_domain(lab_dir: Path, bare_qemu: Start) -> None:
    """Whoever reads gets an error, not other data; it is told which disk is broken and why; deleting works."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", SIZE), stage.disk("vdb", SIZE)], running=True)
    api = Api(stage, qemu)
    qemu.device_write("vda", 0, SIZE, 0x11)
    qemu.device_write("vdb", 0, SIZE, 0x12)
    frozen = reference(qemu, "vdb")
    with mounted_tmpfs(lab_dir / "small", "1M") as small:
        api.do("snapshot", "create", "s", "--scratch", small)
        uris = api.export("s")
        assert [one["broken"] for one in api.do("snapshot", "list")["snapshots"]] == [[]]
        assert api.show()["snapshots"][0]["why_broken"] is None
        for start in range(0, SIZE, 256 * KIB):
            qemu.device_write("vda", start, 256 * KIB, 0x77)
        assert set(reference(qemu, "vda")) == {0x77}

        assert reads(uris["vda"]).returncode != 0
        assert by_nbdcopy(uris["vdb"]) == frozen
        (snapshot,) = api.do("snapshot", "list")["snapshots"]
        assert snapshot["broken"] == ["vda"]
        assert "could not be saved" in api.show()["snapshots"][0]["why_broken"]
        said = api.attempt("domain", "show").out
        assert "vda is broken: its old data could not be saved" in said
        assert "vdb is broken" not in said
        assert "broken: vda" in api.attempt("snapshot", "list").out
        api.do("snapshot", "delete", "s")
        assert list(small.rglob("*")) == []
    assert api.clean() == []
    assert qemu.qmp("query-status")["status"] == "running"


def test_a_scratch_that_qemu_cannot_make(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", SIZE)], running=True)
    api = Api(stage, qemu)
    api.refused(2, "", "snapshot", "create", "s", "--scratch", lab_dir / "missing")
    assert api.clean() == []
