# SPDX-License-Identifier: Apache-2.0
"""What may not be left half done when we are cancelled, or when something beside it fails."""

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


async def together(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """Carry out all at once, and give back what came of each; the first failure is raised when all have ended."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
