# SPDX-License-Identifier: Apache-2.0
"""Backups that a signal, or any other blow, hits at a chosen point; mostly in a forked child."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from lab.qemu import Qemu
from pullback.cli.interrupts import EXIT_INTERRUPTED, Interrupted, run_interruptible
from pullback.engine.backup import run_backup
from pullback.engine.events import silent
from pullback.errors import PullbackError
from pullback.qemu.monitor import Monitor
from tests.support.backups import open_repository
from tests.support.product import Stage, forked

#: What happens at a point: a signal to this process, or anything else.
Blow = signal.Signals | Callable[[], None]
#: A point to be hit at: a context manager that arms it around the backup.
Point = Callable[[Blow], Any]


def changes_something(command: str) -> bool:
    """Whether a QMP command may change QEMU; dying around the others shows nothing new.  Empty: no command at all."""
    return bool(command) and not command.startswith(("query-", "x-debug-", "qom-get"))


def _hit(blow: Blow) -> None:
    if isinstance(blow, signal.Signals):
        os.kill(os.getpid(), blow)
    else:
        blow()


def before_command(count: int) -> Point:
    """Right before the ``count``-th command that changes something is sent."""
    return _around_command(count, sent=False)


def after_sending(count: int) -> Point:
    """When that command was sent, whatever QEMU has made of it by then."""
    return _around_command(count, sent=True)


def _around_command(count: int, sent: bool) -> Point:
    @contextmanager
    def point(blow: Blow) -> Iterator[None]:
        execute: Callable[..., Awaitable[Any]] = Monitor.execute
        left = count

        async def hit(self: Monitor, command: str, arguments: Mapping[str, Any] | None = None, *more: Any) -> Any:
            nonlocal left
            left -= changes_something(command)
            if left == 0 and changes_something(command):
                if not sent:
                    _hit(blow)
                    return await execute(self, command, arguments, *more)
                running = asyncio.ensure_future(execute(self, command, arguments, *more))
                for _ in range(10):  # the client's writer is a task of its own
                    await asyncio.sleep(0)
                _hit(blow)
                return await running
            return await execute(self, command, arguments, *more)

        with mock.patch.object(Monitor, "execute", hit):
            yield

    return point


def at_call(owner: Any, name: str, count: int = 1, after: bool = False) -> Point:
    """Before (or after) the ``count``-th call of a method, on whatever thread that is."""

    @contextmanager
    def point(blow: Blow) -> Iterator[None]:
        method = getattr(owner, name)
        left = count

        def hit(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                _hit(blow)
            result = method(*arguments, **keywords)
            if left == 0 and after:
                _hit(blow)
            return result

        with mock.patch.object(owner, name, hit):
            yield

    return point


def hit_backup(stage: Stage, qemu: Qemu, point: Point, blow: Blow, **more: Any) -> int:
    """A backup in a child that ``blow`` hits at ``point``; its exit code, or minus the signal."""
    return forked(lambda: hit_here(stage, qemu, point, blow, **more))


def hit_here(stage: Stage, qemu: Qemu, point: Point, blow: Blow, **more: Any) -> int:
    """The same in this process, if it goes on after it."""
    with point(blow):
        try:
            run_interruptible(run_backup(stage.request(qemu, **more), lambda: open_repository(stage.repo), silent))
        except Interrupted:
            return EXIT_INTERRUPTED
        except PullbackError as error:
            print(error)
            return error.exit_code
    return 0


def commands_of(stage: Stage, qemu: Qemu) -> int:
    """How many commands that change something a backup sends now."""
    sent: list[str] = []

    def trace(command: str, arguments: Mapping[str, Any], reply: Any) -> None:
        sent.append(command)

    asyncio.run(run_backup(stage.request(qemu), lambda: open_repository(stage.repo), silent, trace))
    return sum(map(changes_something, sent))
