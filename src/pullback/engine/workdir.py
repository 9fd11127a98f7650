# SPDX-License-Identifier: Apache-2.0
"""A private directory for a scratch or a socket, which QEMU can use and which nobody has to clean up after us.

While we live we hold a lock on the directory; the kernel drops it when we die, so whoever makes the next one can tell
a dead one from one in use and removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pullback.errors import UsageError
from pullback.qemu.monitor import Peer

#: Where scratch images go unless told otherwise: large, kept over reboots, not the file system of the domain's images.
DEFAULT_BASE = "/var/tmp"

_PREFIX = "pullback-"
#: A directory younger than this, in seconds, may be one whose maker has not locked it yet.
_YOUNG = 60.0


def _sweep(base: Path) -> None:
    for place in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - place.stat().st_mtime < _YOUNG:
                continue
            handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place)
            finally:
                os.close(handle)


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
        place = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    except OSError as error:
        raise UsageError(
            f"cannot make a directory in {base}: {error.strerror}", todo="Name another one with --scratch."
        ) from error
    handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.geteuid() == 0 and owner.uid != 0:
            os.chown(place, owner.uid, owner.gid)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(handle)
