# SPDX-License-Identifier: Apache-2.0
"""Making a checkpoint under writes loses none of them: what changed between two points is never told too small."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.qemu import BareQemu
from pullback.engine import freezing
from pullback.engine.domain import DomainAddress, open_domain
from pullback.nbd.address import UnixAddress
from pullback.plan.command import Plan
from tests.support.api import BLOCK, by_nbdcopy, dirty_map
from tests.support.product import MIB, Stage

POINTS = 30
SIZE = 16 * MIB


@contextmanager
def writing(qemu: BareQemu) -> Iterator[None]:
    """Write through the device, on a monitor of our own, as fast as it goes, until the block ends."""
    stop = threading.Event()
    chance = random.Random(5)
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for number in itertools.count(1):
                if stop.is_set():
                    return
                block = chance.randrange(SIZE // BLOCK)
                qemu.device_write("vda", block * BLOCK + number % 128 * 512, 512, number % 251 + 1)
        except BaseException as error:
            failures.append(error)
            raise

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert failures == []


async def missed(qemu: BareQemu, stage: Stage, count: int) -> tuple[set[int], int]:
    """Blocks that differ between two consecutive points and are not in the map of changes; and how many differ."""
    lost: set[int] = set()
    differing = 0
    before = b""
    async with open_domain(DomainAddress(socket=str(qemu.qmp_path))) as domain:
        for number in range(count):
            scratch = str(stage.scratch)
            snapshot = await domain.create_snapshot(name=f"s{number}", checkpoint=f"c{number}", scratch=scratch)
            since = [f"c{number - 1}"] if number else []
            where = UnixAddress(str(stage.place / "nbd"))
            (export,) = await domain.start_export(snapshot, address=where, since=since)
            now = await asyncio.to_thread(by_nbdcopy, export.uri)
            if before:
                told = await asyncio.to_thread(dirty_map, export.uri, since[0])
                blocks = {
                    at // BLOCK for at in range(0, SIZE, BLOCK) if now[at : at + BLOCK] != before[at : at + BLOCK]
                }
                differing += len(blocks)
                lost |= blocks - told
            before = now
            await snapshot.delete()
            if lost:
                break
    return lost, differing


def test_no_write_around_a_checkpoint_is_missed(bare_qemu: Callable[..., BareQemu], tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    qemu = bare_qemu([stage.disk("vda", SIZE)], running=True)
    with writing(qemu):
        lost, differing = asyncio.run(missed(qemu, stage, POINTS))
    assert lost == set()
    print(f"{differing} blocks differed between {POINTS} points")
    assert differing > 10 * POINTS


def test_the_judge_sees_the_other_order(
    bare_qemu: Callable[..., BareQemu], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old bitmap stopped first and the new one started last: writes in between are in neither."""
    freeze = freezing.freeze

    def the_other_order(*arguments: Any, **keywords: Any) -> Plan:
        record, *middle, settle = freeze(*arguments, **keywords).actions
        if "block-dirty-bitmap-disable" not in str(settle):
            return Plan((record, *middle, settle))
        return Plan((settle, *middle, record))

    monkeypatch.setattr(freezing, "freeze", the_other_order)
    stage = Stage(tmp_path)
    qemu = bare_qemu([stage.disk("vda", SIZE)], running=True)
    with writing(qemu):
        lost, _ = asyncio.run(missed(qemu, stage, POINTS))
    assert lost
