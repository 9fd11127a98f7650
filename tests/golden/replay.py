# SPDX-License-Identifier: Apache-2.0
"""Captured QEMU replies, played back to the code that observes; and the files they and the golden plans are in."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pullback.errors import CommandFailed
from pullback.model.facts import Facts
from pullback.qemu.monitor import Monitor
from pullback.qemu.observe import observe

DATA = Path(__file__).parent / "data"
CAPTURES = DATA / "qemu-7.2"
UPDATE = "PULLBACK_UPDATE_GOLDEN"


class Replay:
    """A monitor that answers with what was captured; any other question is an error of the test."""

    def __init__(self, captured: Mapping[str, Any]) -> None:
        self.version = tuple(captured["version"])
        self.features = frozenset(captured["features"])
        self._replies = {self._key(item["execute"], item["arguments"]): item for item in captured["replies"]}

    @staticmethod
    def _key(command: str, arguments: Mapping[str, Any] | None) -> str:
        return json.dumps([command, dict(arguments or {})], sort_keys=True)

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        item = self._replies[self._key(command, arguments)]
        if "error" in item:
            raise CommandFailed(command, "GenericError", item["error"])
        return item["return"]


def observed(name: str) -> Facts:
    """What observing gives on the capture ``name``."""
    captured = json.loads((CAPTURES / f"{name}.json").read_text())
    return asyncio.run(observe(cast(Monitor, Replay(captured))))


def check_golden(name: str, value: Any) -> None:
    """Compare a JSON value with the file ``name``; with PULLBACK_UPDATE_GOLDEN set, write the file instead."""
    path = DATA / f"{name}.json"
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if os.environ.get(UPDATE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"there is no {path.name} yet: run with {UPDATE}=1 and read what it says"
    assert text == path.read_text(), f"{path.name} has changed: if that is meant, run with {UPDATE}=1 and read the diff"
