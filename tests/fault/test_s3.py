# SPDX-License-Identifier: Apache-2.0
"""An S3 server that fails, lies, loses answers or refuses: what survives it, and what is said."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from math import inf
from pathlib import Path

import pytest

from lab.fault_proxy import (
    Deed,
    Exchange,
    FaultProxy,
    Hold,
    answer,
    away,
    delay,
    drop,
    drop_answer,
    flip,
    shorten,
    truncate,
)
from lab.qemu import BareQemu
from lab.s3 import S3Address
from pullback.errors import Damaged, PullbackError, RepositoryError, RepositoryMissing
from pullback.repository import object_store
from pullback.repository.location import open_store
from pullback.repository.store import FileKind
from tests.support.backups import read_disk, store_backup
from tests.support.product import KIB, MIB, leftovers, references, same
from tests.support.restic import needs_restic
from tests.support.s3 import S3Stage
from tests.support.survival import Fault

pytestmark = needs_restic

Start = Callable[..., BareQemu]

UNSET = "unset"
UNAVAILABLE = answer("503 Slow Down", "SlowDown")
VANISHED = answer("404 Not Found", "NoSuchKey")
PASSING: dict[str, Deed] = {
    "dropped": drop,
    "answer lost": drop_answer,
    "late": delay(0.5),
    "500": answer("500 Internal Server Error", "InternalError"),
    "503": UNAVAILABLE,
}


@pytest.fixture(autouse=True)
def account(s3: S3Address, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def proxy(s3: S3Address) -> Iterator[FaultProxy]:
    with FaultProxy(s3.port) as running:
        yield running


@pytest.fixture
def stage(lab_dir, s3: S3Address, proxy: FaultProxy) -> S3Stage:
    """Its pullback goes through the proxy, its restic does not."""
    return S3Stage(lab_dir, s3, proxy.endpoint)


# -- what passes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that grow as the real ones do, from less."""
    monkeypatch.setattr(object_store, "_FIRST_PAUSE", timedelta(milliseconds=10))


@pytest.mark.fault(Fault.STORE_ERROR)
@pytest.mark.parametrize("deed", PASSING.values(), ids=PASSING)
@pytest.mark.usefixtures("brisk")
def test_a_backup_survives_what_passes(stage: S3Stage, proxy: FaultProxy, deed: Deed) -> None:
    """Every kind of request fails three times in a row."""
    disk = [os.urandom(MIB), os.urandom(MIB)]
    faults = [
        proxy.fault(deed, method, path, times=3)
        for method, path in [
            ("PUT", "/data/"),
            ("PUT", "/index/"),
            ("PUT", "/snapshots/"),
            ("PUT", "/locks/"),
            ("GET", "prefix=.*locks"),
            ("GET", "prefix=.*keys"),
            ("HEAD", "/config"),
            ("POST", "[?&]delete"),
        ]
    ]
    repository = stage.open()
    with repository.lock():
        backup = store_backup(repository, {"vda": disk})
    # What is only late happens once to each request.
    assert all(fault.happened == 3 or (deed is PASSING["late"] and fault.happened > 0) for fault in faults)
    proxy.faults.clear()
    assert read_disk(stage.open(), backup, "vda") == b"".join(disk)
    assert list(stage.open().store.list(FileKind.LOCKS)) == []
    stage.restic.check()


@pytest.mark.fault(Fault.STORE_ERROR)
def test_a_lost_answer_leaves_one_object(stage: S3Stage, proxy: FaultProxy) -> None:
    lost = proxy.fault(drop_answer, "PUT", "/data/", times=2)
    repository = stage.open()
    with repository.lock():
        store_backup(repository, {"vda": [os.urandom(MIB)]})
    assert lost.happened == 2
    stored = list(repository.store.list(FileKind.DATA))
    assert proxy.count("^PUT .*/data/") == len(stored) + 2
    stage.restic.check()


@pytest.mark.fault(Fault.STORE_SLOW)
def test_a_store_that_is_away_for_a_while(stage: S3Stage, proxy: FaultProxy) -> None:
    """Longer than obstore's own pauses would last, and than a gateway takes to start."""
    repository = stage.open()
    begun = time.monotonic()
    proxy.fault(away(5), times=inf)
    with repository.lock():
        store_backup(repository, {"vda": [os.urandom(MIB)]})
    assert time.monotonic() - begun > 5
    stage.restic.check()


@pytest.mark.fault(Fault.STORE_SLOW)
def test_a_store_that_takes_its_time_for_everything(stage: S3Stage, proxy: FaultProxy, bare_qemu: Start) -> None:
    """A fifth of a second for each request: what is read does not pile up in memory until it is stored."""
    threads = os.cpu_count() or 1
    size = 64 * max(threads, 2) * MIB
    qemu = bare_qemu([stage.disk("vda", size)], running=True)
    for at in range(0, size, 16 * MIB):
        qemu.device_write("vda", at, 16 * MIB, os.urandom(16 * MIB))
    hold = Hold()
    proxy.fault(hold, "PUT", "/snapshots/")
    proxy.latency = 0.2
    with stage.running("backup", f"qmp:{qemu.qmp_path}", "--scratch", stage.scratch) as ours:
        assert hold.reached.wait(60)
        status = Path(f"/proc/{ours.pid}/status").read_text()
        hold.release()
        assert ours.wait(60) == 0
    # What all threads have in hand, and the program itself: 130 MB were seen with two threads.
    assert int(status.partition("VmHWM:")[2].split()[0]) * KIB < (80 + 40 * threads) * MIB
    proxy.latency = 0.0
    same(stage.contents(stage.listed()[-1]), references(qemu))
    assert leftovers(qemu, stage.scratch) == []
    stage.restic.check()


@pytest.mark.fault(Fault.STORE_ERROR)
def test_the_product_survives_faults_all_along(stage: S3Stage, proxy: FaultProxy, bare_qemu: Start) -> None:
    qemu = bare_qemu([stage.disk("vda", 48 * MIB)], running=True)
    qemu.device_write("vda", 0, 40 * MIB, os.urandom(40 * MIB))
    faults = [
        proxy.fault(deed, path=path, after=after)
        for after, path in ((0, "/data/"), (1, "/(index|snapshots|locks)/"), (3, "."), (9, "."))
        for deed in PASSING.values()
    ]
    done = stage.cli_backup(qemu)
    assert done.code == 0, done.err
    assert sum(fault.happened for fault in faults) > 12
    proxy.faults.clear()
    same(stage.contents(stage.listed()[0]), references(qemu))
    assert leftovers(qemu, stage.scratch) == []
    stage.restic.check()


# -- what does not pass ------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_PATIENCE", timedelta(seconds=1))


@pytest.mark.fault(Fault.STORE_ERROR)
@pytest.mark.parametrize(
    ("path", "deed", "words"),
    [
        ("/data/", UNAVAILABLE, "the store is overloaded"),
        ("/index/", UNAVAILABLE, "the store is overloaded"),
        ("/snapshots/", UNAVAILABLE, "the store is overloaded"),
        ("/data/", drop, "the connection broke"),
        ("/data/", answer("507 Insufficient Storage", "QuotaExceeded"), "quota is used up"),
        ("/snapshots/", answer("403 Forbidden", "AccessDenied"), "permission is denied"),
        ("/index/", answer("400 Bad Request", "ExpiredToken"), "the session token has expired"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_a_failure_that_stays_costs_this_backup_only(
    stage: S3Stage, proxy: FaultProxy, bare_qemu: Start, path: str, deed: Deed, words: str
) -> None:
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, os.urandom(MIB))
    first, state = stage.backup(qemu), references(qemu)
    qemu.device_write("vda", 0, 64 * KIB, 1)
    proxy.fault(deed, "PUT", path, times=inf)
    with pytest.raises(RepositoryError, match=words) as caught:
        stage.backup(qemu)
    assert caught.value.exit_code == 14
    assert "untouched" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    proxy.faults.clear()
    assert leftovers(qemu, stage.scratch) == []
    assert stage.listed() == [first.id]
    same(stage.contents(first.id), state)
    stage.restic.check()
    state = references(qemu)
    again = stage.backup(qemu)
    assert again.manifest.disks[0].mode == "incremental"
    same(stage.contents(again.id), state)


@pytest.mark.fault(Fault.KILLED_AT_A_STORE_CALL)
def test_killed_while_it_uploads(stage: S3Stage, proxy: FaultProxy, bare_qemu: Start) -> None:
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, os.urandom(MIB))
    first = stage.backup(qemu)
    for path in ("/data/", "/index/", "/snapshots/"):
        qemu.device_write("vda", 0, MIB, os.urandom(MIB))
        hold = Hold()
        proxy.fault(hold, "PUT", path, times=inf)
        with stage.running("backup", f"qmp:{qemu.qmp_path}", "--scratch", stage.scratch) as ours:
            assert hold.reached.wait(60)
            ours.send_signal(signal.SIGKILL)
            ours.wait(30)
        proxy.faults.clear()
        hold.release()
        stage.restic.run("unlock")
        stage.restic.check()
    state = references(qemu)
    last = stage.backup(qemu)
    same(stage.contents(last.id), state)
    assert stage.listed()[0] == first.id
    stage.restic.check()


@pytest.mark.fault(Fault.STORE_ERROR)
@pytest.mark.parametrize("silent", [False, True], ids=["drops", "hangs"])
def test_whoever_presses_ctrl_c_during_an_outage_does_not_wait_for_the_store(
    stage: S3Stage, proxy: FaultProxy, bare_qemu: Start, silent: bool
) -> None:
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.device_write("vda", 0, MIB, os.urandom(MIB))
    first, begun, hold = stage.backup(qemu), threading.Event(), Hold()

    async def outage(exchange: Exchange) -> None:
        begun.set()
        await (hold if silent else drop)(exchange)

    qemu.device_write("vda", 0, 64 * KIB, 1)
    proxy.fault(outage, "PUT", "/data/", times=inf)
    with stage.running("backup", f"qmp:{qemu.qmp_path}", "--scratch", stage.scratch) as ours:
        assert begun.wait(60)
        proxy.fault(outage, times=inf)
        at = time.monotonic()
        ours.send_signal(signal.SIGINT)
        said = ours.communicate(timeout=60)[1]
        took = time.monotonic() - at
    hold.release()
    proxy.faults.clear()
    assert ours.returncode == 130, said
    assert took < 45
    assert "Traceback" not in said
    assert leftovers(qemu, stage.scratch) == []
    assert stage.listed() == [first.id]
    state = references(qemu)
    again = stage.backup(qemu)
    assert again.manifest.disks[0].mode == "incremental"
    same(stage.contents(again.id), state)
    # The lock that could not be removed is the next one's to remove.
    assert list(stage.open().store.list(FileKind.LOCKS)) == []
    stage.restic.check()


# -- a store that lies -------------------------------------------------------------------------------------------------


@pytest.mark.fault(Fault.STORE_ERROR)
@pytest.mark.parametrize("deed", [flip, shorten, VANISHED], ids=["flipped", "shortened", "vanished"])
@pytest.mark.parametrize("kind", [FileKind.DATA, FileKind.INDEX, FileKind.SNAPSHOTS, FileKind.CONFIG, FileKind.KEYS])
def test_a_lie_is_caught_and_the_file_is_named(stage: S3Stage, proxy: FaultProxy, kind: FileKind, deed: Deed) -> None:
    repository = stage.open()
    with repository.lock():
        backup = store_backup(repository, {"vda": [os.urandom(MIB)]})
    names = [name for name, _ in repository.store.list(kind)]
    proxy.fault(deed, "GET", f"/{kind.value}(/|$)", times=inf)
    with pytest.raises(Damaged) as caught:
        read_disk(stage.open(), backup, "vda")
    named = "file config" if kind is FileKind.CONFIG else f"file {kind.value}/"
    assert named in str(caught.value)
    assert kind is FileKind.CONFIG or any(name in str(caught.value) for name in names)


@pytest.mark.fault(Fault.STORE_ERROR)
def test_a_part_that_is_too_short_is_told_by_its_length(stage: S3Stage, proxy: FaultProxy) -> None:
    store, data = stage.open().store, os.urandom(MIB)
    name = hashlib.sha256(data).hexdigest()
    store.save(FileKind.DATA, name, data)
    proxy.fault(shorten, "GET", "/data/")
    with pytest.raises(Damaged, match=f"{name} is too short"):
        store.load(FileKind.DATA, name, 10, 1000)
    assert store.load(FileKind.DATA, name, 10, 1000) == data[10:1010]


@pytest.mark.fault(Fault.STORE_ERROR)
@pytest.mark.parametrize("kind", [FileKind.DATA, FileKind.INDEX, FileKind.SNAPSHOTS, FileKind.CONFIG, FileKind.KEYS])
def test_an_answer_that_breaks_off_is_asked_for_again(stage: S3Stage, proxy: FaultProxy, kind: FileKind) -> None:
    repository, disk = stage.open(), os.urandom(MIB)
    with repository.lock():
        backup = store_backup(repository, {"vda": [disk]})
    cut = proxy.fault(truncate, "GET", f"/{kind.value}(/|$)", times=2)
    assert read_disk(stage.open(), backup, "vda") == disk
    assert cut.happened == 2


# -- places and accounts that are wrong --------------------------------------------------------------------------------


def _closed_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@pytest.mark.parametrize(
    ("environment", "location", "code", "words"),
    [
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "{good}", 14, "does not know this access key"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "{good}", 14, "secret key does not fit"),
        ({"AWS_ACCESS_KEY_ID": UNSET, "AWS_SECRET_ACCESS_KEY": UNSET}, "{good}", 14, "no credentials"),
        ({"AWS_SECRET_ACCESS_KEY": UNSET}, "{good}", 14, "no credentials"),
        ({}, "s3:{endpoint}/no-such-bucket/x", 10, "no bucket of this name"),
        ({}, "{good}/elsewhere", 10, "There is no repository at"),
        ({}, "s3:http://127.0.0.1:{closed}/b", 14, "nothing listens there"),
        ({}, "s3:http://no-such-host.invalid/b", 14, "host name cannot be resolved"),
        ({}, "s3:https://{host}/b", 14, "does not speak TLS"),
        ({"RESTIC_CACERT": "/no/such/file"}, "{good}", 2, "RESTIC_CACERT"),
        ({"AWS_PROFILE": "nobody", "AWS_ACCESS_KEY_ID": UNSET}, "{good}", 2, "AWS_PROFILE"),
    ],
)
def test_a_wrong_place_or_account_is_told_at_once(
    stage: S3Stage, s3: S3Address, environment: dict[str, str], location: str, code: int, words: str
) -> None:
    where = location.format(
        good=stage.direct, endpoint=s3.endpoint, closed=_closed_port(), host=s3.endpoint.removeprefix("http://")
    )
    # Where obstore looks when there are no keys at all: nobody is there.
    elsewhere = {
        "AWS_METADATA_ENDPOINT": f"http://127.0.0.1:{_closed_port()}/169.254.169.254",
        "HOME": str(stage.place),
    }
    begun = time.monotonic()
    unset = [name for name, value in environment.items() if value == UNSET]
    done = stage.cli("list", env={"RESTIC_REPOSITORY": where} | elsewhere | environment, unset=unset)
    assert done.code == code
    assert words in done.err
    assert len(done.err.splitlines()) == 1
    assert "secret" not in done.err.replace("secret key", "")
    assert time.monotonic() - begun < 60  # it would try for minutes


@pytest.mark.fault(Fault.STORE_ERROR)
@pytest.mark.parametrize(
    ("deed", "kind", "words"),
    [
        (answer("400 Bad Request", "ExpiredToken"), RepositoryError, "AWS_SESSION_TOKEN"),
        (answer("301 Moved Permanently", "PermanentRedirect"), RepositoryError, "AWS_DEFAULT_REGION"),
        (answer("400 Bad Request", "AuthorizationHeaderMalformed"), RepositoryError, "AWS_DEFAULT_REGION"),
        (answer("403 Forbidden", "RequestTimeTooSkewed"), RepositoryError, "clock"),
        (answer("404 Not Found", "NoSuchBucket"), RepositoryMissing, "no bucket"),
        (answer("418 I'm a teapot", "Odd"), RepositoryError, r"418 I \(Odd\)"),
        (UNAVAILABLE, RepositoryError, "overloaded"),
    ],
)
def test_what_a_store_refuses_is_told_at_once(
    stage: S3Stage, proxy: FaultProxy, deed: Deed, kind: type[PullbackError], words: str
) -> None:
    proxy.fault(deed, times=inf)
    begun = time.monotonic()
    with pytest.raises(kind, match=words):
        stage.open()
    assert time.monotonic() - begun < 60  # it would try for minutes


def test_the_location_names_the_server(stage: S3Stage, s3: S3Address, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{_closed_port()}")
    assert open_store(stage.direct).exists(FileKind.CONFIG, "config")


def test_a_profile_of_the_credentials_file(stage: S3Stage, s3: S3Address, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stage.place / "credentials"
    path.write_text(
        "[default]\naws_access_key_id = nobody\naws_secret_access_key = x\n"
        f"[other]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    with pytest.raises(RepositoryError, match="does not know this access key"):
        stage.open()
    monkeypatch.setenv("AWS_PROFILE", "other")
    stage.open()
