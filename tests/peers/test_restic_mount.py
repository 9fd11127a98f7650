# SPDX-License-Identifier: Apache-2.0
"""A backup of ours, mounted by restic: its disks can be read like files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.processes import Process, wait_for
from tests.support.backups import new_repository, store_backup
from tests.support.restic import Restic

needs_fuse = pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="this system offers no FUSE")


@contextmanager
def mounted(place: Path) -> Iterator[Path]:
    """The repository, mounted by restic while the block runs."""
    target = place / "mnt"
    target.mkdir()
    restic = Restic(place / "repo")
    program = Process(["restic", "--no-cache", "mount", str(target)], place / "mount.log", env=restic.environment())
    try:
        wait_for(lambda: os.path.ismount(target) or not program.running(), "restic's mount", 30)
        assert program.running(), program.output()
        yield target
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(target)], capture_output=True, check=False)
        program.end()


@needs_fuse
def test_restic_mounts_our_backups(tmp_path: Path) -> None:
    repository = new_repository(tmp_path / "repo")
    first, second = os.urandom(300_000), os.urandom(100_000)
    with repository.lock():
        backup = store_backup(repository, {"vda": [first, second]})
    with mounted(tmp_path) as place:
        for way in ("hosts/web/latest", f"ids/{backup[:8]}"):
            disk = place / way / "web" / "vda"
            assert (disk / "0000" / "0000.raw").read_bytes() == first
            assert (disk / "0001" / "0001.raw").read_bytes() == second
