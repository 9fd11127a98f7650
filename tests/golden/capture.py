# SPDX-License-Identifier: Apache-2.0
"""Writes the captured replies anew, from a real QEMU:  python -m tests.golden.capture

The domain has two disks with checkpoints, one that cannot have any, and an empty drive.  It is captured idle, and
with a snapshot exported.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from lab import images
from lab.disks import DiskSpec
from lab.qemu import BareQemu, short_directory
from pullback.model.chain import read_chain
from pullback.plan.checkpoint import NodeChain, start_recording, stop_recording
from pullback.plan.command import Plan
from pullback.plan.snapshot import DiskSnapshot, ExportPart, freeze, open_access, prepare_snapshot, start_export
from pullback.qemu.execute import run_plan
from pullback.qemu.monitor import Monitor, connect, dial
from pullback.qemu.observe import observe
from tests.golden.replay import CAPTURES

SIZE = 8 << 20
SNAPSHOT = "b0000c0de"


@asynccontextmanager
async def session(qemu: BareQemu, seen: list[dict[str, Any]] | None = None) -> AsyncIterator[Monitor]:
    """A session on QEMU's monitor; what is asked goes into ``seen``."""

    def trace(command: str, arguments: Mapping[str, Any], reply: Any) -> None:
        if seen is not None:
            failed = isinstance(reply, dict) and set(reply) == {"error"}
            result = {"error": reply["error"]} if failed else {"return": reply}
            seen.append({"execute": command, "arguments": dict(arguments), **result})

    monitor = await connect(dial(str(qemu.qmp_path)), trace)
    try:
        yield monitor
    finally:
        await monitor.close()


async def _checkpoint(qemu: BareQemu, name: str, targets: tuple[str, ...]) -> None:
    async with session(qemu) as monitor:
        facts = await observe(monitor)
        disks = [facts.disk(device) for device in facts.devices if device.target in targets]
        chains = [NodeChain(disk.node, read_chain(disk.bitmaps)) for disk in disks]
        await run_plan(monitor, Plan((start_recording(chains, name),)) + stop_recording(chains))


async def _freeze(qemu: BareQemu, directory: Path) -> None:
    """A snapshot with checkpoint D, exported with the changes since B."""
    async with session(qemu) as monitor:
        facts = await observe(monitor)
        disks = [facts.disk(device) for device in facts.devices if device.root]
        parts = [DiskSnapshot(disk, SNAPSHOT, n, str(directory / f"{n}.scratch")) for n, disk in enumerate(disks)]
        chains = {part.disk.target: read_chain(part.disk.bitmaps) for part in parts if not part.disk.untracked}
        tracked = [NodeChain(part.disk.node, chains[part.disk.target]) for part in parts if not part.disk.untracked]
        await run_plan(monitor, prepare_snapshot(parts))
        await run_plan(monitor, freeze(parts, tracked, "D", facts.running) + open_access(parts))
        items = []
        for part in parts:
            edges = chains[part.disk.target].since("B") if part.disk.target in chains else ()
            assert isinstance(edges, tuple)
            items.append(ExportPart(part, (("B", edges),) if edges else ()))
        await run_plan(monitor, start_export(items, str(directory / "nbd"), writable=True))


async def _write(qemu: BareQemu, directory: Path, name: str) -> None:
    seen: list[dict[str, Any]] = []
    async with session(qemu, seen) as monitor:
        await observe(monitor)
        text = json.dumps({"version": monitor.version, "replies": seen}, indent=1)
    CAPTURES.mkdir(parents=True, exist_ok=True)
    (CAPTURES / f"{name}.json").write_text(text.replace(str(directory), "/var/lib/vms") + "\n")


def main() -> None:
    """Write both captures."""
    directory = short_directory()
    try:
        disks = [
            DiskSpec(images.create(directory / "vda.qcow2", SIZE), id="vda"),
            DiskSpec(images.create(directory / "vdb.qcow2", SIZE), id="vdb"),
            DiskSpec(images.create(directory / "vdc.raw", SIZE, "raw"), id="vdc", format="raw"),
        ]
        with BareQemu(disks, name="web", running=True, extra_args=["-device", "ide-cd,id=cd0"]) as qemu:
            for number, name in enumerate("ABC"):
                asyncio.run(_checkpoint(qemu, name, ("vda", "vdb") if name != "A" else ("vda",)))
                qemu.device_write("vda", number << 20, 1 << 20)
            asyncio.run(_write(qemu, directory, "idle"))
            asyncio.run(_freeze(qemu, directory))
            asyncio.run(_write(qemu, directory, "frozen"))
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
