# SPDX-License-Identifier: Apache-2.0
"""A private directory for a scratch or a socket, which QEMU can use and which nobody has to clean up after us.

    .pullback-new-XXXXXXXX ──lock──► .pullback-work-XXXXXXXX
                                       holds a scratch, a socket, a log: nothing but ``_OURS``

While we live we hold a lock on the directory; the kernel drops it when we die, so whoever makes the next one can tell
a dead one from one in use.  It stands under its final name only once it is locked, so an unlocked one is always dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pullback.errors import UsageError
from pullback.qemu.monitor import Peer

#: Where scratch images go unless told otherwise: large, kept over reboots, not the file system of the domain's images.
DEFAULT_BASE = "/var/tmp"

_NEW, _WORK = ".pullback-new-", ".pullback-work-"
#: The files that may be in one.  A directory that holds anything else is somebody else's and is left alone.
_OURS = re.compile(r"\d+\.scratch|nbd|pid|log")
#: Seconds after which a directory that was never locked has no maker any more.
_ABANDONED = 60.0


def _remove(place: Path, handle: int) -> None:
    """Remove the directory and the files of ours in it, never anything else; that it stays is no failure.

    Through the handle: in a directory that others may write to, the path may be a link by now.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(handle):
            if _OURS.fullmatch(name):
                os.unlink(name, dir_fd=handle)
        place.rmdir()


def _sweep(base: Path) -> None:
    for place in base.glob(f"{_WORK}*"):
        with contextlib.suppress(OSError):
            handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(place, handle)
            finally:
                os.close(handle)
    for place in base.glob(f"{_NEW}*"):
        with contextlib.suppress(OSError):
            if time.time() - place.lstat().st_mtime > _ABANDONED:
                place.rmdir()


def _make(base: Path, owner: Peer) -> tuple[Path, int]:
    """A new directory, locked, and the handle that holds the lock."""
    new = Path(tempfile.mkdtemp(prefix=_NEW, dir=base))
    handle = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.geteuid() == 0 and owner.uid != 0:
            os.fchown(handle, owner.uid, owner.gid)
        return new.rename(base / f"{_WORK}{secrets.token_hex(4)}"), handle
    except BaseException:
        os.close(handle)
        new.rmdir()
        raise


@contextmanager
def work_directory(base: str, owner: Peer) -> Iterator[Path]:
    """A new directory below ``base`` that only ``owner`` (QEMU's user) may enter; removed at the end.

    UsageError when ``base`` cannot take it.
    """
    if not base.startswith("/"):
        raise UsageError(
            f"the scratch directory {base} is not an absolute path", todo="QEMU runs elsewhere; begin with /."
        )
    try:
        _sweep(Path(base))
        place, handle = _make(Path(base), owner)
    except OSError as error:
        raise UsageError(
            f"cannot make a directory in {base}: {error.strerror}", todo="Name another one with --scratch."
        ) from error
    try:
        yield place
    finally:
        _remove(place, handle)
        os.close(handle)
