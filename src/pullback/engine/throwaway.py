# SPDX-License-Identifier: Apache-2.0
"""A private directory for the images of a backup that is booted to be thrown away.

    .pullback-booting-XXXXXXXX ──lock──► .pullback-booted-XXXXXXXX

Whoever holds the lock lives: we, or a QEMU that was given it and has not ended yet.  What nobody holds any more is
removed by the next one here, whoever was killed.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pullback.errors import UsageError

_NEW, _LOCKED = ".pullback-booting-", ".pullback-booted-"
#: Seconds after which a directory that was never locked has no maker any more.
_ABANDONED = 60.0


@contextmanager
def throwaway_directory(base: str) -> Iterator[tuple[Path, int]]:
    """A new directory below ``base`` that only we may enter, and the handle that holds its lock; removed at the end.

    UsageError when ``base`` cannot take it.
    """
    try:
        _sweep(Path(base))
        place, handle = _make(Path(base).resolve(strict=True))
    except OSError as error:
        raise UsageError(
            f"cannot make a directory in {base}: {error.strerror}", todo="Name another one with --work."
        ) from error
    try:
        yield place, handle
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(handle)


def _make(base: Path) -> tuple[Path, int]:
    new = Path(tempfile.mkdtemp(prefix=_NEW, dir=base))
    handle = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return new.rename(base / f"{_LOCKED}{secrets.token_hex(4)}"), handle
    except BaseException:
        os.close(handle)
        new.rmdir()
        raise


def _sweep(base: Path) -> None:
    """Remove what those who died left; never another user's, nor what is in use."""
    for place in base.glob(f"{_LOCKED}*"):
        with suppress(OSError):
            handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(handle).st_uid == os.geteuid():
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(place)
            finally:
                os.close(handle)
    for place in base.glob(f"{_NEW}*"):
        with suppress(OSError):
            if time.time() - place.lstat().st_mtime > _ABANDONED:
                place.rmdir()
