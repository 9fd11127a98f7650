# SPDX-License-Identifier: Apache-2.0
"""Checkpoints through the commands: listed, sized, deleted anywhere, on two disks whose chains differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lab.qemu import BareQemu
from tests.support.api import BLOCK, Api, dirty_map, scribble, state_of
from tests.support.product import MIB, Stage, chain

Start = Callable[..., BareQemu]
SIZE = 4 * MIB
POINTS = ("A", "B", "C", "D")
# vdb joins at B.
WRITTEN = {"A": {1, 2}, "B": {2, 3, 4}, "C": {10}, "D": {11, 1}}


@pytest.fixture
def api(lab_dir: Path, bare_qemu: Start) -> Api:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", SIZE), stage.disk("vdb", SIZE)], running=True)
    return Api(stage, qemu)


def _checkpoint(api: Api, name: str, *words: str) -> None:
    api.snapshot("s", "--checkpoint", name, *words)
    api.do("snapshot", "delete", "s")


def _since(point: str) -> set[int]:
    return set().union(*(WRITTEN[one] for one in POINTS[POINTS.index(point) :]))


def _changes(api: Api) -> dict[tuple[str, str], set[int]]:
    """Since each checkpoint, on each disk that has it, up to now: as a snapshot's exports show it."""
    points = api.do("checkpoint", "list")["checkpoints"]
    made = {}
    api.snapshot("now", "--checkpoint", "now")
    for point in points:
        for disk in point["changed"]:
            name = f"{disk}-{point['name']}"
            words = ("-d", disk, "--since", point["name"], "--export-name", f"{disk}={name}")
            made[disk, point["name"]] = dirty_map(api.export("now", *words)[name], point["name"])
    api.do("snapshot", "delete", "now")
    api.do("checkpoint", "delete", "now")
    return made


@pytest.mark.parametrize("gone", POINTS)
def test_deleted_anywhere_the_others_stay_exact(api: Api, gone: str) -> None:
    for point in POINTS:
        _checkpoint(api, point, *(("-d", "vda") if point == "A" else ()))
        for disk in ("vda", "vdb"):
            scribble(api.qemu, disk, WRITTEN[point])
    before = _changes(api)
    assert before["vda", "A"] == _since("A") and before["vdb", "B"] == _since("B") and ("vdb", "A") not in before
    done = api.attempt("checkpoint", "delete", gone, "--trace")
    assert done.code == 0
    sent = [line for line in done.err.splitlines() if line.startswith("  -> ") and "query-" not in line]
    changing = [line for line in sent if '"qom-get"' not in line]
    assert len(changing) == 1 and '"transaction"' in changing[0]
    after = _changes(api)
    assert after == {key: blocks for key, blocks in before.items() if key[1] != gone}
    assert api.clean() == []
    assert sum(chain(api.qemu, "vda").values()) == sum(chain(api.qemu, "vdb").values()) == 1


def test_the_only_one_and_sizes(api: Api) -> None:
    assert api.do("checkpoint", "list")["checkpoints"] == []
    api.refused(2, "there is no checkpoint other. There is none", "checkpoint", "size", "other")
    _checkpoint(api, "only")
    scribble(api.qemu, "vda", {1, 3})
    assert api.do("checkpoint", "list")["checkpoints"] == [{"name": "only", "changed": {"vda": 2 * BLOCK, "vdb": 0}}]
    sizes = api.do("checkpoint", "size", "only")["disks"]
    assert [(one["target"], one["most"], one["unknown"]) for one in sizes] == [("vda", 2 * BLOCK, ""), ("vdb", 0, "")]
    api.refused(2, "there is no checkpoint other. There is only", "checkpoint", "size", "other")
    api.refused(2, "there is no checkpoint other", "checkpoint", "delete", "other")
    api.do("checkpoint", "delete", "only")
    assert chain(api.qemu, "vda") == chain(api.qemu, "vdb") == {}


def test_names(api: Api) -> None:
    _checkpoint(api, "a" * 400)
    _checkpoint(api, "2026-05-04T03:02:01+00:00_@.")
    before = state_of(api.qemu)
    for name in ("a" * 401, "a^b", " a", "a b", "é", "-a", "", 'a"', "a\n", "a\udcff"):
        done = api.attempt("snapshot", "create", "s", f"--checkpoint={name}")
        assert done.code == 2, (name, done.err)
        done = api.attempt("snapshot", "create", "--", name)
        assert done.code == (0 if name in ("", "a" * 401) and done.code == 0 else 2), (name, done.err)
        for one in api.do("snapshot", "list")["snapshots"]:
            api.do("snapshot", "delete", one["id"])
    api.refused(2, "there is a checkpoint", "snapshot", "create", "s", "--checkpoint", "a" * 400)
    assert state_of(api.qemu) == before


def test_a_backup_leaves_the_user_s_checkpoints(api: Api) -> None:
    for point in ("mine", "also"):
        _checkpoint(api, point)
    for _ in range(4):
        api.stage.backup(api.qemu, keep_checkpoints=1)
    names = [one["name"] for one in api.do("checkpoint", "list")["checkpoints"]]
    assert names[:2] == ["mine", "also"] and len(names) == 3
