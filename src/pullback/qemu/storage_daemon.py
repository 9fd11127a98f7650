# SPDX-License-Identifier: Apache-2.0
"""qemu-storage-daemon as a child process: QEMU's block layer without a domain.

If we die, it must not go on holding images: a watcher, a line of shell that waits on a pipe, ends it then.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pullback.errors import RestoreError, UsageError

PROGRAM = "qemu-storage-daemon"

#: What file systems want direct requests to be aligned to, at most.
_MOST_ALIGNED = 4096

#: Seconds to come up, and to write out what is left at the end.
_START, _STOP = 30.0, 300.0
#: Who is to end is asked again so often: the daemon looks whether it was asked, then waits for something to happen, and
#: does not see what comes in between (once in some thousand times).
ASK_EVERY = 1.0


def qemu_program(name: str) -> str:
    """Where one of QEMU's programs is; UsageError, saying what to install, when it is missing."""
    if path := shutil.which(name):
        return path
    raise UsageError(
        f"{name} is not installed", todo="On Debian it comes with qemu-system-common (storage daemon) and qemu-utils."
    )


def file_node(path: Path, image_format: str) -> dict[str, object]:
    """QEMU's options for an image that is read or written whole: past the page cache, if its file system can.

    What is restored does not drive what the host's domains need out of its memory, and what is read again comes from
    the disk.  It takes half the time, too: for fresh pages copying costs more than the disk does.
    """
    node: dict[str, object] = {"driver": "file", "filename": str(path)}
    if image_format == "raw" and path.stat().st_size % _MOST_ALIGNED:
        return node  # QEMU refuses one that it would have to make larger
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return node
    return node | {"cache": {"direct": True}}


#: Asks process $1 to end, again and again, once our end of the pipe is closed without a word.  A process that got the
#: same number later is another one: it was not born at the same time.
_WATCH = """
born() { stat=$(cat "/proc/$1/stat" 2>/dev/null); set -- ${stat##*)}; [ "$1" = Z ] || echo "${20}"; }
born=$(born "$1")
read -r _ && exit
for _ in $(seq "$2"); do
    [ -n "$born" ] && [ "$(born "$1")" = "$born" ] && kill "$1" || exit
    sleep "$3"
done 2>/dev/null
"""


class Watcher:
    """Ends process ``pid``, in order, when we die without having released it."""

    def __init__(self, pid: int) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "sh", str(pid), f"{_STOP / ASK_EVERY:.0f}", str(ASK_EVERY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def release(self) -> None:
        """Watch no more; the process may live on."""
        self._process.communicate(b"\n")


class StorageDaemon:
    """A daemon on images, exporting them; a context manager, blocking.

    ``blockdevs`` are QEMU's ``BlockdevOptions`` and ``exports`` its ``BlockExportOptions`` as JSON values; the NBD
    server listens on the unix socket ``directory/nbd``.  RestoreError, with QEMU's words, when it does not start or
    ends badly: then what was written may be incomplete.
    """

    def __init__(
        self, blockdevs: Sequence[Mapping[str, Any]], exports: Sequence[Mapping[str, Any]], directory: Path
    ) -> None:
        self.socket = str(directory / "nbd")
        self._pidfile = directory / "pid"
        self._log = directory / "log"
        argv = [qemu_program(PROGRAM), "--pidfile", str(self._pidfile)]
        for blockdev in blockdevs:
            argv += ["--blockdev", json.dumps(blockdev)]
        argv += ["--nbd-server", f"addr.type=unix,addr.path={self.socket}"]
        for export in exports:
            argv += ["--export", json.dumps(export)]
        self._argv = argv
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: Watcher | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            # A session of its own: a Ctrl-C is for us, and we end it in order.
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._watcher = Watcher(self._process.pid)
        deadline = time.monotonic() + _START
        while not self._pidfile.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._end(signal.SIGKILL)
                raise RestoreError(f"qemu-storage-daemon did not start: {self._said()}")
            time.sleep(0.005)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = self._end(signal.SIGTERM if kind is None else signal.SIGKILL)
        if kind is None and code != 0:
            raise RestoreError(f"qemu-storage-daemon ended with {code}: {self._said()}")

    def _end(self, how: signal.Signals) -> int:
        assert self._process is not None
        assert self._watcher is not None
        deadline = time.monotonic() + _STOP
        try:
            while True:
                self._process.send_signal(how if time.monotonic() < deadline else signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):
                    return self._process.wait(ASK_EVERY)
        finally:
            self._watcher.release()

    def _said(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no word")
