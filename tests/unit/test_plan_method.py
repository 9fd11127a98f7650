# SPDX-License-Identifier: Apache-2.0
"""How disks are frozen and what is refused: versions, I/O threads, features, daemons, and what stands there already."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from pullback.errors import Refused, UsageError
from pullback.model.facts import ON_CBW_ERROR, Facts, Job
from pullback.plan.method import Method, choose_method, on_unsafe_iothread, refuse_export
from tests.support.values import bitmap, device, disk, facts, mark, node

THREAD = "/objects/thread-vda"
Version = tuple[int, int, int]


def choice(wanted: Method | None = None, *, of: Facts | None = None, version: Version = (7, 2, 22), **more: Any) -> str:
    """The method for vda and vdb, of which vdb is as ``more`` says; or what was said instead."""
    try:
        return choose_method(of or facts(version=version), [disk("vda"), disk("vdb", **more)], wanted)
    except (Refused, UsageError) as error:
        return str(error)


def export_refused(version: Version, **more: Any) -> str:
    try:
        refuse_export(facts(version=version), [disk("vda"), disk("vdb", **more)])
    except Refused as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("wanted", "feature", "method"),
    [
        (None, False, "filter"),
        (None, True, "job"),
        ("filter", False, "filter"),
        ("filter", True, "filter"),
        ("job", False, "job"),
        ("job", True, "job"),
    ],
)
def test_jobs_are_chosen_where_they_cannot_make_the_domains_writes_fail(
    wanted: Method | None, feature: bool, method: str
):
    for version in ((7, 1, 0), (7, 2, 22), (10, 1, 0)):
        there = facts(version=version, features=[ON_CBW_ERROR] if feature else [])
        assert choice(wanted, of=there) == method, version


@pytest.mark.parametrize("wanted", [None, "filter", "job"])
@pytest.mark.parametrize(("version", "taken"), [((7, 0, 99), False), ((6, 2, 0), False), ((7, 1, 0), True)])
def test_old_qemu(wanted: Method | None, version: Version, taken: bool):
    said = choice(wanted, version=version)
    assert (f"QEMU {version[0]}.{version[1]}.{version[2]} of domain web is too old" in said) == (not taken)


def test_a_storage_daemon_has_jobs_only():
    stopped = facts(daemon=True)
    # Without devices there is nothing to swap and no I/O thread.
    for wanted in (None, "job"):
        assert choice(wanted, of=stopped, qdev="", device_type="") == "job"
    assert "no devices to put filters under" in choice("filter", of=stopped)


@pytest.mark.parametrize("feature", [True, False])
@pytest.mark.parametrize("iothread", ["", THREAD, None])
@pytest.mark.parametrize("version", [(7, 2, 22), (8, 2, 0), (8, 99, 99), (9, 0, 0), (10, 0, 13)])
def test_jobs_on_io_threads(version: Version, iothread: str | None, feature: bool):
    """A frozen view of a job's filter on an I/O thread aborts QEMU before 9.0; unknown counts as yes."""
    there = facts(version=version, features=[ON_CBW_ERROR] if feature else [])
    unsafe = version < (9, 0, 0) and iothread != ""
    assert on_unsafe_iothread(there, disk("vdb", iothread=iothread)) == unsafe
    said = choice("job", of=there, iothread=iothread)
    assert ("disk vdb of domain web is on an I/O thread" in said) == unsafe
    assert (said == "job") == (not unsafe)
    assert choice("filter", of=there, iothread=iothread) == "filter", "a filter is safe there: it may be pushed"


def test_nothing_to_put_a_filter_under():
    for version in ((7, 2, 22), (10, 0, 0)):
        said = choice(version=version, qdev="")
        assert "disk vdb of domain web belongs to a device that QEMU can put no filter under" in said
        assert "--method job" in said
        assert "no filter" in choice(version=version, qdev="/machine/peripheral/gone", device_type="")
        assert choice("job", version=version, qdev="") == "job"


# What stands there already


def frozen(*made_by: str) -> Facts:
    """vdb below our filters, the topmost first, each made by a "filter" or a "job"; vda bare."""
    nodes = [node("node-vda"), node("node-vdb")]
    jobs = []
    below = "node-vdb"
    for number, method in reversed(list(enumerate(made_by))):
        name = f"pb-s0000000{number}-0"
        scratch = mark("vdb", name=f"night{number}").bitmap_name()
        nodes.append(node(f"{name}-scratch", "file", bitmaps=(bitmap(scratch, persistent=False),)))
        children = {"file": below, "target": f"{name}-scratch"}
        nodes.append(node(f"{name}-filter", "copy-before-write", children=children))
        nodes.append(node(f"{name}-access", "snapshot-access", children={"file": f"{name}-filter"}))
        below = f"{name}-filter"
        if method == "job":
            jobs.append(Job(f"pullback-s0000000{number}-0", "backup", "running"))
    return facts([device("vda"), device("vdb", root=below)], nodes, jobs=jobs)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_no_filter_goes_over_a_job(depth: int):
    """Ending a job whose filter has another one's bitmaps aborts QEMU 7.2.22."""
    for stack in itertools.product(["filter", "job"], repeat=depth):
        there = frozen(*stack)
        said = choice(of=there)
        assert (said == "filter") == ("job" not in stack), stack
        assert choice("job", of=there) == "job"
        if "job" in stack:
            assert f"snapshot night{stack.index('job')} of domain web was frozen with a job" in said
            only = choose_method(there, [disk("vda")])
            assert only == "filter", "another disk of the domain does not matter"


def test_a_jobs_snapshot_whose_mark_is_gone_is_named_by_its_id():
    there = frozen("job")
    bare = {name: replace(one, bitmaps=()) for name, one in there.nodes.items()}
    assert "snapshot s00000000 of domain web was frozen with a job" in choice(of=replace(there, nodes=bare))


# Exports


@pytest.mark.parametrize("version", [(7, 2, 22), (8, 2, 0), (8, 99, 99)])
def test_a_disk_on_an_io_thread_is_not_exported_where_it_can_abort_qemu(version: Version):
    said = export_refused(version, iothread=THREAD)
    assert f"disk vdb of domain web runs on I/O thread {THREAD}" in said
    assert "pullback backup can back the disk up" in said
    assert "may run on an I/O thread" in export_refused(version, iothread=None)
    assert export_refused(version, iothread="") == ""


@pytest.mark.parametrize("version", [(9, 0, 0), (10, 0, 13)])
def test_from_9_0_on_it_is(version: Version):
    assert export_refused(version, iothread=THREAD) == export_refused(version, iothread=None) == ""
