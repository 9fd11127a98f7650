# SPDX-License-Identifier: Apache-2.0
"""An NBD server for asyncio: several exports, several clients, blocking backends in a few worker threads.

Per connection at most 16 requests and 64 MiB are under way; past that the socket is not read, and the client's
writes wait in its own buffers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self

from pullback.nbd import protocol as p
from pullback.nbd.address import Address, TcpAddress, UnixAddress
from pullback.nbd.backend import Backend, WritableBackend
from pullback.nbd.protocol import TransmissionFlag
from pullback.nbd.session import Session

_READ_FLAGS: Final = TransmissionFlag.HAS_FLAGS | TransmissionFlag.CAN_MULTI_CONN
_WRITE_FLAGS: Final = (
    TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
)


class NbdServer:
    """Serve ``exports`` by name; one that has no ``write`` is read-only.

    With ``tls`` every client must encrypt.  ``workers`` threads call the backends.
    """

    def __init__(
        self,
        exports: Mapping[str, Backend],
        *,
        tls: ssl.SSLContext | None = None,
        workers: int = 4,
        descriptions: Mapping[str, str] | None = None,
    ) -> None:
        self._exports = dict(exports)
        self._infos = {
            name: _describe(name, backend, (descriptions or {}).get(name, "")) for name, backend in exports.items()
        }
        self._tls = tls
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="nbd-server")
        self._sessions: set[Session] = set()
        self._servers: list[asyncio.Server] = []
        self._paths: list[str] = []

    async def listen(self, address: Address) -> Address:
        """Start to listen, on a Unix socket that only its owner may use, or on a TCP port (0: any); return where.

        Raises OSError when the address cannot be had.
        """
        loop = asyncio.get_running_loop()
        if isinstance(address, UnixAddress):
            sock = _private_socket(address.path)
            self._paths.append(address.path)
            self._servers.append(await loop.create_unix_server(self._session, sock=sock))
            return address
        server = await loop.create_server(self._session, address.host, address.port)
        self._servers.append(server)
        return TcpAddress(address.host, server.sockets[0].getsockname()[1])

    @property
    def connections(self) -> int:
        """Number of clients that are connected."""
        return len(self._sessions)

    async def close(self) -> None:
        """Stop listening, let go of every client, and wait for the worker threads; may be called again."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        for path in self._paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108  (a socket, not a file)
        self._paths.clear()
        sessions = list(self._sessions)
        for session in sessions:
            session.cut()
        for session in sessions:
            await session.closed.wait()
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _session(self) -> Session:
        session = Session(self._exports, self._infos, self._pool, self._tls, self._sessions.discard)
        self._sessions.add(session)
        return session


def _describe(name: str, backend: Backend, description: str) -> p.ExportInfo:
    flags = _READ_FLAGS | (_WRITE_FLAGS if isinstance(backend, WritableBackend) else TransmissionFlag.READ_ONLY)
    return p.ExportInfo(name, backend.size, flags, contexts={p.BASE_ALLOCATION: 1}, description=description)


def _private_socket(path: str) -> socket.socket:
    """Bind a Unix socket with mode 0600, without a moment in which others may connect."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        os.fchmod(sock.fileno(), 0o600)  # Linux gives this mode, less the umask, to what bind() makes
        sock.bind(path)
    except OSError:
        sock.close()
        raise
    return sock
