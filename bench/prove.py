# SPDX-License-Identifier: Apache-2.0
"""What `backup --prove` costs: the same disk, backed up with and without.

`python -m bench.prove [DATA_MIB] [DIRECTORY]` (1024 if not said) makes a disk of four times that size whose first
quarter is random data, and for each kind of backup a new change of 1 % of the data.  Every figure is of a `pullback`
process of its own: by the clock, and its processor time (without QEMU's).
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lab.disks import DiskSpec
from lab.qemu import BareQemu
from pullback.model.units import KIB, MIB, human_bytes

PASSWORD = "bench"
PIECE = 64 * KIB
#: Name, whether the domain writes before it, options.
RUNS = [
    ("full", False, ()),
    ("full --prove", False, ("--full", "--prove")),
    ("incremental", True, ()),
    ("incremental --prove", True, ("--prove",)),
    ("incremental --prove=all", True, ("--prove=all",)),
]


def pullback(place: Path, *arguments: str) -> tuple[float, float, dict[str, Any]]:
    """Seconds that a command took by the clock and of the processor, and the last that it said."""
    environment = os.environ | {"RESTIC_REPOSITORY": str(place / "repo"), "RESTIC_PASSWORD": PASSWORD}
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "pullback.cli.main", *arguments, "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - began, used, json.loads(done.stdout.splitlines()[-1])


def make_disk(place: Path, data: int) -> DiskSpec:
    """A disk that is random in its first quarter and has never been written behind it."""
    raw = place / "raw"
    with raw.open("wb") as file:
        for _ in range(data // MIB):
            file.write(os.urandom(MIB))
        file.truncate(4 * data)
    path = place / "vda.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(path)], check=True)
    raw.unlink()
    return DiskSpec(path, "vda", "qcow2")


def change(qemu: BareQemu, data: int) -> None:
    """1 % of the data, in pieces all over it."""
    for place in random.sample(range(data // PIECE), data // PIECE // 100):
        qemu.device_write("vda", place * PIECE, PIECE, os.urandom(PIECE))


def main() -> None:
    data = int(sys.argv[1]) * MIB if len(sys.argv) > 1 else 1024 * MIB
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as directory:
        place = Path(directory)
        pullback(place, "init")
        with BareQemu([make_disk(place, data)], running=True) as qemu:
            for name, changes, options in RUNS:
                if changes:
                    change(qemu, data)
                seconds, used, said = pullback(
                    place, "backup", f"qmp:{qemu.qmp_path}", "--scratch", directory, *options
                )
                proved = said["proved"] or {"changed": 0, "unchanged": 0}
                compared = human_bytes(proved["changed"] + proved["unchanged"])
                cost = f"{seconds:.1f} s, processor {used:.1f} s, read {human_bytes(said['bytes_read'])}"
                print(f"{name}: {cost}, compared {compared}", flush=True)


if __name__ == "__main__":
    main()
