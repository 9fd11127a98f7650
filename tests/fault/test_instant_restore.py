# SPDX-License-Identifier: Apache-2.0
"""Instant restore with a real QEMU on its images, and everything in it dying at chosen moments."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import images
from lab.disks import DiskSpec
from lab.monitor import QmpError
from lab.processes import wait_for
from lab.qemu import BareQemu
from tests.support.backups import open_repository
from tests.support.product import MIB, Stage
from tests.support.serving import Server, random_disk, spoil, store_models
from tests.support.serving import packs as packs_of
from tests.support.survival import Fault

SIZE = 24 * MIB
MODEL = random_disk(SIZE, seed=11)
#: What the domain writes, where, and the byte: parts of clusters, which take the rest from the backup, and whole ones.
#: The lab's writes hold QEMU until they are done, so only whole clusters can be written while nothing is served.
WRITES = [(512, 4096, 0xA1), (5 * MIB, 192 << 10, 0xA2), (SIZE - 512, 512, 0xA3)]

#: Bytes per second that keep a job at its first step: while nothing is served it must not wait in the middle of a read,
#: which whoever writes to the same place would wait for, too.
SLOW = MIB // 64

#: Bytes of a directory's path below which sockets can be made.
LONGEST = 79


class Restored(BareQemu):
    """The domain on the images; its device cannot be told by its node, which QEMU's own filter hides for a while."""

    def qdev(self, disk_id: str) -> str:
        return f"/machine/peripheral/{disk_id}/virtio-backend"


class World:
    """A stored backup, a directory for its images, and the domain on them."""

    def __init__(self, stage: Stage, to: Path) -> None:
        self.stage = stage
        self.backup = store_models(open_repository(stage.repo), {"vda": MODEL})
        self.to = to / "out"
        self.image = self.to / "vda.qcow2"
        self.written = bytearray(MODEL.data)
        #: Where the command looks for the domain: it finds it once the test lets it.
        self.door = to / "door"
        # Its processor stands still: QEMU waits with a firmware that resets the disk while nothing is served.
        self.qemu = Restored([DiskSpec(self.image, "vda")], name="web")

    def move(self, name: str) -> None:
        """Have the images elsewhere."""
        self.to = self.to.with_name(name)
        self.image = self.to / "vda.qcow2"

    def name_of(self, length: int) -> str:
        """A name with which the directory's path has so many bytes."""
        return "x" * (length - len(str(self.to.parent)) - 1)

    @contextmanager
    def restoring(self) -> Iterator[Server]:
        """The command, once a domain may use the images."""
        domain = f"qmp:{self.door}"
        arguments = ("restore", self.backup, "--instant", "--to", self.to, "--domain", domain, "--json")
        with self.stage.running(*arguments) as process:
            server = Server(process)
            assert server.read("overlays"), f"it ended: {server.lines} {process.communicate()}"
            yield server

    def finish(self, server: Server) -> None:
        """Wait for the command to end well."""
        assert server.read("streamed"), server.lines
        assert server.process.wait(60) == 0
        if self.qemu.running():
            self.qemu.qmp("query-named-block-nodes", flat=True)  # a QEMU that a job left in a bad way dies of it

    def write(self, number: int) -> None:
        """Have the domain write, durably."""
        offset, length, byte = WRITES[number]
        self.qemu.device_write("vda", offset, length, byte)
        self.qemu.device_flush("vda")
        self.written[offset : offset + length] = bytes([byte]) * length

    def open_door(self) -> None:
        """Let the command find the domain."""
        self.door.symlink_to(self.qemu.qmp_path)

    def slow_stream(self) -> None:
        """The job as the command starts it, but slow; then let the command find the domain."""
        self.qemu.qmp(
            "block-stream",
            job_id="instant-0",
            device="node-vda",
            filter_node_name="pb-stream-0",
            auto_finalize=False,
            speed=SLOW,
        )
        self.open_door()

    def hurry(self) -> None:
        """Let the slow job go, if it still runs."""
        with contextlib.suppress(QmpError):
            self.qemu.qmp("block-job-set-speed", device="instant-0", speed=0)

    def status(self) -> str:
        """The job's, or nothing."""
        return next((job["status"] for job in self.qemu.qmp("query-jobs") if job["id"] == "instant-0"), "")

    def judge(self) -> None:
        """The image stands alone, nothing else is left, and every byte is right."""
        assert [path.name for path in self.to.iterdir()] == ["vda.qcow2"]
        assert "backing-filename" not in images.info(self.image)
        assert images.raw_bytes(self.image) == bytes(self.written)


@pytest.fixture
def world(tmp_path: Path, lab_dir: Path) -> Iterator[World]:
    made = World(Stage(tmp_path), lab_dir)
    try:
        yield made
    finally:
        made.qemu.close()


def test_a_domain_reads_and_writes_at_once_and_its_image_stands_alone_in_the_end(world: World) -> None:
    with world.restoring() as server, world.qemu:
        assert images.info(world.image)["virtual-size"] == SIZE
        world.write(0)
        world.open_door()
        world.write(1)
        world.write(2)
        world.finish(server)
        # Nothing that was copied may be in QEMU's memory only.
        world.qemu.kill()
        world.judge()


@pytest.mark.parametrize("odd", [True, False], ids=["odd", "longest"])
def test_without_a_domain_a_storage_daemon_fills_the_images(world: World, odd: bool) -> None:
    world.move('out, "of" ünit' if odd else world.name_of(LONGEST))
    done = world.stage.cli("restore", world.backup, "--instant", "--to", world.to)
    assert done.code == 0, done.err
    world.judge()
    images.check(world.image)
    again = world.stage.cli("restore", world.backup, "--instant", "--to", world.to)
    assert again.code == 9
    assert "exists already" in again.err
    world.judge()


def go_on(world: World, moment: str) -> None:
    """The same command once more, to its end; the first one ended at this moment."""
    with world.restoring() as other:
        if moment == "before the job":
            assert world.status() == ""
            world.open_door()
        if moment == "running":
            assert world.status() == "running"
            world.hurry()
        world.write(2)
        world.finish(other)


@pytest.mark.fault(Fault.KILLED_IN_AN_INSTANT_RESTORE)
@pytest.mark.parametrize("moment", ["before the job", "running", "pending"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_command_dies_and_goes_on(world: World, moment: str, number: signal.Signals) -> None:
    with world.restoring() as server, world.qemu:
        if moment != "before the job":
            world.slow_stream()
        world.write(0)
        if moment == "pending":
            world.hurry()
            wait_for(lambda: world.status() in ("pending", "concluded", ""), "the end of copying", 60)
        server.end(number)
        # It may have been looking at the job just then: what was done is done.
        was_done = (moment, number, server.process.returncode) == ("pending", signal.SIGTERM, 0)
        assert server.process.returncode == (-9 if number is signal.SIGKILL else 130) or was_done
        world.write(1)
        if was_done:
            assert server.events[-1]["event"] == "streamed"
            world.write(2)
        else:
            go_on(world, moment)
        world.qemu.kill()
        world.judge()


@pytest.mark.fault(Fault.QEMU_KILLED_IN_THE_DATA)
@pytest.mark.parametrize("moment", ["before the job", "running"])
def test_qemu_dies_and_is_started_again(world: World, moment: str) -> None:
    with world.restoring() as server, world.qemu:
        if moment == "running":
            world.slow_stream()
        world.write(0)
        world.write(1)
        world.qemu.kill()
        world.qemu.start()
        if moment != "running":
            world.open_door()
        world.write(2)
        world.finish(server)
        world.qemu.kill()
        world.judge()


def test_what_a_domain_left_is_finished_without_it(world: World) -> None:
    with world.restoring() as server, world.qemu:
        world.slow_stream()
        world.write(0)
        world.write(1)
        server.end(signal.SIGKILL)
        world.qemu.kill()
    done = world.stage.cli("restore", world.backup, "--instant", "--to", world.to)
    assert done.code == 0, done.err
    world.judge()


def test_an_image_that_a_domain_has_open_is_not_taken_from_it(world: World) -> None:
    with world.restoring() as server, world.qemu:
        world.slow_stream()
        server.end(signal.SIGKILL)
        done = world.stage.cli("restore", world.backup, "--instant", "--to", world.to)
        assert done.code == 9
        assert "--domain" in done.err
        with world.restoring() as other:
            world.hurry()
            world.finish(other)
        world.qemu.kill()
        world.judge()


def test_backups_are_made_while_the_rest_is_copied(world: World) -> None:
    with world.restoring() as server, world.qemu:
        world.slow_stream()
        world.write(0)
        assert world.status() == "running"
        # While the backup has the monitor, the job cannot be finalized.
        first = world.stage.cli_backup(world.qemu, "--json")
        assert first.code == 0, first.out
        world.write(1)
        second = world.stage.cli_backup(world.qemu, "--json")
        assert second.code == 0, second.out
        assert second.event("backup")["disks"][0]["mode"] == "incremental"
        held = world.stage.contents(second.event("backup")["id"])
        assert held == {"vda": bytes(world.written)}
        world.hurry()
        world.finish(server)
        world.write(2)
        third = world.stage.cli_backup(world.qemu, "--json")
        assert third.event("backup")["disks"][0]["mode"] == "incremental"
        assert world.stage.contents(third.event("backup")["id"]) == {"vda": bytes(world.written)}
        world.qemu.shutdown()
        world.judge()


@pytest.mark.fault(Fault.REPOSITORY_DAMAGED)
@pytest.mark.damages_repository("what cannot be read cannot be copied")
def test_a_damaged_backup_ends_the_command_and_not_the_domain(world: World) -> None:
    spoil(packs_of(world.stage.repo)[0], 1000)
    with world.restoring() as server, world.qemu:
        world.open_door()
        assert not server.read("streamed")
        assert server.process.wait(60) == 9
        assert "cannot pull the rest of vda" in server.events[-1]["message"]
        assert world.qemu.qmp("query-named-block-nodes", flat=True)
    assert "backing-filename" in images.info(world.image)


def test_what_is_there_is_left_alone(world: World) -> None:
    world.to.mkdir()
    world.image.write_bytes(b"mine")
    done = world.stage.cli("restore", world.backup, "--instant", "--to", world.to)
    assert done.code == 9
    assert world.image.read_bytes() == b"mine"
    assert len(list(world.to.iterdir())) == 1


def test_images_that_are_removed_end_it_in_words(world: World) -> None:
    with world.restoring() as server:
        # At once: file by file, it would race with the server's own removal of its socket.
        gone = world.to.rename(world.to.with_name("gone"))
        shutil.rmtree(gone)
        assert server.process.wait(60) == 9
        assert not server.read("streamed")
        assert "cannot read" in server.events[-1]["message"]


def test_unfinished_images_of_another_backup_are_left_alone(world: World) -> None:
    with world.restoring() as server:
        server.end(signal.SIGKILL)
    other = store_models(open_repository(world.stage.repo), {"vda": random_disk(SIZE, seed=12)})
    done = world.stage.cli("restore", other, "--instant", "--to", world.to)
    assert done.code == 9
    assert f"unfinished instant restore of backup {world.backup[:8]}" in done.err
    done = world.stage.cli("restore", world.backup, "--instant", "--to", world.to)
    assert done.code == 0, done.err
    world.judge()


def test_a_directory_that_qemu_cannot_be_told_of_is_refused_before_anything_is_made(world: World) -> None:
    for name, said in (world.name_of(LONGEST + 1), "too long"), ("not \udcff UTF-8", "not UTF-8"):
        world.move(name)
        done = world.stage.cli("restore", world.backup, "--instant", "--to", world.to)
        assert done.code == 2, done.err
        assert said in done.err
        assert not world.to.exists()


@pytest.mark.parametrize("option", ["--overwrite", "--verify", "--keep-going", "--format=raw", "--into=qmp:/none"])
def test_options_that_do_not_go_together_are_refused(world: World, option: str) -> None:
    assert world.stage.cli("restore", world.backup, "--instant", option, "--to", world.to).code == 2
    assert world.stage.cli("restore", world.backup, "--domain", "qmp:/none", "--to", world.to).code == 2
    assert not world.to.exists()
