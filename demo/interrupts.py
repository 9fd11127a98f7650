# SPDX-License-Identifier: Apache-2.0
"""Signals that ask the demo to end: one exception, raised once, and not where it would lose a process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked the demo to end."""


class _State:
    held = False
    pending = False


def watch() -> None:
    """From here on the first signal raises Interrupted in the main thread; later ones do nothing."""
    for number in _SIGNALS:
        signal.signal(number, _on_signal)


def ignore() -> None:
    """From here on signals do nothing."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held_back() -> Iterator[None]:
    """A signal raises at the block's end: between a process's start and whatever ends it again nothing may happen."""
    _State.held = True
    try:
        yield
    finally:
        _State.held = False
    if _State.pending:
        ignore()
        raise Interrupted


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _State.held:
        _State.pending = True
        return
    ignore()
    raise Interrupted
