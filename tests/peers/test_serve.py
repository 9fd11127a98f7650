# SPDX-License-Identifier: Apache-2.0
"""``pullback serve`` judged by the NBD clients that people use: libnbd's tools and QEMU's."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import ssl
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from lab.processes import wait_for
from lab.qemu import BareQemu
from lab.s3 import S3Address
from pullback.engine.chunk_cache import ChunkCache
from pullback.engine.events import Event, Serving
from pullback.engine.serving import Serve, ServeRequest, served_disks
from pullback.engine.walking import walk
from pullback.errors import Damaged, NbdRefused, RepositoryLocked, TransferError
from pullback.nbd.address import UnixAddress, parse_uri
from pullback.nbd.blocking import NbdConnection
from pullback.repository.blob import BlobId, BlobKind, BlobLocation, blob_id
from pullback.repository.layout import BackupBuilder
from pullback.repository.snapshots import Snapshot
from tests.support.backups import MOMENT, open_repository
from tests.support.certificates import write_certificates
from tests.support.product import KIB, MIB, Stage, references
from tests.support.restic import needs_restic
from tests.support.s3 import S3Stage
from tests.support.serving import Model, manifest, packs, random_disk, random_model, serving, spoil, store_models

LIMIT = 60
#: A manifest may say another size of segments than ours of 256 MiB; small ones make small tests.
SEGMENT = 16 * MIB

pytestmark = [
    needs_restic,
    pytest.mark.skipif(
        any(shutil.which(tool) is None for tool in ("qemu-img", "nbdcopy", "nbdinfo")),
        reason="qemu-utils and libnbd-bin are the judges here",
    ),
]


def run(*command: str | Path, code: int = 0) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == code, f"{command}: {done.returncode} {done.stderr}"
    return done.stdout


def copied(uri: str, to: Path, *options: str) -> bytes:
    """The whole disk by nbdcopy."""
    run("nbdcopy", *options, uri, to)
    return to.read_bytes()


@pytest.fixture
def stage(lab_dir: Path) -> Stage:
    return Stage(lab_dir)


#: Mixed sizes, as ours and as any other program's; two segments; an end that is not aligned.
LENGTHS = (64 * KIB, 256 * KIB, 8 * MIB, 70001)


def two_disks(stage: Stage) -> dict[str, Model]:
    hole = (bytes(256 * KIB),) * (10 * MIB // (256 * KIB) + SEGMENT // (256 * KIB))
    models = {
        "vda": Model(random_disk(6 * MIB, 1).chunks + hole + random_disk(3 * MIB + 512, 2, (64 * KIB,)).chunks),
        "vdb": random_model(random.Random(3), SEGMENT + 4 * MIB, SEGMENT, LENGTHS),
    }
    store_models(open_repository(stage.repo), models, segment=SEGMENT)
    return models


def test_every_client_reads_the_disks(stage: Stage, lab_dir: Path) -> None:
    models = two_disks(stage)
    with serving(stage, "latest") as server:
        assert {one["disk"]: one["size"] for one in server.ready["exports"]} == {
            target: len(model.data) for target, model in models.items()
        }
        for target, uri in server.uris.items():
            data = models[target].data
            (lab_dir / "raw").write_bytes(data)
            assert copied(uri, lab_dir / "out") == data
            assert copied(uri, lab_dir / "out", "--connections=4", "--requests=16", "--request-size=65536") == data
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, lab_dir / "raw")
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, lab_dir / "out.qcow2")
            run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", lab_dir / "raw", lab_dir / "out.qcow2")
            (told,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
            assert (told["export-size"], told["is_read_only"], told["can_multi_conn"]) == (len(data), True, True)
        listed = json.loads(run("nbdinfo", "--list", "--json", server.uris["vda"].replace("/vda?", "/?")))
        assert [export["export-name"] for export in listed["exports"]] == ["vda", "vdb"]
        done = server.end()
    assert (done.code, done.err) == (0, "")
    assert not Path(parse_uri(server.uris["vda"]).address.path).parent.exists()  # type: ignore[union-attr]


def test_maps_tell_the_holes(stage: Stage, lab_dir: Path) -> None:
    models = two_disks(stage)
    with serving(stage, "latest", "-d", "vda", "--socket", lab_dir / "nbd") as server:
        assert list(server.uris) == ["vda"]
        by_qemu = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", server.uris["vda"]))
        by_nbd = json.loads(run("nbdinfo", "--map", "--json", server.uris["vda"]))
        done = server.end()
    holes = models["vda"].holes()
    assert [(one["offset"], one["length"], one["type"] == 3) for one in joined(by_nbd)] == holes
    # QEMU rounds the end up to its sector.
    assert [(one["start"], one["zero"]) for one in by_qemu] == [(offset, hole) for offset, _, hole in holes]
    assert done.event("served")["bytes_loaded"] == 0


def joined(extents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with neighbours of one kind made one: a server may end a reply wherever it likes."""
    found: list[dict[str, Any]] = []
    for one in extents:
        if found and found[-1]["type"] == one["type"]:
            found[-1]["length"] += one["length"]
        else:
            found.append(dict(one))
    return found


def test_a_large_empty_disk_is_mapped_at_once(stage: Stage) -> None:
    """1 TiB: every segment is the same tree, which is read once."""
    repository = open_repository(stage.repo)
    size, whole = 1 << 40, 256 * MIB
    with repository.lock():
        with repository.new_writer() as writer:
            builder = BackupBuilder(repository, writer, "web", MOMENT)
            content = [writer.add(BlobKind.DATA, bytes(256 * KIB))] * (whole // (256 * KIB))
            tree = builder.add_segment("vda", 0, whole, content)
            for number in range(1, size // whole):
                builder.keep_segment("vda", number, tree)
            top = builder.finish(manifest({"vda": size}))
        repository.save_index()
        repository.save_snapshot(Snapshot(MOMENT, top, (builder.path,), "web", tags=("pullback",)))
    with serving(stage, "latest") as server:
        told = json.loads(run("timeout", "20", "nbdinfo", "--map", "--json", server.uris["vda"]))
    assert [(one["offset"], one["length"], one["type"]) for one in joined(told)] == [(0, size, 3)]


def test_several_clients_read_any_range(stage: Stage) -> None:
    models = two_disks(stage)
    with serving(stage, "latest", "--cache-size", "2M") as server:

        def client(seed: int) -> None:
            rng = random.Random(seed)
            target = rng.choice(list(models))
            data = models[target].data
            with NbdConnection.connect(parse_uri(server.uris[target]).address, target) as connection:
                for _ in range(60):
                    offset = rng.randrange(len(data))
                    length = min(rng.choice([1, 512, 4096, 300_000, 3 * MIB]), len(data) - offset)
                    assert connection.read(offset, length) == data[offset : offset + length]

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(client, range(6)))
        assert server.end(signal.SIGINT).code == 0


def test_a_backup_that_restic_made_of_such_a_directory(stage: Stage, lab_dir: Path) -> None:
    """Restic cuts by content: chunks of any length between 512 KiB and 8 MiB."""
    models = two_disks(stage)
    (theirs := lab_dir / "theirs").mkdir()
    stage.restic.run("restore", "latest", "--target", str(theirs))
    stage.restic.run("forget", "latest")
    stage.restic.run("backup", "--host", "web", "--tag", "pullback", str(theirs / "web"))
    with serving(stage, "latest") as server:
        for target, uri in server.uris.items():
            assert copied(uri, lab_dir / "out") == models[target].data
        told = joined(json.loads(run("nbdinfo", "--map", "--json", server.uris["vda"])))
    holes = [range(one["offset"], one["offset"] + one["length"]) for one in told if one["type"] == 3]
    assert not any(any(models["vda"].data[hole.start : hole.stop]) for hole in holes)
    # Zeroes are cut into 512 KiB from where a chunk with data happens to end, and anew in the next segment.
    empty = {
        number for number in range(32) for hole in holes if number * MIB in hole and (number + 1) * MIB - 1 in hole
    }
    assert empty >= {*range(7, 15), *range(16, 32)}


def test_a_backup_of_a_domain_is_a_backing_file(stage: Stage, bare_qemu: Callable[..., BareQemu]) -> None:
    qemu = bare_qemu([stage.disk("vda", 8 * MIB + 512)], running=True)
    qemu.device_write("vda", MIB, 3 * MIB, 7)
    stage.backup(qemu)
    qemu.device_write("vda", 2 * MIB, 4096, 8)
    state = references(qemu)
    stage.backup(qemu)
    overlay = stage.place / "overlay.qcow2"
    with serving(stage, "latest", "--socket", stage.place / "serve") as server:
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", server.uris["vda"], overlay)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 4096 4096", overlay)
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, stage.place / "out")
    assert (stage.place / "out").read_bytes()[: len(state["vda"])] == (
        state["vda"][:4096] + b"\x09" * 4096 + state["vda"][8192:]
    )


# -- where it listens ---------------------------------------------------------------------------------------------


def test_the_socket_is_private_and_a_dead_one_is_replaced(stage: Stage, lab_dir: Path) -> None:
    two_disks(stage)
    path = lab_dir / "serve"
    with serving(stage, "latest", "--socket", path) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        second = stage.cli("serve", "latest", "--socket", path)
        assert (second.code, "in use" in second.err) == (2, True), second.err
        server.process.kill()
        server.process.wait()
    assert path.exists()
    # The lock of the dead one is in nobody's way, either.
    assert len(list((stage.repo / "locks").iterdir())) == 1
    with serving(stage, "latest", "--socket", path) as server:
        assert stage.cli("prune").code in (11, 14)
        assert server.end().code == 0
    assert not path.exists()
    assert stage.cli("prune").code == 0
    assert not list((stage.repo / "locks").iterdir())
    path.write_text("precious")
    assert stage.cli("serve", "latest", "--socket", path).code == 2
    assert path.read_text() == "precious"


def test_a_new_directory_is_private_and_that_of_a_dead_server_goes(stage: Stage) -> None:
    two_disks(stage)
    with serving(stage, "latest") as server:
        place = Path(parse_uri(server.uris["vda"]).address.path)  # type: ignore[union-attr]
        assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        # Every server that starts now, also another test's, removes what a dead one left under that name.
        aside = place.parent.rename(place.parent.with_name(f".aside-{place.parent.name}"))
        server.process.kill()
        server.process.wait()
    left = (aside / place.name).exists()
    aside.rename(place.parent)
    assert left
    with serving(stage, "latest") as server:
        assert not place.parent.exists()
        server.end()


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_tcp(stage: Stage, lab_dir: Path, host: str) -> None:
    models = two_disks(stage)
    refused = stage.cli("serve", "latest", "--listen", host)
    assert (refused.code, "without TLS lets everybody" in refused.err) == (2, True)
    if host == "[::1]":
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 here")
    with serving(stage, "latest", "--listen", host, "--insecure") as server:
        assert copied(server.uris["vdb"], lab_dir / "out") == models["vdb"].data
        port = parse_uri(server.uris["vdb"]).address.port  # type: ignore[union-attr]
        taken = stage.cli("serve", "latest", "--listen", f"{host}:{port}", "--insecure")
        assert (taken.code, "in use" in taken.err) == (2, True), taken.err
        assert server.end().code == 0


@pytest.mark.parametrize("where", ["unix", "tcp"])
def test_tls(stage: Stage, lab_dir: Path, where: str) -> None:
    models = two_disks(stage)
    (place := lab_dir / "tls").mkdir()
    assert stage.cli("serve", "latest", "--listen", "127.0.0.1", "--tls", place).code == 2
    write_certificates(place)
    for end in ("cert", "key"):
        shutil.copy(place / f"server-{end}.pem", place / f"client-{end}.pem")
    at = ("--socket", lab_dir / "nbd") if where == "unix" else ("--listen", "127.0.0.1")
    with serving(stage, "latest", *at, "--tls", place) as server:
        uri = server.uris["vda"]
        assert uri.startswith("nbds")
        trusted = f"{uri}{'&' if where == 'unix' else '?'}tls-certificates={place}"
        assert "TLS" in run("nbdinfo", trusted)
        assert copied(trusted, lab_dir / "out") == models["vda"].data
        address = parse_uri(uri).address
        if isinstance(address, UnixAddress):
            options = f"driver=nbd,path={address.path},export=vda,tls-creds=t,tls-hostname=localhost"
        else:
            options = f"driver=nbd,host=127.0.0.1,port={address.port},export=vda,tls-creds=t"
        run(
            *("qemu-img", "convert", "--object", f"tls-creds-x509,id=t,endpoint=client,dir={place}"),
            *("--image-opts", options, "-O", "raw", lab_dir / "converted"),
        )
        assert (lab_dir / "converted").read_bytes()[: len(models["vda"].data)] == models["vda"].data
        # Neither without encryption nor without a certificate.
        run("nbdinfo", uri.replace("nbds", "nbd"), code=1)
        stranger = ssl.create_default_context(cafile=str(place / "ca-cert.pem"))
        stranger.check_hostname = False
        with pytest.raises(TransferError), NbdConnection.connect(address, "vda", tls=stranger) as connection:
            connection.read(0, 512)
        assert server.end().code == 0


# -- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.damages_repository("it serves what is left of a damaged backup")
def test_damage_fails_what_touches_it_and_is_told_once(stage: Stage) -> None:
    chunks = [os.urandom(256 * KIB) for _ in range(64)]
    store_models(open_repository(stage.repo), {"vda": Model(tuple(chunks))})
    data = b"".join(chunks)
    spoil(packs(stage.repo)[0], 5 * MIB)
    with serving(stage, "latest") as server:
        lost = []
        with NbdConnection.connect(parse_uri(server.uris["vda"]).address, "vda") as connection:
            for _ in range(2):
                for number in range(64):
                    try:
                        assert connection.read(number * 256 * KIB, 256 * KIB) == chunks[number]
                    except NbdRefused as error:
                        assert error.errno == 5
                        lost.append(number)
            assert lost == [lost[0], lost[0]]
            begin = lost[0] * 256 * KIB
            assert connection.read(0, begin) == data[:begin]
            with pytest.raises(NbdRefused):
                connection.read(0, len(data))
        run("nbdcopy", server.uris["vda"], stage.place / "out", code=1)
        done = server.end()
    notes = [event["message"] for event in done.events if event["event"] == "note"]
    (note,) = notes
    assert f"vda: bytes {begin:,}-{begin + 256 * KIB - 1:,} cannot be read" in note
    assert f"data/{packs(stage.repo)[0].name}" in note
    assert done.code == 0


def test_a_chunk_that_no_index_file_knows(stage: Stage) -> None:
    """Where two are unknown, nothing says where between them one ends."""
    chunks = [os.urandom(256 * KIB) for _ in range(10)]
    backup = store_models(open_repository(stage.repo), {"vda": Model(tuple(chunks))})
    repository = open_repository(stage.repo)
    gone = {blob_id(chunks[2]), blob_id(chunks[4])}
    index = repository.index
    lengths, lookup_all = index.lengths, index.lookup_all

    def lengths_without(kind: BlobKind, blobs: Sequence[BlobId]) -> list[int | None]:
        return [None if blob in gone else length for blob, length in zip(blobs, lengths(kind, blobs), strict=True)]

    def lookup_without(kind: BlobKind, blob: BlobId) -> Iterator[BlobLocation]:
        return iter(()) if blob in gone else lookup_all(kind, blob)

    told: list[tuple[str, int, int]] = []
    cache = ChunkCache(repository, 8 * MIB, 1)
    data = b"".join(chunks)
    begin, end = 2 * 256 * KIB, 5 * 256 * KIB
    with (
        patch.object(index, "lengths", lengths_without),
        patch.object(index, "lookup_all", lookup_without),
        closing(cache),
    ):
        snapshot = repository.find(backup)
        (disk,) = served_disks(repository, cache, snapshot, (), lambda *what: told.append(what[:3]))[1].values()
        assert bytes(disk.read(0, begin)) == data[:begin]
        assert bytes(disk.read(end, len(data) - end)) == data[end:]
        assert disk.extents(0, len(data)) == [(len(data), 0)]
        for at in (begin, end - 1):
            with pytest.raises(Damaged):
                disk.read(at, 1)
    assert told == [("vda", begin, end - begin)]


@pytest.mark.damages_repository("a tree of a segment is gone")
def test_a_segment_whose_tree_is_lost(stage: Stage) -> None:
    models = two_disks(stage)
    data = models["vda"].data
    repository = open_repository(stage.repo)
    piece = next(one for one in walk(repository, repository.find("latest")) if one.disk == "vda" and one.number == 0)
    (place,) = repository.index.lookup_all(BlobKind.TREE, piece.tree)
    spoil(next((stage.repo / "data").glob(f"*/{place.pack_id.hex()}")), place.offset + 20)
    with serving(stage, "latest", "--no-cache") as server:
        uri = server.uris["vda"]
        with NbdConnection.connect(parse_uri(uri).address, "vda", contexts=["base:allocation"]) as connection:
            assert connection.read(SEGMENT, len(data) - SEGMENT) == data[SEGMENT:]
            for _ in range(2):
                with pytest.raises(NbdRefused):
                    connection.read(4096, 512)
            told = connection.extents("base:allocation", 0, len(data))
            assert told[0][:2] == (0, SEGMENT) or told[0][2] == 0
        assert copied(server.uris["vdb"], stage.place / "out") == models["vdb"].data
        notes = [event["message"] for event in server.end().events if event["event"] == "note"]
    assert len(notes) == 1 and f"vda: bytes 0-{SEGMENT - 1:,} cannot be read" in notes[0]


def test_what_cannot_be_served(stage: Stage) -> None:
    assert stage.cli("serve", "latest").code == 13
    two_disks(stage)
    for words, code, said in [
        (("nonsense",), 13, ""),
        (("latest", "-d", "sda"), 2, "no disk sda"),
        (("latest", "--socket", "a", "--listen", "b"), 2, "one of"),
        (("latest", "--socket", "x" * 200), 2, "absolute path"),
        (("latest", "--cache-size", "much"), 2, "no size"),
        (("latest", "--socket", stage.place / "not" / "there"), 2, "cannot listen"),
    ]:
        done = stage.cli("serve", *words)
        assert (done.code, said in done.err) == (code, True), done.err
    assert stage.cli("serve", "latest", env={"RESTIC_PASSWORD": "wrong"}).code == 12
    assert not list((stage.repo / "locks").iterdir())


def test_the_probe_of_a_lock_is_survived(stage: Stage, lab_dir: Path) -> None:
    two_disks(stage)
    with serving(stage, "latest", "--socket", lab_dir / "nbd") as server:
        os.kill(server.process.pid, signal.SIGHUP)  # restic asks so whether a lock's owner lives
        stage.restic.run("unlock")
        assert len(list((stage.repo / "locks").iterdir())) == 1
        run("nbdinfo", server.uris["vda"])
        assert server.end().code == 0
    assert not list((stage.repo / "locks").iterdir())


def test_a_lock_that_is_lost_ends_it(stage: Stage, lab_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_disks(stage)
    monkeypatch.setattr("pullback.engine.serving._LOOK_EVERY", 0.01)
    path = lab_dir / "nbd"

    def tell(event: Event) -> None:
        assert isinstance(event, Serving) and path.exists()
        assert work._lock is not None
        work._lock._lost = "another program removed it"

    request = ServeRequest("latest", address=UnixAddress(str(path)))
    work = Serve(request, lambda: open_repository(stage.repo), tell)
    with pytest.raises(RepositoryLocked, match=r"another program removed it\. Serving ended"):
        asyncio.run(asyncio.wait_for(work.run(), 30))
    assert not path.exists()
    assert not list((stage.repo / "locks").iterdir())


# -- in S3 --------------------------------------------------------------------------------------------------------


def test_a_repository_in_s3(s3: S3Address, lab_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in s3.environment().items():
        monkeypatch.setenv(variable, value)
    stage = S3Stage(lab_dir, s3)
    model = random_disk(24 * MIB)
    store_models(stage.open(), {"vda": model})
    with serving(stage, "latest") as server:
        assert copied(server.uris["vda"], lab_dir / "out") == model.data
        done = server.end()
    assert done.code == 0
    # Each chunk came once.
    assert done.event("served")["bytes_loaded"] == sum(len(one) for one in {c for c in model.chunks if any(c)})


def test_signals_before_it_listens(stage: Stage) -> None:
    two_disks(stage)
    with (
        open_repository(stage.repo).lock(exclusive=True),
        stage.running("serve", "latest", "--lock-retry", "60", "--json") as process,
    ):
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "note"
        process.send_signal(signal.SIGTERM)
        assert wait_for(lambda: process.poll() is not None, "the end", timeout=30)
        assert process.returncode == 130
