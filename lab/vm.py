# SPDX-License-Identifier: Apache-2.0
"""A booted Linux whose shell answers on a serial port, and whether this machine can run it with KVM."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shlex
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import agent, guest
from lab.disks import KINDS, DiskSpec
from lab.processes import LabError, LabTimeout, wait_for
from lab.qemu import Qemu

LONGEST_SCRIPT = 32 << 10
"""Bytes of a script in base64; a terminal without flow control loses what its 64 KiB of buffers cannot take."""
PROBE_LIMIT = 20.0
KVM = Path("/dev/kvm")


class GuestError(LabError):
    """A command in the guest ended with another exit code than 0."""

    def __init__(self, script: str, code: int, output: bytes) -> None:
        super().__init__(f"{script!r} in the guest: exit code {code}: {output.decode(errors='replace').strip()}")
        self.code = code
        self.output = output


class Vm(Qemu):
    """A Linux with busybox on real disks; root's shell is at hand, there is no network.

    Disks appear in their order: ``/dev/vda`` … on virtio, ``/dev/sda`` … on scsi and ide.  ``with_agent`` gives it the
    port of a guest agent, which QEMU offers at ``agent_path``; ``start-agent`` in the guest is the agent.
    """

    def __init__(
        self,
        disks: Sequence[DiskSpec] = (),
        *,
        memory: str = "256M",
        accel: str | None = None,
        boot_timeout: float = 90.0,
        with_agent: bool = False,
        **more: Any,
    ) -> None:
        for disk in disks:
            if KINDS[disk.bus].modules is None:
                raise ValueError(f"the guest has no driver for {disk.bus}")
        # The cloud kernel has a driver for the IDE controller of `pc`, none for the one of `q35`.
        super().__init__(disks, memory=memory, machine="pc", accel=accel or accelerator(), **more)
        self.boot_timeout = boot_timeout
        self.with_agent = with_agent
        self.agent_path = self.directory / "agent"
        self._shell_path = self.directory / "shell"
        self._console_path = self.directory / "console"
        self._shell: socket.socket | None = None
        self._buffer = b""
        self._numbers = itertools.count(1)
        self._turn = threading.Lock()

    def start(self) -> None:
        """Boot, and return when the guest's shell is ready and all disks are there."""
        self._shell_path.unlink(missing_ok=True)
        super().start()
        try:
            # Connected before the processor starts: what the guest says without a listener is lost.
            self._buffer = b""
            self._shell = socket.socket(socket.AF_UNIX)
            self._shell.connect(str(self._shell_path))
            self.qmp("cont")
            self._boot()
        except BaseException:
            self.kill()
            raise

    def _boot(self) -> None:
        try:
            words = self._line(time.monotonic() + self.boot_timeout).split()
        except LabError as error:
            raise type(error)(f"{self.name} did not boot: {error}\n{self.log()}\n{self.console()[-3000:]}") from error
        if words != ["ready", str(len(self.disks))]:
            raise LabError(f"{self.name}: not all disks appeared: {words}\n{self.console()[-3000:]}")

    def _more_args(self) -> list[str]:
        modules = dict.fromkeys(module for disk in self.disks for module in KINDS[disk.bus].modules or ())
        if self.with_agent:
            modules |= dict.fromkeys(("virtio_pci", agent.MODULE))
        initramfs = agent.initramfs() if self.with_agent else guest.initramfs()
        command_line = (
            "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr tsc=reliable random.trust_cpu=on "
            f"lab.disks={len(self.disks)} lab.modules={','.join(modules)}"
        )
        return [
            *(["-cpu", "host"] if self.accel == "kvm" else []),
            *["-kernel", str(guest.kernel()), "-initrd", str(initramfs), "-append", command_line],
            *["-no-reboot", "-chardev", f"file,id=console,path={self._console_path},append=on"],
            *["-serial", "chardev:console"],
            *["-chardev", f"socket,id=shell,path={self._shell_path},server=on,wait=off", "-serial", "chardev:shell"],
            *(self._agent_args() if self.with_agent else []),
        ]

    def _agent_args(self) -> list[str]:
        return [
            *["-device", "virtio-serial-pci", "-device", f"virtserialport,chardev=agent,name={agent.PORT}"],
            *["-chardev", f"socket,id=agent,path={self.agent_path},server=on,wait=off"],
        ]

    def run(self, script: str, timeout: float = 60.0) -> str:
        """Run a shell script in the guest and return what it wrote to standard output and error.

        Raises GuestError for an exit code other than 0, LabTimeout after ``timeout`` seconds: the script then still
        runs, and the next call waits for its end.
        """
        return self.run_bytes(script, timeout).decode(errors="replace")

    def run_bytes(self, script: str, timeout: float = 60.0) -> bytes:
        """The same as ``run``, for output that is not text."""
        encoded = base64.b64encode(script.encode()).decode()
        if len(encoded) > LONGEST_SCRIPT:
            raise ValueError(f"a script of {len(script)} characters is too long for the guest's serial port")
        with self._turn:
            number = next(self._numbers)
            self._connection().sendall(f"{number} {encoded}\n".encode())
            deadline = time.monotonic() + timeout
            answered = 0
            while answered < number:  # smaller ones are answers that an earlier call did not wait for
                answered, code, length = self._answer(number, deadline)
                output = self._exactly(length, deadline)
        if code:
            raise GuestError(script, code, output)
        return output

    def _answer(self, number: int, deadline: float) -> tuple[int, int, int]:
        """The number, the exit code and the length of the next answer; LabError when it cannot be one up to ours."""
        line = self._line(deadline)
        words = line.split()
        if len(words) != 3 or not all(word.isdecimal() for word in words) or int(words[0]) > number:
            raise LabError(f"{self.name}: the guest's shell answered {line!r} to command {number}")
        return int(words[0]), int(words[1]), int(words[2])

    def start_background(self, script: str) -> GuestJob:
        """Start a shell script in the guest and let it run beside everything else."""
        name = f"/run/job.{next(self._numbers)}"
        inner = shlex.quote(f"sh -c {shlex.quote(script)}; echo $? >{name}.code")
        pid = int(self.run(f"setsid sh -c {inner} </dev/null >{name} 2>&1 & echo $!"))
        return GuestJob(self, pid, name)

    def console(self) -> str:
        """What the firmware and the kernel said on the first serial port since the first start."""
        return self._console_path.read_text(errors="replace") if self._console_path.exists() else ""

    def _connection(self) -> socket.socket:
        if self._shell is None:
            raise LabError(f"{self.name} is not running")
        return self._shell

    def _line(self, deadline: float) -> str:
        while b"\n" not in self._buffer:
            self._receive(deadline)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace")

    def _exactly(self, length: int, deadline: float) -> bytes:
        parts = [self._buffer]
        have = len(self._buffer)
        while have < length:
            self._buffer = b""
            self._receive(deadline)
            parts.append(self._buffer)
            have += len(self._buffer)
        whole = b"".join(parts)
        self._buffer = whole[length:]
        return whole[:length]

    def _receive(self, deadline: float) -> None:
        connection = self._connection()
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            more = connection.recv(1 << 16)
        except TimeoutError as error:
            raise LabTimeout(f"{self.name}: the guest's shell did not answer within the time limit") from error
        except ConnectionError as error:
            raise LabError(f"{self.name}: the guest's shell is gone: {error}") from error
        if not more:
            raise LabError(f"{self.name}: the guest's shell is gone")
        self._buffer += more

    def _disconnect(self) -> None:
        super()._disconnect()
        if self._shell is not None:
            self._shell.close()
            self._shell = None


@dataclass(frozen=True, slots=True)
class GuestJob:
    """A script running in a guest, in a process group of its own."""

    vm: Vm
    pid: int
    path: str

    def output(self) -> str:
        """What it wrote so far."""
        return self.vm.run(f"cat {self.path}")

    def code(self) -> int | None:
        """Its exit code; None while it runs, and after ``stop``."""
        said = self.vm.run(f"cat {self.path}.code 2>/dev/null || :")
        return int(said) if said else None

    def wait(self, timeout: float = 60.0) -> str:
        """Wait for its end and return what it wrote; GuestError for an exit code other than 0."""
        wait_for(lambda: self.code() is not None, f"the end of job {self.pid} in the guest", timeout)
        code = self.code()
        output = self.output()
        if code:
            raise GuestError(self.path, code, output.encode())
        return output

    def stop(self) -> None:
        """Kill it with all it started; gone when this returns.  Nothing happens if it has ended."""
        self.vm.run(f"kill -9 -{self.pid} 2>/dev/null || :")
        gone = f"! grep -q '^State:.[^Z]' /proc/{self.pid}/status 2>/dev/null && echo gone || :"
        wait_for(lambda: self.vm.run(gone), f"the end of job {self.pid} in the guest")


def accelerator() -> str:
    """Say ``kvm`` if a guest was seen to boot and answer with it, else ``tcg``.

    Some machines offer KVM and then hang the guest.  The answer is kept until this machine reboots;
    PULLBACK_LAB_ACCEL overrides it.
    """
    if named := os.environ.get("PULLBACK_LAB_ACCEL"):
        return named
    if not os.access(KVM, os.R_OK | os.W_OK):
        return "tcg"
    with guest.locked("accelerator"):
        kept = guest.CACHE / "accelerator.json"
        machine = _machine()
        if kept.exists():
            known = json.loads(kept.read_text())
            if known["machine"] == machine:
                return str(known["answer"])
        answer = "kvm" if _boots("kvm") else "tcg"
        fresh = kept.with_suffix(".new")
        fresh.write_text(json.dumps({"machine": machine, "answer": answer}))
        fresh.rename(kept)
        return answer


def _machine() -> list[str]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), models[0] if models else ""]


def _boots(accel: str) -> bool:
    try:
        with Vm(accel=accel, boot_timeout=PROBE_LIMIT, name="probe") as vm:
            return vm.run("echo alive", timeout=PROBE_LIMIT) == "alive\n"
    except LabError:
        return False
