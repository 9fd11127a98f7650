# SPDX-License-Identifier: Apache-2.0
"""Whatever answers on a monitor's socket: facts that all who read them can read, or a documented error."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Mapping
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.errors import CommandFailed, DomainError, Refused, UsageError
from pullback.model.chain import read_chain
from pullback.model.facts import Facts
from pullback.model.snapshots import current_server, filter_stack, foreign_exports, read_exports, read_snapshots
from pullback.plan.cleanup import remove_snapshots
from pullback.plan.method import choose_method
from pullback.plan.selection import select_disks
from pullback.qemu.monitor import Monitor
from pullback.qemu.observe import observe, observe_daemon
from tests.golden.plans import as_json
from tests.golden.replay import CAPTURES, Replay
from tests.support.fuzzing import ANYTHING, changed, fuzz, places

CAPTURED = {name: json.loads((CAPTURES / f"{name}.json").read_text()) for name in ("idle", "frozen")}


class Anybody:
    """A monitor whose other end says what it likes: replies by command, errors to all that is not there."""

    def __init__(self, captured: Mapping[str, Any], features: frozenset[str] | None = frozenset()) -> None:
        self.version = tuple(captured["version"])
        self.features = features
        self.replies: dict[str, Any] = {item["execute"]: item.get("return") for item in captured["replies"]}
        del self.replies["qom-get"]
        self._captured = Replay(captured)

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        if command in self.replies:
            return self.replies[command]
        try:
            return await self._captured.execute(command, arguments)
        except KeyError:  # of a device that is not there
            raise CommandFailed(command, "GenericError", "no") from None


def look(monitor: Anybody, daemon: bool = False) -> Facts:
    found = observe_daemon(cast(Monitor, monitor), "web") if daemon else observe(cast(Monitor, monitor))
    return asyncio.run(found)


def use(facts: Facts) -> None:
    """What every command reads out of the facts."""
    for snapshot in read_snapshots(facts):
        assert None not in (snapshot.name, snapshot.time, snapshot.whole, snapshot.frozen)
    assert None not in (read_exports(facts), foreign_exports(facts))
    current_server(facts)
    for device in facts.devices:
        filter_stack(facts, device)
        if device.root:
            chain = read_chain(facts.disk(device).bitmaps)
            assert all(isinstance(chain.since(point), tuple) for point in chain.points)
    selection = select_disks(facts)
    choose_method(facts, selection.disks)
    assert as_json(remove_snapshots(facts, {one.id for one in read_snapshots(facts)})) is not None


def outcome(monitor: Anybody, daemon: bool = False) -> str:
    try:
        facts = look(monitor, daemon)
    except DomainError as error:
        return str(error)
    try:
        use(facts)
    except (Refused, UsageError) as error:
        return str(error)
    return ""


def spoiled(name: str, command: str, place: tuple[Any, ...], new: Any, drop: bool = False) -> Anybody:
    monitor = Anybody(CAPTURED[name])
    monitor.replies[command] = changed(monitor.replies[command], place, new, drop)
    return monitor


@pytest.mark.parametrize("name", CAPTURED)
def test_what_was_captured_is_read(name: str) -> None:
    monitor = Anybody(CAPTURED[name])
    assert outcome(monitor) == ""
    assert len(read_snapshots(look(monitor))) == (name == "frozen")


WHERE = {
    name: [(command, place) for command, reply in Anybody(captured).replies.items() for place in places(reply)]
    for name, captured in CAPTURED.items()
}


@pytest.mark.parametrize("daemon", [False, True])
@fuzz(60)
@given(name=st.sampled_from(sorted(CAPTURED)), data=st.data(), new=ANYTHING, drop=st.booleans())
def test_one_part_of_a_reply_may_be_anything(
    daemon: bool, name: str, data: st.DataObject, new: Any, drop: bool
) -> None:
    command, place = data.draw(st.sampled_from(WHERE[name]))
    outcome(spoiled(name, command, place, new, drop), daemon)


NAMES = st.builds(
    lambda prefix, holder, number, rest: f"{prefix}{holder}a1b2c3d4-{number}{rest}",
    st.sampled_from(["pb-", "pullback-"]),
    st.sampled_from("bswrx"),
    st.sampled_from(["0", "1", "٣", "9" * 5000]),
    st.sampled_from(["", "-scratch", "-filter", "-access", "-view", "-x", "-xff-c", "-x1-c1-c", "-create", "-push"]),
)
MARKS = st.builds(
    lambda prefix, fields: prefix + (fields if isinstance(fields, str) else json.dumps(fields)),
    st.sampled_from(["pullback-snapshot:", "pullback-nbd-server:", "pullback-restoring:", "pullback-"]),
    st.one_of(ANYTHING, st.lists(st.sampled_from(["a", "", "\ud800", None, "2026"]), max_size=6), st.just("[" * 900)),
)


@fuzz(60)
@given(data=st.data(), names=st.lists(NAMES | MARKS | st.sampled_from(["node-vda", "", "#block1"]), min_size=1))
def test_names_that_look_like_ours(data: st.DataObject, names: list[str]) -> None:
    """What stands in names is all that is known of snapshots and exports."""
    reply = copy.deepcopy(CAPTURED["frozen"])
    monitor = Anybody(reply)
    for name in names[:4]:
        command, place = data.draw(
            st.sampled_from([one for one in WHERE["frozen"] if one[1] and one[1][-1] in ("name", "node-name", "id")])
        )
        if command == "x-debug-query-block-graph":
            continue
        monitor.replies[command] = changed(monitor.replies[command], place, name, drop=False)
    outcome(monitor)


def test_a_graph_without_an_end_is_refused() -> None:
    graph = Anybody(CAPTURED["frozen"]).replies["x-debug-query-block-graph"]
    numbers = {node["name"]: node["id"] for node in graph["nodes"]}
    top = next(name for name in numbers if name.endswith("-0-filter"))
    edge = {"parent": numbers["node-vda"], "child": numbers[top], "name": "file", "perm": [], "shared-perm": []}
    said = outcome(spoiled("frozen", "x-debug-query-block-graph", ("edges",), [*graph["edges"], edge]))
    assert "a node is on itself" in said


def test_a_node_that_went_away_between_two_questions_is_told() -> None:
    nodes = Anybody(CAPTURED["idle"]).replies["query-named-block-nodes"]
    left = [node for node in nodes if node["node-name"] != "node-vda"]
    assert "vda is on the node node-vda, which is not listed" in outcome(
        spoiled("idle", "query-named-block-nodes", (), left)
    )


@fuzz(40)
@given(data=st.data(), schema=ANYTHING)
def test_a_schema_may_be_anything(data: st.DataObject, schema: Any) -> None:
    made = [
        {"name": "blockdev-backup", "meta-type": "command", "arg-type": "7"},
        {"name": "7", "meta-type": "object", "members": [{"name": "on-cbw-error"}]},
    ]
    monitor = Anybody(CAPTURED["idle"], features=None)
    monitor.replies["query-qmp-schema"] = made
    assert look(monitor).features
    monitor.features = None
    place = data.draw(st.sampled_from(list(places(made))))
    monitor.replies["query-qmp-schema"] = changed(made, place, schema, data.draw(st.booleans()))
    outcome(monitor)
