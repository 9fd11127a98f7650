# SPDX-License-Identifier: Apache-2.0
"""Every kind of file, damaged in every way: what needs it names it, all else works, no wrong byte comes back."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab.qemu import BareQemu
from pullback.engine.backup import BackupResult
from pullback.engine.events import Note, silent
from pullback.engine.listing import list_stored
from pullback.engine.restore import Restore, RestoreRequest
from pullback.errors import Damaged, PullbackError
from pullback.repository import pack
from pullback.repository.blob import BlobKind, blob_id
from pullback.repository.local_store import LocalStore
from pullback.repository.store import FileKind
from tests.support.backups import new_repository, open_repository, store_backup
from tests.support.cli import MANIFEST
from tests.support.product import KIB, MIB, Stage, leftovers, references, same
from tests.support.survival import Fault

pytestmark = pytest.mark.damages_repository("that is what it is about")

DAMAGED, MISSING, WRONG_PASSWORD, NOT_FOUND = 8, 10, 12, 13
KINDS = ("config", "key", "index", "snapshot", "lock", "trees", "data")
chance = random.Random(11)
DISKS = {"old": chance.randbytes(MIB), "new": chance.randbytes(MIB), "other": chance.randbytes(MIB)}


def _flip(at: float) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        position = min(int(len(content) * at), len(content) - 1)
        return content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :]

    return flip


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "flip-first": _flip(0.0),
    "flip-early": _flip(0.1),
    "flip-middle": _flip(0.5),
    "flip-last": _flip(1.0),
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"\0",
    "zeroes": lambda content: bytes(len(content)),
    "garbage": lambda content: random.Random(3).randbytes(len(content)),
    "gone": lambda content: None,
}


@dataclass(frozen=True)
class Good:
    """A repository with two backups of web and one of db; of each kind the file that web's newest backup needs."""

    place: Path
    files: dict[str, Path]
    ids: dict[str, str]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    place = tmp_path_factory.mktemp("good") / "repo"
    new_repository(place)
    for folder in (place / "data").iterdir():
        folder.rmdir()  # so that copies are quick
    ids = {}
    for number, (name, domain) in enumerate((("other", "db"), ("old", "web"), ("new", "web"))):
        before = {path for path in place.rglob("*") if path.is_file()}
        # Another process each time: it shares no pack with the one before.
        manifest = json.dumps(MANIFEST | {"domain": domain}, indent=2).encode() + b"\n" * number
        with open_repository(place).lock():
            disk = {"vda": [DISKS[name]]}
            ids[name] = store_backup(
                open_repository(place), disk, domain=domain, day=number, manifest=manifest, chunk=64 << 10
            )
    made = sorted({path for path in place.rglob("*") if path.is_file()} - before, key=lambda path: path.stat().st_size)
    packs = [path for path in made if path.parent.parent.name == "data"]
    (lock,) = [path for path in _with_lock(place) if path.is_file()]
    files = {
        "config": place / "config",
        "key": next((place / "keys").iterdir()),
        "index": next(path for path in made if path.parent.name == "index"),
        "snapshot": place / "snapshots" / ids["new"],
        "lock": lock,
        "trees": packs[0],
        "data": packs[1],
    }
    assert len(packs) == 2
    return Good(place, {kind: path.relative_to(place) for kind, path in files.items()}, ids)


def _with_lock(place: Path) -> list[Path]:
    """A shared lock of a process that lives, and stays."""
    open_repository(place).lock()._write()
    return list((place / "locks").iterdir())


@pytest.fixture
def copy(good: Good, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good.place, tmp_path / "copy"))


def replace(path: Path, content: bytes | None) -> None:
    path.chmod(0o600)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def name_of(file: Path) -> str:
    """How a message calls it."""
    return f"data/{file.name}" if file.parts[0] == "data" else str(file)


def restored(place: Path, backup: str, to: Path, name: str) -> PullbackError | None:
    """Restore; either the bytes are right, or no image has its name and this is the error."""
    try:
        Restore(RestoreRequest(backup, to, (), "raw"), lambda: open_repository(place), silent).run()
    except PullbackError as error:
        assert not list(to.glob("*.raw"))
        shutil.rmtree(to, ignore_errors=True)
        return error
    assert (to / "vda.raw").read_bytes() == DISKS[name]
    return None


def listed(place: Path) -> tuple[dict[str, str], PullbackError | None]:
    """Each backup with what is wrong with it, or the error."""
    try:
        return {one.id: one.damage for one in list_stored(open_repository(place))}, None
    except PullbackError as error:
        return {}, error


def judge_error(error: PullbackError, kind: str, damage: str, file: Path) -> None:
    """The documented code, the file's name unless there is no file, and a remedy."""
    codes = {("config", "gone"): MISSING, ("key", "gone"): WRONG_PASSWORD, ("snapshot", "gone"): NOT_FOUND}
    assert error.exit_code == codes.get((kind, damage), DAMAGED), error
    if damage != "gone" or kind in ("config", "trees", "data"):
        assert kind == "config" or name_of(file) in str(error), error
    assert error.todo, error


#: What is needed for what.  A header of a pack, at its end, is only for those who lost the index.
NEEDED_BY_ALL = ("config", "key", "index")
HARMLESS = {("trees", "flip-last"), ("data", "flip-last"), ("trees", "longer"), ("data", "longer")}
NO_LOCK = {("lock", "empty"), ("lock", "gone")}


@pytest.mark.fault(Fault.REPOSITORY_DAMAGED)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_or_makes_no_difference(good: Good, copy: Path, tmp_path: Path, kind: str, damage: str) -> None:
    file = good.files[kind]
    replace(copy / file, DAMAGES[damage]((copy / file).read_bytes()))
    backups, list_error = listed(copy)
    new = restored(copy, good.ids["new"], tmp_path / "new", "new")
    old = restored(copy, good.ids["old"], tmp_path / "old", "old")
    other = restored(copy, good.ids["other"], tmp_path / "other", "other")
    for error in (list_error, new, old, other):
        if error is not None:
            judge_error(error, kind, damage, file)

    if (kind, damage) in HARMLESS | NO_LOCK:
        assert (list_error, new, old, other) == (None, None, None, None)
        assert set(backups.values()) == {""}
    elif kind == "lock":
        assert list_error is None  # it takes none
        assert new is not None
    elif kind == "snapshot" and damage == "gone":
        assert (list_error, old, other) == (None, None, None)
        assert good.ids["new"] not in backups
    else:
        assert new is not None
    if kind in ("trees", "data"):
        assert (list_error, old, other) == (None, None, None)
        assert (backups[good.ids["old"]], backups[good.ids["other"]]) == ("", "")
        if kind == "trees" and damage in ("empty", "half", "zeroes", "garbage", "gone"):
            assert name_of(file) in backups[good.ids["new"]]


@pytest.mark.fault(Fault.REPOSITORY_DAMAGED)
@pytest.mark.parametrize(("one", "two"), [("trees", "data"), ("index", "snapshot"), ("config", "snapshot")])
def test_files_with_their_contents_swapped(good: Good, copy: Path, tmp_path: Path, one: str, two: str) -> None:
    """Every seal is right, and every byte is somewhere else."""
    paths = [copy / good.files[kind] for kind in (one, two)]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        replace(path, content)
    error = restored(copy, good.ids["new"], tmp_path / "new", "new")
    assert error is not None
    assert error.exit_code == DAMAGED
    assert any(name_of(good.files[kind]) in str(error) for kind in (one, two)), error


@pytest.mark.fault(Fault.REPOSITORY_DAMAGED)
def test_data_packs_of_two_domains_swapped(good: Good, copy: Path, tmp_path: Path) -> None:
    """Both are of the same length, blob by blob: only hash and MAC can tell."""
    packs = sorted((copy / "data").rglob("*/*"), key=lambda path: path.stat().st_size)[-3:]
    contents = [path.read_bytes() for path in packs]
    for path, content in zip(packs, [*contents[1:], contents[0]], strict=True):
        replace(path, content)
    for name, backup in good.ids.items():
        error = restored(copy, backup, tmp_path / name, name)
        assert error is not None
        assert error.exit_code == DAMAGED
        assert any(path.name in str(error) for path in packs)


@pytest.mark.fault(Fault.REPOSITORY_DAMAGED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_command_tells_it(good: Good, copy: Path, lab_dir: Path, kind: str) -> None:
    stage = Stage(lab_dir)
    stage.repo = copy
    replace(copy / good.files[kind], _flip(0.3)((copy / good.files[kind]).read_bytes()))
    done = stage.cli("restore", good.ids["new"], "--to", lab_dir / "to")
    assert done.code == DAMAGED
    assert name_of(good.files[kind]) in done.err
    assert not (lab_dir / "to").exists()
    if kind in ("trees", "data"):
        assert stage.cli("list").code == 0
        assert stage.cli("restore", "db@latest", "--to", lab_dir / "to").code == 0


@pytest.mark.fault(Fault.REPOSITORY_DAMAGED)
@pytest.mark.parametrize("damage", ["flip-middle", "empty", "garbage"])
def test_a_damaged_snapshot_file_hides_no_other_backup(good: Good, copy: Path, tmp_path: Path, damage: str) -> None:
    victim = copy / good.files["snapshot"]
    replace(victim, DAMAGES[damage](victim.read_bytes()))
    for name in ("old", "other"):
        assert restored(copy, good.ids[name], tmp_path / name, name) is None
    # Whose the broken one is nobody knows: it may be the newest of any domain.
    for spec in ("latest", "db@latest"):
        error = restored(copy, spec, tmp_path / "latest", "other")
        assert error is not None
        assert error.exit_code == DAMAGED
        assert victim.name in str(error)
        assert "by its id" in error.todo
    told: list[Damaged] = []
    shown = list_stored(open_repository(copy), broken=told.append)
    assert [one.id for one in shown] == [good.ids["other"], good.ids["old"]]
    assert [victim.name in str(one) for one in told] == [True]


@pytest.mark.fault(Fault.REPOSITORY_DAMAGED)
def test_a_broken_snapshot_file_is_no_base_and_stops_no_backup(
    lab_dir: Path, bare_qemu: Callable[..., BareQemu]
) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, os.urandom(4096))
    first = stage.backup(qemu)
    qemu.device_write("vda", 0, 4096, 1)
    victim = stage.repo / "snapshots" / stage.backup(qemu).id
    whole = victim.read_bytes()
    replace(victim, _flip(0.3)(whole))
    qemu.device_write("vda", 500 * KIB, 4096, 2)
    state = references(qemu)
    done = stage.cli_backup(qemu, "--json")
    assert done.code == 0
    assert any(victim.name in event["message"] for event in done.events if event["event"] == "note")
    (disk,) = done.event("backup")["disks"]
    assert (disk["mode"], disk["base"]["backup"]) == ("incremental", first.id)
    replace(victim, whole)
    same(stage.contents("latest"), state)


@pytest.mark.fault(Fault.REPOSITORY_DAMAGED)
@pytest.mark.parametrize("kind", ["config", "key", "index", "lock"])
def test_a_backup_into_a_damaged_repository_touches_nothing(
    lab_dir: Path, bare_qemu: Callable[..., BareQemu], kind: str
) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, os.urandom(4096))
    first = stage.backup(qemu)
    _with_lock(stage.repo)
    folder = {"config": stage.repo, "key": stage.repo / "keys", "lock": stage.repo / "locks"}.get(kind)
    folder = folder or stage.repo / "index"
    victim = next(path for path in folder.iterdir() if path.is_file())
    whole = victim.read_bytes()
    replace(victim, _flip(0.3)(whole))
    before = sorted(path for path in stage.repo.rglob("*") if path.is_file())
    bitmaps = qemu.bitmaps("vda")
    for arguments in ([], ["--full"]):
        done = stage.cli_backup(qemu, *arguments)
        assert done.code == DAMAGED, done.err
        assert victim.name in done.err
    assert leftovers(qemu, stage.scratch) == []
    assert sorted(path for path in stage.repo.rglob("*") if path.is_file()) == before
    assert set(qemu.bitmaps("vda")) == set(bitmaps)
    # Mended, all goes on as if nothing had been.
    replace(victim, whole)
    state = references(qemu)
    again = stage.backup(qemu)
    assert again.manifest.disks[0].mode == "incremental"
    assert again.manifest.disks[0].base is not None
    assert again.manifest.disks[0].base.backup == first.id
    same(stage.contents(again.id), state)


@pytest.mark.fault(Fault.REPOSITORY_DAMAGED)
@pytest.mark.parametrize("damage", ["flip-early", "half", "gone"])
@pytest.mark.parametrize("kind", ["trees", "data"])
def test_a_repository_that_lost_a_pack_is_mended_by_a_full_backup(
    lab_dir: Path, bare_qemu: Callable[..., BareQemu], kind: str, damage: str
) -> None:
    """And the repository can be mended: the next full backup stores what was lost."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, os.urandom(4096))
    stage.backup(qemu)
    packs = sorted((stage.repo / "data").glob("*/*"), key=lambda path: path.stat().st_size)
    victim = packs[0 if kind == "trees" else -1]
    replace(victim, DAMAGES[damage](victim.read_bytes()))
    qemu.device_write("vda", 0, 64 << 10, os.urandom(4096))
    done = stage.cli_backup(qemu)
    assert done.code in (0, DAMAGED), done.err
    if kind == "trees":
        assert victim.name in done.err  # passed over as a base, or the reason why there is no backup
    assert leftovers(qemu, stage.scratch) == []

    # As restic's chapter on repairing says: without the pack in the index, the next backup stores it anew.
    victim.unlink(missing_ok=True)
    stage.restic.run("rebuild-index")
    state = references(qemu)
    healed = stage.cli_backup(qemu, "--full", "--json")
    assert healed.code == 0, healed.err
    same(stage.contents(healed.event("backup")["id"]), state)


@dataclass
class Losing:
    """A domain whose disk of four chunks is backed up, each in a pack of its own, and the pack of the second."""

    stage: Stage
    qemu: BareQemu
    chunks: list[bytes]
    first: str

    def lose(self, damage: Callable[[bytes], bytes | None], pick: Callable[[list[Path]], Path] | None = None) -> str:
        """Damage the pack of the second chunk, or the one picked; its name."""
        blob = blob_id(self.chunks[1])
        place = open_repository(self.stage.repo).index.lookup(BlobKind.DATA, blob)
        assert place is not None
        victim = self.stage.repo / "data" / place.pack_id.hex()[:2] / place.pack_id.hex()
        if pick is not None:
            victim = pick(list((self.stage.repo / "data").glob("*/*")))
        replace(victim, damage(victim.read_bytes()))
        return victim.name

    def backup(self, **more: Any) -> tuple[BackupResult, list[str]]:
        """Back up; the backup, and the notes that speak of what was lost."""
        notes: list[str] = []
        done = self.stage.backup(
            self.qemu, lambda event: notes.append(event.message) if isinstance(event, Note) else None, **more
        )
        return done, [note for note in notes if "lost" in note]


@pytest.fixture
def losing(lab_dir: Path, bare_qemu: Callable[..., BareQemu], monkeypatch: pytest.MonkeyPatch) -> Losing:
    monkeypatch.setattr(pack, "PACK_SIZE", 100 * KIB)
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    chunks = [os.urandom(256 * KIB) for _ in range(2)]
    qemu.device_write("vda", 0, 512 * KIB, b"".join(chunks))
    return Losing(stage, qemu, chunks, stage.backup(qemu).id)


def _smallest(packs: list[Path]) -> Path:
    return min(packs, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("lost", ["data", "a byte", "trees"])
def test_a_full_backup_stores_again_what_the_index_still_lists(losing: Losing, lost: str) -> None:
    """Nobody ran rebuild-index: what is lost is known by looking."""
    stage, state = losing.stage, references(losing.qemu)
    # Without its last byte the blobs of a pack are whole, but restic's rebuild-index drops it.
    damage = (lambda content: content[:-1]) if lost == "a byte" else DAMAGES["gone"]
    victim = losing.lose(damage, _smallest if lost == "trees" else None)
    healed, (said,) = losing.backup(full=True, prove="all")
    for words in (f"data/{victim}", "stored again", "pullback verify", "rebuild-index", "repair index"):
        assert words in said
    assert "--full" not in said
    same(stage.contents(healed.id), state)
    if lost == "trees":
        stage.restic.run("forget", losing.first)
    else:
        same(stage.contents(losing.first), state)  # it shares what was stored again
    # What the message says to do helps, and restic is content then.
    stage.restic.run("rebuild-index")
    stage.restic.run("prune")
    stage.restic.check()
    again, notes = losing.backup(full=True)
    assert notes == []
    same(stage.contents(again.id), state)


@pytest.mark.parametrize("damage", ["gone", "half"])
def test_an_incremental_backup_does_not_believe_that_lost_chunks_are_stored(losing: Losing, damage: str) -> None:
    """It reads what the lost pack held, at another place; where that did not change, a full one is needed."""
    victim = losing.lose(DAMAGES[damage])
    losing.qemu.device_write("vda", 768 * KIB, 256 * KIB, losing.chunks[1])
    state = references(losing.qemu)
    made, (said,) = losing.backup()
    assert made.manifest.disks[0].mode == "incremental"
    assert victim in said
    assert "--full" in said
    same(losing.stage.contents(made.id), state)


def test_an_incremental_backup_looks_at_no_pack_that_it_does_not_need(
    losing: Losing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs what changed, not what the repository holds."""
    listed: list[FileKind] = []
    looked: list[int] = []
    list_files, load = LocalStore.list, LocalStore.load

    def note_list(self: LocalStore, kind: FileKind) -> Iterator[tuple[str, int]]:
        listed.append(kind)
        return list_files(self, kind)

    def note_load(self: LocalStore, kind: FileKind, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if length == 1:
            looked.append(offset)
        return load(self, kind, name, offset, length)

    monkeypatch.setattr(LocalStore, "list", note_list)
    monkeypatch.setattr(LocalStore, "load", note_load)
    # Nothing of the first is stored yet; of the second the chunk of zeroes is.
    for place, data, looks in ((512 * KIB, os.urandom(256 * KIB), 0), (0, bytes(256 * KIB), 1)):
        losing.qemu.device_write("vda", place, 256 * KIB, data)
        losing.backup()
        assert FileKind.DATA not in listed
        assert len(looked) == looks
    losing.backup(full=True)
    assert listed.count(FileKind.DATA) == 1
    assert len(looked) == 1


def test_a_proof_that_meets_a_lost_pack_says_how_to_mend_the_index(losing: Losing) -> None:
    victim = losing.lose(DAMAGES["gone"])
    losing.qemu.device_write("vda", 0, 512, 1)
    with pytest.raises(Damaged) as raised:
        losing.backup(prove="all")
    for words in ("cannot be read back", victim, "rebuild-index", "repair index", "--full", "No backup was stored"):
        assert words in str(raised.value)
    # It helps.
    losing.stage.restic.run("rebuild-index")
    state = references(losing.qemu)
    healed, _ = losing.backup(full=True, prove="all")
    same(losing.stage.contents(healed.id), state)
    losing.stage.restic.run("prune")


def test_a_pushed_disk_is_read_whole_whatever_became_of_its_last_backup(
    lab_dir: Path, bare_qemu: Callable[..., BareQemu]
) -> None:
    """The last backup can be read, but not how it cut the disk: that is in a pack of the one before."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB, iothread=True)], running=True)
    qemu.device_write("vda", 0, MIB, os.urandom(4096))
    stage.backup(qemu)
    victim = _smallest(list((stage.repo / "data").glob("*/*")))
    stage.backup(qemu)
    replace(victim, None)
    state = references(qemu)
    same(stage.contents(stage.backup(qemu, full=True).id), state)
