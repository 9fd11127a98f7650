# SPDX-License-Identifier: Apache-2.0
"""The worked example of docs/api.md, taken from the page and run on a real QEMU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lab.qemu import BareQemu
from tests.support.markdown import code_blocks
from tests.support.product import KIB, MIB, Stage, chain, leftovers

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


def example(socket: Path, nbd: Path) -> str:
    (block,) = code_blocks(PAGE.partition("runs this block -->\n")[2], "python")
    for shown, used in (("/run/qemu/web.qmp", socket), ("/run/web-nbd", nbd)):
        assert shown in block
        block = block.replace(shown, str(used))
    return block


def test_the_example_reads_what_changed_and_leaves_only_the_checkpoint(
    tmp_path: Path, bare_qemu: Callable[..., BareQemu]
) -> None:
    stage = Stage(tmp_path)
    qemu = bare_qemu([stage.disk("vda"), stage.disk("vdb")], name="web", running=True)
    domain = f"qmp:{qemu.qmp_path}"
    assert (
        stage.cli("snapshot", "create", domain, "first", "--checkpoint", "sunday", "--scratch", stage.scratch).code == 0
    )
    assert stage.cli("snapshot", "delete", domain, "first").code == 0
    qemu.device_write("vda", MIB, 64 * KIB)
    qemu.device_write("vdb", 3 * MIB + 64 * KIB, 128 * KIB)
    source = example(qemu.qmp_path, qemu.directory / "nbd")
    assert len(source.splitlines()) < 40
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"vda {MIB}+{64 * KIB}\nvdb {3 * MIB + 64 * KIB}+{128 * KIB}\n"
    assert chain(qemu) == {"pullback-sunday": False, "pullback-monday^sunday": True}
    assert not leftovers(qemu, stage.scratch)


def test_a_dry_run_of_an_incremental_backup_tells_its_export_and_changes_nothing(
    tmp_path: Path, bare_qemu: Callable[..., BareQemu]
) -> None:
    """The checkpoint that the changes lead to is only planned."""
    stage = Stage(tmp_path)
    qemu = bare_qemu([stage.disk("vda"), stage.disk("vdb")], name="web", running=True)
    assert stage.cli_backup(qemu).code == 0
    before = chain(qemu)
    done = stage.cli_backup(qemu, "--dry-run", "--freeze", "--agent", tmp_path / "nobody", "--json")
    assert done.code == 0, done.out
    told = [event["execute"] for event in done.events if event["event"] == "command"]
    assert "block-export-add" in told
    assert "stop" not in told
    assert chain(qemu) == before
    assert not leftovers(qemu, stage.scratch)
