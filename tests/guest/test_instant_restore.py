# SPDX-License-Identifier: Apache-2.0
"""A Linux on the images of an instant restore: it reads and writes meanwhile, and what serves it is killed."""

from __future__ import annotations

import hashlib
import random
import signal
from pathlib import Path

from lab import images
from lab.disks import DiskSpec
from lab.vm import Vm
from pullback.model.units import CHUNK
from tests.support.backups import open_repository
from tests.support.product import MIB, Stage
from tests.support.serving import Model, Server, random_disk, store_models

KNOWN = random.Random(5).randbytes(8 * MIB)
SIZE = 32 * MIB


def test_a_guest_works_on_a_backup_while_it_is_copied_and_what_serves_it_is_killed(
    tmp_path: Path, lab_dir: Path
) -> None:
    stage, to = Stage(tmp_path), lab_dir / "out"
    system = images.make_ext4(tmp_path / "system", SIZE, {"known": KNOWN}, format="raw").read_bytes()
    plain = random_disk(SIZE, seed=21)
    files = Model(tuple(system[start : start + CHUNK] for start in range(0, SIZE, CHUNK)))
    backup = store_models(open_repository(stage.repo), {"vda": files, "vdb": plain})
    vm = Vm([DiskSpec(to / "vda.qcow2", "vda"), DiskSpec(to / "vdb.qcow2", "vdb")], name="web")
    command = ("restore", backup, "--instant", "--to", to, "--json", "--domain")
    md5 = hashlib.md5(KNOWN, usedforsecurity=False).hexdigest()
    # This one serves, and waits for a domain elsewhere: nothing is copied before it is killed.
    with stage.running(*command, f"qmp:{lab_dir / 'later'}") as process:
        server = Server(process)
        assert server.read("overlays"), server.lines
        vm.__enter__()
        try:
            vm.run("mkdir -p /mnt && mount /dev/vda /mnt && echo first >/mnt/first && sync")
            server.end(signal.SIGKILL)
            reading = vm.start_background("md5sum /mnt/known >/mnt/sum; sync")
            # Part of a cluster: the rest of it comes from the backup.
            writing = vm.start_background(
                "yes | dd of=/dev/vdb bs=512 seek=9 count=1 conv=notrunc iflag=fullblock; sync"
            )
            with stage.running(*command, f"qmp:{vm.qmp_path}") as again:
                other = Server(again)
                assert other.read("streamed"), other.lines
                assert again.wait(60) == 0
            reading.wait()
            writing.wait()
            assert vm.run("cat /mnt/sum").split()[0] == md5
            vm.run("echo last >/mnt/last; sync")
            vm.kill()
            expected = bytearray(plain.data)
            expected[9 * 512 : 10 * 512] = b"y\n" * 256
            assert images.raw_bytes(to / "vdb.qcow2") == bytes(expected)
            assert sorted(path.name for path in to.iterdir()) == ["vda.qcow2", "vdb.qcow2"]
            vm.start()
            vm.run("mkdir -p /mnt && mount /dev/vda /mnt")
            assert vm.run("cat /mnt/first /mnt/last").split() == ["first", "last"]
            assert vm.run("md5sum /mnt/known").split()[0] == md5
        finally:
            vm.close()
