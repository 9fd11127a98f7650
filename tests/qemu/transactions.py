# SPDX-License-Identifier: Apache-2.0
"""Tells the story of docs/transactions.md on a real QEMU, and writes down what QEMU was sent.

``python -m tests.qemu.transactions --write`` puts what it saw into the page.
"""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from lab import images
from lab.disks import DiskSpec
from lab.qemu import BareQemu
from pullback import Domain, DomainAddress, Snapshot, UnixAddress, open_domain
from pullback.engine.freezing import SnapshotRequest
from pullback.plan.method import Method

PAGE = Path(__file__).parents[2] / "docs" / "transactions.md"
KIB, MIB = 1 << 10, 1 << 20

#: Only looks.
_LOOKS = re.compile(r"query-.*|qom-get|x-debug-query-.*|qmp_capabilities|device-list-properties")
_ID = re.compile(r"\b(pb|pullback)-([a-z][0-9a-f]{8})-")


def _flat(value: Any, before: str = "") -> list[str]:
    """Arguments as words: ``a.b=c``; what is true stands by its name alone."""
    if isinstance(value, Mapping):
        return [word for key, one in value.items() for word in _flat(one, f"{before}.{key}" if before else key)]
    if isinstance(value, list):
        return [
            f"{before}={','.join('.'.join(map(str, x.values())) if isinstance(x, Mapping) else str(x) for x in value)}"
        ]
    if isinstance(value, bool):
        return [before if value else f"{before}=no"]
    return [f"{before}={value}"]


class Recorder:
    """Writes the story down; names that change from run to run are replaced as the page says."""

    def __init__(self, qemu: BareQemu) -> None:
        self.lines: list[str] = []
        self._qemu = qemu
        self._names: dict[str, str] = {}
        self._unnamed: list[int] = []

    def note(self, command: str, arguments: Mapping[str, Any], reply: Any) -> None:
        """A ``trace`` of ``open_domain``."""
        if not command:
            given = ", ".join(f"{key}={value}" for key, value in arguments["arguments"].items() if value)
            self.say(f"{arguments['call']}({given})")
        elif command == "transaction":
            self._add("transaction")
            for action in arguments["actions"]:
                self._add("    " + " ".join([action["type"], *_flat(action["data"])]))
        elif not _LOOKS.fullmatch(command):
            self._add(" ".join([command, *_flat(arguments)]))

    def say(self, line: str) -> None:
        """What happens, before the commands it comes to."""
        self.lines += ["", line] if self.lines else [line]

    def named(self, snapshot: Snapshot) -> None:
        """From here on, and in what was written already, this snapshot's id is its name."""
        self.lines = [line.replace(f"-{snapshot.id}-", f"-{snapshot.name}-") for line in self.lines]
        self._names[snapshot.id] = snapshot.name

    def chains(self) -> None:
        """The bitmaps as they are now; an asterisk records."""
        nodes = {node["node-name"]: node for node in self._qemu.qmp("query-named-block-nodes", flat=True)}
        for disk in self._qemu.disks:
            bitmaps = {one.get("name", ""): one["recording"] for one in nodes[disk.node].get("dirty-bitmaps", ())}
            mine = [
                name + "*" * recording for name, recording in sorted(bitmaps.items()) if name.startswith("pullback-")
            ]
            self.lines.append(f"  = {disk.id}: {' '.join(mine) or 'no bitmap'}")

    def _add(self, words: str) -> None:
        line = re.sub(r"/\S*/\.pullback-work-[0-9a-f]+/", "SCRATCH/", words)
        line = line.replace(str(self._qemu.directory), "RUN")
        line = re.sub(r'"\d{4}-\d\d-\d\dT[\d:.]+\+00:00"', '"TIME"', line)
        line = _ID.sub(lambda match: f"{match[1]}-{self._names.get(match[2], match[2])}-", line)
        self.lines.append(f"  > {line}")


class Story:
    """Sessions with one QEMU, told to a recorder."""

    def __init__(self, qemu: BareQemu, method: Method, scratch: str) -> None:
        self.qemu = qemu
        self.record = Recorder(qemu)
        self._method = method
        self._scratch = scratch

    def domain(self) -> AbstractAsyncContextManager[Domain]:
        return open_domain(DomainAddress(socket=str(self.qemu.qmp_path)), trace=self.record.note)

    async def write(self, disk: str, offset: int) -> None:
        self.record.say(f"the domain writes 64 KiB to {disk} at {offset // MIB} MiB")
        await asyncio.to_thread(self.qemu.device_write, disk, offset, 64 * KIB)

    async def create(self, domain: Domain, name: str, **more: Any) -> Snapshot:
        request = {"checkpoint": name, "scratch": self._scratch, "method": self._method, **more}
        # A backup run's own is one that no other caller can ask for.
        own = "private" in more
        made = domain.freeze(SnapshotRequest(name, **request)) if own else domain.create_snapshot(name=name, **request)
        snapshot = await made
        self.record.named(snapshot)
        self.record.chains()
        return snapshot

    async def export(self, domain: Domain, snapshot: Snapshot, since: str) -> None:
        place = UnixAddress(str(self.qemu.directory / "nbd"))
        await domain.start_export(snapshot, address=place, since=[since])

    async def delete_checkpoint(self, domain: Domain, name: str) -> None:
        await domain.delete_checkpoint(name)
        self.record.chains()


async def filters(story: Story) -> None:
    """Four checkpoints, removed in the middle, at the front and at the end; two snapshots at a time; a death."""
    async with story.domain() as domain:
        a = await story.create(domain, "A")
        await story.write("vda", MIB)
        b = await story.create(domain, "B")
        await story.export(domain, b, "A")
        await a.delete()
        await b.delete()
        await story.write("vdb", 2 * MIB)
        c = await story.create(domain, "C")
        await c.delete()
        await story.delete_checkpoint(domain, "B")
        d = await story.create(domain, "D")
        await d.delete()
        await story.delete_checkpoint(domain, "A")
        await story.delete_checkpoint(domain, "D")
        await story.create(domain, "E", private=True, checkpoint=None, disks=("vda",))
    story.record.say("the client that made E dies; another one comes")
    async with story.domain() as domain:
        await domain.recover()
        await story.delete_checkpoint(domain, "C")


async def jobs(story: Story) -> None:
    """The same beginning with jobs."""
    async with story.domain() as domain:
        a = await story.create(domain, "A")
        await story.write("vda", MIB)
        b = await story.create(domain, "B")
        await story.export(domain, b, "A")
        await a.delete()
        await b.delete()


STORIES: Mapping[Method, Callable[[Story], Any]] = {"filter": filters, "job": jobs}


def tell(method: Method, place: Path) -> tuple[str, tuple[int, int]]:
    """What QEMU was sent, as the page shows it, and QEMU's version."""
    disks = []
    for name in ("vda", "vdb"):
        images.create(path := place / f"{method}-{name}.qcow2", 8 * MIB)
        disks.append(DiskSpec(path, name))
    with BareQemu(disks, name="web", running=True) as qemu:
        for disk in disks:
            qemu.qdev(disk.id)  # found by its node, which no filter may hide yet
        story = Story(qemu, method, str(place))
        asyncio.run(STORIES[method](story))
        version = qemu.qmp("query-version")["qemu"]
    return "\n".join(story.record.lines) + "\n", (version["major"], version["minor"])


def block_of(method: Method) -> re.Pattern[str]:
    """Where the page has the story of a method."""
    return re.compile(rf"(<!-- story: {method} -->\n```\n)(.*?)(```\n)", re.DOTALL)


def for_version(story: str, version: tuple[int, int]) -> str:
    """A story of the page, which is QEMU 7.2's, as it is for another version."""
    if version >= (8, 0):
        story = re.sub(
            r"^  > blockdev-(add|del) .*node-name=pb-\w-\d-(view|align|deny|void)( .*)?\n", "", story, flags=re.M
        )
        story = re.sub(r"^  > block-dirty-bitmap-add .*name=pullback-saved .*\n", "", story, flags=re.M)
        story = re.sub(r"(pb-\w-\d)-view", r"\1-access", story)
    if version >= (10, 1):
        story = re.sub(r"(blockdev-backup .*)$", r"\1 on-cbw-error=break-snapshot", story, flags=re.M)
    return story


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pb-story-") as place:
        told = {method: tell(method, Path(place))[0] for method in STORIES}
    if "--write" not in sys.argv:
        print("\n".join(told.values()))
        return
    text = PAGE.read_text()
    for method, story in told.items():
        text = block_of(method).sub(lambda match, story=story: match[1] + story + match[3], text)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
