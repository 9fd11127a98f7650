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
from pullback.model.snapshots import ServerMark
from pullback.plan.checkpoint import NodeChain, start_recording, stop_recording
from pullback.plan.command import Plan
from pullback.qemu.execute import run_plan
from pullback.qemu.monitor import Monitor, connect, dial
from pullback.qemu.observe import observe
from tests.golden.daemon import RealDaemon
from tests.golden.replay import CAPTURES
from tests.support.making import export_disks, snapshot

SIZE = 8 << 20
SNAPSHOT = "b0000c0de"


@asynccontextmanager
async def session(qemu: BareQemu | RealDaemon, seen: list[dict[str, Any]] | None = None) -> AsyncIterator[Monitor]:
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
    server = ServerMark("unix", str(directory / "nbd"))
    async with session(qemu) as monitor:
        frozen = snapshot(await observe(monitor), SNAPSHOT, checkpoint="D", directory=str(directory), name="night")
        await run_plan(monitor, frozen)
        facts = await observe(monitor)
        await run_plan(monitor, export_disks(facts, SNAPSHOT, server, points=["B"]))


async def _write(qemu: BareQemu, directory: Path, name: str) -> None:
    seen: list[dict[str, Any]] = []
    async with session(qemu, seen) as monitor:
        await observe(monitor)
        # Of the schema, 200 KB, only what was made of it.
        replies = [one for one in seen if one["execute"] != "query-qmp-schema"]
        features = sorted(monitor.features or ())
        text = json.dumps({"version": monitor.version, "features": features, "replies": replies}, indent=1)
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
