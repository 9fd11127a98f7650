# SPDX-License-Identifier: Apache-2.0
"""``pullback boot`` with a real QEMU and no operating system: kept and thrown away, and everything in it dying."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import images
from lab.monitor import Monitor, QmpError
from lab.processes import wait_for
from pullback.engine.boot import Boot, BootRequest
from pullback.engine.events import Booted, Event
from tests.support.backups import open_repository
from tests.support.cli import Terminal
from tests.support.product import MIB, Stage
from tests.support.serving import Server, packs, random_disk, spoil, store_models
from tests.support.survival import Fault

SIZE = 48 * MIB
MODEL = random_disk(SIZE, seed=31)
#: Bytes per second that let a job take its next step after half a minute: while nothing is served it must not wait in
#: the middle of a read, which whoever writes to the same place would wait for, too.
SLOW = MIB // 64
FIRMWARE_ONLY = ("-accel", "tcg", "-m", "64M", "-smp", "1")
#: The firmware finds nothing to boot, and QEMU ends.
ENDS_BY_ITSELF = (*FIRMWARE_ONLY, "-no-reboot", "-boot", "reboot-timeout=1")


def lives(pid: int) -> bool:
    """Whether a QEMU of this number runs."""
    try:
        name, state = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rsplit(") ", 1)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return name.startswith("qemu") and state[0] != "Z"


class World:
    """A stored backup, a directory for images that are kept, and one for those that are not."""

    def __init__(self, stage: Stage, place: Path) -> None:
        self.stage = stage
        self.backup = store_models(open_repository(stage.repo), {"vda": MODEL})
        self.to = place / "out"
        self.work = place / "work"
        self.work.mkdir()
        self.image = self.to / "vda.qcow2"
        self.written = bytearray(MODEL.data)
        self._own = place / "own"
        self._monitor: Monitor | None = None

    @contextmanager
    def booting(self, *, kept: bool = True) -> Iterator[Server]:
        """The command, once the domain runs; no QEMU of it is left at the block's end."""
        where = ("--to", self.to) if kept else ("--work", self.work)
        # Its processor stands still: QEMU waits with a firmware that resets the disk while nothing is served.
        own = ("-S", "-qmp", f"unix:{self._own},server=on,wait=off")
        with self.stage.running("boot", self.backup, "--json", *where, "--", *FIRMWARE_ONLY, *own) as process:
            server = Server(process)
            try:
                assert server.read("booted"), f"it ended: {server.lines} {process.communicate()}"
                yield server
            finally:
                for event in server.events:
                    if event["event"] == "booted" and lives(event["pid"]):
                        os.kill(event["pid"], signal.SIGKILL)

    def told(self, server: Server) -> dict[str, object]:
        """The event that says what runs."""
        return next(event for event in server.events if event["event"] == "booted")

    @property
    def qmp(self) -> Monitor:
        """A monitor of the test's own."""
        if self._monitor is None:
            self._monitor = Monitor(self._own)
        return self._monitor

    def disconnect(self) -> None:
        """Let go of a QEMU that has ended."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def slow(self) -> None:
        """Have the copying take long, once it began."""

        def slowed() -> bool:
            with contextlib.suppress(QmpError):
                self.qmp.command("block-job-set-speed", {"device": "instant-0", "speed": SLOW})
                return True
            return False

        wait_for(slowed, "the job that copies")

    def hurry(self) -> None:
        """Let it go again, if it still runs."""
        with contextlib.suppress(QmpError):
            self.qmp.command("block-job-set-speed", {"device": "instant-0", "speed": 0})

    def status(self) -> str:
        """The job's, or nothing."""
        return next((job["status"] for job in self.qmp.command("query-jobs") if job["id"] == "instant-0"), "")

    def write(self, offset: int, length: int, byte: int) -> None:
        """Have the domain write, durably."""
        for command in (f"write -P {byte} {offset} {length}", "flush"):
            device = "/machine/peripheral/vda/virtio-backend"
            self.qmp.command("human-monitor-command", {"command-line": f'qemu-io -d {device} "{command}"'})
        self.written[offset : offset + length] = bytes([byte]) * length

    def backup_of(self, server: Server) -> tuple[str, bytes]:
        """How a backup of the domain that runs read its disk, and what it holds."""
        done = self.stage.cli("backup", f"qmp:{self.told(server)['qmp']}", "--scratch", self.stage.scratch, "--json")
        assert done.code == 0, done.out
        backup = done.event("backup")
        return backup["disks"][0]["mode"], self.stage.contents(backup["id"])["vda"]

    def judge(self, *, alone: bool = True) -> None:
        """Every byte is right, and nothing but the images is left."""
        assert ("backing-filename" in images.info(self.image)) is not alone
        if alone:
            assert sorted(path.name for path in self.to.iterdir()) == [f".booted-{self.backup[:12]}", "vda.qcow2"]
            assert images.raw_bytes(self.image) == bytes(self.written)


@pytest.fixture
def world(tmp_path: Path, lab_dir: Path) -> Iterator[World]:
    made = World(Stage(tmp_path), lab_dir)
    try:
        yield made
    finally:
        made.disconnect()


@pytest.mark.fault(Fault.KILLED_IN_AN_INSTANT_RESTORE)
def test_what_is_kept_is_copied_backed_up_and_gone_on_with_when_the_command_is_killed(world: World) -> None:
    with world.booting() as first:
        world.slow()
        world.write(512, 4096, 0xA1)
        world.write(5 * MIB + 512, 192 << 10, 0xA2)
        first.process.kill()
        first.process.wait()
        # Nothing is served: whole clusters need nothing of it.
        world.write(9 * MIB, 64 << 10, 0xA3)
        with world.booting() as again:
            assert world.told(again)["pid"] == world.told(first)["pid"]
            world.write(SIZE - 512, 512, 0xA4)
            assert world.status() == "running"
            # What it reads is copied by that, too.
            assert world.backup_of(again) == ("full", bytes(world.written))
            world.hurry()
            assert again.read("streamed"), again.lines
            assert not list((world.stage.repo / "locks").iterdir())
            world.write(MIB, 4096, 0xA5)
            assert world.backup_of(again) == ("incremental", bytes(world.written))
            os.kill(int(str(world.told(first)["pid"])), signal.SIGKILL)
            assert again.process.wait(60) == 0
            assert again.read("ended")
            assert again.events[-1]["left"] == []
    world.disconnect()
    world.judge()
    with world.booting() as alone:
        world.write(2 * MIB, 4096, 0xA6)
        assert world.backup_of(alone) == ("full", bytes(world.written))  # a killed QEMU stores no bitmaps
        done = alone.end(signal.SIGTERM)
        assert done.code == 130
        assert "boot it again" in done.event("error")["message"]
        assert not lives(int(str(world.told(alone)["pid"])))
    world.judge()
    bitmaps = images.info(world.image)["format-specific"]["data"]["bitmaps"]
    assert bitmaps
    assert not [bitmap for bitmap in bitmaps if "in-use" in bitmap["flags"]]


@pytest.mark.fault(Fault.QEMU_KILLED_IN_THE_DATA)
def test_a_qemu_that_is_killed_is_told_and_started_again_and_the_rest_can_be_copied_without_one(world: World) -> None:
    with world.booting() as first:
        world.slow()
        world.write(512, 4096, 0xB1)
        os.kill(int(str(world.told(first)["pid"])), signal.SIGKILL)
        assert first.process.wait(60) == 4
        first.read("error")
        assert "by SIGKILL" in first.events[-1]["message"]
        assert "goes on" in first.events[-1]["message"]
    world.disconnect()
    with world.booting() as again:
        world.slow()
        world.write(5 * MIB + 512, 4096, 0xB2)
        world.qmp.command("quit")
        assert again.process.wait(60) == 0
        assert again.read("ended")
        assert again.events[-1]["left"] == ["vda"]
    world.judge(alone=False)
    done = world.stage.cli("restore", world.backup, "--instant", "--to", world.to)
    assert done.code == 0, done.err
    assert images.raw_bytes(world.image) == bytes(world.written)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_what_is_thrown_away_is_gone_however_it_ends(world: World, number: signal.Signals) -> None:
    with world.booting(kept=False) as server:
        world.write(512, 4096, 0xC1)
        (directory,) = world.work.iterdir()
        assert directory.stat().st_mode & 0o777 == 0o700
        pid = int(str(world.told(server)["pid"]))
        server.process.send_signal(number)
        assert server.process.wait(60) == (-9 if number is signal.SIGKILL else 130)
        wait_for(lambda: not lives(pid), "the end of QEMU", 60)
    if number is signal.SIGKILL:
        done = world.stage.cli("boot", world.backup, "--work", world.work, "--", *ENDS_BY_ITSELF)
        assert done.code == 0, done.err
        assert "thrown away" in done.out
    assert not list(world.work.iterdir())


def test_it_is_booted_once_all_of_its_sockets_are_there(world: World, lab_dir: Path) -> None:
    """QEMU listens at its monitor before it makes the domain, and may wait for somebody in between."""
    waits = ("-serial", f"unix:{lab_dir}/serial,server=on,wait=on")
    command = ("boot", world.backup, "--json", "--work", world.work, "--", *FIRMWARE_ONLY, *waits)
    with world.stage.running(*command) as process, socket.socket(socket.AF_UNIX) as user:
        server = Server(process)
        while not any("waiting for connection" in event.get("message", "") for event in server.events):
            assert server.read_more()
        assert list(world.work.glob("*/qmp"))
        while select.select([process.stdout], [], [], 0.5)[0]:
            assert server.read_more()
        assert {event["event"] for event in server.events} == {"note"}
        user.connect(str(lab_dir / "serial"))
        assert server.read("booted")
        done = server.end()
    assert done.code == 130
    assert not list(world.work.iterdir())


def test_one_that_is_stopped_before_it_came_up(world: World, lab_dir: Path) -> None:
    waits = ("-serial", f"unix:{lab_dir}/serial,server=on,wait=on", "-pidfile", str(lab_dir / "pid"))
    command = ("boot", world.backup, "--json", "--work", world.work, "--", *FIRMWARE_ONLY, *waits)
    with world.stage.running(*command) as process:
        wait_for((lab_dir / "serial").is_socket, "the socket at which it waits", 60)
        done = Server(process).end()
    assert done.code == 130
    assert "interrupted" in done.event("error")["message"]
    assert not list(world.work.iterdir())


@pytest.mark.parametrize("kept", [True, False])
async def test_a_program_that_gives_up_has_its_domain_ended(world: World, kept: bool) -> None:
    where = {"to": world.to} if kept else {"work": str(world.work)}
    booted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def hear(event: Event) -> None:
        if isinstance(event, Booted):
            booted.set_result(event.pid)

    request = BootRequest(world.backup, arguments=FIRMWARE_ONLY, **where)
    running = asyncio.create_task(Boot(request, lambda: open_repository(world.stage.repo), hear).run())
    pid = await asyncio.wait_for(booted, 60)
    assert lives(pid)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not lives(pid)
    assert not list(world.work.iterdir())


def test_images_that_another_qemu_has_are_left_to_it(world: World) -> None:
    with world.booting() as server:
        world.slow()
        world.write(512, 4096, 0xD1)
        server.process.kill()
        server.process.wait()
        (world.to / "qmp").unlink()
        done = world.stage.cli("boot", world.backup, "--to", world.to, "--", *FIRMWARE_ONLY)
        assert done.code == 4
        assert "lock" in done.err
        assert lives(int(str(world.told(server)["pid"])))


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (("--qemu", "qemu-system-none"), 2, "qemu-system-x86"),
        (("--disk", "vdx"), 2, "no disk vdx"),
        (("--work", "/nonexistent"), 2, "--work"),
        (("--", "-accel", "tcg", "-nonsense"), 4, "-nonsense: invalid option"),
    ],
)
def test_what_cannot_be_booted_is_said_in_words(world: World, given: tuple[str, ...], code: int, said: str) -> None:
    where = () if "/nonexistent" in given else ("--work", world.work)
    accel = () if "--" in given else ("--", "-accel", "tcg")
    done = world.stage.cli("boot", world.backup, *where, *given, *accel)
    assert (done.code, said in done.err) == (code, True), done
    assert not list(world.work.iterdir())


def test_a_terminal_is_the_domains_while_it_runs(world: World) -> None:
    command = world.stage.command("boot", world.backup, "--work", world.work, "--", *FIRMWARE_ONLY)
    with Terminal(command, world.stage.environment(TERM="xterm")) as terminal:
        assert terminal.read_until(b"Ctrl-A X")
        terminal.type("\x01h")
        assert terminal.read_until(b"send break")  # QEMU's own help: the terminal is its own by now
        terminal.type("\x03\x01x")  # a Ctrl-C, which is the guest's
        code, shown = terminal.end()
    assert code == 0, shown
    assert "it wrote is thrown away" in shown


def test_a_repository_that_is_locked_is_told_before_anything_runs(world: World) -> None:
    with open_repository(world.stage.repo).lock(exclusive=True):
        done = world.stage.cli("boot", world.backup, "--to", world.to, "--json", "--", *ENDS_BY_ITSELF)
    assert done.code == 11
    assert not [event for event in done.events if event["event"] == "booted"]


@pytest.mark.damages_repository("what cannot be read cannot be copied")
@pytest.mark.fault(Fault.REPOSITORY_DAMAGED)
def test_a_damaged_backup_ends_the_copying_and_not_the_domain(world: World) -> None:
    spoil(packs(world.stage.repo)[0], 1000)
    with world.booting() as server:
        assert server.read("note")
        while not any("runs on" in event.get("message", "") for event in server.events):
            assert server.read_more(), server.lines
        assert lives(int(str(world.told(server)["pid"])))
        world.qmp.command("quit")
        assert server.process.wait(60) == 9
    assert "backing-filename" in images.info(world.image)
