# SPDX-License-Identifier: Apache-2.0
"""The blocking connection against a server that does what a test tells it."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from struct import pack
from typing import cast

import pytest

from pullback.errors import NbdDisconnected, NbdProtocolError, NbdRefused
from pullback.nbd import protocol as p
from pullback.nbd.address import UnixAddress
from pullback.nbd.blocking import NbdConnection
from pullback.nbd.server_handshake import ServerHandshake
from pullback.nbd.stream import TlsStream

MIB = 1 << 20
Script = Callable[[socket.socket], None]


@contextmanager
def raw_server(path: Path, script: Script) -> Iterator[UnixAddress]:
    """Serve one client: run ``script`` on the socket."""
    listener = socket.socket(socket.AF_UNIX)
    address = UnixAddress(str(path / "s"))
    listener.bind(address.path)
    listener.listen(1)

    def serve() -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        with sock:
            sock.settimeout(20)
            try:
                script(sock)
            except OSError:
                pass  # the client is gone

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield address
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def server(path: Path, script: Script, *, size: int = 1 << 40) -> Iterator[UnixAddress]:
    """Serve one client: shake hands, then run ``script`` on the socket."""
    info = p.ExportInfo("x", size, p.TransmissionFlag(0b1111_1111_1101), contexts={"base:allocation": 1})

    def greet(sock: socket.socket) -> None:
        handshake = ServerHandshake({"x": info})
        while not handshake.done:
            sock.sendall(handshake.data_to_send())
            handshake.receive(sock.recv(65536))
        sock.sendall(handshake.data_to_send())
        script(sock)

    with raw_server(path, greet) as address:
        yield address


def take(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = sock.recv(min(MIB, count - len(data)))
        if not part:
            raise ConnectionResetError
        data += part
    return bytes(data)


def until_closed(sock: socket.socket) -> None:
    with suppress(ConnectionResetError):  # the client had not read all of what we said
        while sock.recv(65536):
            pass


def data_reply(cookie: int, offset: int, data: bytes) -> bytes:
    return bytes.fromhex("668e33ef") + pack(">HHQIQ", 1, 1, cookie, len(data) + 8, offset) + data


def done_reply(cookie: int, error: int = 0) -> bytes:
    return bytes.fromhex("67446698") + pack(">IQ", error, cookie)


def test_large_writes_and_large_reads_at_once_do_not_block_each_other(tmp_path: Path) -> None:
    """The server sends 8 MiB before it reads on, far more than both sockets hold together."""

    def script(sock: socket.socket) -> None:
        take(sock, 28)
        take(sock, 28 + MIB)  # now the client is in the middle of sending its second write
        sock.sendall(data_reply(1, 0, b"r" * 8 * MIB))
        take(sock, 28 + 8 * MIB)
        sock.sendall(done_reply(3) + done_reply(2))
        until_closed(sock)

    buffer = bytearray(8 * MIB)
    with server(tmp_path, script) as address, NbdConnection.connect(address, "x", timeout=10) as connection:
        connection.submit_read(0, memoryview(buffer))
        connection.submit_write(0, b"w" * MIB)
        connection.submit_write(MIB, b"w" * 8 * MIB)
        assert connection.pending == 3
        assert [connection.wait() for _ in range(3)] == [1, 3, 2]
        assert connection.pending == 0
    assert buffer == b"r" * 8 * MIB


def test_one_refusal_among_many(tmp_path: Path) -> None:
    def script(sock: socket.socket) -> None:
        take(sock, 3 * 28 + 1)
        sock.sendall(done_reply(2, 28) + done_reply(1) + done_reply(3))
        take(sock, 28)
        sock.sendall(done_reply(4))
        until_closed(sock)

    with server(tmp_path, script) as address, NbdConnection.connect(address, "x", timeout=10) as connection:
        connection.submit_trim(0, 4096)
        connection.submit_write(8192, b"x")
        connection.submit_write_zeroes(0, 4096)
        with pytest.raises(NbdRefused, match=r"write 1 bytes at 8192.*ENOSPC") as caught:
            connection.wait()
        assert caught.value.errno == 28
        assert [connection.wait(), connection.wait()] == [1, 3]
        connection.flush()
        with pytest.raises(NbdRefused, match="No request"):
            connection.wait()


def test_a_simple_call_between_pipelined_ones_loses_none(tmp_path: Path) -> None:
    def script(sock: socket.socket) -> None:
        take(sock, 2 * 28)
        sock.sendall(done_reply(1) + data_reply(2, 5, b"abc"))
        until_closed(sock)

    with server(tmp_path, script) as address, NbdConnection.connect(address, "x", timeout=10) as connection:
        cookie = connection.submit_trim(0, 4096)
        assert connection.read(5, 3) == b"abc"
        assert connection.pending == 1
        assert connection.wait() == cookie


def test_silence_is_an_end(tmp_path: Path) -> None:
    with server(tmp_path, until_closed) as address:
        connection = NbdConnection.connect(address, "x", timeout=10)
        connection._stream.set_timeout(0.2)
        start = time.monotonic()
        with pytest.raises(NbdDisconnected, match="did not answer in time"):
            connection.read(0, 10)
        assert time.monotonic() - start < 5
        with pytest.raises(NbdDisconnected):
            connection.flush()
        connection.close()


def test_a_server_that_never_reads_is_an_end(tmp_path: Path) -> None:
    release = threading.Event()
    with server(tmp_path, lambda _: release.wait(20) and None) as address:
        connection = NbdConnection.connect(address, "x", timeout=10)
        connection._stream.set_timeout(0.2)
        with pytest.raises(NbdDisconnected, match="did not answer in time"):
            connection.write(0, bytes(8 * MIB))
        release.set()


def test_a_server_that_goes_away_and_one_that_lies(tmp_path: Path) -> None:
    for script, error in (
        (lambda sock: take(sock, 28) and None, NbdDisconnected),
        (lambda sock: take(sock, 28) and sock.sendall(b"?" * 28), NbdProtocolError),
        (lambda sock: (take(sock, 28) and sock.sendall(done_reply(7))) or until_closed(sock), NbdProtocolError),
    ):
        (path := tmp_path / error.__name__).mkdir(exist_ok=True)
        (path / "s").unlink(missing_ok=True)
        with server(path, script) as address, NbdConnection.connect(address, "x", timeout=10) as connection:
            for _ in range(2):
                with pytest.raises(error):
                    connection.read(0, 10)


def test_abort_wakes_another_thread(tmp_path: Path) -> None:
    asked = threading.Event()

    def script(sock: socket.socket) -> None:
        take(sock, 28)
        asked.set()
        until_closed(sock)

    with server(tmp_path, script) as address, NbdConnection.connect(address, "x", timeout=10) as connection:
        caught: list[Exception] = []

        def read() -> None:
            try:
                connection.read(0, 10)
            except NbdDisconnected as error:
                caught.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        assert asked.wait(10)
        connection.abort()
        thread.join(5)
        assert len(caught) == 1


def test_long_ranges_go_in_steps_that_keep_their_alignment(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def script(sock: socket.socket) -> None:
        for cookie in range(1, 4):
            header = take(sock, 28)
            seen.append((int.from_bytes(header[16:24], "big"), int.from_bytes(header[24:28], "big")))
            sock.sendall(done_reply(cookie))
        until_closed(sock)

    with server(tmp_path, script) as address, NbdConnection.connect(address, "x", timeout=10) as connection:
        connection.write_zeroes(4096, 9 << 30)
    step = 0xFFFF0000
    assert seen == [(4096, step), (4096 + step, step), (4096 + 2 * step, (9 << 30) - 2 * step)]


def test_goodbye(tmp_path: Path) -> None:
    seen: list[bytes] = []
    with server(tmp_path, lambda sock: seen.append(take(sock, 28) + sock.recv(1))) as address:
        connection = NbdConnection.connect(address, "x", timeout=10)
        connection.close()
        connection.close()
        with pytest.raises(NbdDisconnected, match="was closed"):
            connection.read(0, 1)
    assert seen == [bytes.fromhex("25609513") + pack(">HHQQI", 0, 2, 0, 0, 0)]


def test_an_interrupted_write_is_not_followed_by_a_goodbye(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server would take it for the end of the payload."""
    seen: list[bytes] = []

    def script(sock: socket.socket) -> None:
        while data := sock.recv(MIB):
            seen.append(data)

    with server(tmp_path, script) as address:
        connection = NbdConnection.connect(address, "x", timeout=10)

        def interrupt() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(connection, "_make_room", interrupt)
        with pytest.raises(KeyboardInterrupt):
            while True:
                connection.submit_write(0, b"w" * 8 * MIB)
        connection.close()
    assert not b"".join(seen).endswith(bytes.fromhex("25609513") + pack(">HHQQI", 0, 2, 0, 0, 0))


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NbdDisconnected, match=r"Nothing answers.*No such file"):
        NbdConnection.connect(UnixAddress(str(tmp_path / "none")), "")
    with pytest.raises(NbdDisconnected, match=r"Nothing answers.*too long"):
        NbdConnection.connect(UnixAddress("/" + "x" * 200), "")


def test_somebody_who_says_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        with pytest.raises(NbdDisconnected, match=r"handshake.*did not answer in time"):
            NbdConnection.connect(UnixAddress(str(tmp_path / "s")), "", timeout=0.2)


def test_a_server_of_another_protocol_is_let_go_of_at_once(tmp_path: Path) -> None:
    let_go = threading.Event()

    def script(sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        until_closed(sock)
        let_go.set()

    with raw_server(tmp_path, script) as address:
        with pytest.raises(NbdProtocolError, match="does not speak NBD") as caught:
            NbdConnection.connect(address, "", timeout=10)
        assert let_go.wait(10)
    assert caught.value.exit_code == 7


def test_a_refusal_is_told_also_when_the_server_does_not_wait_for_a_goodbye(tmp_path: Path) -> None:
    def script(sock: socket.socket) -> None:
        handshake = ServerHandshake({})
        while True:
            data = handshake.data_to_send()
            if p.Reply.ERR_UNKNOWN.to_bytes(4, "big") in data:
                sock.shutdown(socket.SHUT_RD)  # what the client says from here on is EPIPE
                sock.sendall(data)
                return
            sock.sendall(data)
            handshake.receive(sock.recv(65536))

    with raw_server(tmp_path, script) as address, pytest.raises(NbdRefused, match="'nowhere'"):
        NbdConnection.connect(address, "nowhere", timeout=10)


def test_a_server_that_takes_no_more_clients(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "s"))
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(address.path)
        listener.listen(0)
        first.connect(address.path)
        with pytest.raises(NbdDisconnected, match=r"Nothing answers for NBD at .*did not answer in time"):
            NbdConnection.connect(address, "", timeout=0.1)


class Rekeying:
    """A TLS socket that has to write before it can read, as when the peer asks for new keys; ``raw`` is under it."""

    def __init__(self, raw: socket.socket) -> None:
        self.raw = raw
        self.fileno = raw.fileno

    def settimeout(self, seconds: float) -> None:
        self.raw.settimeout(seconds)

    def recv_into(self, view: memoryview) -> int:
        try:
            self.raw.send(b"key")
        except BlockingIOError:
            raise ssl.SSLWantWriteError from None
        view[:4] = b"data"
        return 4


def test_tls_that_has_to_write_before_it_can_read_waits_until_it_can_write() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = TlsStream(cast(ssl.SSLSocket, Rekeying(ours)), 0.1)
        with suppress(BlockingIOError):
            while True:
                ours.send(bytes(65536))
        buffer = memoryview(bytearray(10))
        with pytest.raises(TimeoutError):
            stream.recv_into(buffer, whole=False)
        reader = threading.Thread(target=lambda: until_closed(theirs))
        reader.start()
        stream.set_timeout(10)
        assert stream.recv_into(buffer, whole=False) == 4
        ours.shutdown(socket.SHUT_WR)
        reader.join(10)
    assert bytes(buffer[:4]) == b"data"


def test_several_reads_are_asked_for_at_once(tmp_path: Path) -> None:
    def script(sock: socket.socket) -> None:
        take(sock, 2 * 28)
        sock.sendall(data_reply(2, 4096, b"b" * 4096) + data_reply(1, 0, b"a" * 4096))
        take(sock, 28)
        sock.sendall(data_reply(3, 0, b"c" * 4096))
        until_closed(sock)

    buffers = [bytearray(4096) for _ in range(3)]
    views = [memoryview(buffer) for buffer in buffers]
    with server(tmp_path, script) as address, NbdConnection.connect(address, "x", timeout=10) as connection:
        assert connection.submit_reads([(0, views[0]), (4096, views[1])]) == [1, 2]
        assert [connection.wait(), connection.wait()] == [2, 1]
        assert connection.submit_reads([]) == []
        # What came before the refused one was asked for, and its answer is not taken for another's.
        with pytest.raises(NbdRefused):
            connection.submit_reads([(0, views[2]), (1 << 60, views[0])])
        assert (connection.pending, connection.wait()) == (1, 3)
    assert buffers == [b"a" * 4096, b"b" * 4096, b"c" * 4096]
