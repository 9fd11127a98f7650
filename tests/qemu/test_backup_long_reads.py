# SPDX-License-Identifier: Apache-2.0
"""Frozen disks are read in long requests; before QEMU 8.0 what the domain overwrites meanwhile is read again.

There a request that meets saved data, and ends beyond it, is answered with the domain's new data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.qemu import BareQemu, qemu_version
from pullback.engine import reading
from pullback.engine.events import Event, Frozen
from pullback.engine.rate import Rate
from pullback.engine.reading import REQUEST, Window
from pullback.nbd.blocking import NbdConnection
from pullback.nbd.client_codec import ClientCodec
from pullback.plan.method import SAVED_UNIT
from tests.support.product import KIB, MIB, Stage, references, same

Start = Callable[..., BareQemu]
#: Its end is shorter than a unit.
SIZE = 4 * MIB + 5 * 512
OLD = qemu_version() < (8, 0, 0)


def crosses(read: tuple[int, int]) -> bool:
    offset, length = read
    return offset // SAVED_UNIT != (offset + length - 1) // SAVED_UNIT


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The reads that are asked for: (offset, length)."""
    found: list[tuple[int, int]] = []
    ask = ClientCodec.read

    def recorded(self: ClientCodec, offset: int, buffer: memoryview) -> tuple[int, bytes]:
        found.append((offset, len(buffer)))
        return ask(self, offset, buffer)

    monkeypatch.setattr(ClientCodec, "read", recorded)
    return found


@pytest.fixture
def stage(lab_dir: Path) -> Stage:
    return Stage(lab_dir)


def filled(bare_qemu: Start, stage: Stage) -> BareQemu:
    """A domain whose disk is full of data but for a hole from 1 MiB to 1.5 MiB."""
    qemu = bare_qemu([stage.disk("vda", SIZE)])
    for at in range(0, SIZE, 512 * KIB):
        if at != MIB:
            qemu.device_write("vda", at, min(512 * KIB, SIZE - at), 1 + at // (512 * KIB))
    return qemu


def test_what_nobody_overwrites_is_read_in_long_requests(
    bare_qemu: Start, stage: Stage, asked: list[tuple[int, int]]
) -> None:
    qemu = filled(bare_qemu, stage)
    state = references(qemu)
    backup = stage.backup(qemu, threads=1)
    assert max(length for _, length in asked) == REQUEST
    assert sum(length for _, length in asked) == backup.bytes_read
    same(stage.contents(backup.id), state)


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 1), (1, 1), (3, 2), (7, 1), (0, 8), (6, 4)],
    ids=["the first unit", "the second", "two in the middle", "the last", "all", "the last two and two of the next"],
)
@pytest.mark.parametrize("how", ["write", "zero", "unmap", "discard"])
def test_what_is_overwritten_before_the_answer_is_as_it_was(
    bare_qemu: Start,
    stage: Stage,
    asked: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    first: int,
    count: int,
    how: str,
) -> None:
    qemu = filled(bare_qemu, stage)
    state = references(qemu)
    with overwriting(monkeypatch, qemu, how, first, count):
        backup = stage.backup(qemu, threads=1)
    same(stage.contents(backup.id), state)
    twice = sum(length for _, length in asked) > backup.bytes_read
    assert twice == OLD
    state = references(qemu)
    again = stage.backup(qemu)
    assert again.manifest.disks[0].mode == "incremental"
    same(stage.contents(again.id), state)


@pytest.mark.parametrize("how", ["write", "zero"])
def test_the_same_of_a_disk_that_is_frozen_by_a_job(
    bare_qemu: Start, stage: Stage, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    qemu = filled(bare_qemu, stage)
    state = references(qemu)
    with overwriting(monkeypatch, qemu, how, 1, 2):
        backup = stage.backup(qemu, threads=1, method="job")
    same(stage.contents(backup.id), state)


@contextmanager
def overwriting(monkeypatch: pytest.MonkeyPatch, qemu: BareQemu, how: str, first: int, count: int) -> Iterator[None]:
    """The domain overwrites units of two windows that were found unharmed, just before they are asked for."""
    overwritten: list[int] = []
    submit = reading.submit

    def late(connection: NbdConnection, window: Window, unit: int, rate: Rate) -> list[int]:
        begin = window.span.offset
        if begin in (512 * KIB, 2 * MIB) and begin not in overwritten:
            overwritten.append(begin)
            overwrite(qemu, how, begin + first * SAVED_UNIT, count * SAVED_UNIT)
        return submit(connection, window, unit, rate)

    with monkeypatch.context() as patched:
        patched.setattr(reading, "submit", late)
        yield
    assert len(overwritten) == 2


def overwrite(qemu: BareQemu, how: str, offset: int, length: int) -> None:
    match how:
        case "write":
            qemu.device_write("vda", offset, length, 0xEE)
        case "discard":
            qemu.device_discard("vda", offset, length)
        case _:
            qemu.device_zero("vda", offset, length, unmap=how == "unmap")


def test_what_was_a_hole_is_one_though_the_domain_has_written_there(
    bare_qemu: Start, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of old zeroes the scratch keeps no data, only the map tells: written before block status is asked for."""
    qemu = filled(bare_qemu, stage)
    state = references(qemu)

    def write(event: Event) -> None:
        if isinstance(event, Frozen):
            qemu.device_write("vda", MIB, 128 * KIB, 0xEE)
            qemu.device_write("vda", MIB + 256 * KIB, 64 * KIB, 0xEF)

    backup = stage.backup(qemu, write, threads=1)
    same(stage.contents(backup.id), state)


def test_what_was_overwritten_already_is_read_once_and_unit_by_unit(
    bare_qemu: Start, stage: Stage, asked: list[tuple[int, int]]
) -> None:
    qemu = filled(bare_qemu, stage)
    state = references(qemu)

    def write(event: Event) -> None:
        if isinstance(event, Frozen):
            qemu.device_write("vda", 2 * MIB + 128 * KIB, 4096, 0xEE)

    backup = stage.backup(qemu, write, threads=1)
    same(stage.contents(backup.id), state)
    assert sum(length for _, length in asked) == backup.bytes_read
    crossing = [offset for offset, length in asked if crosses((offset, length))]
    assert crossing
    assert (2 * MIB in crossing) != OLD


def test_below_a_limit_an_old_qemu_is_read_unit_by_unit(
    bare_qemu: Start, stage: Stage, asked: list[tuple[int, int]]
) -> None:
    """Long requests take long then, and to ask twice would count twice."""
    qemu = filled(bare_qemu, stage)
    stage.backup(qemu, limit_rate=100 * MIB)
    assert asked
    assert any(map(crosses, asked)) != OLD
