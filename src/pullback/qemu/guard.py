# SPDX-License-Identifier: Apache-2.0
"""A tiny process that lets a domain go on if the one that holds it still dies: ``cont`` for a paused domain, a thaw for
file systems that the guest agent froze.

    pullback ──pipe──► guard
       │                 │  the pipe closes without "disarmed": connect, undo
       └──QMP──► QEMU ◄──┘

It runs in a session of its own, so a signal to pullback's process group does not reach it, and imports nothing
but the standard library, so it is there within milliseconds.  A monitor, and an agent's socket, take its connection as
soon as the kernel has closed the dead one's.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

ARM, DISARM, READY = b"a", b"d", b"r"

#: For how long, in seconds, the guard tries to reach the other side.
PERSISTENCE = 30.0

#: What to say to each kind of socket, in order.  A guest agent first gets a byte that ends whatever was half said.
_UNDO: dict[str, list[dict[str, object]]] = {
    "qmp": [{"execute": "qmp_capabilities"}, {"execute": "cont"}],
    "agent": [
        {"execute": "guest-sync-delimited", "arguments": {"id": 20180525}},
        {"execute": "guest-fsfreeze-thaw"},
    ],
}


def _undo(kind: str, path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(5.0)
        link.connect(path)
        lines = link.makefile("rwb")
        if kind == "qmp":
            json.loads(lines.readline())
        else:
            lines.write(b"\xff")
        for command in _UNDO[kind]:
            lines.write(json.dumps(command).encode() + b"\r\n")
            lines.flush()
            while True:
                line = lines.readline()
                if not line:
                    raise ConnectionResetError("it closed the connection")
                reply = json.loads(line.rpartition(b"\xff")[2])
                if "return" in reply or "error" in reply:
                    break


def _persist(kind: str, path: str) -> None:
    """Undo, once the other side takes the connection; an error in between means trying again.

    Where nobody listens QEMU has ended, and so has what was paused or frozen.
    """
    deadline = time.monotonic() + PERSISTENCE
    while time.monotonic() < deadline:
        try:
            _undo(kind, path)
            return
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except (OSError, ValueError):
            pass
        time.sleep(0.05)


def main(undo: Sequence[tuple[str, str]], pipe: int) -> None:
    """Serve until the pipe closes; undo if that happens while armed."""
    os.write(sys.stdout.fileno(), READY)
    armed = False
    while message := os.read(pipe, 1):
        armed = message == ARM
        os.write(sys.stdout.fileno(), message)
    if armed:
        for kind, path in undo:
            _persist(kind, path)


class Guard:
    """The parent's end.  Between :meth:`arm` and :meth:`disarm` our death makes it undo.

    ``undo`` are kinds ("qmp": continue the domain, "agent": thaw its file systems) with the paths of their sockets.
    """

    def __init__(self, undo: Sequence[tuple[str, str]]) -> None:
        read_end, self._pipe = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, json.dumps(list(undo)), str(read_end)],
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
        """From here on, our death makes the guard undo."""
        os.write(self._pipe, ARM)
        await self._expect(ARM)

    async def disarm(self) -> None:
        """The domain goes on; nothing is left to guard."""
        os.write(self._pipe, DISARM)
        await self._expect(DISARM)

    def close(self) -> None:
        """End the guard; an armed one does its work."""
        os.close(self._pipe)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
