# SPDX-License-Identifier: Apache-2.0
"""Our NBD clients against nbdkit and qemu-nbd, and libnbd's and QEMU's clients against our server."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from pullback.errors import NbdDisconnected, NbdRefused
from pullback.nbd.address import TcpAddress, UnixAddress
from pullback.nbd.backend import MemoryBackend
from pullback.nbd.blocking import NbdConnection
from pullback.nbd.blocking import list_exports as list_exports_blocking
from pullback.nbd.client import AsyncNbdClient, list_exports
from pullback.nbd.server import NbdServer
from tests.support.survival import Fault

MIB = 1 << 20
BASE = "base:allocation"
LIMIT = 60

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("nbdkit", "qemu-nbd", "nbdcopy", "nbdinfo")),
    reason="nbdkit, qemu-utils and libnbd-bin are the judges here",
)


class Start:
    """Start servers on Unix sockets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, *command: str | Path) -> UnixAddress:
        number = len(self.processes)
        path, pid = self._folder / f"s{number}", self._folder / f"pid{number}"
        if command[0] == "nbdkit":
            command = ("nbdkit", "-f", "-U", path, "-P", pid, *command[1:])
        else:
            command = ("qemu-nbd", "-t", "-k", path, f"--pid-file={pid}", *command[1:])
        process = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL)
        self.processes.append(process)
        deadline = time.monotonic() + LIMIT
        while not (pid.exists() and pid.read_text().strip()):
            assert process.poll() is None, f"{command} ended"
            assert time.monotonic() < deadline, f"{command} did not start"
            time.sleep(0.01)
        return UnixAddress(str(path))

    def end(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    starter = Start(tmp_path)
    try:
        yield starter
    finally:
        starter.end()


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


async def judge(*command: str) -> str:
    """Run a client of our own server, which lives in this very event loop."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), LIMIT)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, f"{command}: {err.decode()}"
    return out.decode()


# The blocking client


def test_nbdkit_memory_takes_and_gives_back(start: Start) -> None:
    address = start("nbdkit", "memory", "96M")
    data = random.Random(1).randbytes(40 * MIB)
    with NbdConnection.connect(address, "", contexts=[BASE, "no:such"]) as connection:
        assert connection.info.size == 96 * MIB
        assert list(connection.info.contexts) == [BASE]
        connection.write(3 * MIB + 5, data)  # more than one request may carry, and not aligned
        connection.flush()
        assert connection.read(3 * MIB + 5, len(data)) == data
        connection.write_zeroes(4 * MIB, MIB)
        connection.trim(8 * MIB, MIB)
        assert connection.read(4 * MIB, MIB) == bytes(MIB)
        extents = connection.extents(BASE, 0, 96 * MIB)
        assert [(offset, length) for offset, length, flags in extents if flags & 2][:3] == [
            (0, 3 * MIB),
            (4 * MIB, MIB),
            (8 * MIB, MIB),
        ]
        assert sum(length for _, length, _ in extents) == 96 * MIB
        assert connection.extents_all(0, 96 * MIB) == {BASE: extents}
        assert sum(length for length, _ in connection.block_status(MIB, 90 * MIB, BASE)) <= 90 * MIB
        with pytest.raises(NbdRefused, match="no metadata context 'no:such'"):
            connection.extents("no:such", 0, MIB)


def test_pipelined_reads_of_sparse_random_data_equal_nbdcopys(start: Start, tmp_path: Path) -> None:
    address = start("nbdkit", "sparse-random", "64M", "seed=7", "percent=30")
    run("nbdcopy", address.uri(), tmp_path / "copy")
    size = 256 << 10
    data = bytearray(64 * MIB)
    view = memoryview(data)
    with NbdConnection.connect(address, "", contexts=[BASE]) as connection:
        for offset in range(0, len(data), size):
            if connection.pending == 4:
                connection.wait()
            connection.submit_read(offset, view[offset : offset + size])
        while connection.pending:
            connection.wait()
        holes = [(o, n) for o, n, flags in connection.extents(BASE, 0, len(data)) if flags & 2]
    assert data == (tmp_path / "copy").read_bytes()
    assert holes
    assert all(not any(data[offset : offset + length]) for offset, length in holes)


@pytest.mark.parametrize("structured", [True, False])
def test_errors_of_a_server_concern_one_request(start: Start, tmp_path: Path, structured: bool) -> None:
    trigger = tmp_path / "trigger"
    options = () if structured else ("--no-sr",)
    address = start(
        "nbdkit", *options, "--filter=error", "memory", "1M", "error-pread=ENOSPC", "error-pread-rate=100%",
        f"error-pread-file={trigger}",
    )  # fmt: skip
    with NbdConnection.connect(address, "") as connection:
        assert connection.info.structured_replies is structured
        connection.write(0, b"abc")
        trigger.touch()
        with pytest.raises(NbdRefused, match="ENOSPC") as caught:
            connection.read(0, 3)
        assert caught.value.errno == 28
        trigger.unlink()
        assert connection.read(0, 3) == b"abc"


def test_block_sizes_are_respected(start: Start) -> None:
    address = start(
        "nbdkit", "--filter=blocksize-policy", "memory", "4M", "blocksize-minimum=4096", "blocksize-preferred=64K",
        "blocksize-maximum=128K", "blocksize-error-policy=error",
    )  # fmt: skip
    data = random.Random(2).randbytes(MIB)
    with NbdConnection.connect(address, "") as connection:
        info = connection.info
        assert (info.min_block, info.preferred_block, info.max_payload) == (4096, 65536, 131072)
        connection.write(0, data)
        assert connection.read(0, MIB) == data
        with pytest.raises(NbdRefused, match="multiples of 4096"):
            connection.read(512, 512)


@pytest.mark.fault(Fault.NBD_ERROR)
@pytest.mark.parametrize("name", ["EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "ESHUTDOWN"])
def test_requests_that_nbdkit_refuses_now_and_then(start: Start, name: str) -> None:
    """A third of all requests: each is told by its number, and what is not refused is right."""
    number = getattr(errno, name)
    address = start(
        "nbdkit", "--filter=error", "memory", "4M", f"error-pread={name}", "error-pread-rate=30%",
        f"error-pwrite={name}", "error-pwrite-rate=30%", f"error-zero={name}", "error-zero-rate=30%",
        f"error-extents={name}", "error-extents-rate=30%",
    )  # fmt: skip
    expected, chance, refused = bytearray(4 * MIB), random.Random(number), 0
    with NbdConnection.connect(address, "", contexts=[BASE]) as connection:
        for _ in range(70):
            at = chance.randrange(64) << 16
            data = chance.randbytes(1 << 16)
            try:
                match chance.randrange(4):
                    case 0:
                        connection.write(at, data)
                        expected[at : at + len(data)] = data
                    case 1:
                        connection.write_zeroes(at, 1 << 16)
                        expected[at : at + (1 << 16)] = bytes(1 << 16)
                    case 2:
                        assert connection.read(at, 1 << 16) == expected[at : at + (1 << 16)]
                    case _:
                        found = connection.extents(BASE, 0, 4 * MIB)
                        assert sum(length for _, length, _ in found) == 4 * MIB
                        for offset, length, flags in found:
                            assert not flags & 2 or not any(expected[offset : offset + length])
            except NbdRefused as error:
                assert error.errno == number
                assert name in str(error)
                refused += 1
    assert 3 < refused < 50


def test_a_server_without_write_zeroes(start: Start) -> None:
    address = start("nbdkit", "--filter=nozero", "memory", "1M")
    with NbdConnection.connect(address, "") as connection, pytest.raises(NbdRefused, match="does not offer") as caught:
        connection.write_zeroes(0, 4096)
    assert caught.value.errno == 95


def test_an_unknown_export_and_a_list(start: Start, tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "d", "1M")
    address = start("qemu-nbd", "-f", "raw", "-x", "sda ü", "-D", "the first", tmp_path / "d")
    assert list_exports_blocking(address) == [("sda ü", "the first")]
    with pytest.raises(NbdRefused, match=r"'sdb'.*no such export") as caught:
        NbdConnection.connect(address, "sdb")
    assert caught.value.errno == 2


def test_extents_of_a_qcow2_equal_qemu_imgs(start: Start, tmp_path: Path) -> None:
    image = tmp_path / "d.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "9G")
    chance = random.Random(3)
    writes = [f"write -P 7 {chance.randrange(9 * 1024) * MIB} 64k" for _ in range(300)]
    writes += [f"write -z {chance.randrange(9 * 1024) * MIB} 192k" for _ in range(50)]
    run("qemu-io", "-f", "qcow2", *[part for write in writes for part in ("-c", write)], image)
    maps = json.loads(run("qemu-img", "map", "--output=json", image))
    expected: list[tuple[int, int, bool]] = []
    for part in maps:
        if expected and expected[-1][2] is part["zero"]:
            expected[-1] = (expected[-1][0], expected[-1][1] + part["length"], part["zero"])
        else:
            expected.append((part["start"], part["length"], part["zero"]))
    address = start("qemu-nbd", "-f", "qcow2", "-r", image)
    with NbdConnection.connect(address, "", contexts=[BASE]) as connection:
        found: list[tuple[int, int, bool]] = []
        for offset, length, flags in connection.extents(BASE, 0, connection.info.size):
            if found and found[-1][2] is bool(flags & 2):
                found[-1] = (found[-1][0], found[-1][1] + length, found[-1][2])
            else:
                found.append((offset, length, bool(flags & 2)))
        with pytest.raises(NbdRefused, match="read-only"):
            connection.write(0, b"x")
    assert found == expected
    assert len(found) > 500


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    folder = tmp_path_factory.mktemp("tls")
    run(
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
        "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
        "-keyout", folder / "server-key.pem", "-out", folder / "server-cert.pem",
    )  # fmt: skip
    shutil.copy(folder / "server-cert.pem", folder / "ca-cert.pem")
    return folder


async def test_tls_with_nbdkit_as_the_server(start: Start, certificates: Path) -> None:
    address = start("nbdkit", "--tls=require", f"--tls-certificates={certificates}", "memory", "8M")
    context = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
    data = random.Random(4).randbytes(3 * MIB)
    with NbdConnection.connect(address, "", contexts=[BASE], tls=context) as connection:
        connection.write(MIB + 1, data)
        assert connection.read(MIB + 1, len(data)) == data
        assert len(connection.extents(BASE, 0, 8 * MIB)) == 3
    async with await AsyncNbdClient.connect(address, "", tls=context) as client:
        assert await client.read(MIB + 1, len(data)) == data
    with pytest.raises(NbdRefused, match="requires TLS"):
        NbdConnection.connect(address, "")
    with pytest.raises(NbdRefused, match="requires TLS"):
        await AsyncNbdClient.connect(address, "")
    with pytest.raises(NbdDisconnected, match="certificate verify failed"):
        NbdConnection.connect(address, "", tls=ssl.create_default_context())
    with pytest.raises(NbdDisconnected, match="certificate verify failed"):
        await AsyncNbdClient.connect(address, "", tls=ssl.create_default_context())


async def test_tls_with_our_server(certificates: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "server-cert.pem", certificates / "server-key.pem")
    data = random.Random(5).randbytes(2 * MIB)
    async with NbdServer({"": MemoryBackend(data)}, tls=context) as server:
        address = await server.listen(TcpAddress("127.0.0.1", 0))
        assert isinstance(address, TcpAddress)
        ours = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
        async with await AsyncNbdClient.connect(address, "", tls=ours) as client:
            assert await client.read(0, 2 * MIB) == data
        assert await asyncio.to_thread(_read_all, address, ours) == data
        out = await judge(
            "qemu-img", "map", "--output=json", "--object", f"tls-creds-x509,id=t,endpoint=client,dir={certificates}",
            "--image-opts", f"driver=nbd,host=127.0.0.1,port={address.port},tls-creds=t",
        )  # fmt: skip
        assert sum(part["length"] for part in json.loads(out)) == 2 * MIB
        with pytest.raises(NbdRefused, match="requires TLS"):
            await AsyncNbdClient.connect(address, "")


def _read_all(address: TcpAddress, context: ssl.SSLContext) -> bytes:
    with NbdConnection.connect(address, "", tls=context) as connection:
        return connection.read(0, connection.info.size)


# The asyncio client


async def test_many_calls_share_one_connection(start: Start) -> None:
    address = start("nbdkit", "--filter=delay", "memory", "16M", "delay-read=5ms")
    data = random.Random(6).randbytes(16 * MIB)
    async with await AsyncNbdClient.connect(address, "", contexts=[BASE]) as client:
        await client.write(0, data)
        await client.flush()
        tasks = [asyncio.create_task(client.read(number << 16, 1 << 16)) for number in range(256)]
        await asyncio.sleep(0)  # let each send, or queue
        for task in tasks[::7]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for number, result in enumerate(results):
            if number % 7 == 0:
                assert isinstance(result, asyncio.CancelledError)
            else:
                assert result == data[number << 16 : (number + 1) << 16]
        await client.write_zeroes(MIB, MIB)
        await client.trim(4 * MIB, MIB)
        assert await client.extents(BASE, 0, 16 * MIB) == [
            (0, MIB, 0), (MIB, MIB, 3), (2 * MIB, 2 * MIB, 0), (4 * MIB, MIB, 3), (5 * MIB, 11 * MIB, 0),
        ]  # fmt: skip
        with pytest.raises(NbdRefused):
            await client.read(16 * MIB, 1)
    with pytest.raises(NbdDisconnected):
        await client.read(0, 1)


async def test_a_server_that_dies_fails_every_call(start: Start) -> None:
    address = start("nbdkit", "--filter=delay", "memory", "1M", "delay-read=60")
    client = await AsyncNbdClient.connect(address, "")
    reads = [asyncio.create_task(client.read(0, 10)) for _ in range(5)]
    await asyncio.sleep(0)  # all five are sent
    start.processes[-1].kill()
    results = await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), LIMIT)
    assert [type(result) for result in results] == [NbdDisconnected] * 5
    await client.close()


async def test_silence_is_an_end_for_the_asyncio_client_too(start: Start) -> None:
    address = start("nbdkit", "--filter=delay", "memory", "1M", "delay-read=60")
    client = await AsyncNbdClient.connect(address, "")
    client._timeout = 0.3  # not for connecting, which may take longer on a busy machine
    with pytest.raises(NbdDisconnected, match="did not answer in time"):
        await client.read(0, 10)
    await client.close()
    start.processes[-1].kill()


# Our server


class Served:
    def __init__(self, address: UnixAddress, server: NbdServer, source: MemoryBackend, target: MemoryBackend) -> None:
        self.address, self.server, self.source, self.target = address, server, source, target


class ReadOnlyMemory:
    """Only the reading half of a MemoryBackend."""

    def __init__(self, data: bytes) -> None:
        memory = MemoryBackend(data)
        self.read = memory.read
        self.extents = memory.extents
        self.size = memory.size


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    chance = random.Random(8)
    data = bytearray(24 * MIB)
    for _ in range(40):
        at = chance.randrange(24 * 16 - 1) << 16
        data[at : at + 65536] = chance.randbytes(65536)
    source, target = MemoryBackend(data), MemoryBackend(b"\xff" * len(data))
    exports = {"": source, "target": target, "constant": ReadOnlyMemory(bytes(data))}
    async with NbdServer(exports, descriptions={"target": "to write to"}) as server:
        address = UnixAddress(str(tmp_path / "served"))
        await server.listen(address)
        yield Served(address, server, source, target)


async def test_only_the_owner_may_connect(served: Served) -> None:
    assert os.stat(served.address.path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "command",
    [
        ("nbdcopy", "--destination-is-zero"),
        ("nbdcopy", "--no-extents", "--requests=64"),
        ("nbdcopy", "--connections=4", "--flush"),
        ("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw"),
        ("qemu-img", "convert", "-n", "-W", "-m", "16", "-S", "0", "-f", "raw", "-O", "raw"),
    ],
)
async def test_copies_from_us_to_us_are_equal(served: Served, command: tuple[str, ...]) -> None:
    size = served.source.size
    if "--destination-is-zero" in command:
        served.target.write_zeroes(0, size, False)
    await judge(*command, served.address.uri(), served.address.uri("target"))
    assert served.target.read(0, size) == served.source.read(0, size)


async def test_nbdinfo_understands_us(served: Served) -> None:
    listed = json.loads(await judge("nbdinfo", "--json", "--list", served.address.uri()))["exports"]
    assert [(export["export-name"], export["is_read_only"]) for export in listed] == [
        ("", False),
        ("target", False),
        ("constant", True),
    ]
    assert listed[1]["description"] == "to write to"
    assert all(export["can_multi_conn"] and export["contexts"] == [BASE] for export in listed)
    found = json.loads(await judge("nbdinfo", "--json", "--map", served.address.uri()))
    pairs = [(extent["length"], extent["type"]) for extent in found]
    assert pairs == served.source.extents(0, served.source.size)
    assert await list_exports(served.address) == [("", ""), ("target", "to write to"), ("constant", "")]


async def test_qemu_writes_zeroes_and_discards_into_us(served: Served) -> None:
    await judge(
        "qemu-io", "-f", "raw", "-d", "unmap", "-c", "write -P 5 512 1M", "-c", "write -z 64k 64k",
        "-c", "discard 128k 64k", "-c", "write -f -P 6 1M 512", "-c", "flush", served.address.uri("target"),
    )  # fmt: skip
    expected = bytearray(b"\xff" * 2 * MIB)
    expected[512 : 512 + MIB] = b"\5" * MIB
    expected[65536 : 3 * 65536] = bytes(2 * 65536)
    expected[MIB : MIB + 512] = b"\6" * 512
    assert served.target.read(0, 2 * MIB) == expected


async def test_nbdkit_as_a_proxy_before_us(served: Served) -> None:
    """Another implementation's proxy between us and the judge."""
    out = await judge("nbdkit", "-U", "-", "nbd", f"uri={served.address.uri()}", "--run", 'nbdinfo --size "$uri"')
    assert int(out) == served.source.size


class Faulty(MemoryBackend):
    """A backend with a full disk, and a defect."""

    def write(self, offset: int, data: memoryview) -> None:
        raise OSError(28, "No space left on device")

    def read(self, offset: int, length: int) -> bytes:
        if offset == 512:
            raise KeyError("a defect")
        return super().read(offset, length)


async def test_a_backends_errors_reach_the_client(tmp_path: Path) -> None:
    seen: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context["exception"]))
    async with NbdServer({"": Faulty(bytes(MIB))}) as server:
        address = await server.listen(UnixAddress(str(tmp_path / "s")))
        client = await AsyncNbdClient.connect(address, "")
        with pytest.raises(NbdRefused, match="No space left") as caught:
            await client.write(0, b"x")
        assert caught.value.errno == 28
        assert await client.read(0, 3) == bytes(3)
        with pytest.raises(NbdDisconnected):
            await client.read(512, 3)
        await client.close()
        assert [type(error) for error in seen] == [KeyError]


async def test_closing_a_server_lets_go_of_its_clients(tmp_path: Path) -> None:
    async with NbdServer({"": MemoryBackend(bytes(MIB))}) as server:
        address = await server.listen(UnixAddress(str(tmp_path / "s")))
        client = await AsyncNbdClient.connect(address, "")
        assert server.connections == 1
    assert server.connections == 0
    assert not (tmp_path / "s").exists()
    with pytest.raises(NbdDisconnected):
        await client.read(0, 1)
    await client.close()


async def test_qemu_pushes_a_disk_into_us(served: Served, tmp_path: Path) -> None:
    """blockdev-backup with our server as its target: the way round for disks that must not be exported."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(served.source.read(0, served.source.size))
    process = await asyncio.create_subprocess_exec(
        "qemu-storage-daemon", "--chardev", "stdio,id=m", "--monitor", "chardev=m",
        "--blockdev", f"driver=file,node-name=disk,filename={disk},discard=unmap",
        "--blockdev", f"driver=nbd,node-name=target,server.type=unix,server.path={served.address.path},export=target",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    backup = {"job-id": "j", "device": "disk", "target": "target", "sync": "full"}
    commands = [{"execute": "qmp_capabilities"}, {"execute": "blockdev-backup", "arguments": backup}]
    try:
        async with asyncio.timeout(LIMIT):
            assert "QMP" in json.loads(await process.stdout.readline())
            process.stdin.write("".join(json.dumps(command) + "\n" for command in commands).encode())
            while True:
                message = json.loads(await process.stdout.readline())
                assert "error" not in message
                if message.get("event") == "BLOCK_JOB_COMPLETED":
                    break
            assert "error" not in message["data"]
            process.stdin.write(b'{"execute": "quit"}\n')
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert served.target.read(0, served.source.size) == served.source.read(0, served.source.size)
