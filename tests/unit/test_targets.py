# SPDX-License-Identifier: Apache-2.0
"""The files of a restore where the file system says no: what is told, and what is left."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lab import images
from lab.processes import LabError
from pullback.engine import targets
from pullback.engine.targets import Target, claimed, publish
from pullback.errors import RestoreError, TargetExists
from pullback.model.extents import Span
from pullback.model.unfinished import Unfinished
from pullback.plan.target import Act

#: fcntl(2), F_OFD_SETLK: the kind of lock that QEMU takes; Python 3.11 has no name for it.
_OFD_SETLK = 37
SIZE = 1 << 16
WANTED = Unfinished("repo", "backup", "vda", "raw", SIZE)


def saying(number: int) -> Callable[..., NoReturn]:
    def no(*arguments: Any, **keywords: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return no


def whole(directory: Path) -> Target:
    """An image that only lacks its name."""
    target = Target(directory, WANTED)
    target.look(False)
    target.prepare()
    target.partial.write_bytes(b"x" * SIZE)
    target.durable([Span(0, SIZE)])
    return target


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_without_links_an_image_gets_its_name_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", saying(errno.EPERM))
    publish(tmp_path, [whole(tmp_path)], False)
    assert names(tmp_path) == ["vda.raw"]
    assert (tmp_path / "vda.raw").read_bytes() == b"x" * SIZE


@pytest.mark.parametrize("call", ["link", "fsync"])
def test_images_that_cannot_get_their_names_are_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Whether before an image has its name or after it, nothing is written again."""
    target = whole(tmp_path)
    sync_directory = targets.sync_directory

    def failing_at_last(directory: Path) -> None:
        (saying(errno.EIO) if (directory / "vda.raw").exists() else sync_directory)(directory)

    with monkeypatch.context() as patch:
        if call == "link":
            patch.setattr(os, "link", saying(errno.EIO))
        else:
            patch.setattr(targets, "sync_directory", failing_at_last)
        with pytest.raises(RestoreError, match=r"cannot store .*: Input/output error\. Run the restore again") as told:
            publish(tmp_path, [target], False)
    assert told.value.exit_code == 9
    again = Target(tmp_path, WANTED)
    again.look(False)
    assert again.act is (Act.GO_ON if call == "link" else Act.FINISH)
    assert again.state.done == (Span(0, SIZE),)
    publish(tmp_path, [again], False)
    assert names(tmp_path) == ["vda.raw"]
    assert (tmp_path / "vda.raw").read_bytes() == b"x" * SIZE


def test_a_name_that_the_file_system_does_not_take_is_told_and_no_directory_stays(tmp_path: Path) -> None:
    """A manifest names the disks, and others may have written it."""
    with (
        pytest.raises(RestoreError, match=r"cannot look at .*: File name too long\. Nothing was written"),
        claimed(tmp_path / "new" / "place", [Unfinished("repo", "backup", "v" * 255, "raw", SIZE)], False),
    ):
        pytest.fail("a place for it")
    assert names(tmp_path) == []


def test_a_state_that_cannot_be_read_is_no_license_to_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = whole(tmp_path)
    path_open = Path.open

    def unreadable(path: Path, *arguments: Any, **keywords: Any) -> Any:
        return (saying(errno.EIO) if path == target.state_file else path_open)(path, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", unreadable)
        for overwrite in (False, True):
            with pytest.raises(RestoreError, match=r"cannot read .*json: Input/output error\. Nothing was written"):
                Target(tmp_path, WANTED).look(overwrite)
    assert target.partial.read_bytes() == b"x" * SIZE


def test_a_partial_image_that_cannot_be_removed_is_told_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user's in a directory like /tmp is; once it may go the restore begins."""
    partial = tmp_path / "vda.raw.partial"
    partial.write_bytes(b"another's")
    target = Target(tmp_path, WANTED)
    target.look(True)
    unlink = Path.unlink

    def sticky(path: Path, missing_ok: bool = False) -> None:
        (saying(errno.EPERM) if path == partial else unlink)(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", sticky)
        with pytest.raises(RestoreError, match=r"cannot replace .*partial, left by an earlier .*: Operation not perm"):
            target.prepare()
    assert partial.read_bytes() == b"another's"
    target.prepare()
    assert partial.stat().st_size == SIZE


def test_an_image_that_may_be_in_use_by_another_user_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write to a directory can replace in it what he may not open, and a domain may run on that."""
    final = tmp_path / "vda.raw"
    final.write_bytes(b"a domain's")
    os_open = os.open

    def private(path: Any, *arguments: Any, **keywords: Any) -> int:
        return int((saying(errno.EACCES) if path == final else os_open)(path, *arguments, **keywords))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", private)
        with pytest.raises(
            RestoreError, match=r"cannot tell whether .*vda\.raw is in use: Permission denied\. Move it"
        ):
            Target(tmp_path, WANTED).look(True)
    assert final.read_bytes() == b"a domain's"


def test_a_lock_is_seen_on_an_image_that_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As QEMU takes it, a shared one on some byte; where there are no locks, and once a file is gone, it is not."""
    final = tmp_path / "vda.raw"
    final.write_bytes(b"x" * 512)
    target = Target(tmp_path, WANTED)
    with final.open("rb") as file:
        fcntl.fcntl(file, _OFD_SETLK, struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0))
        with pytest.raises(TargetExists, match="is in use by another program"):
            target.look(True)
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "fcntl", saying(errno.ENOLCK))
            target.look(True)
    target.look(True)
    lstat = Path.lstat

    def gone_next(path: Path) -> os.stat_result:
        found = lstat(path)
        path.unlink()
        return found

    monkeypatch.setattr(Path, "lstat", gone_next)
    target.look(True)
    assert target.act is Act.BEGIN


def gone_on_with(directory: Path) -> Target:
    """A qcow2 image that an interrupted restore left."""
    wanted = replace(WANTED, format="qcow2")
    first = Target(directory, wanted)
    first.look(False)
    first.prepare()
    first.durable([Span(0, 4096)])
    again = Target(directory, wanted)
    again.look(False)
    assert again.act is Act.GO_ON
    assert again.prepare()
    return again


def spoil_refcount(image: Path, cluster: int, count: int) -> None:
    """Say of a cluster that it is used so often (docs/interop/qcow2.txt: tables of 8 and of 2 bytes, big endian)."""
    with image.open("r+b") as file:
        file.seek(48)
        (table,) = struct.unpack(">Q", file.read(8))
        file.seek(table)
        (block,) = struct.unpack(">Q", file.read(8))
        file.seek(block + 2 * cluster)
        file.write(struct.pack(">H", count))
        file.truncate(max(file.seek(0, os.SEEK_END), (cluster + 1) << 16))


def test_an_image_that_was_gone_on_with_holds_no_clusters_that_nothing_uses(tmp_path: Path) -> None:
    target = gone_on_with(tmp_path)
    spoil_refcount(target.partial, 9, 1)
    with pytest.raises(LabError, match="Leaked cluster 9"):
        images.check(target.partial)
    target.sync()
    images.check(target.partial)


def test_an_image_that_is_damaged_in_the_end_gets_no_name(tmp_path: Path) -> None:
    target = gone_on_with(tmp_path)
    spoil_refcount(target.partial, 0, 0)
    with pytest.raises(RestoreError, match=r"vda.qcow2.partial was gone on with, and is damaged. Remove it"):
        target.sync()
