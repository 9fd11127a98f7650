# SPDX-License-Identifier: Apache-2.0
"""A domain that runs or is stopped, and a model of every byte of its disks: what it writes is written to both.

A running one is written to through its devices; a stopped one through the storage daemon's writable export.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lab import images
from lab.disks import DiskSpec
from lab.processes import run
from lab.qemu import BareQemu
from pullback.engine.domain import DomainAddress, open_domain
from pullback.engine.freezing import Snapshot
from pullback.errors import PullbackError
from pullback.nbd.address import UnixAddress
from tests.support.product import KIB, MIB, Stage, same

Start = Callable[..., BareQemu]

SIZES = [512, 64 * KIB + 512, 256 * KIB - 512, 256 * KIB + 1024, MIB + 7 * 512, 2 * MIB, 3 * MIB + 513 * 512]


@dataclass(frozen=True)
class Change:
    """``length`` bytes at ``offset`` of a disk: written with ``value``, zeroed (perhaps unmapped), or discarded."""

    how: str
    disk: str
    offset: int
    length: int
    value: int = 0

    @property
    def line(self) -> str:
        """As a line for qemu-io."""
        verb = {"write": f"write -P {self.value}", "zero": "write -z", "unmap": "write -z -u", "discard": "discard"}
        return f"{verb[self.how]} {self.offset} {self.length}"


@dataclass
class Parked:
    """The image of a disk that the domain lost, or a copy of one from earlier, and what it holds."""

    spec: DiskSpec
    data: bytes


class DomainModel:
    """The domain, its ``bytes`` by disk, and the ``snapshots`` that are open with what each must hold.

    What was done stands in ``log``.
    """

    def __init__(self, place: Path, start: Start, chance: random.Random) -> None:
        self.chance = chance
        self.stage = Stage(place)
        self._start = start
        self._count = 0
        self._detect = chance.choice(["off", "on", "unmap"])
        self.specs = [self.new_disk(name) for name in ("vda", "vdb")]
        self.bytes = {spec.id: bytearray(images.info(spec.path)["virtual-size"]) for spec in self.specs}
        self.parked: list[Parked] = []
        self.snapshots: dict[str, dict[str, bytes]] = {}
        self.qemu: BareQemu | None = None
        self.log: list[str] = []

    def new_disk(self, name: str) -> DiskSpec:
        """An empty image of its own, also where there was one of this name before."""
        format = "raw" if self.chance.random() < 0.1 else "qcow2"
        path = self.stage.place / f"{name}-{self.number()}.{format}"
        images.create(path, self.chance.choice(SIZES), format)
        bus = self.chance.choice(["virtio", "scsi"])
        return DiskSpec(path, name, format, bus=bus, detect_zeroes=self._detect)

    def number(self) -> int:
        """Another number each time."""
        self._count += 1
        return self._count

    @property
    def tracked_disks(self) -> list[str]:
        """The disks whose images keep dirty bitmaps."""
        return [spec.id for spec in self.specs if spec.format == "qcow2"]

    @property
    def address(self) -> DomainAddress:
        """Where it is reached now."""
        if self.qemu is not None:
            return DomainAddress(str(self.qemu.qmp_path))
        return DomainAddress(images=",".join(f"{spec.id}={spec.path}" for spec in self.specs), name="lab")

    def contents(self) -> dict[str, bytes]:
        """What the model holds, as it stands."""
        return {disk: bytes(data) for disk, data in self.bytes.items()}

    def read(self, disk: str) -> bytes:
        """What QEMU's own tools read of a disk now."""
        if self.qemu is not None:
            self.qemu.device_flush(disk)
        spec = next(spec for spec in self.specs if spec.id == disk)
        return images.raw_bytes(spec.path, spec.format)

    def look(self) -> None:
        """The model is what the disks hold."""
        same({disk: self.read(disk) for disk in self.bytes}, self.contents())

    # -- it writes ------------------------------------------------------------------------------------------------

    def some_change(self) -> Change:
        disk = self.chance.choice(list(self.bytes))
        sectors = len(self.bytes[disk]) // 512
        start = self.chance.randrange(sectors)
        if self.chance.random() < 0.5:
            start = start // 128 * 128
        length = min(self.chance.choice([1, 3, 8, 127, 128, 129, 512, 1000, 3000]), sectors - start)
        how = self.chance.choices(["write", "zero", "unmap", "discard"], [8, 2, 2, 3])[0]
        value = self.chance.choice([0, 1, 2, self.chance.randrange(256)])
        return Change(how, disk, start * 512, length * 512, value)

    def write(self, changes: Sequence[Change]) -> None:
        """Carry them out, on the domain and on the model.  What a discarded range holds is QEMU's to say."""
        self.log += [f"{'' if self.qemu else 'offline '}{change.disk} {change.line}" for change in changes]
        if self.qemu is not None:
            for change in changes:
                self._through_the_device(self.qemu, change)
                self._adopt([change])
        else:
            asyncio.run(self._through_the_daemon(changes))
            self._adopt(changes)

    def _through_the_device(self, qemu: BareQemu, change: Change) -> None:
        place = change.disk, change.offset, change.length
        if change.how == "write":
            qemu.device_write(*place, change.value)
        elif change.how == "discard":
            qemu.device_discard(*place)
        else:
            qemu.device_zero(*place, unmap=change.how == "unmap")

    async def _through_the_daemon(self, changes: Sequence[Change]) -> None:
        async with open_domain(self.address) as domain:
            address = UnixAddress(str(self.stage.place / "nbd"))
            exports = await domain.start_writable_export(address=address)
            uris = {export.disk: export.uri for export in exports}
            for disk in sorted({change.disk for change in changes}):
                lines = [word for change in changes if change.disk == disk for word in ("-c", change.line)]
                argv = ["qemu-io", "-f", "raw", "-d", "unmap", *lines, "-c", "flush", uris[disk]]
                said = (await asyncio.to_thread(run, argv)).decode()
                assert "failed" not in said and "rror" not in said, said
            await domain.stop_exports(exports)

    def _adopt(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.how != "discard":
                filled = bytes([change.value if change.how == "write" else 0]) * change.length
                self.bytes[change.disk][change.offset : change.offset + change.length] = filled
        for disk in {change.disk for change in changes if change.how == "discard"}:
            before, now = self.bytes[disk], bytearray(self.read(disk))
            self.bytes[disk] = now[:]
            for change in changes:
                if change.disk == disk:
                    now[change.offset : change.offset + change.length] = bytes(change.length)
                    before[change.offset : change.offset + change.length] = bytes(change.length)
            assert before == now, f"a discard changed other bytes of {disk}"

    # -- it starts and ends ---------------------------------------------------------------------------------------

    def start(self, running: bool = True) -> None:
        """It starts; snapshots of the stopped one are let go of before."""
        for name in list(self.snapshots):
            self.delete_snapshot(name)
        self.log.append(f"start {[spec.id for spec in self.specs]}")
        self.qemu = self._start(self.specs, running=running, name="lab")
        for disk in self.bytes:
            self.qemu.qdev(disk)  # which cannot be told while a filter is above the disk

    def stop(self, crash: bool = False, flush: bool = True) -> None:
        """It ends, in order or not: then what it had not flushed may be lost, and QEMU says what is there."""
        assert self.qemu is not None
        self.log.append(f"{'crash' if crash else 'stop'}, {'flushed' if flush else 'not flushed'}")
        if flush:
            for disk in self.bytes:
                self.qemu.device_flush(disk)
        if crash:
            self.qemu.kill()
        else:
            self.qemu.shutdown()
        self.qemu.close()
        self.qemu = None
        self.snapshots.clear()
        if crash and not flush:
            self.bytes = {disk: bytearray(self.read(disk)) for disk in self.bytes}
        self.look()

    def recover(self) -> None:
        """A killed backup leaves filters, which let nobody resize the disks, and perhaps the NBD server in use."""
        self.log.append("recover")

        async def recover() -> None:
            async with open_domain(self.address) as domain:
                await domain.recover()

        asyncio.run(recover())

    # -- its disks ------------------------------------------------------------------------------------------------

    def resize(self, disk: str, sizes: Sequence[int]) -> None:
        """To these sizes in turn.  What is beyond an old end is QEMU's to say, what is before every end stays."""
        self.log.append(f"resize {disk} {sizes}")
        spec = next(spec for spec in self.specs if spec.id == disk)
        for size in sizes:
            if self.qemu is not None:
                self.qemu.qmp("block_resize", node_name=spec.node, size=size)
            else:
                run(["qemu-img", "resize", "-q", "--shrink", "-f", spec.format, spec.path, str(size)])
        kept = min(*sizes, len(self.bytes[disk]))
        before, self.bytes[disk] = self.bytes[disk], bytearray(self.read(disk))
        assert len(self.bytes[disk]) == sizes[-1]
        assert self.bytes[disk][:kept] == before[:kept]

    def attach(self, parked: Parked) -> None:
        """A disk that the stopped domain has from now on, in place of one of the same name."""
        self.log.append(f"attach {parked.spec.path.name} as {parked.spec.id}")
        self.specs = [spec for spec in self.specs if spec.id != parked.spec.id] + [parked.spec]
        self.bytes[parked.spec.id] = bytearray(parked.data)

    def detach(self, disk: str) -> Parked:
        """A disk that the stopped domain loses."""
        self.log.append(f"detach {disk}")
        spec = next(spec for spec in self.specs if spec.id == disk)
        self.specs.remove(spec)
        return Parked(spec, bytes(self.bytes.pop(disk)))

    def copy(self, disk: str) -> Parked:
        """A copy of the stopped domain's image as it is, bitmaps and all."""
        self.log.append(f"copy {disk}")
        spec = next(spec for spec in self.specs if spec.id == disk)
        path = spec.path.with_name(f"{disk}-{self.number()}.{spec.format}")
        shutil.copy(spec.path, path)
        return Parked(
            DiskSpec(path, disk, spec.format, bus=spec.bus, detect_zeroes=self._detect), bytes(self.bytes[disk])
        )

    # -- its snapshots --------------------------------------------------------------------------------------------

    def make_snapshot(self, disks: Sequence[str], checkpoint: str | None) -> str:
        """A snapshot that stays open; its name."""
        name = f"s{self.number()}"
        self.log.append(f"snapshot {name} of {disks or 'all'}, checkpoint {checkpoint}")

        async def make() -> None:
            async with open_domain(self.address) as domain:
                scratch = str(self.stage.scratch)
                await domain.create_snapshot(disks, name=name, checkpoint=checkpoint, scratch=scratch)

        asyncio.run(make())
        self.snapshots[name] = {disk: data for disk, data in self.contents().items() if not disks or disk in disks}
        return name

    def judge_snapshot(self, name: str) -> None:
        """It holds what the disks held at its instant."""
        self.log.append(f"read snapshot {name}")
        same(asyncio.run(self._read_snapshot(name)), self.snapshots[name])

    async def _read_snapshot(self, name: str) -> dict[str, bytes]:
        async with open_domain(self.address) as domain:
            snapshot: Snapshot = await domain.find_snapshot(name)
            address = UnixAddress(str(self.stage.place / "nbd"))
            exports = await domain.start_export(snapshot, address=address)
            read = {one.disk: await asyncio.to_thread(run, ["nbdcopy", one.uri, "-"]) for one in exports}
            await domain.stop_exports(exports)
        return read

    def delete_snapshot(self, name: str) -> None:
        self.log.append(f"delete snapshot {name}")

        async def delete() -> None:
            async with open_domain(self.address) as domain:
                await (await domain.find_snapshot(name)).delete()

        asyncio.run(delete())
        del self.snapshots[name]

    def close(self) -> None:
        """End what is left of a life that went wrong."""
        if self.qemu is not None:
            self.qemu.close()
        else:
            with suppress(PullbackError):
                for name in list(self.snapshots):
                    self.delete_snapshot(name)
