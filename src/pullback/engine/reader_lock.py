# SPDX-License-Identifier: Apache-2.0
"""The lock of whoever only reads a repository."""

from __future__ import annotations

from pullback.engine.events import Emit, Note
from pullback.errors import RepositoryError
from pullback.repository.locks import RepositoryLock


def acquire_for_reading(lock: RepositoryLock, doing: str, emit: Emit) -> None:
    """Take the lock; where none can be written (a full or read-only file system) say so and do without.

    Every blob is verified: the worst that a prune beside a reader can do is that some cannot be read.  RepositoryLocked
    while an exclusive lock is held.
    """
    try:
        lock.acquire()
    except RepositoryError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        emit(Note(f"{doing} without a lock, so nothing may prune the repository meanwhile: {error.what}."))


def release_after_reading(lock: RepositoryLock, emit: Emit) -> None:
    """Give the lock back; where it cannot be removed say so: what was read is right, or has an error of its own."""
    try:
        lock.release()
    except RepositoryError as error:
        emit(Note(f"The repository's lock could not be removed, the next pullback does that: {error.what}."))
