# SPDX-License-Identifier: Apache-2.0
"""Damage is found, named to the byte, and restic agrees that there is some."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pullback.engine.damage import Damage
from pullback.engine.events import silent
from pullback.engine.verify import Verification, Verified, VerifyRequest
from pullback.errors import Damaged, WrongPassword
from pullback.repository.blob import BlobId, BlobKind, BlobLocation, PackId, blob_id
from pullback.repository.pack import Pack, PackBuilder
from pullback.repository.repository import Repository
from pullback.repository.store import FileKind
from tests.support.backups import new_repository, open_repository, store_backup
from tests.support.cli import MANIFEST
from tests.support.product import Stage
from tests.support.restic import Restic, needs_restic

pytestmark = [needs_restic, pytest.mark.damages_repository("to see that it is found")]

KIB = 1 << 10
SEGMENT = 1 << 20
CHUNK = 64 * KIB


def manifest(domain: str, size: int) -> bytes:
    disk = {**MANIFEST["disks"][0], "virtual_size": size}  # type: ignore[index]
    return json.dumps({**MANIFEST, "domain": domain, "segment_size": SEGMENT, "disks": [disk]}).encode()


def store(repository: Repository, data: bytes, day: int, domain: str = "web", known: bool = True) -> str:
    """A backup of one disk; chunks that the repository has are not stored again if they are ``known``."""
    segments = [data[start : start + SEGMENT] for start in range(0, len(data), SEGMENT)]
    with repository.lock():
        if known:
            repository.load_index()
        return store_backup(
            repository, {"vda": segments}, domain=domain, day=day, manifest=manifest(domain, len(data)), chunk=CHUNK
        )


class Shelf:
    """A repository of three backups: two of web that share a segment and a half, one of mail that shares a chunk."""

    def __init__(self, place: Path) -> None:
        chance = random.Random(5)
        self.path = place
        self.first = chance.randbytes(2 * SEGMENT + 300 * KIB)
        self.second = bytearray(self.first)
        self.second[SEGMENT + 512 * KIB : 2 * SEGMENT] = chance.randbytes(512 * KIB)
        self.other = chance.randbytes(256 * KIB) + self.first[:CHUNK]
        repository = new_repository(place)
        self.ids = [store(repository, self.first, 0), store(repository, bytes(self.second), 1)]
        self.ids.append(store(repository, self.other, 2, "mail"))
        self.restic = Restic(place)

    def verify(self, *backups: str, data: bool = False, domain: str | None = None) -> Verified:
        request = VerifyRequest(backups, domain, data)
        return Verification(request, lambda: open_repository(self.path), silent).run()

    def place(self, data: bytes) -> BlobLocation:
        """Where the chunk with these bytes lies."""
        found = open_repository(self.path).index.lookup(BlobKind.DATA, blob_id(data))
        assert found is not None
        return found

    def pack(self, place: BlobLocation) -> Path:
        name = place.pack_id.hex()
        return self.path / "data" / name[:2] / name

    def change(self, path: Path, change: Callable[[bytearray], None]) -> None:
        content = bytearray(path.read_bytes())
        change(content)
        path.unlink()  # it is read-only
        path.write_bytes(content)

    def flip(self, path: Path, position: int) -> None:
        def change(content: bytearray) -> None:
            content[position] ^= 4

        self.change(path, change)

    def restic_finds_damage(self, read: bool = True) -> bool:
        """Whether `restic check` does; without ``read`` only by names and sizes: it asks for a lost pack for 40 s."""
        return self.restic.attempt("check", *(["--read-data"] if read else [])).returncode != 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf") / "repo")


@pytest.fixture
def shelf(made: Shelf, tmp_path: Path) -> Shelf:
    """A copy of it to damage."""
    copy = object.__new__(Shelf)
    copy.__dict__.update(made.__dict__)
    copy.path = tmp_path / "repo"
    shutil.copytree(made.path, copy.path)
    copy.restic = Restic(copy.path)
    return copy


def touched(damage: Damage) -> set[tuple[str, str | None, tuple[tuple[int, int], ...], bool]]:
    return {(one.backup, one.disk, tuple(map(tuple, one.spans)), one.lost) for one in damage.touched}


def test_undamaged(shelf: Shelf) -> None:
    done = shelf.verify()
    assert done.sound
    assert (done.backups, done.disks, done.bytes_read) == (3, 3, 0)
    done = shelf.verify(data=True)
    assert done.sound
    files = sum(path.stat().st_size for path in (shelf.path / "data").glob("*/*"))
    assert done.bytes_read == files
    assert shelf.verify("mail@latest", data=True).bytes_read < files
    assert shelf.verify(domain="web").backups == 2
    assert not shelf.restic_finds_damage()


def test_a_flipped_bit_in_a_chunk_that_backups_share(shelf: Shelf) -> None:
    """All three are named, whichever was verified: the chunk is in the first segment of both, and behind mail's own."""
    place = shelf.place(shelf.first[:CHUNK])
    shelf.flip(shelf.pack(place), place.offset + place.length // 2)
    assert shelf.verify().sound, "without --data nothing is read"
    for chosen in ((), ("mail@latest",), (shelf.ids[0],)):
        done = shelf.verify(*chosen, data=True)
        (damage,) = done.damages
        assert not done.wrong
        assert damage.file == f"data/{place.pack_id.hex()}"
        assert damage.blobs == (blob_id(shelf.first[:CHUNK]).hex(),)
        assert touched(damage) == {
            (shelf.ids[0], "vda", ((0, CHUNK),), True),
            (shelf.ids[1], "vda", ((0, CHUNK),), True),
            (shelf.ids[2], "vda", ((256 * KIB, CHUNK),), True),
        }
    assert shelf.restic_finds_damage()


def test_chunks_side_by_side_are_one_range_and_only_their_backup_is_named(shelf: Shelf) -> None:
    at = SEGMENT + 512 * KIB
    for start in (at + CHUNK, at + 2 * CHUNK):
        place = shelf.place(bytes(shelf.second[start : start + CHUNK]))
        shelf.flip(shelf.pack(place), place.offset + 40)
    (damage,) = shelf.verify(data=True).damages
    assert touched(damage) == {(shelf.ids[1], "vda", ((at + CHUNK, 2 * CHUNK),), True)}


def test_a_missing_pack_is_found_without_reading(shelf: Shelf) -> None:
    place = shelf.place(shelf.other[:CHUNK])
    shelf.pack(place).unlink()
    (damage,) = shelf.verify("web@latest").damages or shelf.verify().damages
    assert damage.reason == "it is missing"
    assert (shelf.ids[2], "vda", ((0, 256 * KIB),), True) in touched(damage)
    assert {one for one in touched(damage) if one[1]} == {(shelf.ids[2], "vda", ((0, 256 * KIB),), True)}
    assert shelf.restic_finds_damage(read=False)


def test_a_truncated_pack_loses_only_what_is_cut_off(shelf: Shelf) -> None:
    data = shelf.first[2 * SEGMENT + 4 * CHUNK :]  # the last chunk of the disk: 44 KiB
    place = shelf.place(data)
    shelf.change(shelf.pack(place), lambda content: content.__delitem__(slice(place.offset + 100, None)))
    (damage,) = shelf.verify().damages
    assert damage.reason.startswith("it is too short")
    lost = {one for one in touched(damage) if one[0] == shelf.ids[0] and one[1]}
    assert lost == {(shelf.ids[0], "vda", ((2 * SEGMENT + 4 * CHUNK, len(data)),), True)}
    assert shelf.restic_finds_damage(read=False)


def test_another_pack_with_the_same_chunk_is_as_good(shelf: Shelf) -> None:
    again = open_repository(shelf.path)
    store(again, shelf.first[:SEGMENT], 3, "twin", known=False)
    places = list(open_repository(shelf.path).index.lookup_all(BlobKind.DATA, blob_id(shelf.first[:CHUNK])))
    assert len(places) == 2
    shelf.flip(shelf.pack(places[0]), places[0].offset + 60)
    (damage,) = shelf.verify(data=True).damages
    assert len(damage.touched) == 4
    assert not any(one.lost for one in damage.touched)
    shelf.flip(shelf.pack(places[1]), places[1].offset + 60)
    damages = shelf.verify(data=True).damages
    assert len(damages) == 2
    assert all(one.lost for damage in damages for one in damage.touched)
    assert shelf.restic_finds_damage()


def test_a_lost_tree_of_a_segment_takes_the_segment(shelf: Shelf) -> None:
    tree = only_in_first(shelf)
    place = next(open_repository(shelf.path).index.lookup_all(BlobKind.TREE, tree))
    shelf.flip(shelf.pack(place), place.offset + 20)
    (damage,) = shelf.verify().damages
    assert touched(damage) == {(shelf.ids[0], "vda", ((SEGMENT, SEGMENT),), True)}
    assert shelf.restic_finds_damage()


def only_in_first(shelf: Shelf) -> BlobId:
    """The tree of segment 1 of the first backup: the second has another."""
    listed = shelf.restic.run("ls", "--json", "--long", shelf.ids[0]).decode().splitlines()
    node = next(one for one in map(json.loads, listed[1:]) if one["path"] == "/web/vda")
    assert node["type"] == "dir"
    repository = open_repository(shelf.path)
    tree = repository.load_tree(repository.find(shelf.ids[0]).tree)
    for name in ("web", "vda", "0001"):
        found = tree.find(name)
        assert found is not None
        assert found.subtree is not None
        if name == "0001":
            return found.subtree
        tree = repository.load_tree(found.subtree)
    raise AssertionError("no segment 1")


def test_a_flipped_bit_in_a_packs_header_touches_no_byte(shelf: Shelf) -> None:
    place = shelf.place(shelf.other[:CHUNK])
    pack = shelf.pack(place)
    shelf.flip(pack, pack.stat().st_size - 10)
    (damage,) = shelf.verify(data=True).damages
    assert not damage.touched
    assert not damage.blobs
    assert shelf.restic_finds_damage()


def test_a_lost_index_file_is_told_with_all_that_it_knew(shelf: Shelf) -> None:
    lost = max((shelf.path / "index").iterdir(), key=lambda path: path.stat().st_size)
    lost.unlink()
    (damage,) = shelf.verify().damages
    assert damage.file == "index"
    assert {one.backup for one in damage.touched} >= {shelf.ids[0]}
    assert shelf.restic_finds_damage()


@pytest.mark.parametrize("kind", ["config", "keys", "index"])
def test_what_all_depends_on_is_named(shelf: Shelf, kind: str) -> None:
    path = shelf.path / kind
    path = path if path.is_file() else next(path.iterdir())
    shelf.flip(path, path.stat().st_size // 2)
    with pytest.raises((Damaged, WrongPassword), match=path.name):
        shelf.verify()
    assert shelf.restic_finds_damage()


def test_a_broken_snapshot_file_hides_no_other(shelf: Shelf) -> None:
    shelf.flip(shelf.path / "snapshots" / shelf.ids[0], 30)
    done = shelf.verify(data=True)
    (damage,) = done.damages
    assert shelf.ids[0] in damage.reason
    assert done.backups == 2
    assert shelf.restic_finds_damage()


def test_sizes_that_do_not_add_up(shelf: Shelf) -> None:
    repository = open_repository(shelf.path)
    with repository.lock():
        wrong = store_backup(repository, {"vda": [b"x" * 100]}, domain="odd", day=4, manifest=manifest("odd", 101))
        gone = store_backup(repository, {"vdb": [b"x"]}, domain="odd", day=5, manifest=manifest("odd", 1))
        none = store_backup(repository, {"vda": [b"x"]}, domain="odd", day=6, manifest=b"{")
    reasons = dict(shelf.verify().wrong)
    assert "100 bytes instead of 101" in reasons.pop(wrong)
    assert "vda is not there" in reasons.pop(gone)
    assert "manifest" in reasons.pop(none)
    assert not reasons


def test_the_command(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    stage = Stage(tmp_path / "stage")
    stage.repo = shelf.path
    assert stage.cli("verify", "--all").out.endswith("data not read (--data reads it): nothing damaged\n")
    for wrong in (("verify",), ("verify", "latest", "--all")):
        assert stage.cli(*wrong).code == 2
    assert stage.cli("verify", "--domain", "nobody").code == 13
    place = shelf.place(shelf.other[:CHUNK])
    shelf.flip(shelf.pack(place), place.offset + 50)
    done = stage.cli("verify", "--all", "--data")
    assert done.code == 15
    assert f"data/{place.pack_id.hex()} is damaged" in done.out
    assert f"vda of backup {shelf.ids[2][:8]} (mail, 2026-05-06 03:02:01) bytes 0-65,535: lost" in done.out
    assert "1 backups cannot be read whole" in done.err
    assert stage.cli("check", "--read-data").code == 15
    (shelf.path / "snapshots" / shelf.ids[0]).unlink()
    shelf.flip(shelf.path / "snapshots" / shelf.ids[1], 30)
    listed = stage.cli("list")
    assert listed.code == 0
    assert shelf.ids[2][:8] in listed.out
    assert f"snapshots/{shelf.ids[1]}" in listed.err


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("header", "its header was changed"),
        ("blob", "at 0: "),
        ("index", "its header does not list what the index says of it"),
    ],
)
def test_a_pack_that_was_wrong_before_it_had_its_name(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, wrong: str, reason: str
) -> None:
    """Made in bad memory, say: the SHA-256 of the file is its name, and only what is in it tells."""
    finish = PackBuilder.finish

    def in_bad_memory(self: PackBuilder) -> Pack | None:
        pack = finish(self)
        if pack is None or pack.blobs[0].kind is not BlobKind.DATA:
            return pack
        if wrong == "index":
            first = pack.blobs[0]
            return replace(pack, blobs=(first._replace(offset=1), *pack.blobs[1:]))
        pack.content[-10 if wrong == "header" else 50] ^= 4
        return replace(pack, id=PackId(hashlib.sha256(pack.content).digest()))

    data = random.Random(7).randbytes(2 * CHUNK)
    with monkeypatch.context() as patch:
        patch.setattr(PackBuilder, "finish", in_bad_memory)
        backup = store(open_repository(shelf.path), data, 3, "odd")
    assert shelf.verify("odd@latest").sound, "without --data nothing is read"
    done = shelf.verify("odd@latest", data=True)
    (damage,) = done.damages
    assert damage.file == f"data/{shelf.place(data[CHUNK:]).pack_id.hex()}"
    assert reason in damage.reason
    assert not done.wrong
    # What lies where the index says, and opens there, is not lost with the header.
    lost = set() if wrong == "header" else {(backup, "vda", ((0, CHUNK),), True)}
    assert touched(damage) == lost


def test_a_pack_that_goes_while_others_are_read(shelf: Shelf) -> None:
    """It was listed, and is gone when its turn comes: damage as any other, not the end of verifying."""
    place = shelf.place(shelf.other[:CHUNK])

    def opened() -> Repository:
        repository = open_repository(shelf.path)
        listed = repository.store.list

        def and_gone(kind: FileKind) -> Iterator[tuple[str, int]]:
            yield from listed(kind)
            if kind is FileKind.DATA:
                shelf.pack(place).unlink()

        repository.store.list = and_gone  # type: ignore[method-assign]
        return repository

    done = Verification(VerifyRequest((), None, True), opened, silent).run()
    (damage,) = done.damages
    assert damage.file == f"data/{place.pack_id.hex()}"
    assert "is missing" in damage.reason
    assert {one for one in touched(damage) if one[1]} == {(shelf.ids[2], "vda", ((0, 256 * KIB),), True)}
    assert done.backups == 3


def test_lost_chunks_come_back_as_documented(shelf: Shelf) -> None:
    """Damaged files away, the index made anew, the data stored again: the older backup is whole again."""
    data = bytes(shelf.second[SEGMENT + 512 * KIB : 2 * SEGMENT])
    shelf.pack(shelf.place(data[:CHUNK])).unlink()
    shelf.restic.run("rebuild-index")
    (damage,) = shelf.verify().damages
    assert (shelf.ids[1], "vda", True) in {(one.backup, one.disk, one.lost) for one in damage.touched}
    repository = open_repository(shelf.path)
    store(repository, bytes(shelf.second), 7)
    assert shelf.verify(data=True).sound
    shelf.restic.check()
