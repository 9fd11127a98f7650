# SPDX-License-Identifier: Apache-2.0
"""The page for the day on which the host is gone, walked: only the repository and its password are left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab import images
from tests.support.markdown import code_blocks
from tests.support.product import MIB, Stage
from tests.support.restic import PASSWORD, needs_restic

PAGE = Path(__file__).parents[2] / "docs" / "restore.md"
MARK = "<!-- tests/unit/test_docs_host_is_gone.py runs this block -->\n"


@needs_restic
@pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="QEMU is not installed")
def test_the_disks_come_back_with_pullback_and_with_restic_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    expected = {"vda": os.urandom(2 * MIB) + bytes(6 * MIB), "vdb": bytes(MIB) + os.urandom(MIB)}
    for name, content in expected.items():
        (tmp_path / f"{name}.img").write_bytes(content)
    given = ",".join(f"{name}={tmp_path}/{name}.img" for name in expected)
    assert stage.cli("backup", f"disk:{given}", "--name", "web").code == 0
    for name in expected:
        (tmp_path / f"{name}.img").unlink()
    blocks = [code_blocks(part, "sh")[0] for part in PAGE.read_text().split(MARK)[1:]]
    assert len(blocks) == 3
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    (home := tmp_path / "home").mkdir()
    environment = {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    settings = blocks[0].replace("/mnt/backup", str(stage.repo)).replace("/root/password", str(tmp_path / "password"))
    for block in blocks[1:]:
        (here := tmp_path / block.split()[0]).mkdir()
        script = settings + block.replace("/srv/vm", str(here))
        done = subprocess.run(
            ["bash", "-euc", script], cwd=here, env=environment, check=False, timeout=60, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        for name, content in expected.items():
            assert images.raw_bytes(here / f"{name}.qcow2") == content
