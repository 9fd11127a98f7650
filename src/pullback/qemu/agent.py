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
_LINE_LIMIT = 1 << 20


class Agent:
    """A connection to a guest agent; made by :func:`connect_agent`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
        self._reader = reader
        self._writer = writer
        self.path = path

    async def _command(self, name: str, arguments: dict[str, Any] | None = None, prefix: bytes = b"") -> Any:
        request = {"execute": name, **({"arguments": arguments} if arguments else {})}
        try:
            self._writer.write(prefix + json.dumps(request).encode() + b"\n")
            await self._writer.drain()
            line = await self._reader.readline()
            reply = json.loads(line.rpartition(b"\xff")[2]) if line else None
        except (OSError, ValueError) as error:
            raise DomainUnreachable(f"the guest agent at {self.path} was lost during {name}: {error}") from error
        if reply is None:
            raise DomainUnreachable(f"the guest agent at {self.path} went away during {name}")
        if "error" in reply:
            raise DomainError(f"the guest agent refused {name}: {reply['error'].get('desc', 'no reason given')}")
        return reply.get("return")

    async def synchronize(self) -> None:
        """Make sure that an agent answers, and that what it answers is meant for us (guest-sync-delimited)."""
        token = secrets.randbelow(1 << 31)
        # The byte is no valid JSON: it ends whatever an earlier client left half said.
        while await self._command("guest-sync-delimited", {"id": token}, b"\xff") != token:
            token = secrets.randbelow(1 << 31)

    async def freeze(self) -> int:
        """Freeze all file systems; how many there were (guest-fsfreeze-freeze)."""
        async with asyncio.timeout(_COMMAND_TIMEOUT):
            return int(await self._command("guest-fsfreeze-freeze"))

    async def thaw(self) -> int:
        """Thaw all file systems; how many there were (guest-fsfreeze-thaw)."""
        async with asyncio.timeout(_COMMAND_TIMEOUT):
            return int(await self._command("guest-fsfreeze-thaw"))

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
async def frozen_file_systems(agent: Agent) -> AsyncIterator[int]:
    """Keep all file systems frozen while the block runs; how many.  They thaw however it ends, even by SIGKILL."""
    guard = Guard([("agent", agent.path)])
    thawed = False
    try:
        await guard.ready()
        await guard.arm()
        try:
            yield await agent.freeze()
        finally:
            await asyncio.shield(agent.thaw())
            await guard.disarm()
            thawed = True
    except TimeoutError as error:
        raise DomainUnreachable(f"the guest agent at {agent.path} did not answer in time") from error
    finally:
        if not thawed:
            # The guard is armed still, and the agent serves one client at a time.
            await agent.close()
        await asyncio.to_thread(guard.close)
