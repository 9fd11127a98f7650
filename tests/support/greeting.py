# SPDX-License-Identifier: Apache-2.0
"""Who greets as a QMP server does, and then answers as it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}


@asynccontextmanager
async def greeting_server(path: str, answers: list[dict[str, Any]]) -> AsyncIterator[None]:
    """A server that greets, and answers the first thing it hears from each client in turn with one of ``answers``."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(GREETING).encode() + b"\n")
        await reader.read(4096)
        writer.write(json.dumps(answers.pop(0)).encode() + b"\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(greet, path):
        yield
