# SPDX-License-Identifier: Apache-2.0
"""Requests that nobody waits for any more once the process was asked to end.

A store that is away is asked again for minutes.  Whoever presses Ctrl-C does not wait that long: a request that is not
answered within moments is left to itself, in a thread that ends with the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

from pullback.errors import RepositoryError

T = TypeVar("T")

#: Seconds that requests have from the moment the process is asked to end, and that each of them has at least.
_LAST, _LEAST = 3.0, 2.0

_asked: Future[float] = Future()


def begin() -> None:
    """Nobody has asked this process to end yet."""
    global _asked
    _asked = Future()


def ask() -> None:
    """Asked to end: what is not answered soon fails.  From any thread; more than once is no more than once."""
    if not _asked.done():
        _asked.set_result(time.monotonic())


def answer_to(request: Callable[[], T], location: str, *failures: type[Exception]) -> T:
    """Make a request that may take minutes, and return its answer or raise its failure, one of ``failures``.

    RepositoryError, when the process is asked to end meanwhile, or was before, and no answer comes; the request may
    be carried out all the same.
    """
    answer: Future[T] = Future()
    threading.Thread(target=_carry, args=(request, answer, failures), name="pullback-request", daemon=True).start()
    asked = _asked
    either: list[Future[Any]] = [answer, asked]
    wait(either, return_when=FIRST_COMPLETED)
    if not answer.done():
        wait([answer], timeout=max(asked.result() + _LAST - time.monotonic(), _LEAST))
    if not answer.done():
        raise RepositoryError(
            f"The repository {location} did not answer, and pullback was asked to end",
            means="What was not done there stays undone; backups stored earlier are untouched.",
            todo="A lock that is left there is removed by the next pullback on this host, or by restic unlock.",
        )
    return answer.result()


def _carry(request: Callable[[], T], answer: Future[T], failures: tuple[type[Exception], ...]) -> None:
    try:
        answer.set_result(request())
    except failures as error:
        answer.set_exception(error)
    finally:
        if not answer.done():
            answer.set_exception(RuntimeError("a request to a store failed in a way that nobody expects"))
