# SPDX-License-Identifier: Apache-2.0
"""A Linux booted by ``pullback boot``: it works on a backup that is copied meanwhile; pullback and QEMU are killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lab import images
from lab.disks import DiskSpec
from lab.monitor import Monitor, QmpError
from lab.processes import LabError, wait_for
from lab.vm import Vm
from pullback.model.units import CHUNK
from tests.support.backups import open_repository
from tests.support.product import MIB, Stage
from tests.support.serving import Model, Server, store_models

KNOWN = random.Random(6).randbytes(8 * MIB)
# Hardly any of it zero: so copying takes seconds, and is slowed down before it ends.
SIZE = 64 * MIB
REST = random.Random(7).randbytes(44 * MIB)


class Booted(Vm):
    """The laboratory's guest on a QEMU that the command starts."""

    def given(self) -> list[str]:
        """What follows ``--``: everything but the disks, and a processor that waits until somebody listens."""
        self._shell_path.unlink(missing_ok=True)
        own = ["-qmp", f"unix:{self._own_path},server=on,wait=off", "-S"]
        return ["-M", "pc", "-m", "256M", "-smp", "1", "-accel", self.accel, *self._more_args(), *own]

    def attach(self, *, slow: bool = False) -> None:
        """Let it boot, and return when its shell is ready; ``slow`` has the copying take long."""
        self._monitor = Monitor(self._own_path)
        for number in range(len(self.disks) if slow else 0):
            wait_for(partial(self.set_speed, number, MIB // 4), "the job that copies")
        self._buffer = b""
        self._shell = socket.socket(socket.AF_UNIX)
        self._shell.connect(str(self._shell_path))
        self.qmp("cont")
        self._boot()

    def set_speed(self, number: int, speed: int) -> bool:
        """Have a disk be copied so fast, in bytes per second (0: as fast as can be); whether it is being copied."""
        try:
            self.qmp("block-job-set-speed", device=f"instant-{number}", speed=speed)
        except QmpError:
            return False
        return True


@contextmanager
def booting(stage: Stage, backup: str, to: Path, vm: Booted) -> Iterator[Server]:
    """The command, once its QEMU runs, which is killed at the block's end."""
    with stage.running("boot", backup, "--to", to, "--json", "--", *vm.given()) as process:
        server = Server(process)
        try:
            assert server.read("booted"), f"it ended: {server.lines} {process.communicate()}"
            yield server
        finally:
            with contextlib.suppress(StopIteration, ProcessLookupError):
                os.kill(pid_of(server), signal.SIGKILL)
            vm._disconnect()


def pid_of(server: Server) -> int:
    """The number of the QEMU that it told of."""
    return int(next(event["pid"] for event in server.events if event["event"] == "booted"))


def test_a_guest_is_booted_from_a_backup_and_goes_on_when_pullback_and_qemu_are_killed(
    tmp_path: Path, lab_dir: Path
) -> None:
    stage, to = Stage(tmp_path), lab_dir / "out"
    system = images.make_ext4(tmp_path / "system", SIZE, {"rest": REST, "known": KNOWN}, format="raw").read_bytes()
    plain = Model(tuple(random.Random(seed).randbytes(CHUNK) for seed in range(SIZE // CHUNK)))
    files = Model(tuple(system[start : start + CHUNK] for start in range(0, SIZE, CHUNK)))
    backup = store_models(open_repository(stage.repo), {"vda": files, "vdb": plain})
    md5 = hashlib.md5(KNOWN, usedforsecurity=False).hexdigest()
    vm = Booted([DiskSpec(to / "vda.qcow2", "vda"), DiskSpec(to / "vdb.qcow2", "vdb")], name="web")
    try:
        with booting(stage, backup, to, vm) as first:
            vm.attach(slow=True)
            # Part of a cluster: the rest of it comes from the backup.
            vm.run("yes | dd of=/dev/vdb bs=512 seek=9 count=1 conv=notrunc iflag=fullblock && sync")
            vm.run("mkdir -p /mnt && mount /dev/vda /mnt && echo first >/mnt/first && sync")
            first.process.kill()
            first.process.wait()
            reading = vm.start_background("md5sum /mnt/known >/mnt/sum; sync")
            with booting(stage, backup, to, vm) as again:
                assert vm.set_speed(0, 0)
                assert vm.set_speed(1, 0)
                assert again.read("streamed"), again.lines
                reading.wait()
                assert vm.run("cat /mnt/sum").split()[0] == md5
                vm.run("echo last >/mnt/last; sync")
                os.kill(pid_of(again), signal.SIGKILL)
                assert again.process.wait(60) == 0
        with booting(stage, backup, to, vm) as alone:
            vm.attach()
            vm.run("mkdir -p /mnt && mount /dev/vda /mnt")
            assert vm.run("cat /mnt/first /mnt/last").split() == ["first", "last"]
            assert vm.run("md5sum /mnt/known").split()[0] == md5
            vm.run("umount /mnt")
            with contextlib.suppress(LabError):  # no answer comes
                vm.run("poweroff -f")
            assert alone.process.wait(60) == 0
        expected = bytearray(plain.data)
        expected[9 * 512 : 10 * 512] = b"y\n" * 256
        assert images.raw_bytes(to / "vdb.qcow2") == bytes(expected)
    finally:
        vm.close()
