# SPDX-License-Identifier: Apache-2.0
"""Stopped domains: every command on their images, and one chain with what was made while they ran."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import images
from lab.disks import DiskSpec
from lab.processes import wait_for
from lab.qemu import BareQemu
from pullback.engine import offline
from tests.support.api import inside
from tests.support.product import KIB, MIB, Done, Stage, references, same

Start = Callable[..., BareQemu]
UNPRIVILEGED = 64321


class Stopped:
    """The images of a stopped domain called "lab", and commands on them."""

    def __init__(self, stage: Stage, disks: list[DiskSpec]) -> None:
        self.stage = stage
        self.disks = disks
        self.spec = "disk:" + ",".join(f"{disk.id}={disk.path}" for disk in disks)

    def attempt(self, command: str, *more: str | Path) -> Done:
        """A command, whatever comes of it; in this process."""
        return inside([*command.split(), self.spec, *map(str, more)], self.stage.environment())

    def cli(self, command: str, *more: str | Path) -> Done:
        """A command that has to succeed."""
        done = self.attempt(command, *more)
        assert done.code == 0, done.err
        return done

    def backup(self) -> dict[str, Any]:
        """A backup as ``lab``; its result."""
        return self.cli("backup", "--name", "lab", "--json").event("backup")

    def daemons(self) -> list[int]:
        """The storage daemons that have the first image open."""
        return holders(self.disks[0].path)

    def contents(self) -> dict[str, bytes]:
        return {disk.id: images.raw_bytes(disk.path, disk.format) for disk in self.disks}


def holders(image: Path) -> list[int]:
    """Processes that have an image open."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if any(os.path.samefile(handle, image) for handle in (process / "fd").iterdir()):
                    found.append(int(process.name))
            except OSError:
                continue
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(image: DiskSpec, offset: int, length: int, fill: int) -> None:
    """The domain runs for a moment, writes, and ends in order."""
    with BareQemu([image]) as qemu:
        qemu.device_write(image.id, offset, length, fill)
        qemu.shutdown()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.fixture
def stopped(stage: Stage) -> Iterator[Stopped]:
    domain = Stopped(stage, [stage.disk("vda"), stage.disk("vdb", 3 * MIB)])
    yield domain
    for pid in domain.daemons():
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not domain.daemons(), "the daemon's end")


def test_snapshots_checkpoints_and_exports_of_a_stopped_domain(stopped: Stopped) -> None:
    assert "no checkpoint yet" in stopped.cli("domain show").out
    assert stopped.daemons() == []
    refused = stopped.attempt("snapshot create", "one", "--require-freeze")
    assert refused.code == 2 and "the domain is stopped" in refused.err
    done = stopped.cli("snapshot create", "one", "--checkpoint", "A", "--freeze", "--json")
    assert "nothing needs freezing" in done.event("note")["message"]
    made = done.event("snapshot")
    assert made["disks"] == ["vda", "vdb"]
    assert made["consistency"] == "crash"
    (daemon,) = stopped.daemons()
    listed = stopped.cli("snapshot list", "--json").event("snapshots")["snapshots"]
    assert [one["name"] for one in listed] == ["one"]
    socket = stopped.stage.place / "nbd"
    uris = stopped.cli("export start", "--snapshot", "one", "--socket", str(socket)).out.split()
    assert [uri.partition("?")[0] for uri in uris] == ["nbd+unix:///vda", "nbd+unix:///vdb"]
    read = subprocess.run(["nbdinfo", "--size", uris[1]], capture_output=True, text=True, check=True)
    assert int(read.stdout) == 3 * MIB
    assert stopped.daemons() == [daemon]
    stopped.cli("export stop")
    assert stopped.daemons() == [daemon]
    stopped.cli("snapshot delete", "one")
    assert stopped.daemons() == []
    assert [images.bitmaps(disk.path) for disk in stopped.disks] == [{"pullback-A": ["auto"]}] * 2
    for disk in stopped.disks:
        images.check(disk.path)

    stopped.cli("snapshot create", "two", "--checkpoint", "B")
    stopped.cli("snapshot delete", "two")
    points = stopped.cli("checkpoint list", "--json").event("checkpoints")["checkpoints"]
    assert [point["name"] for point in points] == ["A", "B"]
    assert stopped.cli("checkpoint size", "A").out == "vda: at most 0 B\nvdb: at most 0 B\n"
    before = [digest(disk.path) for disk in stopped.disks]
    stopped.cli("checkpoint delete", "A", "--dry-run")
    stopped.cli("snapshot create", "three", "--checkpoint", "C", "--dry-run")
    stopped.cli("recover", "--dry-run")
    assert "nothing was left over" in stopped.cli("recover").out
    points = stopped.cli("checkpoint list", "--json").event("checkpoints")["checkpoints"]
    assert [point["name"] for point in points] == ["A", "B"]
    stopped.cli("checkpoint delete", "A")
    assert [images.bitmaps(disk.path) for disk in stopped.disks] == [{"pullback-B": ["auto"]}] * 2
    assert [digest(disk.path) for disk in stopped.disks] != before
    assert stopped.daemons() == []


def test_a_dry_run_writes_nothing_to_the_images(stopped: Stopped) -> None:
    """Not even for a moment, as QEMU does to call the bitmaps of an image that it opens for writing in use."""
    stopped.cli("snapshot create", "one", "--checkpoint", "A")
    stopped.cli("snapshot delete", "one")

    def looks() -> list[tuple[str, int, int]]:
        paths = [disk.path for disk in stopped.disks]
        return [(digest(path), path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in paths]

    before = looks()
    for command, *more in (
        ("snapshot create", "two", "--checkpoint", "B"),
        ("checkpoint delete", "A"),
        ("recover",),
        ("backup", "--name", "lab"),
        ("export start", "--writable", "--socket", str(stopped.stage.place / "nbd")),
    ):
        told = stopped.cli(command, *more, "--dry-run").out
        assert command == "recover" or "disk-vda" in told, (command, told)
    assert looks() == before
    assert stopped.daemons() == []
    # What is looked at in vain above can change: another command does.
    stopped.cli("recover")
    assert looks() != before


def test_one_chain_online_and_offline(stopped: Stopped, bare_qemu: Start) -> None:
    stage = stopped.stage
    qemu = bare_qemu(stopped.disks, name="lab")
    states: dict[str, dict[str, bytes]] = {}

    def online(fill: int) -> set[str]:
        qemu.device_write("vda", fill * 64 * KIB, 70 * KIB, fill)
        qemu.device_write("vdb", fill * 32 * KIB, 512, fill)
        state = references(qemu)
        made = stage.cli_backup(qemu, "--name", "lab", "--json")
        assert made.code == 0, made.err
        states[made.event("backup")["id"]] = state
        return {disk["mode"] for disk in made.event("backup")["disks"]}

    def offline() -> set[str]:
        state = stopped.contents()
        made = stopped.backup()
        states[made["id"]] = state
        return {disk["mode"] for disk in made["disks"]}

    assert online(1) == {"full"}
    assert online(2) == {"incremental"}
    qemu.device_write("vda", 5 * MIB, 64 * KIB, 77)
    qemu.device_zero("vdb", 0, MIB, unmap=True)
    qemu.shutdown()
    assert offline() == {"incremental"}
    assert offline() == {"incremental"}
    qemu.start()
    assert online(3) == {"incremental"}
    qemu.shutdown()
    assert stopped.daemons() == []
    for backup, state in states.items():
        same(stage.contents(backup), state)
    # Each of these read only what had changed, and the one in the middle of nothing read nothing.
    read = [sum(disk["bytes_read"] for disk in one["disks"]) for one in _manifests(stage)]
    assert read[3] == 0
    assert all(amount <= 2 * MIB for amount in read[1:])


def _manifests(stage: Stage) -> list[dict[str, Any]]:
    said = stage.cli("list", "--json")
    return [one for event in said.events for one in event.get("backups", [event]) if "disks" in one]


def test_images_in_use_are_refused_before_anything_is_touched(stopped: Stopped, bare_qemu: Start) -> None:
    stopped.cli("snapshot create", "one", "--checkpoint", "A")
    stopped.cli("snapshot delete", "one")
    qemu = bare_qemu(stopped.disks[1:])
    before = [digest(disk.path) for disk in stopped.disks]
    for command in ("domain show", "recover", "checkpoint list"):
        done = stopped.attempt(command)
        assert done.code == 5
        user = f"{Path(qemu.program).name} ({qemu.pid})"
        assert f"the image {stopped.disks[1].path} is in use by another process: {user}" in done.err
    assert stopped.attempt("backup").code == 5
    assert [digest(disk.path) for disk in stopped.disks] == before
    assert stopped.daemons() == []


@pytest.mark.parametrize("command", ["snapshot create", "backup"])
def test_a_killed_command_leaves_bitmaps_that_can_be_used(stopped: Stopped, command: str) -> None:
    """Killed as soon as the daemon has the images open, and once it holds a scratch."""
    stopped.backup()
    write(stopped.disks[0], MIB, 64 * KIB, 3)
    for ready in (bool, lambda pids: pids and _scratch_of(pids[0])):
        with (
            stopped.stage.running(*command.split(), stopped.spec, "--name", "lab")
            if command == "backup"
            else (stopped.stage.running(*command.split(), stopped.spec, "x")) as process
        ):
            wait_for(lambda ready=ready: ready(stopped.daemons()), "the daemon", timeout=30)
            process.kill()
        # At once: a daemon that is still ending is waited for.
        assert "of no use" not in stopped.cli("domain show").out
        if stopped.daemons():  # its work was done before the kill, and the snapshot stays as it should
            stopped.cli("snapshot delete", "x")
        assert stopped.daemons() == []
    made = stopped.backup()
    assert {disk["mode"] for disk in made["disks"]} == {"incremental"}
    same(stopped.stage.contents(made["id"]), stopped.contents())


def _scratch_of(pid: int) -> bool:
    try:
        return any(".scratch" in os.readlink(handle) for handle in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def test_a_daemon_of_an_earlier_session_is_not_waited_for_once_it_ended(
    stopped: Stopped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a zombie of this process: snapshot create and delete in one waited two minutes now and then."""
    monkeypatch.setattr(offline, "_STOP", 10.0)
    place = offline.daemon_place(offline.parse_images(str(stopped.disks[0].path)), stopped.stage.place)
    earlier = offline.OfflineDaemon(place)
    earlier.start().socket.close()
    begin = time.monotonic()
    daemon = offline.OfflineDaemon(place)
    try:
        daemon.start().socket.close()
        assert time.monotonic() - begin < 10
    finally:
        daemon.terminate()
        earlier.wait()


def test_an_interrupted_command_leaves_another_ones_snapshot_alone(stopped: Stopped) -> None:
    stopped.cli("snapshot create", "kept")
    (daemon,) = stopped.daemons()
    with stopped.stage.running("backup", stopped.spec) as process:
        process.send_signal(signal.SIGTERM)
        process.wait()
    assert stopped.daemons() == [daemon]
    image, other = (str(disk.path) for disk in stopped.disks)
    done = inside(["snapshot", "list", f"disk:{image}"], stopped.stage.environment())
    assert done.code == 5 and f"the image {image} is in use by another pullback (process {daemon})" in done.err
    assert f"together: {image}, {other}." in done.err and "QMP socket" not in done.err
    assert stopped.cli("snapshot list").out.splitlines()[1].startswith("kept")
    stopped.cli("snapshot delete", "kept")
    assert stopped.daemons() == []


def test_raw_images_are_read_whole_each_time(stage: Stage) -> None:
    disk = stage.disk("vda", MIB, "raw")
    disk.path.write_bytes(os.urandom(MIB))
    domain = Stopped(stage, [disk])
    assert "not tracked" in domain.cli("domain show").out
    for _ in range(2):
        made = domain.backup()
        assert made["disks"][0]["mode"] == "full"
        same(stage.contents(made["id"]), {"vda": disk.path.read_bytes()})
    refused = stage.cli("snapshot", "create", domain.spec, "--checkpoint", "A")
    assert refused.code == 5
    assert "cannot store dirty bitmaps" in refused.err
    assert domain.daemons() == []


def test_targets_and_commas(stage: Stage, tmp_path: Path) -> None:
    odd = images.create(tmp_path / "a,b=c,.qcow2", MIB)
    plain = images.create(tmp_path / "web.img.qcow2", MIB)
    spec = f"disk:{str(odd).replace(',', ',,')},{plain}"
    done = stage.cli("domain", "show", spec.replace(str(tmp_path), f"system={tmp_path}", 1), "--json")
    assert [disk["target"] for disk in done.event("domain")["disks"]] == ["system", "web"]
    ending = images.create(tmp_path / "last,", MIB)
    assert stage.cli("domain", "show", f"disk:x={tmp_path}/last,,,y={plain}").code == 2  # not called .qcow2
    done = stage.cli("domain", "show", f"disk:x=qcow2:{tmp_path}/last,,,y={plain}", "--json")
    assert [disk["filename"] for disk in done.event("domain")["disks"]] == [str(ending), str(plain)]


def test_what_is_not_opened(stage: Stage, tmp_path: Path) -> None:
    image = images.create(tmp_path / "vda.qcow2", MIB)
    suspicious = images.create(tmp_path / "vda.raw", MIB, "qcow2")
    nameless = images.create(tmp_path / "volume", MIB, "qcow2")
    raw = images.create(tmp_path / "plain.raw", MIB, "raw")
    (tmp_path / "sub").mkdir()
    other = images.create(tmp_path / "sub" / "vda.qcow2", MIB)
    for spec, said in (
        (f"{suspicious}", "looks like a qcow2 image"),
        (f"qcow2:{raw}", "is not a qcow2 image"),
        (f"{tmp_path}/none.qcow2", "No such file"),
        (f"{tmp_path}", "cannot open the image"),
        (f"{image},{other}", "two images are called vda"),
        (f"a={image},b={image}", "named twice"),
        (f"a b={image}", "cannot name a disk"),
        (f"{image},", "no path"),
        ("vda=", "vda= is followed by no path"),
        ("vda=raw:", "vda=raw: is followed by no path"),
        (f"{nameless}", "looks like a qcow2 image"),
    ):
        done = inside(["domain", "show", f"disk:{spec}"], stage.environment())
        assert (done.code, said in done.err) == (2, True), (spec, done.err)
    assert "raw" in stage.cli("domain", "show", f"disk:vda=raw:{suspicious}").out


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up root's rights")
def test_as_another_user_without_a_runtime_directory(stage: Stage, lab_dir: Path) -> None:
    lab_dir.chmod(0o755)
    home = lab_dir / "theirs"
    home.mkdir()
    disk = images.create(home / "vda.qcow2", MIB)
    for path in (home, disk):
        os.chown(path, UNPRIVILEGED, UNPRIVILEGED)
    os.chmod(home, 0o500)
    user = str(UNPRIVILEGED)
    prefix = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"]

    def as_user(*arguments: str) -> Done:
        return stage.cli(*arguments, prefix=prefix, unset=["XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"])

    try:
        done = as_user("snapshot", "create", f"disk:{disk}", "one", "--checkpoint", "A")
        assert done.code == 0, done.err
        assert as_user("snapshot", "delete", f"disk:{disk}", "one").code == 0
        assert list(images.bitmaps(disk)) == ["pullback-A"]
        os.chmod(disk, 0o400)
        refused = as_user("domain", "show", f"disk:{disk}")
        assert refused.code == 5
        assert "Permission denied" in refused.err
    finally:
        shutil.rmtree(f"/tmp/pullback-{user}", ignore_errors=True)
