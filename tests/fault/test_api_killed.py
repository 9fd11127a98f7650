# SPDX-License-Identifier: Apache-2.0
"""Commands killed before and after every command they send to QEMU: recover clears what is dead, and only that."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.qemu import BareQemu
from pullback.engine.domain import Domain, DomainAddress, open_domain
from pullback.nbd.address import UnixAddress
from tests.support.api import Api, by_nbdcopy, difference, dirty_map, scribble, state_of
from tests.support.dying import Point, after_sending, before_command, changes_something, hit_backup
from tests.support.product import MIB, Stage, forked, references, run_state
from tests.support.survival import Fault, survives

Start = Callable[..., BareQemu]
Work = Callable[[Domain], Any]
SIZE = 2 * MIB


def _in_session(qemu: BareQemu, work: Work, trace: Any = None) -> None:
    async def session() -> None:
        async with open_domain(DomainAddress(str(qemu.qmp_path)), trace=trace) as domain:
            await work(domain)

    asyncio.run(session())


def _killed(qemu: BareQemu, work: Work, point: Point) -> int:
    def die() -> int:
        with point(signal.SIGKILL):
            _in_session(qemu, work)
        return 0

    return forked(die)


def _commands(qemu: BareQemu, work: Work) -> int:
    sent: list[str] = []
    _in_session(qemu, work, lambda command, arguments, reply: sent.append(command))
    return sum(map(changes_something, filter(None, sent)))


@pytest.fixture
def api(lab_dir: Path, bare_qemu: Start) -> Api:
    """Two disks with a checkpoint "first", and a live snapshot "live" exported since it."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", SIZE), stage.disk("vdb", SIZE)], running=True)
    qemu.device_write("vda", 0, SIZE, 0x11)
    qemu.device_write("vdb", 0, SIZE, 0x12)
    api = Api(stage, qemu)
    api.snapshot("before", "--checkpoint", "first")
    api.do("snapshot", "delete", "before")
    scribble(qemu, "vda", {3, 7})
    return api


class Live:
    """A live snapshot with an export since the first checkpoint; whatever dies beside it, it stays right."""

    def __init__(self, api: Api) -> None:
        self.data = references(api.qemu)
        api.snapshot("live", "--checkpoint", "second")
        self.uris = api.export("live", "--since", "first")
        for disk in ("vda", "vdb"):
            scribble(api.qemu, disk, {1, 5, 7, 20})

    def check(self) -> None:
        for disk, uri in self.uris.items():
            assert by_nbdcopy(uri) == self.data[disk]
        assert dirty_map(self.uris["vda"], "first") == {3, 7}


@pytest.mark.parametrize("method", ["filter", "job"])
def test_a_snapshot_s_maker_is_killed_anywhere(api: Api, method: Any) -> None:
    qemu, scratch = api.qemu, str(api.stage.scratch)
    live = Live(api) if method == "filter" else None
    before = state_of(qemu)

    async def make(domain: Domain) -> None:
        await domain.create_snapshot(name="new", checkpoint="third", scratch=scratch, method=method)

    count = _commands(qemu, make)
    for point in [(before_command, after_sending)[number % 4 == 1](number) for number in range(1, count + 1, 2)]:
        with survives(Fault.KILLED_AT_A_COMMAND):
            if "new" in _names(api):
                api.do("snapshot", "delete", "new")
                api.do("checkpoint", "delete", "third")
            assert _killed(qemu, make, point) == -signal.SIGKILL
            shown = api.show()
            dead = shown["left_over"]
            cleared = api.do("recover", "")["cleared"]
            assert len(dead) == len([one for one in cleared if "snapshot" in one])
            assert api.show()["left_over"] == []
            if "new" in _names(api):
                assert not dead
                api.do("snapshot", "delete", "new")
            bitmaps = {name for disk in ("vda", "vdb") for name, _ in state_of(qemu)[0][f"node-{disk}"]}
            if any(name.startswith("pullback-third") for name in bitmaps):
                api.do("checkpoint", "delete", "third")
            assert difference(state_of(qemu), before) == []
    if live is not None:
        live.check()
        api.do("snapshot", "delete", "live")
    assert run_state(qemu) == "running"
    # The work directories of the dead go with the next command that needs one.
    api.snapshot("last")
    api.do("snapshot", "delete", "last")
    assert api.clean() == []


def _names(api: Api) -> list[str]:
    return [one["name"] for one in api.show()["snapshots"]]


def test_an_exporter_is_killed_anywhere(api: Api) -> None:
    """The next export at another address works, and its map of changes is whole."""
    qemu, data = api.qemu, references(api.qemu)

    async def offer(domain: Domain) -> None:
        address = UnixAddress(str(api.stage.place / "first"))
        await domain.start_export(await domain.find_snapshot("live"), address=address, since=["first"])

    api.snapshot("live", "--checkpoint", "second")
    count = _commands(qemu, offer)
    api.do("export", "stop")
    for point in [kind(number) for number in range(1, count + 1) for kind in (before_command, after_sending)]:
        with survives(Fault.KILLED_AT_A_COMMAND):
            # A view that was exported keeps what was gathered: a new one for each.
            api.do("snapshot", "delete", "live")
            api.do("checkpoint", "delete", "second")
            api.snapshot("live", "--checkpoint", "second")
            assert _killed(qemu, offer, point) == -signal.SIGKILL
            if api.show()["exports"]:
                api.do("export", "stop")
            uris = api.export("live", "--since", "first", at="second")
            assert dirty_map(uris["vda"], "first") == {3, 7}
            assert dirty_map(uris["vdb"], "first") == set()
            api.do("export", "stop")
    assert by_nbdcopy(api.export("live")["vda"]) == data["vda"]
    api.do("snapshot", "delete", "live")
    assert api.clean() == []


def test_a_prober_is_killed_anywhere(api: Api) -> None:
    qemu = api.qemu
    api.snapshot("live")

    async def look(domain: Domain) -> None:
        await domain.broken_disks(await domain.find_snapshot("live"))

    count = _commands(qemu, look)
    before = state_of(qemu)
    for number in range(1, count + 1):
        for kind in (before_command, after_sending):
            with survives(Fault.KILLED_AT_A_COMMAND):
                assert _killed(qemu, look, kind(number)) == -signal.SIGKILL
                (snapshot,) = api.do("snapshot", "list")["snapshots"]
                assert snapshot["broken"] == []
                assert state_of(qemu) == before
    api.do("snapshot", "delete", "live")
    assert api.clean() == []


def test_a_deleter_is_killed_anywhere(api: Api) -> None:
    qemu = api.qemu
    live = Live(api)
    before = state_of(qemu)

    async def delete(domain: Domain) -> None:
        await (await domain.find_snapshot("goes")).delete()

    api.snapshot("goes")
    count = _commands(qemu, delete)
    for number in range(1, count + 1):
        with survives(Fault.KILLED_AT_A_COMMAND):
            api.snapshot("goes")
            api.export("goes", "--export-name", "vda=a", "--export-name", "vdb=b")
            assert _killed(qemu, delete, after_sending(number)) == -signal.SIGKILL
            api.do("recover", "")
            if "goes" in _names(api):
                api.do("snapshot", "delete", "goes")
            assert state_of(qemu) == before
    live.check()
    api.do("snapshot", "delete", "live")
    assert api.clean() == []


@pytest.mark.fault(Fault.KILLED_AT_A_COMMAND)
def test_a_killed_backup_beside_a_live_snapshot(api: Api) -> None:
    live = Live(api)
    qemu, before = api.qemu, state_of(api.qemu)
    assert hit_backup(api.stage, qemu, before_command(22), signal.SIGKILL) == -signal.SIGKILL
    shown = api.show()
    assert [one["name"] for one in shown["snapshots"]] == ["live"]
    assert len(shown["left_over"]) == 1
    assert len(api.do("recover", "")["cleared"]) == 1
    assert api.show()["left_over"] == []
    assert state_of(qemu)[1:] == before[1:]
    live.check()
    backup = api.stage.backup(qemu)
    assert api.stage.contents(backup.id) == references(qemu)
    live.check()
    api.do("snapshot", "delete", "live")
    assert api.clean() == []
