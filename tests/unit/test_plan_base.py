# SPDX-License-Identifier: Apache-2.0
"""On which backup an incremental one builds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pullback.model.chain import Chain, read_chain
from pullback.model.facts import Disk
from pullback.plan.base import Full, Incremental, StoredPoint, choose_bases
from tests.support.values import SIZE, bitmap, disk, entry, manifest


def point(
    backup: str, checkpoint: str | None = None, *, size: int = SIZE, targets: Sequence[str] = ("vda",)
) -> StoredPoint:
    """A backup of these disks; its checkpoint has its own name unless told otherwise."""
    checkpoint = backup.upper() if checkpoint is None else checkpoint or None
    return StoredPoint(backup, manifest(*(entry(target, checkpoint, size=size) for target in targets)))


class Points:
    """Backups, newest first, that count how many of them were looked at."""

    def __init__(self, *points: StoredPoint) -> None:
        self._points = points
        self.taken = 0

    def __iter__(self) -> Iterator[StoredPoint]:
        for one in self._points:
            self.taken += 1
            yield one


def choose(points: object, *disks: Disk, full: bool | None = None, **chains: Chain) -> dict[str, Full | Incremental]:
    disks = disks or (disk(),)
    known = {one.target: chains.get(one.target, read_chain(one.bitmaps)) for one in disks}
    asked = {} if full is None else {"force_full": full}
    return choose_bases(disks, known, points, **asked)  # type: ignore[arg-type]


def since(base: Full | Incremental) -> tuple[str, str, list[str]]:
    assert isinstance(base, Incremental), base
    return base.backup, base.checkpoint, [edge.checkpoint for edge in base.edges]


def reason(base: Full | Incremental) -> str:
    assert isinstance(base, Full), base
    return base.reason


def test_the_newest_backup_whose_checkpoint_stands():
    bases = choose([point("c"), point("b"), point("a")], disk(points=("A", "B", "C")))
    assert since(bases["vda"]) == ("c", "C", ["C"])


def test_a_removed_checkpoint_leads_to_the_backup_before():
    bases = choose([point("c"), point("b"), point("a")], disk(points=("A", "B")))
    assert since(bases["vda"]) == ("b", "B", ["B"])


def test_later_checkpoints_of_others_lie_between():
    bases = choose([point("a"), point("z")], disk(points=("Z", "A", "orphan", "other")))
    assert since(bases["vda"]) == ("a", "A", ["A", "orphan", "other"])


def test_two_repositories_have_their_own_schedules():
    both = disk(points=("day1", "day2", "week", "day3"))
    assert since(choose([point("d3", "day3"), point("d2", "day2")], both)["vda"]) == ("d3", "day3", ["day3"])
    assert since(choose([point("w", "week")], both)["vda"]) == ("w", "week", ["week", "day3"])


def test_an_older_copy_of_the_image_knows_only_its_own_points():
    """Put back: its chain ends at B, and what it recorded since B leads to what it holds now."""
    bases = choose([point("d"), point("c"), point("b")], disk(points=("A", "B")))
    assert since(bases["vda"]) == ("b", "B", ["B"])


def test_an_image_older_than_all_backups_is_read_whole():
    bases = choose([point("d"), point("c")], disk(points=("A",)))
    assert reason(bases["vda"]).startswith("changes since the last backup are not known: checkpoint D is not in")


def test_each_disk_has_its_own_base():
    points = [point("c", targets=("vdb",)), point("b", targets=("vda", "vdb")), point("a")]
    bases = choose(points, disk("vda", points=("A", "B")), disk("vdb", points=("A", "B")))
    assert since(bases["vda"])[0] == since(bases["vdb"])[0] == "b"
    bases = choose(points, disk("vda", points=("A", "B")), disk("vdb", points=("A", "B", "C")))
    assert (since(bases["vda"])[0], since(bases["vdb"])[0]) == ("b", "c")


def test_a_disk_added_later_is_read_whole_the_others_are_not():
    bases = choose([point("a")], disk("vda", points=("A",)), disk("vdb"))
    assert since(bases["vda"])[0] == "a"
    assert reason(bases["vdb"]) == "this is the first backup of the disk in this repository"


def test_the_first_backup_says_so():
    assert reason(choose([])["vda"]) == "this is the first backup of the disk in this repository"
    assert reason(choose([], disk(points=("A",)))["vda"]) == "this is the first backup of the disk in this repository"


def test_broken_checkpoints_are_the_reason():
    broken = read_chain([bitmap("pullback-A", inconsistent=True)])
    said = reason(choose([point("a")], disk(), vda=broken)["vda"])
    assert said == "its checkpoints cannot be used: its bitmap is inconsistent: QEMU ended without storing it"


def test_a_size_that_changed_ends_the_search():
    """A shrink and a later growth change content without marking it: an older backup of the right size is no base."""
    points = [point("c", size=SIZE // 2), point("b"), point("a")]
    bases = choose(points, disk(points=("A", "B", "C")))
    assert reason(bases["vda"]) == f"the disk's size changed from {SIZE // 2} to {SIZE} bytes"


def test_a_size_that_changed_ends_the_search_of_that_disk_only():
    grown = replace(disk("vda", points=("A",)), virtual_size=2 * SIZE)
    bases = choose([point("a", targets=("vda", "vdb"))], grown, disk("vdb", points=("A",)))
    assert "size changed" in reason(bases["vda"])
    assert since(bases["vdb"])[0] == "a"


def test_a_size_that_changed_below_a_lost_checkpoint_ends_it_too():
    points = [point("d"), point("c", size=SIZE // 2), point("b")]
    bases = choose(points, disk(points=("B",)))
    assert "size changed" in reason(bases["vda"])


def test_a_backup_without_a_checkpoint_is_passed_over():
    points = [point("b", ""), point("a")]
    assert since(choose(points, disk(points=("A",)))["vda"])[0] == "a"
    assert reason(choose(points[:1], disk(points=("A",)))["vda"]) == "the last backup has no checkpoint of this disk"


def test_what_cannot_be_tracked_is_read_whole():
    assert reason(choose([point("a")], disk(untracked="a raw image"))["vda"]) == "a raw image"


def test_full_is_asked_for():
    points = Points(point("a"))
    (base,) = choose(points, disk(points=("A",)), full=True).values()
    assert base == Full("asked for with --full", like="a")
    assert points.taken == 1
    assert since(choose([point("a")], disk(points=("A",)), full=False)["vda"])[0] == "a"


def test_a_whole_backup_is_cut_like_the_newest_one():
    """Cut otherwise, what did not change would be stored once more."""
    points = [point("c", targets=("vdb",)), point("b", "", targets=("vda", "vdb")), point("a")]
    bases = choose(points, disk("vda"), disk("vdb"), disk("vdc"))
    assert [base.like for base in bases.values() if isinstance(base, Full)] == [None, "c", None]
    bases = choose(points, disk("vda", points=("Z",)), disk("vdb", points=("Z",)))
    assert [base.like for base in bases.values() if isinstance(base, Full)] == ["b", "c"]


def test_another_length_of_segments_is_no_base():
    other = replace(point("a").manifest, segment_size=64 << 20)
    said = reason(choose([StoredPoint("a", other)], disk(points=("A",)))["vda"])
    assert said == "the last backup is laid out in segments of 67108864 bytes"


def test_no_backup_is_looked_at_without_need():
    points = [point("c"), point("b"), point("a")]
    for standing, taken in ((("A", "B", "C"), 1), (("A", "B"), 2), (("A",), 3)):
        counted = Points(*points)
        choose(counted, disk(points=standing))
        assert counted.taken == taken, standing
    # Without a chain only the newest one matters: it may tell why.
    counted = Points(*points)
    choose(counted, disk())
    assert counted.taken == 1
    counted = Points(*points)
    choose(counted, disk(untracked="a raw image"))
    assert counted.taken == 1


def test_a_disk_without_a_chain_does_not_keep_the_others_looking():
    counted = Points(point("b", targets=("vda", "vdb")), point("a", targets=("vda", "vdb")))
    bases = choose(counted, disk("vda", points=("A", "B")), disk("vdb"))
    assert counted.taken == 1
    assert isinstance(bases["vdb"], Full)


def test_the_order_of_the_chain_does_not_matter_the_age_of_the_backup_does():
    assert since(choose([point("a"), point("b")], disk(points=("A", "B")))["vda"]) == ("a", "A", ["A", "B"])
