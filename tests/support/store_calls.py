# SPDX-License-Identifier: Apache-2.0
"""Every system call that changes files, counted; and a process that dies at the n-th of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from tests.support.product import forked

#: By which a store could change files; what is written half is of more interest than what is not written at all.
_CALLS = ("mkdir", "open", "write", "writev", "pwrite", "fchmod", "fsync", "rename", "replace", "link", "unlink")


def _changes(name: str, arguments: tuple[Any, ...]) -> bool:
    return name != "open" or bool(arguments[1] & os.O_CREAT)


def _half(pieces: Any) -> bytes:
    """The first half of what a write was to write."""
    whole = b"".join(bytes(piece) for piece in pieces) if isinstance(pieces, (list, tuple)) else bytes(pieces)
    return whole[: len(whole) // 2]


@contextmanager
def watched(before: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call ``before`` with the name and the arguments of each call."""

    def watch(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if _changes(name, arguments):
                before(name, arguments)
            return real(*arguments, **keywords)

        return call

    with ExitStack() as stack:
        for name in _CALLS:
            stack.enter_context(mock.patch.object(os, name, watch(name, getattr(os, name))))
        yield


def calls_of(work: Callable[[], object]) -> list[str]:
    """The names of the calls that ``work`` makes, in order."""
    made: list[str] = []
    with watched(lambda name, _: made.append(name)):
        work()
    return made


def killed_at(work: Callable[[], object], count: int) -> str:
    """Do ``work`` in a child that is killed before its ``count``-th call (a write is half done).

    Returns the name of that call, empty if the work came to its end before it.
    """
    done, told = os.pipe()

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        count -= 1
        if count == 0:
            if name.startswith("write"):
                real_write(arguments[0], _half(arguments[1]))
            real_write(told, name.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    real_write = os.write

    def child() -> int:
        with watched(before):
            work()
        return 0

    try:
        code = forked(child)
        os.close(told)
        told = -1
        name = os.read(done, 100).decode()
    finally:
        os.close(done)
        if told >= 0:
            os.close(told)
    assert code == (-signal.SIGKILL if name else 0)
    return name
