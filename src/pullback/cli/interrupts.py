# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM end work in order: what was begun is taken back, then the process ends with 130."""

from __future__ import annotations

import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pullback.repository import interruption

T = TypeVar("T")

EXIT_INTERRUPTED = 130


class Interrupted(Exception):
    """The user, or the system, asked us to end; its cause may say what that means."""


def run_interruptible(work: Coroutine[Any, Any, T], stop: Callable[[], None] | None = None) -> T:
    """Run ``work``; a signal cancels it, or calls ``stop`` where that ends it.  Interrupted once it has ended.

    A second signal changes nothing: taking back is short, and bounded by the deadlines of what it talks to.
    """
    import asyncio

    return asyncio.run(_run(work, stop))


async def _run(work: Coroutine[Any, Any, T], stop: Callable[[], None] | None) -> T:
    import asyncio

    loop = asyncio.get_running_loop()
    interruption.begin()
    task = asyncio.ensure_future(work)
    hit = False

    def on_signal() -> None:
        nonlocal hit
        if hit:
            return
        hit = True
        interruption.ask()
        if stop is not None:
            stop()
        else:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        await asyncio.wait({task})
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    if hit and (task.cancelled() or task.exception() is not None):
        raise Interrupted from (None if task.cancelled() else task.exception())
    try:
        return task.result()
    except BrokenPipeError as error:
        # Not our output, which never raises this: it must not be taken for a reader who has enough.
        raise RuntimeError("a pipe between pullback's own parts broke") from error
