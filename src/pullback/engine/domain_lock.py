# SPDX-License-Identifier: Apache-2.0
"""One pullback per domain at a time.

The lock is a file lock, so it ends with its holder however that dies.  It is named after the QEMU process, not the
monitor socket: a domain may have several.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pullback.errors import DomainBusy, UsageError


def lock_directory() -> Path:
    """A directory of our own user's for locks and sockets; UsageError when there is none that is safe."""
    if os.geteuid() == 0:
        place = Path("/run/pullback")
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        place = Path(runtime) / "pullback"
    else:
        place = Path(f"/tmp/pullback-{os.geteuid()}")
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        status = place.lstat()
    except OSError as error:
        raise UsageError(f"cannot make the lock directory {place}: {error.strerror}") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise UsageError(f"the lock directory {place} is not ours alone", todo="Remove it; pullback makes it anew.")
    return place


def qemu_identity(pid: int, socket: str) -> str:
    """What the lock is named after: QEMU's pid and its start time (clock ticks since boot), so it is never used again.

    Where the listener is no QEMU (a manager opened the socket and passed it on), it is the socket's own inode.
    """
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    except OSError:
        name = rest = ""
    if name.startswith("qemu"):
        return f"{pid}-{rest.split()[19]}"
    status = Path(socket).stat()
    return f"socket-{status.st_dev}-{status.st_ino}"


def _open(path: Path) -> int:
    """Open and lock the file, making sure that it still is the one of that name."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


@contextmanager
def domain_lock(identity: str, domain: str) -> Iterator[None]:
    """Hold the domain for ourselves.  DomainBusy, naming the holder's pid, when another pullback does."""
    path = lock_directory() / f"{identity}.lock"
    try:
        handle = _open(path)
    except BlockingIOError as error:
        holder = ""
        with suppress(FileNotFoundError):  # it ended meanwhile
            holder = path.read_text().strip()
        raise DomainBusy(
            f"another pullback (process {holder or '?'}) is working on domain {domain}",
            means="Nothing was touched.",
            todo="Try again when it has ended.",
        ) from error
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
