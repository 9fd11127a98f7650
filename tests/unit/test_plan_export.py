# SPDX-License-Identifier: Apache-2.0
"""Exports: QEMU's one NBD server, changes since checkpoints, marks, and taking all of it back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pullback.errors import DomainBusy, Refused
from pullback.model.facts import Export, Facts
from pullback.model.snapshots import SAVED_MAP, Names, ServerMark, server_mark
from pullback.plan.cleanup import stop_exports
from pullback.plan.command import ExportDeleted, Plan, Step
from pullback.plan.export import (
    TLS_OBJECT,
    ExportPart,
    delete_export,
    disown_server,
    idle_server,
    need_server,
    saved_name,
    saved_part,
    start_export,
    stop_server,
)
from tests.support.fake_qemu import FakeQemu, QemuError
from tests.support.making import SERVER, TLS, export_disks, export_own_disks, export_parts, since, snapshot
from tests.support.values import bitmap, disk, facts, node

PUBLIC = "s00000001"
ELSEWHERE = ServerMark("unix", "/run/elsewhere")


def part(*points: str, target: str = "vda", name: str = "") -> ExportPart:
    names = Names(PUBLIC, 0)
    changes = since(disk(target, ["A", "B", "C"]), *points)
    return ExportPart(names, target, names.node("access"), f"node-{target}", name or target, changes)


def steps(*parts: ExportPart, server: ServerMark = SERVER, seen: Facts | None = None, **more: bool) -> list[Step]:
    given = {"start_server": True, "writable": False} | more
    return list(start_export(seen or facts(), parts, server, **given).commands())


def arguments(made: list[Step], command: str) -> list[Any]:
    return [step.arguments for step in made if step.execute == command]


# The server


def test_one_server_for_all_disks_and_the_marks_before_it():
    other = replace(part(), names=Names(PUBLIC, 1), node=f"pb-{PUBLIC}-1-access", target="vdb", name="vdb")
    made = steps(part(), other, writable=True)
    assert [step.execute for step in made] == [
        "block-dirty-bitmap-add",
        "block-dirty-bitmap-add",
        "nbd-server-start",
        "block-export-add",
        "block-export-add",
    ]
    assert [one["name"] for one in arguments(made, "block-dirty-bitmap-add")] == [SERVER.bitmap_name()] * 2
    assert all(one["disabled"] and not one["persistent"] for one in arguments(made, "block-dirty-bitmap-add"))
    assert all(one["writable"] for one in arguments(made, "block-export-add"))


@pytest.mark.parametrize(
    ("place", "host", "port"),
    [("127.0.0.1:10809", "127.0.0.1", "10809"), ("::1:10809", "::1", "10809"), ("example.org:1", "example.org", "1")],
)
def test_a_server_on_tcp_with_tls(place: str, host: str, port: str):
    made = steps(part(), server=ServerMark("inet", place, "/etc/pullback/tls"))
    assert [step.execute for step in made[1:3]] == ["object-add", "nbd-server-start"]
    assert made[1].arguments == {
        "qom-type": "tls-creds-x509",
        "id": TLS_OBJECT,
        "dir": "/etc/pullback/tls",
        "endpoint": "server",
    }
    assert made[2].arguments == {
        "addr": {"type": "inet", "data": {"host": host, "port": port}},
        "tls-creds": TLS_OBJECT,
    }


def test_a_server_without_tls_needs_no_certificates():
    made = steps(part())
    assert "object-add" not in [step.execute for step in made]
    assert arguments(made, "nbd-server-start") == [{"addr": {"type": "unix", "data": {"path": SERVER.place}}}]


def test_a_server_that_runs_is_not_started():
    assert not arguments(steps(part(), start_server=False), "nbd-server-start")
    assert not arguments(steps(part(), server=TLS, start_server=False), "object-add")


def served(server: ServerMark = SERVER) -> FakeQemu:
    qemu = FakeQemu("vda", "vdb")
    qemu.run(snapshot(qemu.facts(), PUBLIC))
    qemu.run(export_disks(qemu.facts(), PUBLIC, server, ["vda"]))
    return qemu


def with_theirs(seen: Facts, kind: str = "nbd") -> Facts:
    return replace(seen, exports=(*seen.exports, Export("theirs", "node-vda", kind)))


def seen_with_scratch(*names: str, version: tuple[int, int, int] = (7, 2, 22)) -> Facts:
    """A snapshot whose scratch has these bitmaps."""
    scratch = node(f"pb-{PUBLIC}-0-scratch", "file", bitmaps=tuple(bitmap(name, persistent=False) for name in names))
    return facts(nodes=[node("node-vda"), scratch], version=version)


def test_the_scratch_is_offered_beside_the_frozen_view():
    beside = saved_part(seen_with_scratch(SAVED_MAP), part("A", name="n"), writable=True)
    assert (beside.names, beside.target, beside.disk_node) == (Names(PUBLIC, 0), "vda", "node-vda")
    assert (beside.node, beside.name) == (f"pb-{PUBLIC}-0-scratch", saved_name("n"))
    assert (beside.since, beside.maps) == ((), (SAVED_MAP,))
    (add,) = arguments(steps(beside, writable=True), "block-export-add")
    assert (add["node-name"], add["name"], add["bitmaps"]) == (beside.node, "n/saved", [SAVED_MAP])


def test_the_map_of_what_is_saved_is_shown_where_there_is_one():
    assert saved_part(facts(), part(), writable=True).maps == (SAVED_MAP,), "planned only"
    assert saved_part(seen_with_scratch("other"), part(), writable=True).maps == ()
    assert saved_part(seen_with_scratch(SAVED_MAP), part(), writable=False).maps == ()
    for version in ((8, 0, 0), (10, 0, 0)):
        assert saved_part(seen_with_scratch(SAVED_MAP, version=version), part(), writable=True).maps == ()
    assert saved_part(seen_with_scratch(SAVED_MAP, version=(7, 2, 99)), part(), writable=True).maps == (SAVED_MAP,)


def test_a_server_is_needed_where_none_runs():
    assert need_server(facts(), SERVER)
    assert need_server(with_theirs(facts(), "vhost-user-blk"), SERVER)


def test_ours_is_shared_at_its_place_only():
    for there in (SERVER, TLS):
        seen = served(there).facts()
        assert not need_server(seen, there)
        for other in {SERVER, TLS, ELSEWHERE, replace(TLS, tls=None), replace(SERVER, tls="/d")} - {there}:
            with pytest.raises(Refused, match=f"listens at .*{there.place[-6:]} already"):
                need_server(seen, other)


def test_theirs_is_left_alone():
    for seen in (with_theirs(facts()), with_theirs(served().facts())):
        with pytest.raises(DomainBusy, match="another program exports disks"):
            need_server(seen, SERVER)


def test_a_server_that_nobody_is_served_by_is_begun_anew():
    """Whoever started it died before its first export; perhaps before the server itself."""
    for upto in range(6):
        qemu = FakeQemu("vda")
        qemu.run(snapshot(qemu.facts(), PUBLIC))
        plan = export_disks(qemu.facts(), PUBLIC, TLS)
        assert len(list(plan.commands())) == 4
        qemu.run(plan, upto=min(upto, 4))
        assert idle_server(qemu.facts()) == (upto in (1, 2, 3))
        if idle_server(qemu.facts()):
            assert need_server(qemu.facts(), SERVER)
            qemu.run(stop_exports(qemu.facts(), ()))
            assert (qemu.server, qemu.objects) == (False, set())
            qemu.run(export_disks(qemu.facts(), PUBLIC, SERVER))


def test_marks_and_certificates_go_when_the_server_is_not_ours():
    for server in (SERVER, TLS):
        qemu = FakeQemu("vda", "vdb")
        qemu.run(snapshot(qemu.facts(), PUBLIC))
        before = qemu.graph()
        qemu.server = True
        with pytest.raises(QemuError, match="already running"):
            qemu.run(export_disks(qemu.facts(), PUBLIC, server))
        qemu.run(disown_server(export_parts(qemu.facts(), PUBLIC), server))
        assert qemu.server
        qemu.server = False
        assert qemu.graph() == before


def test_taking_back_what_never_came_is_no_failure():
    for server in (SERVER, TLS):
        for plan in (disown_server([part()], server), Plan(tuple(stop_server(server)))):
            assert all(step.optional for step in plan.commands())
    assert [step.execute for step in stop_server(TLS)] == ["nbd-server-stop", "object-del"]
    assert [step.execute for step in stop_server(SERVER)] == ["nbd-server-stop"]
    assert [step.execute for step in stop_server(None)] == ["nbd-server-stop"]


# Changes


def gathered(made: list[Step]) -> dict[str, list[str]]:
    """The edges that are merged, by the map that they are merged into; map and merge in one transaction."""
    found = {}
    for step in made:
        if step.execute == "transaction":
            add, merge = step.arguments["actions"]
            assert add["type"] == "block-dirty-bitmap-add"
            assert (add["data"]["disabled"], add["data"]["persistent"]) == (True, False)
            assert merge["type"] == "block-dirty-bitmap-merge"
            assert add["data"]["node"] == merge["data"]["node"] == f"pb-{PUBLIC}-0-access"
            assert {one["node"] for one in merge["data"]["bitmaps"]} == {"node-vda"}
            assert add["data"]["name"] == merge["data"]["target"]
            found[add["data"]["name"]] = [one["name"] for one in merge["data"]["bitmaps"]]
    return found


def test_changes_are_gathered_on_the_view_from_the_disks_own_edges():
    made = steps(part("A", "C"))
    assert gathered(made) == {
        "A": ["pullback-A", "pullback-B^A", "pullback-C^B"],
        "C": ["pullback-C^B"],
    }
    assert arguments(made, "block-export-add") == [
        {
            "id": f"pullback-{PUBLIC}-0-x766461-c41-c43",
            "type": "nbd",
            "node-name": f"pb-{PUBLIC}-0-access",
            "name": "vda",
            "writable": False,
            "bitmaps": ["A", "C"],
        }
    ]


def test_an_export_without_since_has_no_contexts():
    (added,) = arguments(steps(part()), "block-export-add")
    assert added["bitmaps"] == []
    assert gathered(steps(part())) == {}


def test_the_same_changes_are_gathered_once_for_each_view():
    qemu = FakeQemu("vda")
    qemu.run(snapshot(qemu.facts(), "b00000009", checkpoint="A"))
    qemu.write("vda", 3)
    qemu.run(snapshot(qemu.facts(), PUBLIC, checkpoint="B"))
    view = f"pb-{PUBLIC}-0-view"
    for number, points in enumerate((["A"], ["A", "B"], ["B", "A"])):
        plan = export_disks(
            qemu.facts(), PUBLIC, points=points, role="view", suffix=str(number), start_server=not qemu.server
        )
        maps = [step for step in plan.commands() if step.execute == "transaction"]
        assert len(maps) == (1, 1, 0)[number]
        qemu.run(plan)
        assert next(iter(qemu.exports.values())).bitmaps == tuple(points)
        assert qemu.nodes[view].bitmaps["A"].blocks == {3}
        assert number == 0 or qemu.nodes[view].bitmaps["B"].blocks == set()
        marks = [name for name in qemu.nodes[view].bitmaps if name.startswith("pullback-nbd-server:")]
        assert marks == [SERVER.bitmap_name()], "one, however often"
        qemu.run(stop_exports(qemu.facts(), set(qemu.exports)))
        assert server_mark(qemu.facts().nodes[view]) is None


@pytest.mark.parametrize("name", ["vda", "vda/saved", "größer", "a b", "x" * 300])
def test_export_ids_are_words_that_qemu_takes(name: str):
    """id_wellformed(): a letter, then letters, digits, - . _"""
    made = part(name=name)
    assert made.id.startswith("pullback-")
    assert all(letter.isascii() and (letter.isalnum() or letter in "-._") for letter in made.id)
    assert arguments(steps(made), "block-export-add")[0]["name"] == name


# Own disks


def test_a_running_domains_own_disk_is_not_given_to_a_second_writer():
    qemu = FakeQemu("vda")
    before = qemu.graph()
    with pytest.raises(QemuError, match="written to by the domain"):
        qemu.run(export_own_disks(qemu.facts(), "w00000001"))
    qemu.run(stop_exports(qemu.facts(), {Names("w00000001", 0).export("own-vda")}))
    assert qemu.graph() == before


def test_ending_an_export_waits_for_it_whoever_is_connected():
    step = delete_export("pullback-x")
    assert step.arguments == {"id": "pullback-x", "mode": "hard"}
    assert step.wait == ExportDeleted("pullback-x")
