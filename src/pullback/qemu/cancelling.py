# SPDX-License-Identifier: Apache-2.0
"""What may not be left half done when we are cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def uncancelled(work: Coroutine[Any, Any, T]) -> T:
    """Carry ``work`` to its end even when we are cancelled meanwhile, so that its outcome is known."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # it was seen: being cancelled is what is told
        raise
