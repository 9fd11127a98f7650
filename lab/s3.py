# SPDX-License-Identifier: Apache-2.0
"""A real S3 server on loopback: Ceph's RADOS gateway with one monitor and one disk daemon, in a directory of its own.

    S3Server(place)      started by this process, stopped by it
    shared_s3(place)     one for all processes that name the same place: the first starts it, the last stops it

    test process ─┐
    test process ─┼─ unix socket ─► python -m lab.s3 ─► ceph-mon, ceph-osd, radosgw
    test process ─┘

The kernel closes the connection of a process that dies, so the server never outlives its users, however they end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import obstore
from obstore.store import S3Store

from lab.processes import LabError, Process, run, wait_for

ACCESS_KEY = "lab"
SECRET_KEY = "lab-secret"
REGION = "us-east-1"
DISK_BYTES = 8 << 30
"""Size of the disk daemon's sparse file."""

_START_LIMIT = 90.0
_OSD_ATTEMPTS = 5
_ATTEMPTS = 3

_CONFIGURATION = """\
[global]
fsid = {fsid}
mon_host = v1:127.0.0.1:{mon_port}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
run_dir = {place}
log_file = {place}/$name.log
admin_socket =
mon_data = {place}/mon
osd_data = {place}/osd
rgw_data = {place}/rgw
keyring = {place}/keyring
mon_allow_pool_size_one = true
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
mon_max_pg_per_osd = 1000
osd_crush_chooseleaf_type = 0
osd_class_update_on_start = false
osd_crush_update_on_start = false
osd_objectstore = bluestore
bluestore_block_size = {disk_bytes}
debug_ms = 0
[client.rgw.a]
rgw_frontends = beast endpoint=127.0.0.1:{s3_port} tcp_nodelay=1
rgw_thread_pool_size = 32
"""


@dataclass(frozen=True, slots=True)
class S3Address:
    """Where an S3 server is, and who may use it."""

    endpoint: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def environment(self) -> dict[str, str]:
        """The variables by which AWS's tools, restic and pullback know the account."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
        }

    def store(self, bucket: str, prefix: str | None = None) -> S3Store:
        """A bucket, to look into past whatever is tested."""
        return S3Store(
            bucket,
            prefix=prefix,
            endpoint=self.endpoint,
            region=REGION,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            client_options={"allow_http": True},
        )

    def make_bucket(self, name: str | None = None) -> str:
        """Make a bucket, called by chance unless named, and return its name; LabError with the server's words."""
        name = name or f"b-{uuid.uuid4().hex[:12]}"
        url = obstore.sign(self.store(name), "PUT", "", timedelta(minutes=5))
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=60).close()
        except urllib.error.HTTPError as error:
            raise LabError(f"bucket {name}: {error.read().decode(errors='replace')}") from error
        return name


class S3Server:
    """The daemons; a context manager that starts them (some 10 s) and leaves nothing behind but `place` itself."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._conf = place / "ceph.conf"
        self._processes: list[Process] = []

    def __enter__(self) -> S3Address:
        try:
            for _ in range(_ATTEMPTS - 1):
                try:
                    return self.start()
                except LabError:
                    # Another program may have taken a port meanwhile, and be who answered.
                    self.close()
                    self._clear()
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> S3Address:
        """Start everything, from nothing; LabError with what the daemons said."""
        mon_port, s3_port = _free_ports(2)
        fsid = str(uuid.uuid4())
        self._conf.write_text(
            _CONFIGURATION.format(
                fsid=fsid, mon_port=mon_port, s3_port=s3_port, place=self.place, disk_bytes=DISK_BYTES
            )
        )
        (self.place / "keyring").touch()
        for name in ("mon", "osd", "rgw"):
            (self.place / name).mkdir()
        monmap = self.place / "monmap"
        address = f"[v1:127.0.0.1:{mon_port}]"
        run(["monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", address, monmap])
        run(["ceph-mon", "-c", self._conf, "--mkfs", "-i", "a", "--monmap", monmap])
        self._daemon("ceph-mon", "-i", "a")
        self._start_osd()
        gateway = self._daemon("radosgw", "-n", "client.rgw.a")
        found = S3Address(f"http://127.0.0.1:{s3_port}")
        wait_for(lambda: self._answers(gateway, s3_port), "the S3 server's first answer", _START_LIMIT)
        self._admin("user", "create", "--uid=lab", "--display-name=lab", *_keys(found))
        return found

    def close(self) -> None:
        """End the daemons, the last started first; safe to call twice."""
        while self._processes:
            # Nothing they hold is wanted any more.
            self._processes.pop().end(grace=0.5)

    def _clear(self) -> None:
        for name in ("mon", "osd", "rgw"):
            shutil.rmtree(self.place / name, ignore_errors=True)
        for path in self.place.glob("*.out"):
            path.unlink()

    def _daemon(self, program: str, *arguments: str) -> Process:
        process = Process([program, "-c", str(self._conf), *arguments, "-f"], self.place / f"{program}.out")
        self._processes.append(process)
        return process

    def _ceph(self, *arguments: str) -> str:
        # Its own limit, besides the one of run(): it waits for a monitor that is not there for five minutes.
        return run(["ceph", "-c", self._conf, "--connect-timeout", "20", *arguments], timeout=60).decode()

    def _admin(self, *arguments: str) -> None:
        run(["radosgw-admin", "-c", self._conf, "-n", "client.rgw.a", *arguments])

    def _start_osd(self) -> None:
        """Make the disk daemon's disk and start it.

        Ceph 16's can lose a race at its first start (it gets no map: "wrong fsid") and then ends: it is started again.
        """
        name = str(uuid.uuid4())
        number = self._ceph("osd", "new", name).strip()
        run(["ceph-osd", "-c", self._conf, "-i", number, "--mkfs", "--osd-uuid", name])
        self._ceph("osd", "crush", "add", f"osd.{number}", "1.0", "root=default", "host=lab")
        for _ in range(_OSD_ATTEMPTS):
            daemon = self._daemon("ceph-osd", "-i", number)
            if wait_for(lambda d=daemon: self._osd_state(d), "the disk daemon", _START_LIMIT) == "up":  # type: ignore[misc]
                return
        raise LabError(f"ceph-osd did not come up: {daemon.output()[-2000:]}")

    def _osd_state(self, daemon: Process) -> str | None:
        if not daemon.running():
            return "ended"
        try:
            return "up" if json.loads(self._ceph("osd", "stat", "-f", "json"))["num_up_osds"] else None
        except LabError:
            return None  # the monitor refuses now and then while daemons come

    def _answers(self, gateway: Process, port: int) -> bool:
        if not gateway.running():
            raise LabError(f"radosgw did not start: {gateway.output()[-2000:]}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True


def _keys(address: S3Address) -> tuple[str, str]:
    return f"--access-key={address.access_key}", f"--secret={address.secret_key}"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in held]


# -- one for several processes -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def shared_s3(place: Path, environment: Mapping[str, str] | None = None) -> Iterator[S3Address]:
    """The S3 server of all processes that name this place (a directory, with a short path); started if none runs.

    `environment` is the server's.  When the last user leaves, it is gone before this returns.
    """
    place.mkdir(exist_ok=True)
    connection, address = _join(place, environment)
    with connection:
        try:
            yield address
        finally:
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(60)
            connection.recv(1)  # its end: others are left, or the server is gone


def _join(place: Path, environment: Mapping[str, str] | None) -> tuple[socket.socket, S3Address]:
    door = place / "socket"
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (joined := _greeted(door)) is not None:
            return joined
        door.unlink(missing_ok=True)
        log = place / "log"
        with log.open("ab") as out:
            keeper = subprocess.Popen(
                [sys.executable, "-m", "lab.s3", str(door)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment,
                cwd=Path(__file__).parents[1],
            )

        def ready() -> tuple[socket.socket, S3Address] | None:
            if keeper.poll() is not None:
                raise LabError(f"the S3 server did not start: {log.read_text(errors='replace')[-3000:]}")
            return _greeted(door)

        try:
            return wait_for(ready, "the S3 server", 2 * _START_LIMIT)
        except BaseException:
            keeper.terminate()
            keeper.wait()
            raise


def _greeted(door: Path) -> tuple[socket.socket, S3Address] | None:
    """A connection to the keeper of a server, and what it said; None if none listens, or it is about to end."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(door))
        connection.settimeout(60)
        with connection.makefile("r") as said:
            line = said.readline()
    except OSError as error:
        connection.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET):
            return None
        raise
    if not line:
        connection.close()
        return None
    connection.settimeout(None)
    return connection, S3Address(**json.loads(line))


class _Keeper:
    """Holds a server for whoever is connected; the first to come is waited for as long as a start may take."""

    def __init__(self, door: Path) -> None:
        self._door = door
        self._users = 0
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        place = Path(tempfile.mkdtemp(prefix="pb-s3-"))
        try:
            with S3Server(place) as address, socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(self._door))
                listener.listen(16)
                self._selector.register(listener, selectors.EVENT_READ)
                last = self._until_the_last_leaves(listener, address)
                # Whoever comes from now on finds no socket and starts another server.
                self._door.unlink(missing_ok=True)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        if last is not None:
            last.close()

    def _until_the_last_leaves(self, listener: socket.socket, address: S3Address) -> socket.socket | None:
        while True:
            ready = self._selector.select(timeout=None if self._users else _START_LIMIT)
            if not ready:
                return None
            for key, _ in ready:
                if key.fileobj is listener:
                    self._greet(listener.accept()[0], address)
                elif isinstance(user := key.fileobj, socket.socket) and self._left(user):
                    if self._users == 0:
                        return user
                    user.close()

    def _greet(self, user: socket.socket, address: S3Address) -> None:
        self._users += 1
        self._selector.register(user, selectors.EVENT_READ)
        with contextlib.suppress(OSError):  # it left already; the selector tells
            user.sendall(json.dumps(asdict(address)).encode() + b"\n")

    def _left(self, user: socket.socket) -> bool:
        with contextlib.suppress(ConnectionResetError):
            if user.recv(1):
                return False
        self._selector.unregister(user)
        self._users -= 1
        return True


if __name__ == "__main__":
    _Keeper(Path(sys.argv[1])).run()
