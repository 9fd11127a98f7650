# SPDX-License-Identifier: Apache-2.0
"""libguestfs's appliance: a small virtual machine that reads file systems, driven through guestfish.

    we ──── commands, one a line ────► guestfish ──► QEMU: the appliance's kernel mounts what the image has
       ◄─── answers, then a mark ─────     │
       ◄─── files, through a pipe ─────────┘

A hostile file system meets a kernel that can be lost.  guestfish ends with its input, so nothing of it outlives us.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from pullback.errors import FilesError, UsageError
from pullback.plan.files import printable, quoted

_TODO_INSTALL = "On Debian: apt install guestfish, and a kernel where there is none: linux-image-cloud-amd64."
_TODO_TEST = "libguestfs-test-tool (package libguestfs0) says more."
_TODO_KERNEL = f"It needs a kernel in /boot; where there is none: apt install linux-image-cloud-amd64. {_TODO_TEST}"
_MEANS = "The backup is untouched; pullback restore and serve do not need libguestfs."
_KVM = "/dev/kvm"
#: Of what guestfish says that nobody asked for so much is kept.
_LONGEST_ANSWER = 64 << 20


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds: to start with KVM and without, for guestfish to say or send anything, and to end in order."""

    with_kvm: float = 60.0
    without_kvm: float = 300.0
    silence: float = 300.0
    ending: float = 5.0


def guestfish_program() -> str:
    """Where guestfish is; UsageError, saying what to install, when it is missing."""
    path = shutil.which("guestfish")
    if path is None:
        raise UsageError("guestfish is not installed, which reads file systems", means=_MEANS, todo=_TODO_INSTALL)
    return path


class Appliance:
    """The disks served at a unix socket, in a running appliance; use as a context manager, :meth:`start` first.

    All methods block; only :meth:`stop` may be called from another thread.
    """

    def __init__(
        self, socket: str, disks: Sequence[str], tell: Callable[[str], None], deadlines: Deadlines | None = None
    ) -> None:
        self._socket = socket
        self._disks = disks
        self._tell = tell
        self._deadlines = deadlines or Deadlines()
        self._fish: _Fish | None = None
        self._changing = threading.Lock()
        self._stopped = False

    def __enter__(self) -> Appliance:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fish is not None:
            self._fish.close(in_order=error is None)

    def stop(self) -> None:
        """End it now; whoever waits for an answer gets FilesError."""
        with self._changing:
            self._stopped = True
            if self._fish is not None:
                self._fish.kill()

    def start(self) -> None:
        """Boot it, with KVM where that works; UsageError if guestfish is missing, FilesError if it does not start."""
        program = guestfish_program()
        settings = os.environ.get("LIBGUESTFS_BACKEND_SETTINGS", "")
        if "force_tcg" not in settings and os.access(_KVM, os.R_OK | os.W_OK):
            try:
                self._boot(program, settings, self._deadlines.with_kvm)
                return
            except FilesError as error:
                if self._stopped:
                    raise
                self._tell(f"libguestfs does not start with KVM ({error.what}); again without, which takes longer")
        else:
            self._tell("KVM cannot be used here: libguestfs starts without, which takes longer")
        without = ":".join(filter(None, (settings, "force_tcg"))) if "force_tcg" not in settings else settings
        self._boot(program, without, self._deadlines.without_kvm)

    def _boot(self, program: str, settings: str, deadline: float) -> None:
        with self._changing:
            if self._stopped:
                raise FilesError("reading files was interrupted before it began")
            if self._fish is not None:
                self._fish.close(in_order=False)
            self._fish = _Fish(program, settings, self._deadlines)
        for disk in self._disks:
            self.call("add", disk, "readonly:true", "format:raw", "protocol:nbd", f"server:unix:{self._socket}")
        self._fish.call(["run"], deadline)

    def call(self, *words: str) -> str:
        """The answer to a command; FilesError, with libguestfs's words, if it failed."""
        assert self._fish is not None
        return self._fish.call(words, self._deadlines.silence)

    def transfer(self, *words: str) -> Transfer:
        """What a command writes into its last parameter, a file's name, that is added here; begun at once."""
        assert self._fish is not None
        return Transfer(self._fish, words, self._deadlines.silence)


class _Fish:
    """One guestfish process; :meth:`pump` is where everything waits."""

    def __init__(self, program: str, settings: str, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._mark = f"pullback-{secrets.token_hex(16)}".encode()
        self._said = bytearray()
        self._place = tempfile.TemporaryDirectory(prefix="pullback-files-", ignore_cleanup_errors=True)
        self.data, self._data_in = os.pipe()
        os.set_blocking(self.data, False)
        self._process = subprocess.Popen(
            [program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[self._data_in],
            env=_environment(os.environ, settings, self._place.name),
            start_new_session=True,
        )

    def begin(self, words: Sequence[str], *, into_pipe: bool = False) -> None:
        """Give a command; a failing one does not end guestfish (the dash)."""
        last = [f"/dev/fd/{self._data_in}"] if into_pipe else []
        line = " ".join(quoted(word) for word in [*words, *last])
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # that it has gone is seen where the answer should be
            self._process.stdin.write(b"-%b\necho %b\n" % (line.encode(), self._mark))
            self._process.stdin.flush()

    def call(self, words: Sequence[str], deadline: float) -> str:
        self.begin(words)
        until = time.monotonic() + deadline
        while (answer := self.answer(words)) is None:
            self.pump([], until)
        return answer

    def answer(self, words: Sequence[str]) -> str | None:
        """The whole answer once it is there; FilesError if it is an error."""
        end = self._said.find(self._mark + b"\n")
        if end < 0:
            return None
        said = os.fsdecode(bytes(self._said[:end]))
        del self._said[: end + len(self._mark) + 1]
        lines = said.splitlines()
        wrong = [line.partition("libguestfs: error: ")[2] for line in lines if "libguestfs: error: " in line]
        if wrong:
            reason = printable(wrong[0]).rstrip(".")
            # supermin builds the appliance out of this host's kernel; that there is none it says to nobody.
            todo = _TODO_KERNEL if "supermin" in reason else _TODO_TEST
            raise FilesError(f"libguestfs cannot {words[0]}: {reason}", means=_MEANS, todo=todo)
        return "\n".join(line for line in lines if line)

    def pump(self, others: list[int], until: float) -> bool:
        """Wait for guestfish to say something, or for ``others``; whether these have something to read."""
        assert self._process.stdout is not None
        out = self._process.stdout.fileno()
        ready, _, _ = select.select([out, *others], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            self.kill()
            raise FilesError("libguestfs does not answer, and was ended", means=_MEANS, todo=_TODO_TEST)
        if out in ready:
            piece = os.read(out, 1 << 16)
            self._said += piece
            if not piece or len(self._said) > _LONGEST_ANSWER:
                last = printable(os.fsdecode(bytes(self._said[-300:])).strip())
                raise FilesError(f"guestfish ended: {last or 'it said nothing'}", means=_MEANS, todo=_TODO_TEST)
        return ready != [out]

    def kill(self) -> None:
        """End it and its QEMU now."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self, *, in_order: bool) -> None:
        """End it, wait for that, and remove what it left."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            if in_order:
                self._process.wait(self._deadlines.ending)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.kill()
            self._process.wait()
            self._process.stdout.close()
            os.close(self.data)
            os.close(self._data_in)
            self._place.cleanup()


class Transfer:
    """Bytes that one command sends; has ``read`` as tarfile wants it, and has to be read to its end by ``finish``."""

    def __init__(self, fish: _Fish, words: Sequence[str], silence: float) -> None:
        self._fish = fish
        self._words = words
        self._silence = silence
        self._have = bytearray()
        self._done = False
        fish.begin(words, into_pipe=True)

    def read(self, size: int) -> bytes:
        """``size`` bytes, fewer at the end only; FilesError if the command failed, or nothing came for long."""
        while len(self._have) < size and not self._done:
            self._pump()
        piece = bytes(self._have[:size])
        del self._have[:size]
        return piece

    def finish(self) -> None:
        """Pass over what is left."""
        while not self._done:
            self._have.clear()
            self._pump()

    def _pump(self) -> None:
        self._fish.pump([self._fish.data], time.monotonic() + self._silence)
        # The answer first: all that a command sends is in the pipe before it answers.
        answer = self._fish.answer(self._words)
        with suppress(BlockingIOError):
            while piece := os.read(self._fish.data, 1 << 20):
                self._have += piece
                if answer is None and len(self._have) > 8 << 20:
                    break
        self._done = answer is not None


def _environment(ours: Mapping[str, str], settings: str, place: str) -> dict[str, str]:
    """What guestfish gets of our environment: nothing about the repository."""
    kept = {name: value for name, value in ours.items() if not name.startswith(("RESTIC_", "AWS_"))}
    kept.setdefault("LIBGUESTFS_BACKEND", "direct")  # libvirt's would run QEMU as somebody who may not connect to us
    return kept | {
        "LIBGUESTFS_BACKEND_SETTINGS": settings,
        "LIBGUESTFS_TMPDIR": place,
        "XDG_RUNTIME_DIR": place,  # its sockets: a killed guestfish leaves everything in one place, which we remove
        "LIBGUESTFS_DEBUG": "0",
        "LIBGUESTFS_TRACE": "0",
    }
