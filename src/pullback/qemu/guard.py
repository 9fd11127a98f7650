# SPDX-License-Identifier: Apache-2.0
"""A tiny process that continues a paused domain if the one that paused it dies.

    pullback ──pipe──► guard
       │                 │  the pipe closes without "done": connect, `cont`
       └──QMP──► QEMU ◄──┘

It runs in a session of its own, so a signal to pullback's process group does not reach it, and imports nothing
but the standard library, so it is there within milliseconds.  QEMU's monitor takes its connection as soon as the
kernel has closed the dead one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time

ARM, DISARM, READY = b"a", b"d", b"r"

#: For how long, in seconds, the guard tries to reach QEMU.
PERSISTENCE = 30.0


def _continue(path: str) -> None:
    """Connect and send ``cont``, once QEMU takes the connection; an error in between means trying again."""
    deadline = time.monotonic() + PERSISTENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(2.0)
            link.connect(path)
            lines = link.makefile("rwb")
            json.loads(lines.readline())
            for command in ("qmp_capabilities", "cont"):
                lines.write(json.dumps({"execute": command}).encode() + b"\r\n")
                lines.flush()
                reply = json.loads(lines.readline())
                while "event" in reply:
                    reply = json.loads(lines.readline())
            return
        time.sleep(0.05)


def main(path: str, pipe: int) -> None:
    """Serve until the pipe closes; continue the domain if that happens while armed."""
    os.write(sys.stdout.fileno(), READY)
    armed = False
    while message := os.read(pipe, 1):
        armed = message == ARM
        os.write(sys.stdout.fileno(), message)
    if armed:
        _continue(path)


class Guard:
    """The parent's end.  Between :meth:`arm` and :meth:`disarm` our death continues the domain."""

    def __init__(self, path: str) -> None:
        read_end, self._pipe = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, path, str(read_end)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(read_end,),
            start_new_session=True,
        )
        os.close(read_end)

    async def _expect(self, message: bytes) -> None:
        out = self._process.stdout
        assert out is not None
        if await asyncio.to_thread(os.read, out.fileno(), 1) != message:
            raise ChildProcessError("the guard process ended")

    async def ready(self) -> None:
        """Wait until the guard runs."""
        await self._expect(READY)

    async def arm(self) -> None:
        """From here on, our death makes the guard continue the domain."""
        os.write(self._pipe, ARM)
        await self._expect(ARM)

    async def disarm(self) -> None:
        """The domain runs again; nothing is left to guard."""
        os.write(self._pipe, DISARM)
        await self._expect(DISARM)

    def close(self) -> None:
        """End the guard; an armed one does its work."""
        os.close(self._pipe)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
