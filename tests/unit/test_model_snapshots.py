# SPDX-License-Identifier: Apache-2.0
"""Snapshots and exports, read back from nothing but names."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.model.chain import NAME_MAX, read_chain
from pullback.model.facts import Export, Facts, Job, Node
from pullback.model.snapshots import (
    FROZEN_MARK,
    Names,
    ServerMark,
    SnapshotMark,
    UnfinishedMark,
    current_server,
    filter_stack,
    fits,
    foreign_exports,
    frozen_mark,
    is_mark,
    owner_of,
    read_exports,
    read_snapshots,
    server_mark,
    snapshot_mark,
    unfinished_marks,
)
from pullback.plan.freeze import mark_frozen
from tests.support.fake_qemu import FakeQemu
from tests.support.making import SERVER, TLS, export_disks, export_own_disks, freeze_parts, probe, push, snapshot
from tests.support.values import bitmap, device, facts, mark, node

PRIVATE, PUBLIC = "b00000001", "s00000002"
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def marked(*names: str, persistent: bool = False) -> Node:
    return node("n", "file", bitmaps=tuple(bitmap(name, persistent=persistent) for name in names))


# Marks


@given(texts, texts, texts, texts, st.none() | texts)
def test_a_snapshot_mark_of_any_names_comes_back(name: str, target: str, at: str, time: str, checkpoint: str | None):
    made = SnapshotMark(name, target, at, time, checkpoint)
    assert snapshot_mark(marked("theirs", made.bitmap_name())) == made
    assert is_mark(made.bitmap_name())
    assert server_mark(marked(made.bitmap_name())) is None


@given(texts, texts, st.none() | texts)
def test_a_server_mark_of_any_place_comes_back(kind: str, place: str, tls: str | None):
    made = ServerMark(kind, place, tls)
    assert server_mark(marked("theirs", made.bitmap_name())) == made
    assert snapshot_mark(marked(made.bitmap_name())) is None


HOSTILE = [
    "pullback-snapshot:",
    "pullback-snapshot:null",
    "pullback-snapshot:[]",
    'pullback-snapshot:["a","b","c","d"]',
    'pullback-snapshot:["a","b","c","d",5]',
    'pullback-snapshot:["a","b","c",null,null]',
    'pullback-snapshot:["a","b","c","d","e","f"]',
    'pullback-snapshot:{"0":"a","1":"b","2":"c","3":"d","4":"e"}',
    'pullback-snapshot:"abcde"',
    "pullback-snapshot:" + "[" * 100_000,
    "pullback-nbd-server:[1,2,3]",
    'pullback-nbd-server:["unix",null,null]',
    "pullback-nbd-server:NaN",
    'pullback-nbd-server:["unix","/s",',
]
prefixes = st.sampled_from(["", "pullback-", "pullback-snapshot:", "pullback-nbd-server:"])


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_that_only_look_like_marks_are_none(name: str):
    assert snapshot_mark(marked(name)) is None
    assert server_mark(marked(name)) is None


@given(prefixes, st.text() | st.recursive(st.none() | st.text(), st.lists).map(repr))
def test_no_name_of_a_bitmap_is_an_error(prefix: str, rest: str):
    seen = marked(prefix + rest)
    snapshot_mark(seen)
    server_mark(seen)
    read_snapshots(facts([device()], [replace(seen, name=f"pb-{PUBLIC}-0-scratch"), node("node-vda")]))


@pytest.mark.parametrize("made", [mark(), SERVER], ids=["snapshot", "server"])
def test_a_mark_that_an_image_brought_along_is_none(made: SnapshotMark | ServerMark):
    """Whoever made the image chose the name; marks of ours are never stored in one."""
    seen = marked(made.bitmap_name(), persistent=True)
    assert snapshot_mark(seen) is None
    assert server_mark(seen) is None
    assert current_server(facts(nodes=[node("node-vda", bitmaps=seen.bitmaps)])) is None


@pytest.mark.parametrize("made", [mark(), SERVER], ids=["snapshot", "server"])
def test_bitmaps_of_the_image_hide_no_mark(made: SnapshotMark | ServerMark):
    own = bitmap("pullback-A", recording=True)
    seen = node("n", bitmaps=(own, bitmap(made.bitmap_name(), persistent=False)))
    assert (snapshot_mark(seen) or server_mark(seen)) == made


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (
            SnapshotMark("nächtlich", "vda", "node-vda", "2026-05-04", None),
            'pullback-snapshot:["nächtlich","vda","node-vda","2026-05-04",null]',
        ),
        (ServerMark("unix", "/run/ü", "/etc/tls"), 'pullback-nbd-server:["unix","/run/ü","/etc/tls"]'),
        (UnfinishedMark("aaaa", "bbbb"), 'pullback-restoring:["aaaa","bbbb"]'),
    ],
    ids=["snapshot", "server", "restoring"],
)
def test_the_name_of_a_mark_stays_what_it_was(made: SnapshotMark | ServerMark | UnfinishedMark, name: str):
    """A mark is removed by the name it is read to have had, and one in an image may be another pullback's."""
    assert made.bitmap_name() == name


def test_frozen_is_what_every_scratch_says_and_no_image():
    qemu = FakeQemu("vda", "vdb")
    qemu.run(snapshot(qemu.facts(), PUBLIC))

    def frozen() -> bool:
        return read_snapshots(qemu.facts())[0].frozen

    assert not frozen()
    parts = freeze_parts(qemu.facts(), PUBLIC, (), "/var/tmp", "", None)
    qemu.run(mark_frozen(parts), upto=1)
    assert not frozen()
    qemu.run(mark_frozen(parts[1:]))
    assert frozen()
    assert is_mark(FROZEN_MARK)
    assert frozen_mark(marked(FROZEN_MARK))
    assert not frozen_mark(marked(FROZEN_MARK, persistent=True))
    assert read_chain(marked(FROZEN_MARK).bitmaps).broken == ()


def test_marks_are_no_edges_of_a_chain():
    assert read_chain(marked(mark().bitmap_name(), SERVER.bitmap_name()).bitmaps).broken == ()


def test_a_mark_has_to_fit_into_a_bitmaps_name():
    room = NAME_MAX - len(mark(name="").bitmap_name().encode())
    for letter, size in (("x", 1), ("ö", 2), ("\N{PILE OF POO}", 4)):
        assert fits(mark(name=letter * (room // size)))
        assert not fits(mark(name=letter * (room // size + 1)))


# Snapshots


def whole_ids(seen: Facts) -> set[str]:
    return {state.id for state in read_snapshots(seen) if state.whole}


@pytest.mark.parametrize("method", ["filter", "job"])
def test_a_whole_snapshot(method: str):
    qemu = FakeQemu("vda", "vdb")
    how = "job" if method == "job" else "filter"
    qemu.run(snapshot(qemu.facts(), PUBLIC, checkpoint="A", name='nächtlich "1"', method=how))
    (state,) = read_snapshots(qemu.facts())
    assert (state.id, state.name, state.checkpoint, state.private, state.whole) == (
        *(PUBLIC, 'nächtlich "1"', "A"),
        *(False, True),
    )
    assert [part.target for part in state.parts] == ["vda", "vdb"]
    assert [part.names for part in state.parts] == [Names(PUBLIC, 0), Names(PUBLIC, 1)]
    assert [part.job is not None for part in state.parts] == [method == "job"] * 2
    views = [part.best_view.name for part in state.parts if part.best_view is not None]
    assert views == [f"pb-{PUBLIC}-{number}-view" for number in (0, 1)]


def test_before_8_0_a_public_view_is_one_that_can_be_believed():
    qemu = FakeQemu("vda")
    qemu.run(snapshot(qemu.facts(), PUBLIC, view=False))
    qemu.run(snapshot(qemu.facts(), PRIVATE, view=False))
    assert whole_ids(qemu.facts()) == {PRIVATE}
    assert whole_ids(replace(qemu.facts(), version=(8, 0, 0))) == {PRIVATE, PUBLIC}


@pytest.mark.parametrize("method", ["filter", "job"])
def test_half_made_at_every_step(method: str):
    for snapshot_id in (PRIVATE, PUBLIC):
        plan = snapshot(FakeQemu("vda", "vdb").facts(), snapshot_id, method="job" if method == "job" else "filter")
        steps = len(list(plan.commands()))
        for upto in range(2, steps):
            qemu = FakeQemu("vda", "vdb")
            qemu.run(plan, upto=upto)
            (state,) = read_snapshots(qemu.facts())
            # Of parts that left nothing nobody can know; the marks come before anything is frozen.
            assert not state.whole, upto
            assert state.id == snapshot_id


def test_one_without_its_mark_is_not_whole_but_has_a_name():
    qemu = FakeQemu("vda")
    qemu.run(snapshot(qemu.facts(), PUBLIC))
    qemu.nodes[f"pb-{PUBLIC}-0-scratch"].bitmaps.clear()
    (state,) = read_snapshots(qemu.facts())
    assert (state.whole, state.name, state.time, state.checkpoint) == (False, PUBLIC, "", None)
    assert state.parts[0].target == "disk 0"


def test_one_that_was_given_up_below_another_is_not_whole():
    qemu = FakeQemu("vda")
    for snapshot_id in (PUBLIC, "s00000003"):
        qemu.run(snapshot(qemu.facts(), snapshot_id))
    del qemu.nodes[f"pb-{PUBLIC}-0-access"]
    assert whole_ids(qemu.facts()) == {"s00000003"}


def test_a_view_whose_job_somebody_ended_is_not_frozen():
    """QEMU puts the view on the disk itself then: it reads as the disk does now (seen on 7.2.22)."""
    qemu = FakeQemu("vda")
    qemu.run(snapshot(qemu.facts(), PUBLIC, method="job"))
    assert whole_ids(qemu.facts()) == {PUBLIC}
    qemu.end_job(f"pullback-{PUBLIC}-0")
    assert qemu.nodes[f"pb-{PUBLIC}-0-access"].children == {"file": "node-vda"}
    assert whole_ids(qemu.facts()) == set()


def test_a_stopped_domains_is_the_same():
    qemu = FakeQemu("vda", daemon=True)
    qemu.run(snapshot(qemu.facts(), PUBLIC, method="job"))
    assert whole_ids(qemu.facts()) == {PUBLIC}
    assert filter_stack(qemu.facts(), qemu.facts().devices[0]) == []


def test_a_job_alone_is_still_a_part():
    """Its nodes may have gone; whoever cleans up has to end it."""
    job = Job(f"pullback-{PUBLIC}-0", "backup", "concluded")
    (state,) = read_snapshots(facts([device()], [node("node-vda")], jobs=[job]))
    (part,) = state.parts
    assert (part.names, part.job, part.mark, state.whole) == (Names(PUBLIC, 0), job, None, False)


def test_a_filter_on_nothing_is_none_and_hides_no_other():
    """There is nothing to put back in its place: QEMU leaves such a one with a job that has concluded."""
    bare = node(f"pb-{PUBLIC}-0-filter", "copy-before-write")
    assert read_snapshots(facts([device()], [node("node-vda"), bare])) == ()
    scratch = node(f"pb-{PRIVATE}-0-scratch", "file")
    (state,) = read_snapshots(facts([device()], [node("node-vda"), bare, scratch]))
    assert (state.id, state.parts[0].scratch) == (PRIVATE, scratch)


def test_names_of_others_mean_nothing():
    nodes = ["pb-x", "pb-s0000002-0-filter", "pb-s00000002-0-other", "pb-s00000002-x-filter", "xpb-s00000002-0-filter"]
    jobs = ["backup", "pullback-s00000002", "pullback-s00000002-0-create-x", "pullback-S00000002-0"]
    seen = facts(
        [device()],
        [node("node-vda"), *(node(name) for name in nodes)],
        jobs=[Job(name, "backup", "running") for name in jobs],
        exports=[Export("theirs", "node-vda", "nbd"), Export("pullback-s00000002-0-xyz", "node-vda", "nbd")],
    )
    assert read_snapshots(seen) == ()
    assert read_exports(seen) == ()
    assert [export.id for export in foreign_exports(seen)] == ["theirs", "pullback-s00000002-0-xyz"]


def test_they_come_oldest_first():
    nodes = [node("node-vda")]
    for snapshot_id, time in (("s00000001", "2026-05-04T03"), ("s00000002", "2026-05-03T03"), ("s00000003", "")):
        made = replace(mark(), time=time).bitmap_name() if time else "none"
        nodes.append(node(f"pb-{snapshot_id}-0-scratch", "file", bitmaps=(bitmap(made, persistent=False),)))
    order = [state.id for state in read_snapshots(facts([device()], nodes))]
    assert order == ["s00000003", "s00000002", "s00000001"]


def test_filters_of_a_device_topmost_first():
    qemu = FakeQemu("vda", "vdb")
    for snapshot_id in ("b00000001", "b00000002"):
        qemu.run(snapshot(qemu.facts(), snapshot_id, ["vda"]))
    qemu.run(snapshot(qemu.facts(), "b00000003", ["vda"], method="job"))
    vda, vdb = qemu.facts().devices
    stack = [part.names.snapshot for part in filter_stack(qemu.facts(), vda)]
    assert stack == ["b00000002", "b00000001", "b00000003"], "the job's is right above the disk"
    assert filter_stack(qemu.facts(), vdb) == []


# Exports


@given(texts, st.lists(texts, max_size=4))
def test_an_export_of_any_name_comes_back(name: str, points: list[str]):
    made = Names(PUBLIC, 7).export(name, points)
    (state,) = read_exports(facts(exports=[Export(made, "node-vda", "nbd")]))
    assert (state.id, state.snapshot, state.number, state.name) == (made, PUBLIC, 7, name)
    assert state.checkpoints == tuple(points)
    assert owner_of(made) == PUBLIC


def test_exports_of_others_hide_none_of_ours():
    ids = ["theirs", f"pullback-{PUBLIC}-0-create", f"pullback-{PUBLIC}-0", Names(PUBLIC, 0).export("vda")]
    found = read_exports(facts(exports=[Export(one, "node-vda", "nbd") for one in ids]))
    assert [one.name for one in found] == ["vda"]


@pytest.mark.parametrize("tail", ["x7", "xff", "x", "xc3"])
def test_an_id_that_is_no_name_is_still_ours(tail: str):
    (state,) = read_exports(facts(exports=[Export(f"pullback-{PUBLIC}-0-{tail}", "gone", "nbd")]))
    assert state.snapshot == PUBLIC
    assert (state.server, state.checkpoints) == (None, ())


def test_exports_tell_where_and_since_when():
    qemu = FakeQemu("vda", "vdb")
    qemu.run(snapshot(qemu.facts(), PUBLIC, checkpoint="A"))
    qemu.run(snapshot(qemu.facts(), PRIVATE, checkpoint="B"))
    qemu.run(export_disks(qemu.facts(), PRIVATE, TLS, points=["A", "B"]))
    qemu.run(export_disks(qemu.facts(), PUBLIC, TLS, role="view", suffix="-2", start_server=False))
    found = {(one.snapshot, one.name): one for one in read_exports(qemu.facts())}
    assert set(found) == {(PRIVATE, "vda"), (PRIVATE, "vdb"), (PUBLIC, "vda-2"), (PUBLIC, "vdb-2")}
    assert all(one.server == TLS for one in found.values())
    assert found[PRIVATE, "vda"].checkpoints == ("A", "B")
    assert found[PUBLIC, "vda-2"].checkpoints == ()
    assert found[PUBLIC, "vda-2"].node == f"pb-{PUBLIC}-0-view"


def test_exports_of_one_view_tell_each_its_own_changes():
    qemu = FakeQemu("vda")
    qemu.run(snapshot(qemu.facts(), PUBLIC, checkpoint="A"))
    for number, points in enumerate((["A"], [], ["B"])):
        if points == ["B"]:
            qemu.run(snapshot(qemu.facts(), PRIVATE, checkpoint="B"))
        more = {"role": "view", "suffix": str(number), "start_server": number == 0}
        qemu.run(export_disks(qemu.facts(), PUBLIC, points=points, **more))
    assert {one.name: one.checkpoints for one in read_exports(qemu.facts())} == {
        "vda0": ("A",),
        "vda1": (),
        "vda2": ("B",),
    }


def test_exports_of_own_disks_belong_to_no_snapshot():
    qemu = FakeQemu("vda", daemon=True)
    qemu.run(export_own_disks(qemu.facts(), "w00000001"))
    (state,) = read_exports(qemu.facts())
    assert (state.name, state.checkpoints, state.server) == ("own-vda", (), SERVER)
    assert read_snapshots(qemu.facts()) == ()
    assert foreign_exports(qemu.facts()) == ()


@pytest.mark.parametrize("kind", ["nbd", "vhost-user-blk", "fuse"])
def test_only_nbd_exports_of_others_use_the_server(kind: str):
    seen = facts(exports=[Export("theirs", "node-vda", kind)])
    assert bool(foreign_exports(seen)) == (kind == "nbd")


def test_readers_belong_to_their_part():
    qemu = FakeQemu("vda")
    qemu.run(snapshot(qemu.facts(), PUBLIC))
    qemu.run(push(qemu.facts(), PUBLIC, view="view") + probe(qemu.facts(), PUBLIC))
    ((part,),) = [state.parts for state in read_snapshots(qemu.facts())]
    roles = [reader.name.rsplit("-", 1)[1] for reader in part.readers]
    assert roles == ["target", "probe", "view", "align", "deny", "void"]
    assert {owner_of(name) for name in qemu.jobs} == {PUBLIC}
    assert part.job is None, "jobs that read are not the one that freezes"


@pytest.mark.parametrize("spelt", ['["repo", "backup"]', '["repo","b\\u0061ckup"]', ' ["repo","backup"]'])
def test_only_the_spelling_that_we_give_is_a_mark_of_ours(spelt: str):
    """Who takes a mark away names it as we do: one spelt otherwise would stay for good, or let the removal fail."""
    ours = UnfinishedMark("repo", "backup")
    brought = bitmap(ours.bitmap_name().replace('["repo","backup"]', spelt), persistent=True)
    assert brought.name != ours.bitmap_name()
    assert unfinished_marks([brought]) == ()
    assert unfinished_marks([brought, bitmap(ours.bitmap_name(), persistent=True)]) == (ours,)
