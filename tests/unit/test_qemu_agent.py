# SPDX-License-Identifier: Apache-2.0
"""A guest agent that is not there, goes away, or says what no agent says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pullback.errors import DomainError, DomainUnreachable
from pullback.qemu.agent import Agent, NotFrozen, connect_agent, frozen_file_systems

LIMIT = 10


class Guest:
    """An agent that greets and thaws as it should, and answers a freeze with ``says``; None: it hangs up then."""

    def __init__(self, path: Path, says: bytes | None) -> None:
        self.path, self._says = str(path / "agent"), says
        self.heard: list[str] = []
        self.hung_up = asyncio.Event()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Agent]:
        """Our connection to it."""
        listener = await asyncio.start_unix_server(self._serve, self.path)
        try:
            agent = await connect_agent(self.path)
            yield agent
            await agent.close()
        finally:
            listener.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            request = json.loads(line.removeprefix(b"\xff"))
            self.heard.append(request["execute"])
            if request["execute"] == "guest-sync-delimited":
                writer.write(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n")
                if self._says is not None:
                    continue
            elif request["execute"] == "guest-fsfreeze-thaw":
                writer.write(b'{"return": 1}\n')
            elif self._says is not None:
                writer.write(self._says)
            if self._says is None:
                break
        writer.close()
        await writer.wait_closed()
        self.hung_up.set()


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(DomainUnreachable, match=r"cannot connect to the guest agent's socket .*/none: No such file"):
        await connect_agent(str(tmp_path / "none"))


async def test_an_agent_that_hung_up_is_told_at_the_next_command_and_can_be_closed(tmp_path: Path) -> None:
    guest = Guest(tmp_path, None)
    async with guest.listening() as agent:
        await asyncio.wait_for(guest.hung_up.wait(), LIMIT)
        with pytest.raises(DomainUnreachable, match=r"agent at .* was lost during guest-fsfreeze-freeze") as caught:
            await agent.freeze()
        assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "says",
    [b"freezing\n", b"\xfe\n", b"[" * 100_000 + b"\n", b"7\n", b"{}\n", b'{"error": 5}\n', b'{"return": [1]}\n'],
    ids=["no JSON", "no UTF-8", "nested", "a number", "nothing", "no error", "no number"],
)
async def test_nonsense_is_an_error_and_what_may_be_frozen_is_thawed(tmp_path: Path, says: bytes) -> None:
    guest = Guest(tmp_path, says)
    async with guest.listening() as agent:
        with pytest.raises(NotFrozen, match=r"the guest agent at .* guest-fsfreeze-freeze"):
            async with frozen_file_systems(agent):
                pytest.fail("frozen")
    assert guest.heard[-1] == "guest-fsfreeze-thaw"


async def test_a_line_without_an_end_is_not_waited_for(tmp_path: Path) -> None:
    async with Guest(tmp_path, b"x" * (3 << 20)).listening() as agent:
        with pytest.raises(DomainUnreachable, match="was lost during guest-fsfreeze-freeze"):
            await asyncio.wait_for(agent.freeze(), LIMIT)


async def test_a_refusal_is_told_in_the_agents_words(tmp_path: Path) -> None:
    async with Guest(tmp_path, b'{"error": {"class": "GenericError", "desc": "disabled"}}\n').listening() as agent:
        with pytest.raises(DomainError, match="refused guest-fsfreeze-freeze: disabled"):
            await agent.freeze()
