# SPDX-License-Identifier: Apache-2.0
"""A domain that is written to from outside: disks in a storage daemon, whose writable exports play the domain.

The writer is fio's NBD engine: a guest without KVM is too slow to say anything about QEMU's block layer.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import Bench, BenchError
from bench.rivals import OURS, prepared
from lab.monitor import Monitor
from pullback.engine.domain_lock import lock_directory
from pullback.engine.offline import daemon_place, parse_images
from pullback.model.facts import DISK_NODE

DEPTH = 8


@dataclass(frozen=True)
class Wrote:
    """What a writer saw: writes a second, and latencies in microseconds, of ``total`` writes."""

    per_second: float
    total: int
    p99: float
    longest: float


class Writer:
    """fio on some exports of a server for ``seconds``; with a ``rate`` it makes so many writes a second to each."""

    def __init__(
        self, uris: Sequence[str], output: Path, seconds: int, block: int = 4096, rate: int = 0, random: bool = True
    ) -> None:
        self._output = output
        command = ["fio", "--output-format=json", f"--output={output}", "--ioengine=nbd", "--thread=1"]
        command += ["--time_based", f"--runtime={seconds}", "--group_reporting", "--randrepeat=0"]
        command += [f"--rw={'randwrite' if random else 'write'}", f"--bs={block}", "--norandommap"]
        command += [f"--rate_iops={rate}", "--iodepth=1"] if rate else [f"--iodepth={DEPTH}"]
        for number, uri in enumerate(uris):
            command += [f"--name=writer-{number}", f"--uri={uri}"]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def running(self) -> bool:
        """Whether it still writes."""
        return self._process.poll() is None

    def end(self) -> Wrote:
        """What it saw."""
        if code := self._process.wait():
            raise BenchError(f"fio ended with {code}")
        _, begin, said = self._output.read_text().partition("{\n")  # before it fio says that it is connected
        (job,) = json.loads(begin + said)["jobs"]
        seen: dict[str, Any] = job["write"]
        latency = seen["clat_ns"]
        return Wrote(seen["iops"], seen["total_ios"], latency["percentile"]["99.000000"] / 1000, latency["max"] / 1000)


@dataclass(frozen=True)
class Written:
    """The domain: ``address`` is what pullback calls it, ``qmp`` its daemon's monitor, nobody's between commands."""

    address: str
    uris: tuple[str, ...]
    qmp: Path
    pid: int
    env: Mapping[str, str]

    def pullback(self, *arguments: str) -> dict[str, Any]:
        """Run a command on it; the last that it said."""
        return told([OURS, *arguments, "--json"], self.env)

    @contextmanager
    def monitor(self) -> Iterator[Monitor]:
        """The daemon's monitor, while no pullback works."""
        monitor = Monitor(self.qmp)
        try:
            yield monitor
        finally:
            monitor.close()


def told(command: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """Run a command that prints JSON lines; the last of them."""
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def written(bench: Bench, size: int, env: Mapping[str, str], disks: int = 1) -> Iterator[Written]:
    """A domain with so many disks of this size, allocated in full: its writes find their clusters there."""
    images = [bench.place / f"disk-{number}.qcow2" for number in range(disks)]
    for image in images:
        prepared(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=falloc", str(image), str(size)])
    spec = ",".join(f"vd{chr(97 + number)}={image}" for number, image in enumerate(images))
    socket = bench.place / "written"
    told([OURS, "export", "start", f"disk:{spec}", "--writable", "--socket", str(socket), "--json"], env)
    try:
        place = daemon_place(parse_images(spec), lock_directory())
        uris = tuple(f"nbd+unix:///vd{chr(97 + number)}?socket={socket}" for number in range(disks))
        yield Written(f"disk:{spec}", uris, place.socket, int(place.pidfile.read_text()), env)
    finally:
        names = [f"vd{chr(97 + number)}" for number in range(disks)]
        told([OURS, "export", "stop", f"disk:{spec}", *names, "--json"], env)


def disk_node(number: int = 0) -> str:
    """The node of one of its disks."""
    return f"{DISK_NODE}vd{chr(97 + number)}"


def room_of(pid: int, directory: Path) -> int:
    """Bytes that the files take which a process has open below a directory, those without a name included."""
    sizes: dict[int, int] = {}
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if str(one.readlink()).startswith(f"{directory}/"):
                status = one.stat()
                sizes[status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())
