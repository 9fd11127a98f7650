# SPDX-License-Identifier: Apache-2.0
"""What a restore replaces, whether it fits, what it finds when it reads its images again, and what damage leaves."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lab import images
from lab.disks import DiskSpec
from lab.processes import LabError
from lab.qemu import BareQemu
from pullback.engine.restoring import Writing
from pullback.engine.targets import Target
from pullback.errors import Damaged, RestoreError, TargetExists
from pullback.model.extents import Span
from pullback.repository.blob import BlobId, BlobKind, blob_id
from tests.support.backups import open_repository
from tests.support.product import Stage, mounted_tmpfs
from tests.support.restoring import KIB, MIB, Kept, data_bytes, some_disk

CHUNK = 64 * KIB


@pytest.fixture
def kept(lab_dir: Path) -> Kept:
    return Kept(lab_dir)


@pytest.fixture
def backup(kept: Kept) -> str:
    return kept.store({"vda": some_disk(3 * MIB + 512, 1), "vdb": some_disk(MIB, 2)})


def everything(place: Path) -> dict[str, tuple[int, int]]:
    """Every name below a place, with what lies there and when it changed."""
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in place.rglob("*")}


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize("name", ["vdb.qcow2", "vdb.qcow2.partial", "vdb.qcow2.partial.json"])
@pytest.mark.parametrize(
    ("make", "replaceable"),
    [
        (lambda path: path.write_text("precious"), True),
        (lambda path: path.write_text(""), True),
        (link_to("precious"), True),
        (link_to("nowhere"), True),
        (Path.mkdir, False),
        (as_socket, False),
        (os.mkfifo, False),
    ],
    ids=["file", "empty", "link", "dangling", "directory", "socket", "fifo"],
)
def test_nothing_is_replaced_unless_told(
    kept: Kept, backup: str, lab_dir: Path, name: str, make: Callable[[Path], None], replaceable: bool
) -> None:
    (to := lab_dir / "to").mkdir()
    (to / "precious").write_text("mine")
    make(to / name)
    before = everything(to)
    for overwrite in (False,) if replaceable else (False, True):
        with pytest.raises(TargetExists, match=name):
            kept.restore(backup, to, overwrite=overwrite)
        assert everything(to) == before
    if replaceable:
        kept.restore(backup, to, overwrite=True)
        assert (to / "precious").read_text() == "mine"
        assert not (to / "nowhere").exists()
        (to / "precious").unlink()
        kept.judge(backup, to)


def test_the_old_image_stays_until_the_new_one_is_whole(kept: Kept, backup: str, lab_dir: Path) -> None:
    to = lab_dir / "to"
    other = kept.store({"vda": some_disk(3 * MIB + 512, 3), "vdb": some_disk(MIB, 4)})
    kept.restore(other, to)
    with (
        mock.patch.object(Writing, "carry", side_effect=RestoreError("no")),
        pytest.raises(RestoreError, match="no"),
    ):
        kept.restore(backup, to, overwrite=True)
    for name, data in kept.disks[other].items():
        assert images.raw_bytes(to / f"{name}.qcow2") == data
    kept.restore(backup, to, overwrite=True)
    kept.judge(backup, to)


def test_an_image_in_use_is_not_replaced(
    kept: Kept, backup: str, lab_dir: Path, bare_qemu: Callable[..., BareQemu]
) -> None:
    to = lab_dir / "to"
    kept.restore(backup, to)
    with bare_qemu([DiskSpec(to / "vda.qcow2", "vda")], running=True) as qemu:
        with pytest.raises(TargetExists, match=r"vda\.qcow2 is in use"):
            kept.restore(backup, to, overwrite=True)
        qemu.shutdown()
    kept.restore(backup, to, overwrite=True)


def test_an_image_that_a_domain_opened_meanwhile_is_not_replaced(
    kept: Kept, backup: str, lab_dir: Path, bare_qemu: Callable[..., BareQemu]
) -> None:
    to = lab_dir / "to"
    old = kept.store({"vda": some_disk(MIB, 5), "vdb": some_disk(MIB, 6)})
    kept.restore(old, to)
    started: list[BareQemu] = []

    def late(self: Target) -> None:
        if self.name == "vdb":
            started.append(bare_qemu([DiskSpec(to / "vdb.qcow2", "vdb")], running=True))
        sync(self)

    sync = Target.sync
    with mock.patch.object(Target, "sync", late), pytest.raises(TargetExists, match=r"vdb\.qcow2 is in use"):
        kept.restore(backup, to, overwrite=True)
    started[0].shutdown()
    for name, data in kept.disks[old].items():
        assert images.raw_bytes(to / f"{name}.qcow2") == data
    assert {disk.bytes_written for disk in kept.restore(backup, to, overwrite=True).disks} == {0}
    kept.judge(backup, to)


def test_what_comes_meanwhile_is_not_replaced(kept: Kept, backup: str, lab_dir: Path) -> None:
    to = lab_dir / "to"
    publish = Target.publish

    def late(self: Target, overwrite: bool) -> None:
        self.final.write_text("precious")
        publish(self, overwrite)

    with mock.patch.object(Target, "publish", late), pytest.raises(TargetExists, match="by somebody else meanwhile"):
        kept.restore(backup, to)
    assert (to / "vda.qcow2").read_text() == "precious"
    (to / "vda.qcow2").unlink()
    done = kept.restore(backup, to)
    assert {disk.bytes_written for disk in done.disks} == {0}
    kept.judge(backup, to)


def test_a_relative_path_that_reads_like_a_protocol_is_a_directory(
    kept: Kept, backup: str, lab_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab_dir)
    kept.restore(backup, Path("nbd:a,b"))
    kept.judge(backup, lab_dir / "nbd:a,b")


def test_a_directory_that_was_made_goes_with_a_refusal(kept: Kept, backup: str, lab_dir: Path) -> None:
    with (
        mock.patch("pullback.engine.restore.free_room", return_value=MIB),
        pytest.raises(RestoreError, match=r"there is no space left for them\. Nothing was written\."),
    ):
        kept.restore(backup, lab_dir / "new" / "deeper" / "to")
    assert not (lab_dir / "new").exists()


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_the_room_is_what_the_images_take(lab_dir: Path, kept: Kept, backup: str, image_format: str) -> None:
    """With exactly what is asked for they fit, and not much more is asked for."""
    asked: list[int] = []
    to = lab_dir / "to"
    with mock.patch("pullback.engine.restore.free_room", return_value=0), pytest.raises(RestoreError) as caught:
        kept.restore(backup, to, format=image_format)
    assert "need" in str(caught.value)
    from pullback.engine.source import DiskSource

    room = DiskSource.room

    def noted(self: DiskSource, kind: str) -> int:
        asked.append(room(self, kind))
        return asked[-1]

    with (
        mock.patch.object(DiskSource, "room", noted),
        mock.patch("pullback.engine.restore.free_room", side_effect=lambda _: asked[-1] if asked else 0),
        pytest.raises(RestoreError),
    ):
        kept.restore(backup, to, format=image_format)
    data = sum(data_bytes(disk) for disk in kept.disks[backup].values())
    assert data <= asked[0] <= data + 2 * 10 * 64 * KIB
    try:
        # A tmpfs has whole pages; the directory and the two states take some.
        with mounted_tmpfs(lab_dir / "small", str(asked[0] + 64 * KIB)) as small:
            kept.restore(backup, small, format=image_format)
            kept.judge(backup, small, image_format)
    except LabError as error:
        if "mount" in str(error):
            pytest.skip(f"cannot mount: {error}")
        raise


def test_sizes_and_thinness(kept: Kept, lab_dir: Path) -> None:
    disks = {f"v{size}": some_disk(size, size) for size in (512, 1024, 64 * KIB - 512, 64 * KIB + 512, 999 * 512)}
    disks["zero"] = bytes(4 * MIB)
    disks["none"] = b""
    backup = kept.store(disks)
    for image_format in ("qcow2", "raw"):
        to = lab_dir / image_format
        kept.restore(backup, to, format=image_format, verify=True)
        kept.judge(backup, to, image_format)
        assert (to / f"zero.{image_format}").stat().st_blocks * 512 <= 512 * KIB
    info = images.info(lab_dir / "qcow2" / "zero.qcow2")
    assert info["cluster-size"] == 64 * KIB
    assert info["format-specific"]["data"]["compat"] == "1.1"
    assert "bitmaps" not in info["format-specific"]["data"]


# -- read again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_what_is_read_again_and_differs_is_told_and_mended(
    kept: Kept, backup: str, lab_dir: Path, image_format: str
) -> None:
    """A bit in a chunk of data, and a byte where there was a hole."""
    to = lab_dir / "to"
    disk = kept.disks[backup]["vda"]
    pieces = [disk[at : at + CHUNK] for at in range(0, len(disk), CHUNK)]
    hole = next(at for at, piece in enumerate(pieces) if not any(piece)) * CHUNK
    data = next(at for at, piece in enumerate(pieces) if any(piece) and at * CHUNK > hole + CHUNK) * CHUNK
    sync = Target.sync

    def spoil(self: Target) -> None:
        if self.name == "vda":
            for at in (data + 512, hole + 1024):
                images.run(["qemu-io", "-f", image_format, "-c", f"write -P 7 {at} 512", str(self.partial)])
        sync(self)

    with (
        mock.patch.object(Target, "sync", spoil),
        pytest.raises(RestoreError, match="do not read as they were written: vda") as caught,
    ):
        kept.restore(backup, to, format=image_format, verify=True)
    for at in (data, hole):
        assert f"bytes {at:,}-{at + CHUNK - 1:,}" in str(caught.value)
    assert not (to / f"vda.{image_format}").exists()
    done = kept.restore(backup, to, format=image_format, verify=True)
    assert {one.target: one.bytes_written for one in done.disks} == {"vda": CHUNK, "vdb": 0}
    kept.judge(backup, to, image_format)


def test_verify_on_the_command_line(lab_dir: Path, kept: Kept, backup: str) -> None:
    (place := lab_dir / "stage").mkdir()
    stage = Stage(place)
    stage.repo = kept.repo
    done = stage.cli("restore", backup, "--to", lab_dir / "to", "--verify", "--json")
    assert done.code == 0, done.out
    assert done.event("restore")["verified"] is True
    assert {event["work"] for event in done.events if event["event"] == "progress"} == {"restore", "verify"}
    again = stage.cli("restore", backup, "--to", lab_dir / "to", "--overwrite", "--verify")
    assert "read again and compared" in again.out
    assert stage.cli("restore", backup, "--to", lab_dir / "to", "--no-space-check").code == 9


# -- a damaged backup ---------------------------------------------------------------------------------------------


def spoil_chunk(repo: Path, data: bytes) -> None:
    """Alter the pack that holds this chunk, inside of it."""
    place = open_repository(repo).index.lookup(BlobKind.DATA, blob_id(data))
    assert place is not None
    name = place.pack_id.hex()
    path = repo / "data" / name[:2] / name
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(place.offset + place.length // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.damages_repository("to see what a restore saves")
@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_a_damaged_chunk(kept: Kept, backup: str, lab_dir: Path, image_format: str) -> None:
    disks = dict(kept.disks[backup])
    disk = disks["vda"]
    lost = [at for at in range(0, len(disk) - CHUNK, CHUNK) if any(disk[at : at + CHUNK])][3]
    spoil_chunk(kept.repo, disk[lost : lost + CHUNK])
    (place := lab_dir / "stage").mkdir()
    stage = Stage(place)
    stage.repo = kept.repo
    to = lab_dir / "to"
    done = stage.cli("restore", backup, "--to", to, "--format", image_format)
    assert done.code == 8
    assert not list(to.glob(f"*.{image_format}"))
    done = stage.cli("restore", backup, "--to", to, "--format", image_format, "--keep-going", "--verify")
    assert done.code == 15, done.err
    assert f"bytes {lost:,}-{lost + CHUNK - 1:,}: lost" in done.out
    assert "64.0 KiB of vda could not be restored" in done.err
    kept.disks[backup] = disks | {"vda": disk[:lost] + bytes(CHUNK) + disk[lost + CHUNK :]}
    kept.judge(backup, to, image_format)


@pytest.mark.damages_repository("to see what a restore saves")
def test_a_chunk_that_no_index_lists_and_a_tree_that_is_lost(kept: Kept, backup: str, lab_dir: Path) -> None:
    """Two chunks without a length: all between them has no place.  A lost tree: its whole segment."""
    disks = dict(kept.disks[backup])
    disk = disks["vda"]
    chunks = [at for at in range(0, len(disk) - CHUNK, CHUNK) if any(disk[at : at + CHUNK])]
    first, last = chunks[2], chunks[6]
    hidden = {blob_id(disk[at : at + CHUNK]) for at in (first, last)}
    from pullback.repository.index import Index

    lengths = Index.lengths

    def some(self: Index, kind: BlobKind, blobs: Any) -> list[int | None]:
        blobs = list(blobs)
        found = lengths(self, kind, blobs)
        return [None if blob in hidden else length for blob, length in zip(blobs, found, strict=True)]

    with mock.patch.object(Index, "lengths", some):
        with pytest.raises(Damaged, match="is missing"):
            kept.restore(backup, lab_dir / "stops")
        done = kept.restore(backup, lab_dir / "to", keep_going=True, verify=True)
    span = Span(first, last + CHUNK - first)
    assert [one.lost for one in done.disks] == [(span,), ()]
    kept.disks[backup] = disks | {"vda": disk[:first] + bytes(span.length) + disk[span.end :]}
    kept.judge(backup, lab_dir / "to")
    load = type(open_repository(kept.repo)).load_tree
    subtree = _segment_tree(kept, backup)

    def lost(self: Any, tree: BlobId) -> Any:
        if tree == subtree:
            raise Damaged("gone")
        return load(self, tree)

    with mock.patch("pullback.repository.repository.Repository.load_tree", lost):
        done = kept.restore(backup, lab_dir / "less", keep_going=True)
    assert [one.lost for one in done.disks] == [(Span(0, len(disk)),), ()]
    kept.disks[backup] = disks | {"vda": bytes(len(disk))}
    kept.judge(backup, lab_dir / "less")


def _segment_tree(kept: Kept, backup: str) -> BlobId:
    from pullback.repository.layout import StoredBackup

    repository = open_repository(kept.repo)
    return StoredBackup(repository, repository.find(backup)).subtrees("vda")[0]


def test_what_was_begun_is_given_up_by_removing_it(kept: Kept, backup: str, lab_dir: Path) -> None:
    to = lab_dir / "to"
    with mock.patch.object(Target, "publish", side_effect=RestoreError("no")), pytest.raises(RestoreError):
        kept.restore(backup, to)
    (to / "vda.qcow2.partial").unlink()
    done = kept.restore(backup, to)
    assert {one.target: one.bytes_kept > 0 for one in done.disks} == {"vda": False, "vdb": True}
    kept.judge(backup, to)
    shutil.rmtree(to)
