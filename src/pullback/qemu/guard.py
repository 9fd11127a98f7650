# SPDX-License-Identifier: Apache-2.0
"""A tiny process that lets a domain go on if the one that holds it dies or stands still.

That is ``cont`` for a paused domain, and a thaw for file systems that the guest agent froze.

    pullback ──pipe──► guard
       │                 │  the pipe closes without "disarmed": connect, undo
       └──QMP──► QEMU ◄──┘  nothing comes for too long: undo, over the connection that pullback itself has

It runs in a session of its own, so a signal to pullback's process group does not reach it, and imports nothing
but the standard library, so it is there within milliseconds.  A monitor, and an agent's socket, take its connection as
soon as the kernel has closed the dead one's.  One that stands still (SIGSTOP, a stuck file system, a debugger) keeps
its connection, and these sockets serve one at a time: so the guard holds the same socket, and says one line there.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import subprocess
import sys
import time

ARM, DISARM, READY, UNDID = b"a", b"d", b"r", b"u"
_MESSAGE = 32

#: For how long, in seconds, the guard tries to reach the other side.
PERSISTENCE = 30.0

_SYNC = 20180525

#: What to say to each kind of socket, in order.  A guest agent first gets a byte that ends whatever was half said.
#: The reply to what the dead one asked may still come, to us: so each first command has an answer that is its own.
_UNDO: dict[str, list[dict[str, object]]] = {
    "qmp": [{"execute": "qmp_capabilities", "id": "guard-greets"}, {"execute": "cont", "id": "guard"}],
    "agent": [
        {"execute": "guest-sync-delimited", "arguments": {"id": _SYNC}},
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
                if _answers(json.loads(line.rpartition(b"\xff")[2]), command):
                    break


def _answers(reply: dict[str, object], command: dict[str, object]) -> bool:
    """Whether this is what came of ``command``, and not of one that somebody else gave."""
    if command["execute"] == "guest-sync-delimited":
        return reply.get("return") == _SYNC
    if "id" in command and "id" in reply:
        return reply["id"] == command["id"]
    return "error" in reply or ("return" in reply and "id" not in command)


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


def _undo_beside(kind: str, shared: int) -> None:
    """Undo over the connection of one that lives, and will find a reply with an id that it never used."""
    line = json.dumps(_UNDO[kind][-1]).encode() + b"\r\n"
    try:
        os.write(shared, line)
    except OSError:
        return  # the connection is lost, and whoever had it knows that


def main(kind: str, path: str, shared: int, pipe: int) -> None:
    """Serve until the pipe closes; undo if that happens while armed, and whenever that lasts too long."""
    os.write(sys.stdout.fileno(), READY)
    limit: float | None = None
    undid = False
    while True:
        if not select.select([pipe], [], [], limit)[0]:
            _undo_beside(kind, shared)
            undid = True
            continue
        message = os.read(pipe, _MESSAGE)
        if not message:
            break
        limit = float(message[1:]) if message[:1] == ARM else None
        os.write(sys.stdout.fileno(), UNDID if undid else message[:1])
    os.close(shared)
    if limit is not None:
        _persist(kind, path)


class Guard:
    """The parent's end.  Between :meth:`arm` and :meth:`disarm` our death, or too long a silence, makes it undo.

    ``kind`` is what it undoes ("qmp": continue the domain, "agent": thaw its file systems), ``path`` the socket for
    that, ``shared`` the descriptor of our own connection to it.
    """

    def __init__(self, kind: str, path: str, shared: int) -> None:
        #: Whether the guard undid what we did because it lasted too long.
        self.undid = False
        read_end, self._pipe = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, kind, path, str(shared), str(read_end)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(read_end, shared),
            start_new_session=True,
        )
        os.close(read_end)

    async def _expect(self, message: bytes) -> None:
        out = self._process.stdout
        assert out is not None
        said = await asyncio.to_thread(os.read, out.fileno(), 1)
        self.undid |= said == UNDID
        if said not in (message, UNDID):
            raise ChildProcessError("the guard process ended")

    async def ready(self) -> None:
        """Wait until the guard runs."""
        await self._expect(READY)

    async def arm(self, limit: float) -> None:
        """From here on, our death makes the guard undo, and so does a silence of ``limit`` seconds."""
        os.write(self._pipe, ARM + str(limit).encode())
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
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
