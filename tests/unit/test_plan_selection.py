# SPDX-License-Identifier: Apache-2.0
"""Which disks are backed up, and which must not be touched."""

from __future__ import annotations

import pytest

from pullback.errors import Refused, UsageError
from pullback.plan.selection import refuse_unsafe, select_disks
from tests.support.values import device, disk, facts, node

DRIVES = facts(
    [
        device("vda"),
        device("vdb"),
        device("cd0", root="", removable=True),
        device("iso", root="node-iso", removable=True),
        device("pflash0", root="node-flash", type="cfi.pflash01"),
    ],
    [node("node-vda"), node("node-vdb", "raw"), node("node-iso", "raw", read_only=True), node("node-flash", "raw")],
)


def test_all_writable_disks_and_why_not_the_others():
    selection = select_disks(DRIVES)
    assert [one.target for one in selection.disks] == ["vda", "vdb"]
    assert dict(selection.skipped) == {
        "cd0": "the drive is empty",
        "iso": "the drive is read-only",
        "pflash0": "firmware flash is not a disk",
    }


def test_only_the_wanted_ones_in_the_domains_order():
    assert [one.target for one in select_disks(DRIVES, ["vdb", "vda"]).disks] == ["vda", "vdb"]
    only = select_disks(DRIVES, ["vdb"])
    assert [one.target for one in only.disks] == ["vdb"]
    assert only.skipped == ()


def test_a_disk_that_is_not_there():
    with pytest.raises(UsageError, match="has no disk sda") as caught:
        select_disks(DRIVES, ["vda", "sda"])
    assert "It has vda, vdb, cd0, iso, pflash0." in caught.value.todo


@pytest.mark.parametrize(
    ("target", "reason"), [("cd0", "empty"), ("iso", "read-only"), ("pflash0", "firmware flash is not a disk")]
)
def test_a_wanted_drive_that_cannot_be_backed_up(target: str, reason: str):
    with pytest.raises(UsageError, match=f"disk {target} .* cannot be backed up: .*{reason}"):
        select_disks(DRIVES, ["vda", target])


def test_a_domain_without_disks():
    with pytest.raises(UsageError, match="no disk to back up") as caught:
        select_disks(facts([device("cd0", root="")], []))
    assert caught.value.means == "cd0: the drive is empty."
    with pytest.raises(UsageError, match="no disk to back up") as caught:
        select_disks(facts([]))
    assert caught.value.means == ""


THREAD = "/objects/thread-vda"


def refused(version: tuple[int, int, int], **more: object) -> str:
    try:
        refuse_unsafe(facts(version=version), [disk("vda"), disk("vdb", **more)])
    except Refused as error:
        return str(error)
    return ""


@pytest.mark.parametrize("version", [(7, 2, 22), (8, 2, 0), (8, 99, 99)])
def test_a_disk_on_an_io_thread_is_refused_where_it_can_abort_qemu(version: tuple[int, int, int]):
    said = refused(version, iothread=THREAD)
    assert f"disk vdb of domain web runs on I/O thread {THREAD}" in said
    assert "--disk" in said
    assert "may run on an I/O thread" in refused(version, iothread=None)
    assert refused(version, iothread="") == ""


@pytest.mark.parametrize("version", [(9, 0, 0), (10, 0, 13)])
def test_from_9_0_on_it_is_not(version: tuple[int, int, int]):
    assert refused(version, iothread=THREAD) == refused(version, iothread=None) == ""


@pytest.mark.parametrize(("version", "taken"), [((7, 0, 99), False), ((6, 2, 0), False), ((7, 1, 0), True)])
def test_old_qemu(version: tuple[int, int, int], taken: bool):
    said = refused(version)
    assert ("is too old" in said) == (not taken)


def test_nothing_to_put_a_filter_under():
    assert "belongs to no device" in refused((10, 0, 0), qdev="")
    assert "belongs to no device" in refused((10, 0, 0), qdev="/machine/peripheral/gone", device_type="")
