# SPDX-License-Identifier: Apache-2.0
"""Freezing file systems: the real agent in a real guest, and agents that fail in every way."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lab import images
from lab.disks import DiskSpec
from lab.processes import run, wait_for
from lab.qemu import BareQemu
from lab.vm import Vm
from pullback.errors import DomainUnreachable
from pullback.qemu import agent as agent_module
from pullback.qemu.monitor import Monitor
from tests.support.api import inside, state_of
from tests.support.product import MIB, Done, Stage, leftovers

WRITER = "n=0; while :; do n=$((n + 1)); echo $n >/mnt/a/n; echo $n >/mnt/b/n; echo $n >/run/n; done"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Vm, Stage]]:
    """A guest with an agent that writes to two ext4 file systems without a pause, and a stage."""
    place = tmp_path_factory.mktemp("freeze")
    disks = [DiskSpec(images.make_ext4(place / f"{name}.qcow2", 16 * MIB), name) for name in ("vda", "vdb")]
    with Vm(disks, name="lab", with_agent=True) as vm:
        vm.run("mkdir /mnt/a /mnt/b; mount /dev/vda /mnt/a && mount /dev/vdb /mnt/b; echo 0 >/run/n")
        vm.start_background(WRITER)
        yield vm, Stage(place)


@pytest.fixture
def talking(world: tuple[Vm, Stage], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The agent in the guest runs, and answers; on a busy machine that takes it some time."""
    monkeypatch.setattr(agent_module, "_SYNC_TIMEOUT", 5.0)  # what is said before it listens is lost

    async def hello() -> bool:
        try:
            agent = await agent_module.connect_agent(str(world[0].agent_path))
        except DomainUnreachable:  # QEMU hangs up while nobody inside has the port open
            return False
        await agent.close()
        return True

    job = world[0].start_background("start-agent")
    try:
        wait_for(lambda: asyncio.run(hello()), "the agent in the guest", timeout=150)
        monkeypatch.setattr(agent_module, "_SYNC_TIMEOUT", 30.0)
        yield
    finally:
        job.stop()


def command(vm: Vm, stage: Stage, *words: str | Path) -> Done:
    """``GROUP COMMAND`` on the guest, with its agent."""
    *group, last = words
    return inside([*map(str, group), f"qmp:{vm.qmp_path}", *_options(vm, stage), str(last)], stage.environment())


def _options(vm: Vm, stage: Stage) -> list[str]:
    return ["--agent", str(vm.agent_path), "--scratch", str(stage.scratch), "--json"]


def written(vm: Vm) -> int:
    """How far the writer in the guest came."""
    # It is empty for a moment each time the writer opens it.
    return int(vm.run('until n=$(cat /run/n); [ -n "$n" ]; do :; done; echo $n'))


def writes_on(vm: Vm) -> None:
    """Wait until the writer writes (again)."""
    before = written(vm)
    wait_for(lambda: written(vm) > before, "the guest to write", timeout=10)


def needs_recovery(image: Path) -> bool:
    """Whether an ext4 needs its journal replayed; without that, whether it is whole."""
    features = re.search(r"^Filesystem features:.*$", run(["dumpe2fs", "-h", image]).decode(), re.MULTILINE)
    assert features is not None
    if "needs_recovery" in features[0]:
        return True
    run(["e2fsck", "-fn", image])
    return False


def snapshot_needs_recovery(vm: Vm, stage: Stage, *options: str) -> tuple[dict[str, Any], list[bool]]:
    """Make a snapshot; what was said of it, and whether each file system in it needs its journal."""
    made = command(vm, stage, "snapshot", "create", *options, "point")
    assert made.code == 0, made.err
    domain = f"qmp:{vm.qmp_path}"
    socket_path = stage.place / "nbd"
    uris = inside(
        ["export", "start", domain, "--snapshot", "point", "--socket", str(socket_path)], stage.environment()
    ).out.split()
    found = []
    for uri in uris:
        copy = stage.place / "copy"
        run(["nbdcopy", uri, copy])
        found.append(needs_recovery(copy))
        copy.unlink()
    # Another process finds it again, and how consistent it is.
    shown = inside(["domain", "show", domain, "--json"], stage.environment()).event("domain")["snapshots"]
    listed = inside(["snapshot", "list", domain, "--json"], stage.environment()).event("snapshots")["snapshots"]
    assert [one["consistency"] for one in (*shown, *listed)] == [made.event("snapshot")["consistency"]] * 2
    assert inside(["snapshot", "delete", domain, "point"], stage.environment()).code == 0
    return made.event("snapshot"), found


@pytest.mark.usefixtures("talking")
def test_frozen_file_systems_are_clean_and_crash_consistent_ones_are_not(world: tuple[Vm, Stage]) -> None:
    vm, stage = world
    writes_on(vm)
    said, dirty = snapshot_needs_recovery(vm, stage)
    assert (said["consistency"], said["frozen_ms"], dirty) == ("crash", 0, [True, True])
    assert said["paused_ms"] > 0
    for option in ("--freeze", "--require-freeze"):
        writes_on(vm)
        said, dirty = snapshot_needs_recovery(vm, stage, option)
        assert (said["consistency"], said["paused_ms"], dirty) == ("frozen", 0, [False, False])
        print(f"frozen for {said['frozen_ms']} ms")
    writes_on(vm)


@pytest.mark.usefixtures("talking")
def test_a_backup_says_that_it_is_frozen(world: tuple[Vm, Stage]) -> None:
    vm, stage = world
    for option, frozen in (("--freeze", True), ("--full", False)):
        made = command(vm, stage, "backup", option)
        assert made.code == 0, made.err
        backup = made.event("backup")["id"]
        restored = stage.restore(backup)
        manifest = json.loads(stage.restic.run("dump", backup, "/lab/domain.json"))
        assert manifest["consistency"] == ("frozen" if frozen else "crash")
        for disk in restored.disks:
            raw = stage.place / "raw"
            raw.write_bytes(images.raw_bytes(Path(disk.path)))
            assert needs_recovery(raw) is not frozen
    writes_on(vm)


def test_without_an_agent(world: tuple[Vm, Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    vm, stage = world
    monkeypatch.setattr(agent_module, "_SYNC_TIMEOUT", 1.0)
    before = state_of(vm)
    refused = command(vm, stage, "snapshot", "create", "--require-freeze", "x")
    assert refused.code == 4
    assert "no guest agent answered" in refused.err + refused.out
    assert command(vm, stage, "backup", "--require-freeze", "--full").code == 4
    assert state_of(vm) == before
    said, dirty = snapshot_needs_recovery(vm, stage, "--freeze")
    assert (said["consistency"], dirty) == ("crash", [True, True])
    assert "crash-consistent" in command(vm, stage, "backup", "--freeze", "--full").out


@contextmanager
def held(words: list[str], environment: Mapping[str, str], at: str) -> Iterator[int]:
    """A command in a child that waits for ever before it sends ``at``; the child's pid once it is there."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            execute = Monitor.execute

            async def hold(self: Monitor, name: str, *more: Any, **keywords: Any) -> Any:
                if name == at:
                    os.write(tell, b"x")
                    await asyncio.sleep(3600)
                return await execute(self, name, *more, **keywords)

            with mock.patch.object(Monitor, "execute", hold):
                os._exit(inside(words, environment).code)
        finally:
            os._exit(99)
    os.close(tell)
    try:
        assert os.read(ready, 1) == b"x"
        yield child
    finally:
        os.close(ready)
        if _ended(child) is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _ended(child: int) -> tuple[int] | None:
    """The exit code, or minus the signal, of a child that ended; 0 for one that was collected already."""
    try:
        found = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return (0,)
    if found is None:
        return None
    return (os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]),)


@pytest.mark.usefixtures("talking")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_death_while_the_file_systems_are_frozen(
    world: tuple[Vm, Stage], number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, stage = world
    monkeypatch.setattr(agent_module, "FROZEN_LIMIT", 600.0)  # what thaws is the death alone
    before = state_of(vm)
    words = ["snapshot", "create", f"qmp:{vm.qmp_path}", *_options(vm, stage), "--require-freeze", "x"]
    with held(words, stage.environment(), "qom-set") as child:
        stuck = written(vm)
        vm.run("i=0; while [ $i -lt 2000 ]; do i=$((i + 1)); done")
        assert written(vm) <= stuck + 1, "the writer goes on although its file systems are frozen"
        os.kill(child, number)
        wait_for(lambda: written(vm) > stuck + 1, "the guest to write again", timeout=40)
        (code,) = wait_for(lambda: _ended(child), "the child's end", timeout=40)
    assert inside(["recover", f"qmp:{vm.qmp_path}"], stage.environment()).code == 0
    assert state_of(vm) == before
    assert code in ((0, 130) if number == signal.SIGTERM else (-signal.SIGKILL,))
    writes_on(vm)


# -- agents that fail ---------------------------------------------------------------------------------------------


class FakeAgent:
    """An agent of a few lines; ``answers`` are the replies to commands, None for silence, once each."""

    def __init__(self, path: Path, **answers: Any) -> None:
        self.path = path
        self.said: list[str] = []
        self._answers = {name.replace("_", "-"): answer for name, answer in answers.items()}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> FakeAgent:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, client.makefile("rwb") as lines:
                for line in lines:
                    request = json.loads(line.rpartition(b"\xff")[2])
                    name = request["execute"]
                    self.said.append(name)
                    reply = {"return": request["arguments"]["id"]} if "sync" in name else {"return": 2}
                    reply = self._answers.pop(name, reply)
                    if reply is not None:
                        lines.write(b"\xff" * ("sync" in name) + json.dumps(reply).encode() + b"\n")
                        lines.flush()


REFUSES = {"error": {"class": "GenericError", "desc": "the hook said no"}}


@pytest.mark.parametrize("answer", [REFUSES, {"return": 0}], ids=["refuses", "nothing to freeze"])
def test_what_cannot_be_frozen_is_crash_consistent_and_paused(
    bare_qemu: Callable[..., BareQemu], tmp_path: Path, lab_dir: Path, answer: Any
) -> None:
    stage = Stage(tmp_path)
    qemu = bare_qemu([stage.disk("vda"), stage.disk("vdb")], running=True)
    place = lab_dir / "agent"
    words = [f"qmp:{qemu.qmp_path}", "--agent", str(place), "--scratch", str(stage.scratch), "--json"]
    before = state_of(qemu)
    with FakeAgent(place, guest_fsfreeze_freeze=answer) as agent:
        refused = inside(["snapshot", "create", *words, "--require-freeze", "one"], stage.environment())
        assert refused.code == 4
        assert agent.said[-1] == "guest-fsfreeze-thaw"
    assert state_of(qemu) == before
    place.unlink()
    with FakeAgent(place, guest_fsfreeze_freeze=answer):
        made = inside(["snapshot", "create", *words, "--freeze", "one"], stage.environment()).event("snapshot")
    assert (made["consistency"], made["frozen_ms"]) == ("crash", 0)
    assert made["paused_ms"] > 0  # two disks that nobody froze


@pytest.mark.parametrize("method", ["filter", "job"])
def test_whoever_finds_a_snapshot_knows_that_it_was_frozen(
    bare_qemu: Callable[..., BareQemu], tmp_path: Path, lab_dir: Path, method: str
) -> None:
    stage = Stage(tmp_path)
    qemu = bare_qemu([stage.disk("vda"), stage.disk("vdb")], running=True)
    domain, place = f"qmp:{qemu.qmp_path}", lab_dir / "agent"
    words = ["--scratch", str(stage.scratch), "--method", method]
    with FakeAgent(place):
        create = ["snapshot", "create", domain, "one", "--freeze", "--agent", str(place), *words]
        assert inside(create, stage.environment()).code == 0
    assert inside(["snapshot", "create", domain, "two", *words], stage.environment()).code == 0
    listed = inside(["snapshot", "list", domain, "--json"], stage.environment()).event("snapshots")["snapshots"]
    assert {one["name"]: one["consistency"] for one in listed} == {"one": "frozen", "two": "crash"}
    assert "file systems frozen" in inside(["domain", "show", domain], stage.environment()).out
    for name in ("one", "two"):
        assert inside(["snapshot", "delete", domain, name], stage.environment()).code == 0
    assert leftovers(qemu, stage.scratch) == []


@pytest.mark.parametrize("silent", ["guest_fsfreeze_freeze", "guest_fsfreeze_thaw"])
def test_an_agent_that_falls_silent(
    bare_qemu: Callable[..., BareQemu], tmp_path: Path, lab_dir: Path, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "_COMMAND_TIMEOUT", 3.0)  # for the thaw, too, which is answered
    stage = Stage(tmp_path)
    qemu = bare_qemu([stage.disk("vda"), stage.disk("vdb")], running=True)
    place = lab_dir / "agent"
    words = [f"qmp:{qemu.qmp_path}", "--agent", str(place), "--scratch", str(stage.scratch)]
    before = state_of(qemu)
    with FakeAgent(place, **{silent: None}) as agent:
        refused = inside(["snapshot", "create", *words, "--require-freeze", "one"], stage.environment())
        assert refused.code == 4, refused.err
        # It woke up for the thaw, or the guard came after we had gone.
        assert agent.said[-1] == "guest-fsfreeze-thaw"
        assert agent.said.count("guest-fsfreeze-thaw") == (2 if "thaw" in silent else 1)
    assert state_of(qemu) == before


def test_a_late_answer_to_the_freeze_is_not_taken_for_the_thaws(lab_dir: Path) -> None:
    """What an earlier command is answered late is passed over."""
    late = [{"return": 2}, REFUSES]

    async def talk() -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for number in itertools.count():
                if not (line := await reader.readline()):
                    break
                request = json.loads(line.rpartition(b"\xff")[2])
                answer = request["arguments"]["id"] if "arguments" in request else 7
                replies = [*(late if number == 1 else []), {"return": answer}]
                writer.writelines(json.dumps(reply).encode() + b"\n" for reply in replies)
            writer.close()

        async with await asyncio.start_unix_server(serve, lab_dir / "agent"):
            agent = await agent_module.connect_agent(str(lab_dir / "agent"))
            try:
                return await agent.thaw()
            finally:
                await agent.close()

    assert asyncio.run(talk()) == 7
