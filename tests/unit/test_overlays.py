# SPDX-License-Identifier: Apache-2.0
"""The images of an instant restore in directories that do not take them, or do not let go of them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pullback.engine.overlays import Overlay, OverlayPlace
from pullback.errors import RestoreError
from pullback.model.manifest import DiskEntry

BACKUP = "ab" * 32


def entry(target: str) -> DiskEntry:
    return DiskEntry(target, 1 << 20, None, "full", "for a test", None, "raw", 0, 0, 0)


def begun(directory: Path, *targets: str) -> tuple[OverlayPlace, tuple[Overlay, ...]]:
    place = OverlayPlace(directory, BACKUP)
    return place, place.overlays([entry(target) for target in targets], ())


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def test_a_file_system_without_links_is_left_as_it_was(lab_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stood there before stays, also of the same restore: a domain may have written to it."""
    place, (first,) = begun(lab_dir, "vda")
    place.prepare([first])
    before = names(lab_dir)
    link = os.link

    def some_links(source: Path, target: Path) -> None:
        if target.name == "vdc.qcow2":
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        link(source, target)

    monkeypatch.setattr(os, "link", some_links)
    place, overlays = begun(lab_dir, "vda", "vdb", "vdc")
    with pytest.raises(RestoreError, match=r"Operation not permitted\. Nothing was written\. .*hard links") as told:
        place.prepare(overlays)
    assert told.value.exit_code == 9
    assert names(lab_dir) == before
    other = lab_dir / "other"
    other.mkdir()
    place, overlays = begun(other, "vdc")
    with pytest.raises(RestoreError):
        place.prepare(overlays)
    assert names(other) == set()


def test_a_file_that_is_not_here_is_no_image(tmp_path: Path) -> None:
    """A domain may have disks that this host does not see, or none of ours."""
    place, (one,) = begun(tmp_path, "vda")
    place.prepare([one])
    assert not one.is_file(str(tmp_path / "gone.qcow2"))
    assert not one.is_file("nbd://127.0.0.1/vda")
    assert one.is_file(str(one.ours))


def test_what_cannot_be_remembered_or_let_go_of_is_told_and_the_images_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, overlays = begun(tmp_path, "vda")
    place.prepare(overlays)
    (tmp_path / f".booted-{BACKUP[:12]}").mkdir()
    with pytest.raises(RestoreError, match=r"cannot write .*: Is a directory\. The images are whole"):
        place.remember(overlays)

    def failing(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(RestoreError, match=r"Input/output error\. They are whole\. Run the same command again"):
            place.finish(overlays)
    assert overlays[0].ours.samefile(overlays[0].path), "it is still known to be ours"
    place.finish(overlays)
    assert names(tmp_path) == {"vda.qcow2", f".booted-{BACKUP[:12]}"}
