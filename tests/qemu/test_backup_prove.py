# SPDX-License-Identifier: Apache-2.0
"""``backup --prove``: right backups pass, a bitmap that lied and storage that alters data are found, and said."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest

from lab.qemu import BareQemu, qemu_version
from pullback.engine import prove as engine_prove
from pullback.engine.domain import Domain, DomainAddress, open_domain
from pullback.engine.events import Event, Frozen
from pullback.engine.prove import Proving
from pullback.engine.pull import Pull
from pullback.errors import CommandFailed, Damaged, ProofFailed
from pullback.nbd.client_codec import ClientCodec
from pullback.plan import prove as plan_prove
from pullback.plan.method import SAVED_UNIT
from pullback.plan.prove import Proved
from pullback.repository.blob import BlobKind
from pullback.repository.repository import Repository
from pullback.repository.writer import PackWriter
from tests.support.backups import new_repository
from tests.support.product import KIB, MIB, Stage, chain, leftovers, references, run_state, same

Start = Callable[..., BareQemu]
ODD = 8 * MIB + 5 * 512
HOW = ["sample", "all"]


@pytest.mark.parametrize("how", HOW)
def test_right_backups_are_proved(lab_dir: Path, bare_qemu: Start, how: Literal["sample", "all"]) -> None:
    """Full and incremental, two disks, zeroes and discards, and a domain that overwrites all of it meanwhile."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", ODD), stage.disk("vdb", 3 * MIB)], running=True)
    qemu.device_write("vda", 0, 6 * MIB, os.urandom(256))
    qemu.device_write("vdb", 70 * KIB, 100 * KIB, 0x13)

    def overwrite(event: Event) -> None:
        if isinstance(event, Frozen):
            for disk, size in (("vda", 8 * MIB), ("vdb", 3 * MIB)):
                qemu.device_write(disk, 0, 100 * KIB, 0x41)
                qemu.device_zero(disk, 256 * KIB + 512, size - 512 * KIB, unmap=True)
                qemu.device_write(disk, size - MIB + 1024, 512 * KIB, 0x42)

    states, backups = [references(qemu)], [stage.backup(qemu, overwrite, prove=how)]
    qemu.device_write("vda", 3 * MIB + 4096, 4096, 0x51)
    qemu.device_discard("vda", 7 * MIB, 128 * KIB)
    states.append(references(qemu))
    backups.append(stage.backup(qemu, overwrite, prove=how))
    for _ in range(2):
        qemu.device_write("vdb", 2 * MIB, 512, 0x61)
        states.append(references(qemu))
        backups.append(stage.backup(qemu, prove=how))
    assert states[0] != states[1] != states[2]
    for backup, state in zip(backups, states, strict=True):
        same(stage.contents(backup.id), state)
        assert backup.proved is not None
        assert backup.proved.changed + backup.proved.unchanged == ODD + 3 * MIB
        assert backup.proved.of_unchanged == backup.proved.unchanged
    assert backups[0].proved == Proved(ODD + 3 * MIB, 0, 0)
    assert backups[3].proved == Proved(256 * KIB, ODD + 2816 * KIB, ODD + 2816 * KIB)
    assert [backup.manifest.disks[0].mode for backup in backups] == ["full", *["incremental"] * 3]
    assert leftovers(qemu, stage.scratch) == []


def test_the_command_proves_and_says_how_much(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 4 * MIB)], running=True)
    qemu.device_write("vda", 0, MIB, 0x11)
    domain, scratch = f"qmp:{qemu.qmp_path}", ("--scratch", stage.scratch)
    # Alone in front of the domain, which is not its value.
    first = stage.cli("backup", "--prove", domain, *scratch)
    assert first.code == 0, first.err
    assert (
        "proved: 4.00 MiB that changed and 0 B of 0 B that did not change are stored as they were frozen" in first.out
    )
    qemu.device_write("vda", 0, 512, 0x12)
    second = stage.cli_backup(qemu, "--prove=all", "--json")
    assert second.code == 0
    rest = 4 * MIB - 256 * KIB
    assert second.event("backup")["proved"] == {"changed": 256 * KIB, "unchanged": rest, "of_unchanged": rest}
    assert second.event("progress") == {"event": "progress", "work": "prove", "done": 4 * MIB, "total": 4 * MIB}
    assert stage.cli_backup(qemu, "--json").event("backup")["proved"] is None
    wrong = stage.cli_backup(qemu, "--prove=most")
    assert wrong.code == 2
    assert "--prove=most" in wrong.err
    for how, said in (("--prove", "1,024 random unchanged ones of each disk"), ("--prove=all", "all unchanged ones")):
        dry = stage.cli_backup(qemu, how, "--dry-run")
        assert dry.code == 0
        assert f"all changed chunks and {said} are read back and compared" in dry.err
    assert leftovers(qemu, stage.scratch) == []


def lie(qemu: BareQemu, disk: str, *writes: tuple[int, int]) -> None:
    """Write through the device while no bitmap of the disk records."""
    node = qemu.qmp("query-block")
    inserted = next(block["inserted"] for block in node if block.get("inserted", {}).get("node-name") == f"node-{disk}")
    recording = [name for name, records in chain(qemu, disk).items() if records]
    for name in recording:
        qemu.qmp("block-dirty-bitmap-disable", node=inserted["node-name"], name=name)
    for offset, length in writes:
        qemu.device_write(disk, offset, length, 0x77)
    for name in recording:
        qemu.qmp("block-dirty-bitmap-enable", node=inserted["node-name"], name=name)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("at", [MIB, 6 * MIB], ids=["data", "zeroes"])
def test_a_bitmap_that_lied_is_found_and_said(
    lab_dir: Path, bare_qemu: Start, how: Literal["sample", "all"], at: int
) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda"), stage.disk("vdb", MIB)], running=True)
    qemu.device_write("vda", 0, 4 * MIB, 0x11)
    first = stage.backup(qemu, prove=how)
    lie(qemu, "vda", (at + 1024, 3000), (at + 512 * KIB, 512))
    qemu.device_write("vda", 3 * MIB, 512, 0x12)
    before = [chain(qemu, disk.id) for disk in qemu.disks]
    # Without a proof nobody would know.
    with pytest.raises(ProofFailed) as raised:
        stage.backup(qemu, prove=how)
    said = str(raised.value)
    assert f"vda at bytes {at + 1024:,}-{at + 4095:,}, {at + 512 * KIB:,}-{at + 512 * KIB + 511:,}, which did" in said
    for words in ("No backup was stored", "dirty bitmap did not record writes", "backups of vda since its", "--full"):
        assert words in said
    assert "vdb" not in said
    assert "memory or storage" not in said
    assert stage.listed() == [first.id]
    # Nobody builds on that bitmap again; the other disk's told the truth.
    assert [chain(qemu, disk.id) for disk in qemu.disks] == [{}, before[1]]
    assert "The checkpoints of vda that backups had made were removed" in said
    assert run_state(qemu) == "running"
    assert leftovers(qemu, stage.scratch) == []
    state = references(qemu)
    next_one = stage.backup(qemu)
    assert [disk.mode for disk in next_one.manifest.disks] == ["full", "incremental"]
    assert "is not in this disk's chain" in next_one.manifest.disks[0].reason
    same(stage.contents(next_one.id), state)
    qemu.device_write("vda", 0, 512, 0x13)
    state = references(qemu)
    last = stage.backup(qemu, prove=how)
    assert last.manifest.disks[0].mode == "incremental"
    same(stage.contents(last.id), state)


def test_what_else_was_built_on_a_bitmap_that_lied(
    lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another repository's backups would be as wrong; a user's own checkpoint is not ours to remove."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, 0x11)
    new_repository(other := lab_dir / "other")
    first = stage.backup(qemu)
    asyncio.run(name_a_point(qemu, "mine", str(stage.scratch)))
    elsewhere = stage.backup(qemu, repo=other)
    assert len(chain(qemu)) == 3
    lie(qemu, "vda", (0, 512))
    with monkeypatch.context() as patched, pytest.raises(ProofFailed) as raised:
        patched.setattr(Domain, "prune", mock.AsyncMock(side_effect=CommandFailed("transaction", "GenericError", "no")))
        stage.backup(qemu, prove="all")
    said = str(raised.value)
    assert "The checkpoints of vda could not be removed (QEMU refused transaction: no), so that an incremental" in said
    assert "--full" in said
    assert (len(chain(qemu)), stage.listed()) == (3, [first.id])
    with pytest.raises(ProofFailed, match="Do not trust changes since mine, either") as raised:
        stage.backup(qemu, prove="all")
    assert raised.value.lied == ("vda",)
    assert chain(qemu) == {"pullback-mine": True}
    state = references(qemu)
    for repo, before in ((stage.repo, first), (other, elsewhere)):
        made = stage.backup(qemu, repo=repo)
        assert made.manifest.disks[0].mode == "full"
        assert f"checkpoint {before.manifest.disks[0].checkpoint} is not" in made.manifest.disks[0].reason
        same(stage.contents(made.id, repo=repo), state)


async def name_a_point(qemu: BareQemu, name: str, scratch: str) -> None:
    """Leave a checkpoint of a user's behind."""
    async with open_domain(DomainAddress(str(qemu.qmp_path))) as domain:
        snapshot = await domain.create_snapshot(checkpoint=name, scratch=scratch)
        await domain.end_snapshot(snapshot)


def test_the_command_ends_with_its_own_exit_code(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, 0x11)
    stage.backup(qemu)
    lie(qemu, "vda", (0, 512))
    failed = stage.cli_backup(qemu, "--prove")
    assert failed.code == 16
    assert "vda at bytes 0-511, which did not change by the dirty bitmap" in failed.err
    assert failed.out == ""


def test_many_differences_are_not_all_looked_for(
    lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_prove, "_ENOUGH", 3)
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 8 * MIB)], running=True)
    qemu.device_write("vda", 0, 8 * MIB, 0x11)
    stage.backup(qemu)
    # The end stays as it was: a survey finds that.
    lie(qemu, "vda", *((at * MIB + 512 * n, 512) for at in range(7) for n in range(0, 20, 2)))
    with pytest.raises(ProofFailed, match=r"vda at bytes [\d,]+-[\d,]+, [\d,]+-[\d,]+, [\d,]+-[\d,]+ and at least"):
        stage.backup(qemu, prove="all")


def test_a_pack_that_is_damaged_in_between_is_found(
    lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda")], running=True)
    qemu.device_write("vda", 0, 4 * MIB, os.urandom(MIB))
    run = Proving.run

    def damage(self: Proving, threads: int) -> None:
        pack = max((stage.repo / "data").glob("*/*"), key=lambda path: path.stat().st_size)
        pack.chmod(0o600)
        with pack.open("r+b") as file:
            file.seek(100 * KIB)
            (byte,) = file.read(1)
            file.seek(100 * KIB)
            file.write(bytes([byte ^ 1]))
        run(self, threads)

    with monkeypatch.context() as patched:
        patched.setattr(Proving, "run", damage)
        with pytest.raises(Damaged) as raised:
            stage.backup(qemu, prove="sample")
    said = str(raised.value)
    for words in ("cannot be read back", "data blob", "No backup was stored", "pullback prune"):
        assert words in said
    assert (raised.value.exit_code, stage.listed(), chain(qemu)) == (8, [], {})
    assert leftovers(qemu, stage.scratch) == []
    # What the message says to do helps.
    assert stage.cli("prune").code == 0
    state = references(qemu)
    same(stage.contents(stage.backup(qemu, prove="sample").id), state)


def test_bytes_that_were_altered_on_the_way_in_are_found(
    lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that alters a byte before it is hashed: every hash in the repository is right."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, bytes(range(1, 256)))
    add = PackWriter.add

    def alter(self: PackWriter, kind: BlobKind, data: Any, *more: Any) -> Any:
        if kind is BlobKind.DATA and len(data) == 256 * KIB and data[0] == 1:
            data = bytearray(data)
            data[5000] ^= 1
        return add(self, kind, data, *more)

    with monkeypatch.context() as patched:
        patched.setattr(PackWriter, "add", alter)
        with pytest.raises(ProofFailed) as raised:
            stage.backup(qemu, prove="sample")
    said = str(raised.value)
    assert "vda at bytes 4,608-5,119, which changed since the base or are read for the first time" in said
    assert "memory or storage alters data" in said
    assert "did not record" not in said
    assert stage.listed() == []


def test_an_index_that_was_not_written_is_found(
    lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this process knows of what it stored is not what counts."""
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, 1)
    with monkeypatch.context() as patched:
        patched.setattr(Repository, "_save_packs", lambda *_: None)
        with pytest.raises(Damaged, match="cannot be read back"):
            stage.backup(qemu, prove="sample")
    assert stage.listed() == []


def test_a_pushed_disk_is_refused_before_anything_is_frozen(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB), stage.disk("vdb", MIB, iothread=True)], running=True)
    address = {"type": "unix", "data": {"path": str(qemu.directory / "other")}}
    if qemu_version() < (9, 0, 0):
        for more in ((), ("--dry-run",)):
            refused = stage.cli_backup(qemu, "--prove", *more)
            assert refused.code == 5
            for words in ("vdb is on an I/O thread", "cannot be proved", "Nothing was touched", "leave --prove out"):
                assert words in refused.err
    qemu.qmp("nbd-server-start", addr=address)
    qemu.qmp("block-export-add", type="nbd", id="other", node_name="node-vda", name="other")
    refused = stage.cli_backup(qemu, "--prove", "--disk", "vda")
    assert refused.code == 5
    assert "another program uses QEMU's one NBD server" in refused.err
    assert "frozen at" not in refused.err
    qemu.qmp("block-export-del", id="other")
    qemu.qmp("nbd-server-stop")
    assert chain(qemu) == {}
    assert leftovers(qemu, stage.scratch) == []


def test_no_request_of_a_proof_crosses_a_saved_unit_on_an_old_qemu(
    lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    if qemu_version() >= (8, 0, 0):
        pytest.skip("frozen views are exact")
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", ODD)], running=True)
    qemu.device_write("vda", 0, 2 * MIB, 1)
    seen: list[tuple[int, int]] = []
    ask, run = ClientCodec.read, Proving.run

    def record(self: ClientCodec, offset: int, buffer: memoryview) -> tuple[int, bytes]:
        seen.append((offset, len(buffer)))
        return ask(self, offset, buffer)

    def recorded(self: Proving, threads: int) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(ClientCodec, "read", record)
            run(self, threads)

    monkeypatch.setattr(Proving, "run", recorded)
    stage.backup(qemu, prove="all")
    assert sum(length for _, length in seen) == ODD
    assert all(offset // SAVED_UNIT == (offset + length - 1) // SAVED_UNIT for offset, length in seen)


def test_what_is_not_drawn_is_let_go(lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample costs the domain the scratch of a sample."""
    monkeypatch.setattr(plan_prove, "SAMPLE", 2)
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 16 * MIB)], running=True)
    qemu.device_write("vda", 0, 16 * MIB, 1)
    stage.backup(qemu)
    qemu.device_write("vda", 0, 512, 2)
    state = references(qemu)
    run, room = Pull.run, 0

    def overwrite(self: Pull, *arguments: Any) -> None:
        nonlocal room
        qemu.device_write("vda", 0, 16 * MIB, 3)
        room = sum(file_blocks(qemu, stage.scratch))
        run(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Pull, "run", overwrite)
        made = stage.backup(qemu, prove="sample")
    assert made.proved == Proved(256 * KIB, 512 * KIB, 16 * MIB - 256 * KIB)
    assert 768 * KIB <= room < 2 * MIB
    same(stage.contents(made.id), state)


def file_blocks(qemu: BareQemu, place: Path) -> list[int]:
    """Bytes that QEMU's open files in a directory take there; the scratch has no name any more."""
    found = []
    for link in Path(f"/proc/{qemu.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # QEMU closed it meanwhile
            if os.readlink(link).startswith(str(place)):
                found.append(link.stat().st_blocks * 512)
    return found


def test_a_stopped_domain_is_proved(lab_dir: Path) -> None:
    stage = Stage(lab_dir)
    disk = stage.disk("vda", 4 * MIB)
    for how in ("--prove", "--prove=all"):
        done = stage.cli("backup", how, f"disk:{disk.path}", "--scratch", stage.scratch, "--name", "off", "--json")
        assert done.code == 0, done.out
        proved = done.event("backup")["proved"]
        assert proved["changed"] + proved["unchanged"] == 4 * MIB
    assert proved["changed"] == 0
