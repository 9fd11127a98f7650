# SPDX-License-Identifier: Apache-2.0
"""The Python API as a program uses it: objects that end what they stand for, found again, and used too late."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.qemu import BareQemu
from pullback import Domain, DomainAddress, Export, Snapshot, UnixAddress, open_domain
from pullback.errors import UsageError
from tests.support.api import Api, by_nbdcopy, contexts, dirty_map, scribble
from tests.support.product import MIB, Stage, references

Start = Callable[..., BareQemu]
SIZE = 2 * MIB


@pytest.fixture
def api(lab_dir: Path, bare_qemu: Start) -> Api:
    """A domain with two disks, where vda has a checkpoint "a" and changed since in its block 3."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", SIZE), stage.disk("vdb", SIZE)], running=True)
    api = Api(stage, qemu)
    qemu.device_write("vda", 0, SIZE, 0x11)
    api.snapshot("before", "--checkpoint", "a")
    api.do("snapshot", "delete", "before")
    scribble(qemu, "vda", {3})
    return api


def opened(api: Api) -> DomainAddress:
    return DomainAddress(socket=str(api.qemu.qmp_path))


def place(api: Api) -> UnixAddress:
    return UnixAddress(str(api.stage.place / "nbd"))


def test_as_it_was_sketched(api: Api) -> None:
    """Disks first, changes as a list, "all" or None, each object ends itself."""
    state = references(api.qemu)

    async def story() -> None:
        async with open_domain(opened(api)) as domain:
            scratch = str(api.stage.scratch)
            snapshot = await domain.create_snapshot(["vda"], checkpoint="b", freeze=False, scratch=scratch)
            assert (snapshot.targets, snapshot.checkpoint, snapshot.consistency) == (("vda",), "b", "crash")
            for since, offered in ((["a"], {"a"}), ("all", {"a"}), (None, set()), ({"vda": ["a"]}, {"a"})):
                (export,) = await domain.start_export(
                    snapshot, ["vda"], since=since, address=place(api), names={"vda": "it"}
                )
                assert await asyncio.to_thread(contexts, export.uri) == offered
                assert export.name == "it"
                await export.stop()
                await export.stop()
                assert await domain.exports() == ()
            (export,) = await domain.start_export(snapshot, since=["a"], address=place(api))
            scribble(api.qemu, "vda", {5})
            assert await asyncio.to_thread(by_nbdcopy, export.uri) == state["vda"]
            assert await asyncio.to_thread(dirty_map, export.uri, "a") == {3}
            await snapshot.delete()
            await snapshot.delete()
            assert (await domain.exports(), await domain.snapshots()) == ((), ())
            assert [one.name for one in await domain.checkpoints()] == ["a", "b"]

    asyncio.run(story())
    assert api.clean() == []


def test_freeze_as_a_truth_value_is_only_a_try(api: Api) -> None:
    async def story() -> None:
        async with open_domain(opened(api)) as domain:
            scratch = str(api.stage.scratch)
            with pytest.raises(UsageError, match="no guest agent's socket"):
                await domain.create_snapshot(freeze="require", scratch=scratch)
            snapshot = await domain.create_snapshot(freeze=True, scratch=scratch)
            assert snapshot.consistency == "crash"
            await snapshot.delete()

    asyncio.run(story())


def test_a_bare_name_is_no_list_of_names(api: Api) -> None:
    async def story() -> None:
        async with open_domain(opened(api)) as domain:
            with pytest.raises(UsageError, match="'vda', and no list") as told:
                await domain.create_snapshot("vda")
            assert "Write ['vda']" in told.value.todo
            snapshot = await domain.create_snapshot(checkpoint="b", scratch=str(api.stage.scratch))
            for since in ("a", {"vda": "a"}):
                with pytest.raises(UsageError, match="'a', and no list of checkpoints"):
                    await domain.start_export(snapshot, since=since, address=place(api))
            with pytest.raises(UsageError, match="'vda', and no list"):
                await domain.start_export(snapshot, "vda", address=place(api))
            await snapshot.delete()

    asyncio.run(story())
    assert api.clean() == []


def test_found_again_they_end_in_the_session_that_found_them(api: Api) -> None:
    async def first() -> tuple[Domain, Snapshot, Export]:
        async with open_domain(opened(api)) as domain:
            snapshot = await domain.create_snapshot(name="one", scratch=str(api.stage.scratch))
            export, _ = await domain.start_export(snapshot, address=place(api))
            return domain, snapshot, export

    async def second(domain: Domain, snapshot: Snapshot, export: Export) -> None:
        async with open_domain(opened(api)) as later:
            for late in (snapshot.delete, export.stop, domain.facts, domain.recover):
                with pytest.raises(UsageError, match="the session with this domain has ended"):
                    await late()
            found, other = sorted(await later.exports(), key=lambda one: one.name)
            assert found == export
            await found.stop()
            assert await later.exports() == (other,)
            (again,) = await later.snapshots()
            assert (again.id, again.name) == (snapshot.id, "one")
            assert (await later.find_snapshot("one")) == again
            await again.delete()
            assert await later.exports() == ()

    asyncio.run(second(*asyncio.run(first())))
    assert api.clean() == []


def test_the_session_is_no_part_of_the_value(api: Api) -> None:
    async def story() -> None:
        async with open_domain(opened(api)) as domain:
            snapshot = await domain.create_snapshot(name="one", scratch=str(api.stage.scratch))
            exports = await domain.start_export(snapshot, address=place(api))
            for thing in (snapshot, exports[0]):
                assert "ession" not in repr(thing)
                assert set(dataclasses.asdict(thing)) == {field.name for field in dataclasses.fields(thing)}
                for other in (copy.copy(thing), copy.deepcopy(thing), pickle.loads(pickle.dumps(thing))):
                    assert other == thing
                    with pytest.raises(UsageError, match="is a copy"):
                        await (other.delete() if isinstance(other, Snapshot) else other.stop())
            await snapshot.delete()

    asyncio.run(story())
    assert api.clean() == []


def test_a_dry_run_tells_and_deletes_nothing(api: Api) -> None:
    api.snapshot("one")
    told: list[str] = []

    async def story() -> None:
        tell = lambda plan: told.extend(step.execute for step in plan.commands())  # noqa: E731
        async with open_domain(opened(api), tell=tell) as domain:
            await (await domain.find_snapshot("one")).delete()

    asyncio.run(story())
    assert "blockdev-del" in told
    assert [one["name"] for one in api.show()["snapshots"]] == ["one"]
    api.do("snapshot", "delete", "one")
