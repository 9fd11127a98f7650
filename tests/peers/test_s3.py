# SPDX-License-Identifier: Apache-2.0
"""Repositories in a real S3 server: their whole life, with restic as the judge and beside us."""

from __future__ import annotations

import os
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import images
from lab.fault_proxy import FaultProxy, Hold
from lab.qemu import BareQemu
from lab.s3 import S3Address
from pullback.errors import RepositoryError, RepositoryLocked
from tests.support.backups import store_backup
from tests.support.certificates import write_certificates
from tests.support.product import KIB, MIB, reference, references, same
from tests.support.restic import Restic, needs_restic
from tests.support.s3 import S3Stage

pytestmark = needs_restic

Start = Callable[..., BareQemu]


@pytest.fixture(autouse=True)
def account(s3: S3Address, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def proxy(s3: S3Address) -> Iterator[FaultProxy]:
    with FaultProxy(s3.port) as running:
        yield running


def raw(folder: Path, disk: str) -> bytes:
    """A disk as restic restored it."""
    return b"".join(path.read_bytes() for path in sorted(folder.glob(f"*/{disk}/*/*.raw")))


def test_the_whole_life_of_a_repository(lab_dir: Path, bare_qemu: Start, s3: S3Address) -> None:
    stage = S3Stage(lab_dir, s3, made=False)
    qemu = bare_qemu([stage.disk("vda", 24 * MIB)], running=True)
    assert stage.cli("backup", f"qmp:{qemu.qmp_path}", "--scratch", stage.scratch).code == 10
    assert stage.cli("init").code == 0
    assert stage.cli("init").code == 14
    states: dict[str, bytes] = {}
    qemu.device_write("vda", 0, 20 * MIB, os.urandom(20 * MIB))
    for step in range(3):
        if step:
            qemu.device_write("vda", step * MIB, 4 * KIB, step)
        done = stage.cli_backup(qemu, "--json")
        assert done.code == 0, done.err
        (disk,) = done.event("backup")["disks"]
        assert (disk["mode"], disk["bytes_read"]) == (("incremental", 256 * KIB) if step else ("full", 20 * MIB))
        states[done.event("backup")["id"]] = reference(qemu)
    listed = stage.cli("list", "--json").event("backups")["backups"]
    assert [one["id"] for one in listed] == list(states)
    stage.restic.check()
    for number, (backup, state) in enumerate(states.items()):
        out = lab_dir / f"out-{number}"
        assert stage.cli("restore", backup, "--to", out).code == 0
        (image,) = out.rglob("vda*")
        assert images.raw_bytes(image) == state
    stage.restic.run("restore", "latest", "--target", str(lab_dir / "theirs"))
    assert raw(lab_dir / "theirs", "vda") == state
    stage.restic.run("forget", "--keep-last", "1", "--prune", "--max-unused", "0")
    stage.restic.check()
    qemu.device_write("vda", 9 * MIB, 4 * KIB, 9)
    last = stage.backup(qemu)
    assert last.bytes_read == 256 * KIB
    same(stage.contents(last.id), references(qemu))
    same(stage.contents(backup), {"vda": state})
    stage.restic.check()


def test_an_exclusive_lock_of_restic_is_waited_for(
    lab_dir: Path, bare_qemu: Start, s3: S3Address, proxy: FaultProxy
) -> None:
    stage = S3Stage(lab_dir, s3)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    stage.backup(qemu)
    hold = Hold()
    proxy.fault(hold, "GET", "/index/")
    environment = stage.restic.environment() | {"RESTIC_REPOSITORY": stage.direct.replace(s3.endpoint, proxy.endpoint)}
    command = ["restic", "--no-cache", "prune"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as prune:
        try:
            assert hold.reached.wait(60)
            refused = stage.cli_backup(qemu)
            assert refused.code == 11
            assert f"locked exclusively by process {prune.pid} " in refused.err
            with stage.running(
                "backup", f"qmp:{qemu.qmp_path}", "--scratch", stage.scratch, "--lock-retry", "60"
            ) as ours:
                assert ours.stderr is not None
                said = ""
                while "Waiting for the repository" not in said:
                    said = ours.stderr.readline()
                    assert ours.poll() is None
                assert f"process {prune.pid} " in said
                hold.release()
                prune.communicate(timeout=60)
                assert prune.returncode == 0
                assert ours.wait(60) == 0
        finally:
            prune.kill()
    stage.restic.check()
    assert len(stage.listed()) == 2


def test_restic_honours_our_lock_while_we_upload(
    lab_dir: Path, bare_qemu: Start, s3: S3Address, proxy: FaultProxy
) -> None:
    stage = S3Stage(lab_dir, s3, proxy.endpoint)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, os.urandom(MIB))
    hold = Hold()
    proxy.fault(hold, "PUT", "/data/", times=9)
    with stage.running("backup", f"qmp:{qemu.qmp_path}", "--scratch", stage.scratch) as ours:
        assert hold.reached.wait(60)
        refused = stage.restic.attempt("prune")
        assert refused.returncode != 0
        assert f"already locked by PID {ours.pid} ".encode() in refused.stderr
        with pytest.raises(RepositoryLocked):
            stage.open().lock(exclusive=True).acquire()
        hold.release()
        assert ours.wait(60) == 0
    stage.restic.run("prune")
    stage.restic.check()
    same(stage.contents(stage.listed()[0]), references(qemu))


def test_an_authority_of_ones_own(lab_dir: Path, s3: S3Address, monkeypatch: pytest.MonkeyPatch) -> None:
    write_certificates(lab_dir)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(lab_dir / "server-cert.pem", lab_dir / "server-key.pem")
    with FaultProxy(s3.port, tls=tls) as proxy:
        stage = S3Stage(lab_dir, s3, proxy.endpoint)
        with pytest.raises(RepositoryError, match="no authority that is trusted here"):
            stage.open()
        monkeypatch.setenv("RESTIC_CACERT", str(lab_dir / "ca-cert.pem"))
        repository = stage.open()
        with repository.lock():
            store_backup(repository, {"vda": [b"x" * MIB]})
        Restic(stage.location).run("check", "--cacert", str(lab_dir / "ca-cert.pem"))
        assert proxy.count("^PUT .*/snapshots/") == 1
