# SPDX-License-Identifier: Apache-2.0
"""How long `pullback boot` takes to a guest's first output and to its shell, beside QEMU on the same image.

`python -m bench.boot [MIB] [DIRECTORY]`

The guest is the tests' Linux; its first disk, of this size and half random, holds a file system that is mounted and a
file of 16 MiB that is read.  Medians of three, in turns: QEMU on the raw image, `boot`, `boot --to` (which copies
meanwhile).  Everything with TCG, since KVM is not to be had everywhere.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lab import guest, images
from pullback.model.units import CHUNK, SEGMENT
from pullback.plan.boot import BootDisk, Booting, arguments
from tests.support.backups import open_repository
from tests.support.product import MIB, Stage
from tests.support.serving import Model, store_models

MARK = b"the guest has read "
SCRIPT = f"""#!/bin/sh
mount -t proc proc /proc; mount -t devtmpfs dev /dev
for module in virtio_pci virtio_blk; do while read -r f; do insmod /modules/$f; done </modules/$module.order; done
exec </dev/console >/dev/console 2>&1
mount -o ro /dev/vda /mnt
echo "{MARK.decode()}$(md5sum </mnt/known)"
poweroff -f
"""


def make(stage: Stage, mib: int) -> Path:
    """A backup of a disk of this size with a file system on it, and the image itself."""
    rng = random.Random(3)
    content = {"known": rng.randbytes(16 * MIB), "much": b"".join(rng.randbytes(MIB) for _ in range(mib // 2))}
    raw = images.make_ext4(stage.place / "raw", mib * MIB, content, format="raw")
    data = raw.read_bytes()
    chunks = tuple(data[start : start + CHUNK] for start in range(0, len(data), CHUNK))
    store_models(open_repository(stage.repo), {"vda": Model(chunks)}, segment=SEGMENT)
    return raw


def initramfs(place: Path) -> Path:
    """The tests' initramfs with a program of our own: archives may follow one another, the last file of a name wins."""
    (made := place / "initramfs").write_bytes(
        guest.initramfs().read_bytes() + guest._cpio({"bench": (SCRIPT.encode(), 0o755)})
    )
    return made


def timed(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds to the first output of the guest's kernel, to the mark, and to the end."""
    begin = time.perf_counter()
    found: dict[str, float] = {}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if b"Linux version" in line:
            found["first output"] = time.perf_counter() - begin
        if MARK in line:
            found["16 MiB read"] = time.perf_counter() - begin
    assert process.wait() == 0
    return {**found, "end": time.perf_counter() - begin}


def ways(stage: Stage, raw: Path) -> tuple[dict[str, Callable[[], list[str]]], dict[str, str]]:
    """The command line of each way to boot, and their environment."""
    place = stage.place
    linux = ["-kernel", str(guest.kernel()), "-initrd", str(initramfs(place)), "-no-reboot"]
    linux += ["-append", "console=ttyS0 panic=-1 mitigations=off nokaslr tsc=reliable rdinit=/bench"]
    given = [*linux, "-accel", "tcg", "-m", "512M", "-smp", "1"]
    direct = Booting("qemu-system-x86_64", "web", (BootDisk("vda", str(raw)),), f"{place}/q", "", "tcg", 1, "output")
    plain = [word.replace('"qcow2"', '"raw"') for word in arguments(direct, given)]
    turns = iter(range(1000))
    found: dict[str, Callable[[], list[str]]] = {
        "QEMU on the image": lambda: plain,
        "boot": lambda: stage.command("boot", "latest", "--work", place, "--", *given),
        "boot --to": lambda: stage.command("boot", "latest", "--to", place / f"{next(turns)}", "--", *given),
    }
    return found, stage.environment(PULLBACK_CACHE_DIR=f"{place}/cache", PATH=os.environ["PATH"])


def main() -> None:
    """Print a JSON line per way to boot."""
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        stage = Stage(Path(name))
        found, environment = ways(stage, make(stage, mib))
        seen: dict[str, list[dict[str, float]]] = {way: [] for way in found}
        for _ in range(3):
            for way, command in found.items():
                seen[way].append(timed(command(), environment))
        for way, times in seen.items():
            medians = {what: round(statistics.median(one[what] for one in times), 2) for what in times[0]}
            print(json.dumps({"way": way, **medians}), flush=True)


if __name__ == "__main__":
    main()
