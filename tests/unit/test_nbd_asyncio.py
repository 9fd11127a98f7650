# SPDX-License-Identifier: Apache-2.0
"""The asyncio client and server against a peer that breaks the protocol: it is let go of, and nobody else is."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pullback.errors import NbdProtocolError
from pullback.nbd.address import UnixAddress
from pullback.nbd.backend import MemoryBackend
from pullback.nbd.client import AsyncNbdClient
from pullback.nbd.server import NbdServer
from tests.support.certificates import write_certificates
from tests.unit.test_nbd_blocking import raw_server, server, take, until_closed

LIMIT = 10
#: The client's flags, then an option: its magic and number, and more data than any option has.
TOO_MUCH = b"\0\0\0\3IHAVEOPT\0\0\0\7\xff\xff\xff\xff"
STARTTLS = b"\0\0\0\3IHAVEOPT\0\0\0\5\0\0\0\0"
#: The client's flags, and NBD_OPT_EXPORT_NAME for "": what follows its answer is requests.
EXPORT = b"\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\0"


@pytest.mark.parametrize("ended", ["by what it said", "by us"])
async def test_a_server_is_let_go_of_when_the_handshake_ends_early(tmp_path: Path, ended: str) -> None:
    reached, let_go = threading.Event(), threading.Event()

    def script(sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" if ended == "by what it said" else b"NBDM")
        reached.set()
        until_closed(sock)
        let_go.set()

    with raw_server(tmp_path, script) as address:
        connecting = asyncio.create_task(AsyncNbdClient.connect(address, "", timeout=LIMIT))
        assert await asyncio.to_thread(reached.wait, LIMIT)
        if ended == "by us":
            connecting.cancel()
        with pytest.raises(NbdProtocolError if ended == "by what it said" else asyncio.CancelledError):
            await connecting
        assert await asyncio.to_thread(let_go.wait, LIMIT)


async def test_a_server_that_lies_ends_every_call_and_is_let_go_of(tmp_path: Path) -> None:
    let_go = threading.Event()

    def script(sock: socket.socket) -> None:
        take(sock, 2 * 28)
        sock.sendall(b"?" * 28)
        until_closed(sock)
        let_go.set()

    with server(tmp_path, script) as address:
        client = await AsyncNbdClient.connect(address, "x", timeout=LIMIT)
        calls = await asyncio.gather(client.read(0, 10), client.read(10, 10), return_exceptions=True)
        assert [type(call) for call in calls] == [NbdProtocolError] * 2
        with pytest.raises(NbdProtocolError):
            await client.flush()
        assert await asyncio.to_thread(let_go.wait, LIMIT)
        await client.close()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[UnixAddress]:
    """A server with an honest client, who is served at the end as well as before."""
    async with NbdServer({"": MemoryBackend(b"content")}) as ours:
        address = await ours.listen(UnixAddress(str(tmp_path / "s")))
        assert isinstance(address, UnixAddress)
        async with await AsyncNbdClient.connect(address, "") as honest:
            yield address
            assert await honest.read(0, 7) == b"content"
            assert ours.connections == 1


async def let_go_of(reader: asyncio.StreamReader) -> None:
    """Wait until the server has closed the connection."""
    async with asyncio.timeout(LIMIT):
        try:
            while await reader.read(65536):
                pass
        except ConnectionResetError:
            pass  # it had not read all that was sent


@pytest.mark.parametrize("said", [TOO_MUCH, EXPORT + b"?" * 28], ids=["in the handshake", "for a request"])
async def test_a_client_that_breaks_the_protocol_is_let_go_of(served: UnixAddress, said: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(served.path)
    writer.write(said)
    await let_go_of(reader)
    writer.close()


async def test_a_client_that_breaks_the_protocol_inside_tls_is_let_go_of(tmp_path: Path) -> None:
    """With what it sends together with the end of TLS's own handshake, before the server is told of that end."""
    write_certificates(tmp_path)
    theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    theirs.load_cert_chain(tmp_path / "server-cert.pem", tmp_path / "server-key.pem")
    async with NbdServer({"": MemoryBackend(b"content")}, tls=theirs) as ours:
        address = await ours.listen(UnixAddress(str(tmp_path / "s")))
        assert isinstance(address, UnixAddress)
        reader, writer = await asyncio.open_unix_connection(address.path)
        await reader.readexactly(18)
        writer.write(STARTTLS)
        await reader.readexactly(20)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cafile=tmp_path / "ca-cert.pem")
        tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                incoming.write(await asyncio.wait_for(reader.read(65536), LIMIT))
        tls.write(TOO_MUCH[4:])
        writer.write(outgoing.read())  # in one piece
        await let_go_of(reader)
        writer.close()
        ours_again = ssl.create_default_context(cafile=tmp_path / "ca-cert.pem")
        async with await AsyncNbdClient.connect(address, "", tls=ours_again) as honest:
            assert await honest.read(0, 7) == b"content"
