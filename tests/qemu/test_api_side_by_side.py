# SPDX-License-Identifier: Apache-2.0
"""Several snapshots of the same disks at different instants, side by side: each is right, whichever goes first."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.qemu import BareQemu
from tests.support.api import (
    BLOCK,
    Api,
    by_everybody,
    by_nbdcopy,
    contexts,
    dirty_map,
    scribble,
    some_blocks,
)
from tests.support.product import MIB, Stage, chain, references

Start = Callable[..., BareQemu]
SIZE = 4 * MIB
ODD = 3 * MIB + 5 * 512
DISKS = {"vda": SIZE, "vdb": ODD}


def _churn(qemu: BareQemu, seed: int, discards: bool = True) -> dict[str, set[int]]:
    """Change some blocks of each disk, by writes, writes of zero and discards; which ones.

    A job's own filter takes no option that would pass the domain's discards on: with it nothing of them changes.
    """
    changed = {}
    for number, (disk, size) in enumerate(DISKS.items()):
        written = scribble(qemu, disk, some_blocks(size, 9, seed * 10 + number))
        zeroed, discarded = some_blocks(size, 1, seed * 10 + 5 + number), some_blocks(size, 1, seed * 10 + 7 + number)
        for block in zeroed:
            qemu.device_zero(disk, block * BLOCK, BLOCK // 2, unmap=bool(seed % 2))
        for block in discarded - written - zeroed:
            qemu.device_discard(disk, block * BLOCK, BLOCK)
        changed[disk] = written | zeroed | (discarded if discards else set())
    return changed


@pytest.mark.parametrize("method", ["filter", "job"])
def test_three_instants_deleted_in_any_order(lab_dir: Path, bare_qemu: Start, method: str) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk(disk, size) for disk, size in DISKS.items()], running=True)
    api = Api(stage, qemu)
    for disk in DISKS:
        qemu.device_write(disk, 0, DISKS[disk], 0x11)

    # A job leaves from anywhere: half of the orders will do.
    orders = list(itertools.permutations(range(3)))[:: 1 if method == "filter" else 2]
    for turn, order in enumerate(orders):
        names = [f"s{turn}{letter}" for letter in "abc"]
        states: list[dict[str, bytes]] = []
        steps: list[dict[str, set[int]]] = []
        for number, name in enumerate(names):
            states.append(references(qemu))
            made = api.snapshot(name, "--checkpoint", name, "--method", method)
            assert made["checkpoint"] == name
            assert (made["paused_ms"] == 0) == (method == "job")
            steps.append(_churn(qemu, turn * 3 + number, method == "filter"))

        # A by itself, B since A, C since A and since B: every edge and its sums.
        since: dict[int, list[int]] = {0: [], 1: [0], 2: [0, 1]}
        uris = {}
        for number, name in enumerate(names):
            more = [word for disk in DISKS for word in ("--export-name", f"{disk}={name}-{disk}")]
            more += [word for one in since[number] for word in ("--since", names[one])]
            uris[number] = api.export(name, *more)
        for number, name in enumerate(names):
            for disk in DISKS:
                uri = uris[number][f"{name}-{disk}"]
                read = by_everybody(uri, lab_dir) if turn == 0 else by_nbdcopy(uri)
                assert read == states[number][disk], (name, disk)
                assert contexts(uri) == {names[one] for one in since[number]}
                for one in since[number]:
                    expected = set().union(*(steps[step][disk] for step in range(one, number)))
                    assert dirty_map(uri, names[one]) == expected, (name, disk, names[one])

        left = set(range(3))
        for gone in order:
            api.do("snapshot", "delete", names[gone])
            left.remove(gone)
            if turn == 2:
                # What has to wait below a live snapshot is nothing that a user could clear.
                assert api.show()["left_over"] == []
                assert api.do("recover", "")["cleared"] == []
            _churn(qemu, 1000 + turn * 3 + gone)
            for number in left:
                for disk in DISKS:
                    assert by_nbdcopy(uris[number][f"{names[number]}-{disk}"]) == states[number][disk], (order, gone)
        assert api.clean() == []
        expected_chain = {f"pullback-{names[0]}", f"pullback-{names[1]}^{names[0]}", f"pullback-{names[2]}^{names[1]}"}
        for disk in DISKS:
            assert set(chain(qemu, disk)) == expected_chain
        for name in names:
            api.do("checkpoint", "delete", name)
    assert qemu.running()
