# SPDX-License-Identifier: Apache-2.0
"""Which disks are backed up, and which are left out."""

from __future__ import annotations

import pytest

from pullback.errors import UsageError
from pullback.plan.selection import select_disks
from tests.support.values import device, facts, node

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
