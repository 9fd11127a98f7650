# SPDX-License-Identifier: Apache-2.0
"""The guest agent (qemu-ga), as far as backup needs it: freezing the domain's file systems, and thawing them.

It speaks JSON lines over a virtio-serial port that QEMU offers as a unix socket, to one client at a time, and may be
absent inside the domain without anybody noticing on the outside; so every word has a deadline.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pullback.errors import DomainError, DomainUnreachable
from pullback.qemu.guard import Guard

#: Seconds for the first sign of life, and for a command (a freeze writes out what the file systems hold in memory).
_SYNC_TIMEOUT, _COMMAND_TIMEOUT = 5.0, 60.0
#: Seconds for which file systems may stay frozen; it is less than one unless we are stopped.
FROZEN_LIMIT = 10.0
_LINE_LIMIT = 1 << 20


class NotFrozen(DomainError):
    """The file systems inside the domain could not be frozen; they are as they were."""


class Agent:
    """A connection to a guest agent; made by :func:`connect_agent`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
        self._reader = reader
        self._writer = writer
        self.path = path

    async def _send(self, name: str, arguments: dict[str, Any] | None = None, prefix: bytes = b"") -> None:
        request = {"execute": name, **({"arguments": arguments} if arguments else {})}
        try:
            self._writer.write(prefix + json.dumps(request).encode() + b"\n")
            await self._writer.drain()
        except OSError as error:
            raise DomainUnreachable(f"the guest agent at {self.path} was lost during {name}: {error}") from error

    async def _reply(self, name: str) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
            reply = json.loads(line.rpartition(b"\xff")[2]) if line else None
        except (OSError, ValueError, RecursionError) as error:  # what a domain says may be anything
            raise DomainUnreachable(f"the guest agent at {self.path} was lost during {name}: {error}") from error
        if not isinstance(reply, dict):
            raise DomainUnreachable(f"the guest agent at {self.path} went away during {name}")
        return reply

    async def _command(self, name: str) -> int:
        await self._send(name)
        match await self._reply(name):
            case {"return": int(count)}:
                return count
            case {"error": {"desc": str(reason)}}:
                raise DomainError(f"the guest agent refused {name}: {reason}")
        raise DomainError(f"what the guest agent at {self.path} answered to {name} makes no sense")

    async def synchronize(self) -> None:
        """Make sure that an agent answers, and that what it answers is meant for us (guest-sync-delimited)."""
        token = secrets.randbelow(1 << 31)
        # The byte is no valid JSON: it ends whatever an earlier client left half said.
        await self._send("guest-sync-delimited", {"id": token}, b"\xff")
        while (await self._reply("guest-sync-delimited")).get("return") != token:
            continue

    async def freeze(self) -> int:
        """Freeze all file systems; how many there were (guest-fsfreeze-freeze)."""
        async with asyncio.timeout(_COMMAND_TIMEOUT):
            return await self._command("guest-fsfreeze-freeze")

    async def thaw(self) -> int:
        """Thaw all file systems; how many there were (guest-fsfreeze-thaw).

        Synchronised first: a freeze that was given up may be answered only now.
        """
        async with asyncio.timeout(_COMMAND_TIMEOUT):
            await self.synchronize()
            return await self._command("guest-fsfreeze-thaw")

    def fileno(self) -> int:
        """The descriptor of the connection's socket."""
        return int(self._writer.get_extra_info("socket").fileno())

    async def close(self) -> None:
        """Close the connection."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            return


async def connect_agent(path: str) -> Agent:
    """The guest agent on the unix socket ``path``; DomainUnreachable when none answers in time."""
    try:
        async with asyncio.timeout(_SYNC_TIMEOUT):
            reader, writer = await asyncio.open_unix_connection(path, limit=_LINE_LIMIT)
            agent = Agent(reader, writer, path)
            await agent.synchronize()
            return agent
    except TimeoutError as error:
        raise DomainUnreachable(
            f"no guest agent answered on {path} within {_SYNC_TIMEOUT:.0f} s",
            todo="Is qemu-guest-agent running inside?",
        ) from error
    except OSError as error:
        raise DomainUnreachable(f"cannot connect to the guest agent's socket {path}: {error.strerror}") from error


@asynccontextmanager
async def frozen_file_systems(agent: Agent) -> AsyncIterator[None]:
    """Keep all file systems frozen while the block runs.  They thaw however it ends, even by SIGKILL, or does not end.

    NotFrozen, before the block runs, when the agent cannot freeze them or finds none; DomainError after it when it took
    longer than FROZEN_LIMIT.
    """
    guard = Guard("agent", agent.path, agent.fileno())
    thawed = False
    try:
        await guard.ready()
        await guard.arm(_COMMAND_TIMEOUT + FROZEN_LIMIT)
        try:
            await _freeze(agent)
            await guard.arm(FROZEN_LIMIT)
            yield
        finally:
            await asyncio.shield(_thaw(agent))
            await guard.disarm()
            thawed = True
        if guard.undid:
            raise DomainError(
                f"the file systems inside were frozen for {FROZEN_LIMIT:.0f} s, and then were thawed",
                means="The disks were frozen too late, so nothing was stored; earlier backups are untouched.",
                todo="Run it again. Either pullback itself was stopped meanwhile, or QEMU was too slow.",
            )
    finally:
        if not thawed:
            # The guard is armed still, and the agent serves one client at a time.
            await agent.close()
        await asyncio.to_thread(guard.close)


async def _freeze(agent: Agent) -> None:
    try:
        count = await agent.freeze()
    except TimeoutError as error:
        raise NotFrozen(f"the guest agent at {agent.path} did not freeze within {_COMMAND_TIMEOUT:.0f} s") from error
    except DomainError as error:
        raise NotFrozen(error.what) from error
    if not count:
        raise NotFrozen(f"the guest agent at {agent.path} found no file system to freeze")


async def _thaw(agent: Agent) -> None:
    try:
        await agent.thaw()
    except TimeoutError as error:
        raise DomainUnreachable(
            f"the guest agent at {agent.path} did not thaw within {_COMMAND_TIMEOUT:.0f} s"
        ) from error
