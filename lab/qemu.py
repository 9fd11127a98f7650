# SPDX-License-Identifier: Apache-2.0
"""A QEMU process with disks and two QMP monitors; and one that needs no operating system to write to its disks."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab.disks import DiskSpec, arguments
from lab.monitor import Monitor, MonitorClosed
from lab.processes import LabError, Process, run, wait_for

PROGRAM = "qemu-system-x86_64"
LONGEST_SOCKET_PATH = 107
"""Bytes in a unix socket's path, without the final zero (unix(7))."""


@functools.cache
def qemu_version() -> tuple[int, ...]:
    """(major, minor, micro) of the QEMU that the laboratory starts: the first one in PATH."""
    said = run([PROGRAM, "--version"]).decode()
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", said)
    if found is None:
        raise LabError(f"{PROGRAM} tells no version: {said}")
    return tuple(map(int, found.groups()))


def short_directory() -> Path:
    """Make a private directory whose path leaves room for any socket name of ours."""
    made = Path(tempfile.mkdtemp(prefix="pb-"))
    if len(bytes(made)) > LONGEST_SOCKET_PATH - 40:
        made.rmdir()
        made = Path(tempfile.mkdtemp(prefix="pb-", dir="/tmp"))
    return made


class Qemu:
    """One QEMU process; a context manager that starts it and leaves nothing behind.

    ``qmp_path`` is the monitor for whoever is being tested, ``qmp`` talks over one of our own.  After ``kill`` or
    ``shutdown`` it can be started again on the same disks and under the same paths.
    """

    def __init__(
        self,
        disks: Sequence[DiskSpec] = (),
        *,
        name: str = "lab",
        memory: str = "64M",
        machine: str = "q35",
        accel: str = "tcg",
        extra_args: Sequence[str] = (),
        program: str = PROGRAM,
    ) -> None:
        self.disks = tuple(disks)
        self.name = name
        self.memory = memory
        self.machine = machine
        self.accel = accel
        self.extra_args = tuple(extra_args)
        self.program = program
        self.directory = short_directory()
        self.qmp_path = self.directory / "qmp"
        self._own_path = self.directory / "own"
        self._process: Process | None = None
        self._monitor: Monitor | None = None
        self._qdev: dict[str, str] = {}

    def __enter__(self) -> Self:
        try:
            if self._process is None:
                self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the process and connect; LabError with QEMU's own words if it does not come up."""
        if self._process is not None and self._process.running():
            raise LabError(f"{self.name} runs already")
        for path in (self.qmp_path, self._own_path):
            path.unlink(missing_ok=True)
        self._process = Process(self._argv(), self.directory / "log")
        try:
            self._monitor = wait_for(self._connect, f"{self.name}: the monitor socket")
        except BaseException as error:
            self._process.kill()
            if isinstance(error, MonitorClosed):
                raise LabError(f"{self.name} did not start: {self.log()}") from error
            raise
        self._qdev = {}

    def _connect(self) -> Monitor | None:
        if not self.running():
            raise LabError(f"{self.name} did not start: {self.log()}")
        try:
            return Monitor(self._own_path)
        except (FileNotFoundError, ConnectionRefusedError):  # not bound yet; bound, not listening yet
            return None

    def _argv(self) -> list[str]:
        argv = [self.program, "-no-user-config", "-nodefaults", "-nographic", "-S"]
        argv += ["-name", self.name, "-M", self.machine, "-accel", self.accel, "-m", self.memory]
        # QEMU makes the sockets in this order: when our own listens, the other one does too.
        for number, path in enumerate((self.qmp_path, self._own_path)):
            argv += ["-chardev", f"socket,id=qmp{number},path={path},server=on,wait=off"]
            argv += ["-mon", f"chardev=qmp{number},mode=control"]
        return [*argv, *arguments(self.disks), *self._more_args(), *self.extra_args]

    def _more_args(self) -> list[str]:
        return []

    @property
    def pid(self) -> int:
        return self._running().pid

    def _running(self) -> Process:
        if self._process is None:
            raise LabError(f"{self.name} was never started")
        return self._process

    def running(self) -> bool:
        return self._process is not None and self._process.running()

    def log(self) -> str:
        """What QEMU printed since the first start."""
        return self._process.output() if self._process is not None else ""

    @property
    def monitor(self) -> Monitor:
        if self._monitor is None:
            raise LabError(f"{self.name} is not running")
        return self._monitor

    def qmp(self, command: str, arguments: Mapping[str, object] | None = None, /, **more: object) -> Any:
        """Run a QMP command; keyword arguments are written with ``_`` for ``-``, others go into ``arguments``."""
        keywords = {key.replace("_", "-"): value for key, value in more.items()}
        return self.monitor.command(command, {**(arguments or {}), **keywords})

    def hmp(self, line: str) -> str:
        """Run a line on the human monitor and return what it said."""
        said: str = self.monitor.command("human-monitor-command", {"command-line": line})
        return said

    def disk(self, disk_id: str) -> DiskSpec:
        for disk in self.disks:
            if disk.id == disk_id:
                return disk
        raise LabError(f"{self.name} has no disk {disk_id}")

    def bitmaps(self, disk_id: str) -> dict[str, dict[str, Any]]:
        """The dirty bitmaps of a disk's format node by name, as QEMU describes them (``count`` is in bytes)."""
        wanted = str(self.disk(disk_id).path)
        for node in self.qmp("query-named-block-nodes", flat=True):
            if node["node-name"] == self.disk(disk_id).node or (node["drv"] != "file" and node["file"] == wanted):
                return {bitmap.get("name", ""): bitmap for bitmap in node.get("dirty-bitmaps", [])}
        raise LabError(f"{self.name}: no node of disk {disk_id}")

    def kill(self) -> None:
        """SIGKILL, as a crash of the host would end it; gone when this returns."""
        self._running().kill()
        self._disconnect()

    def shutdown(self, timeout: float = 30.0) -> None:
        """Let QEMU quit by itself, so that it flushes images and stores persistent bitmaps."""
        with contextlib.suppress(MonitorClosed):
            self.qmp("quit")
        code = self._running().wait(timeout)
        self._disconnect()
        if code != 0:
            raise LabError(f"{self.name} ended with {code}: {self.log()}")

    def close(self) -> None:
        """End the process if it runs, and remove the sockets and logs; safe to call twice."""
        if self._process is not None:
            self._process.end()
        self._disconnect()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _disconnect(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None


class BareQemu(Qemu):
    """A QEMU without an operating system: its disks are written through their devices, from the monitor.

    The processor is not started unless ``running``: then firmware runs, finds nothing to boot, and idles.
    """

    def __init__(self, disks: Sequence[DiskSpec] = (), *, running: bool = False, **more: Any) -> None:
        super().__init__(disks, **more)
        self._cont = running

    def start(self) -> None:
        super().start()
        if self._cont:
            self.qmp("cont")

    def device_write(self, disk_id: str, offset: int, length: int, pattern: int | bytes = 0xAB) -> None:
        """Write ``length`` bytes at ``offset``: one byte repeated, or the given bytes repeated."""
        if isinstance(pattern, int):
            self._device(disk_id, f"write -P {pattern} {offset} {length}", length)
            return
        source = self.directory / "pattern"
        source.write_bytes(pattern)
        self._device(disk_id, f"write -s {source} {offset} {length}", length)

    def device_zero(self, disk_id: str, offset: int, length: int, *, unmap: bool = False) -> None:
        """Write zeroes by the command of that name, which may also give the blocks back."""
        self._device(disk_id, f"write -z {'-u ' if unmap else ''}{offset} {length}", length)

    def device_discard(self, disk_id: str, offset: int, length: int) -> None:
        self._device(disk_id, f"discard {offset} {length}", length)

    def device_read_check(self, disk_id: str, offset: int, length: int, pattern: int) -> None:
        """Read, and raise LabError unless every byte is ``pattern``."""
        self._device(disk_id, f"read -P {pattern} {offset} {length}", length)

    def device_flush(self, disk_id: str) -> None:
        """After this the image file holds what was written: reading it beside QEMU gives the disk's content."""
        self._device(disk_id, "flush", None)

    def qdev(self, disk_id: str) -> str:
        """The QOM path of the device that holds the disk's block backend."""
        if disk_id not in self._qdev:
            disk = self.disk(disk_id)
            for block in self.qmp("query-block"):
                inserted = block.get("inserted", {})
                if inserted.get("node-name") == disk.node or block["device"] == disk_id:
                    self._qdev[disk_id] = block["qdev"]
        return self._qdev[disk_id]

    def _device(self, disk_id: str, command: str, length: int | None) -> None:
        """Run a qemu-io command through a device; LabError unless it did all of ``length`` bytes.

        qemu-io prints to QEMU's standard output and the monitor's answer stays empty even when it failed (seen on
        7.2), so success is what the log says: ``wrote 4096/4096 bytes at offset 0``.
        """
        log = self._running().log
        before = log.stat().st_size
        answer = self.hmp(f'qemu-io -d {self.qdev(disk_id)} "{command}"')
        with log.open("rb") as lines:
            lines.seek(before)
            said = (answer + lines.read().decode(errors="replace")).strip()
        # QEMU's own word for an NBD client that went away meanwhile; qemu-io's lines name no program.
        said = re.sub(r"^\S+: Disconnect client\b.*\n?", "", said, flags=re.MULTILINE)
        done = re.search(r"^(?:wrote|read|discard) (\d+)/(\d+) bytes", said, re.MULTILINE)
        wanted = (str(length), str(length)) if length is not None else None
        failed = re.search(r"failed|error|invalid|not a valid|cannot|no medium", said, re.IGNORECASE)
        if failed or (done.groups() if done else None) != wanted:
            raise LabError(f"{self.name}: {disk_id}: {command}: {said or 'no answer'}")
