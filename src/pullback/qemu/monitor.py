# SPDX-License-Identifier: Apache-2.0
"""A QMP connection whose errors are pullback's own.

A command that got no reply in time has an unknown outcome, and so has every later one: the connection is given up and
whoever used it observes QEMU anew before doing anything else.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import stat
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, EventListener, ExecuteError, Message, QMPClient, QMPError
from qemu.qmp.protocol import StateError
from qemu.qmp.qmp_client import NegotiationError

from pullback.errors import CommandFailed, DomainBusy, DomainUnreachable
from pullback.qemu.cancelling import uncancelled
from pullback.qemu.replies import Reply, replies

#: Seconds for QEMU's greeting.  A monitor serves one client at a time; the next one is left waiting without a word.
GREETING_TIMEOUT = 5.0
#: Seconds for a reply.  Commands that take long are jobs in QEMU; what is left answers in milliseconds, or drains I/O.
REPLY_TIMEOUT = 60.0

logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
logging.getLogger("qemu.qmp").propagate = False

Trace = Callable[[str, Mapping[str, Any], Any], None]


@dataclass(frozen=True, slots=True)
class Peer:
    """Who listens on a unix socket: process, and the user and group it acts as."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class JobState:
    """How far a job is, in bytes, and why it failed."""

    status: str
    done: int
    total: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A connected socket on which nothing was said yet, and who is at its other end."""

    socket: socket.socket
    path: str
    peer: Peer


def dial(path: str) -> Line:
    """Connect to the unix socket ``path``.  DomainUnreachable when nobody listens, DomainBusy when too many wait."""
    _check_socket(path)
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.setblocking(False)
        link.connect(path)
        credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except BlockingIOError as error:
        link.close()
        raise _in_use(path, "takes no more clients now") from error
    except OSError as error:
        link.close()
        raise _no_connection(path, error) from error
    return Line(link, path, _acting(*struct.unpack("3i", credentials)))


def _acting(pid: int, uid: int, gid: int) -> Peer:
    """The listener with the user it acts as now; it may have been root when it began to listen (QEMU's -runas)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return Peer(pid, uid, gid)
    ids = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
    if not ids.get("Name", [""])[0].startswith("qemu"):
        return Peer(pid, uid, gid)
    return Peer(pid, int(ids["Uid"][3]), int(ids["Gid"][3]))


def _in_use(path: str, how: str) -> DomainBusy:
    return DomainBusy(
        f"the QMP socket {path} {how}",
        means="Another program holds this monitor (it serves one client at a time), or it is no QMP socket.",
        todo="Give QEMU a second -qmp socket for backups.",
    )


def _check_socket(path: str) -> None:
    """DomainUnreachable, in words that help, when ``path`` is no unix socket that we may open."""
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise _no_connection(path, error) from error
    if not stat.S_ISSOCK(mode):
        raise DomainUnreachable(f"{path} is not a socket", todo="Give the path of the domain's QMP socket.")


def _no_connection(path: str, error: OSError) -> DomainUnreachable:
    if isinstance(error, FileNotFoundError):
        return DomainUnreachable(
            f"there is no QMP socket {path}",
            todo="Is the domain running, with an option like -qmp unix:PATH,server=on,wait=off?",
        )
    if isinstance(error, PermissionError):
        return DomainUnreachable(
            f"no permission to open the QMP socket {path}", todo="Run pullback as QEMU's user or as root."
        )
    if isinstance(error, ConnectionRefusedError):
        return DomainUnreachable(f"nobody listens on the socket {path}", todo="QEMU has ended; start the domain.")
    return DomainUnreachable(f"cannot connect to the QMP socket {path}: {error.strerror or error}")


class _Client(QMPClient):
    """A QMPClient that does not write each message out for its log: the schema alone takes a tenth of a second."""

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


class Monitor:
    """One QMP session; made by :func:`connect`."""

    def __init__(self, client: QMPClient, line: Line, greeting: Mapping[str, Any], trace: Trace | None) -> None:
        self._client = client
        self._trace = trace
        self._socket = line.socket
        self.path = line.path
        version = Reply(greeting, "the greeting").member("QMP").member("version").member("qemu")
        self.version: tuple[int, int, int] = (version.size("major"), version.size("minor"), version.size("micro"))
        self.lost = False
        #: What the schema of this QEMU was found to offer; None until somebody asked.
        self.features: frozenset[str] | None = None

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, timeout: float = REPLY_TIMEOUT
    ) -> Any:
        """Send one command and give back what QEMU returned.

        CommandFailed when QEMU answers with an error; DomainUnreachable when it answers nothing within ``timeout``
        seconds or is gone, and then it is not known whether the command was carried out.
        """
        if self.lost:
            raise DomainUnreachable(f"the connection to {self.path} was given up after an earlier failure")
        try:
            result = await uncancelled(self._reply_to(command, dict(arguments or {}), timeout))
        except ExecuteError as error:
            self._note(command, arguments, {"error": error.error.error.desc})
            raise CommandFailed(command, error.error.error.class_, error.error.error.desc) from error
        except TimeoutError as error:
            self.lost = True
            raise DomainUnreachable(
                f"QEMU gave no reply to {command} on {self.path} within {timeout:.0f} s",
                means="It is not known whether the command was carried out.",
                todo="The next pullback command looks at what is there and clears it.",
            ) from error
        except (QMPError, StateError, EOFError, OSError) as error:
            self.lost = True
            raise DomainUnreachable(
                f"the connection to QEMU on {self.path} was lost during {command}",
                means="It is not known whether the command was carried out.",
                todo="If QEMU has ended, start the domain. The next pullback command clears what is left.",
            ) from error
        self._note(command, arguments, result)
        return result

    async def _reply_to(self, command: str, arguments: Mapping[str, Any], timeout: float) -> Any:
        async with asyncio.timeout(timeout):
            return await self._client.execute(command, arguments)

    def _note(self, command: str, arguments: Mapping[str, Any] | None, reply: Any) -> None:
        if self._trace is not None:
            self._trace(command, arguments or {}, reply)

    async def jobs(self) -> dict[str, JobState]:
        """All jobs by id (query-jobs)."""
        return {
            job.text("id"): JobState(
                job.text("status"), job.size("current-progress"), job.size("total-progress"), job.text("error", "")
            )
            for job in replies(await self.execute("query-jobs"), "query-jobs")
        }

    def fileno(self) -> int:
        """The descriptor of the connection's socket."""
        return self._socket.fileno()

    @asynccontextmanager
    async def events(self, *names: str) -> AsyncIterator[EventListener]:
        """Collect events of these names while the block runs."""
        with self._client.listener(names) as listener:
            yield listener

    async def close(self) -> None:
        """End the session; never raises, however the other side ended."""
        try:
            async with asyncio.timeout(GREETING_TIMEOUT):
                await self._client.disconnect()
        except (QMPError, EOFError, OSError, TimeoutError):
            self.lost = True


async def connect(line: Line, trace: Trace | None = None) -> Monitor:
    """A QMP session on a dialled line, which it owns from here on.

    DomainUnreachable when the other end is no QMP server; DomainBusy when another client holds the monitor.
    """
    try:
        client = await _greeted(line)
    except ConnectError as error:
        if not isinstance(error.exc, NegotiationError):
            raise _no_qmp(line.path) from error
        # Greeted, and then came the reply to what the client before us had asked, and did not wait for.
        try:
            client = await _greeted(line := dial(line.path))
        except ConnectError as again:
            raise _no_qmp(line.path) from again
    greeting = client.greeting
    assert greeting is not None
    return Monitor(client, line, greeting._asdict(), trace)


async def _greeted(line: Line) -> _Client:
    """A client that may ask; else the line is closed."""
    client = _Client("pullback")
    try:
        async with asyncio.timeout(GREETING_TIMEOUT):
            await client.connect(line.socket)
    except TimeoutError as error:  # the client has disconnected, but may not have had the socket yet
        line.socket.close()
        raise _in_use(line.path, f"gave no greeting within {GREETING_TIMEOUT:.0f} s") from error
    except (ConnectError, asyncio.CancelledError):
        line.socket.close()
        raise
    except AssertionError as error:  # it was lost as soon as it was made; the library takes that for impossible
        with suppress(QMPError, StateError, EOFError, OSError):
            await client.disconnect()
        line.socket.close()
        raise ConnectError("the connection was lost", EOFError()) from error
    return client


def _no_qmp(path: str) -> DomainUnreachable:
    return DomainUnreachable(
        f"{path} is not a QMP socket", todo="Give the path that follows -qmp unix: on QEMU's command line."
    )
