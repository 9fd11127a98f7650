# SPDX-License-Identifier: Apache-2.0
"""A stopped domain: its images in a storage daemon of ours, which every operation then uses like a running QEMU.

The daemon ends with the command that started it, unless a snapshot or an export is left in it: then it stays, and the
next command on the same images finds it by its socket.  If we are killed it is told to end, in order: a killed one
would leave every dirty bitmap of the images inconsistent.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pullback.errors import DomainUnreachable, UsageError
from pullback.plan.offline import Image
from pullback.qemu.monitor import Line, dial
from pullback.qemu.storage_daemon import ASK_EVERY, PROGRAM, Watcher, qemu_program

#: Seconds for the daemon to come up (it opens the images), and to end (it stores their bitmaps).
_START, _STOP = 30.0, 120.0
#: Seconds from a pidfile to what stands in it.
_WRITTEN = 1.0

_TARGET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,25}")
_QCOW2_MAGIC = b"QFI\xfb"


def parse_images(text: str) -> tuple[Image, ...]:
    """The images in ``[TARGET=]PATH[,TARGET=PATH…]``, each PATH perhaps with ``qcow2:`` or ``raw:`` before it.

    A comma in a path is written twice.  Without a target it is the file's name up to the first dot.  UsageError for
    what cannot be opened as an image, and where the format would have to be guessed.
    """
    images: list[Image] = []
    for part in _parts(text):
        target, equals, rest = part.partition("=")
        if not equals or "/" in target:
            target, rest = "", part
        given, colon, path = rest.partition(":")
        if not colon or given not in ("qcow2", "raw"):
            given, path = "", rest
        if not path:
            raise UsageError(
                f"{part} is followed by no path" if part else "a comma is followed by no path",
                todo="Write TARGET=PATH for each disk.",
            )
        image = _image(target or Path(path).name.partition(".")[0], path, given)
        if any(other.target == image.target for other in images):
            raise UsageError(f"two images are called {image.target}", todo="Write TARGET=PATH for each.")
        if any(Path(other.path).samefile(image.path) for other in images):
            raise UsageError(f"the image {image.path} is named twice")
        images.append(image)
    return tuple(images)


def _parts(text: str) -> list[str]:
    """What single commas separate, with double ones made single."""
    parts = [""]
    for piece in re.findall(r",,|,|[^,]+", text):
        if piece == ",":
            parts.append("")
        else:
            parts[-1] += "," if piece == ",," else piece
    return parts


def _image(target: str, path: str, given: str) -> Image:
    if not _TARGET.fullmatch(target):
        raise UsageError(
            f"{target!r} cannot name a disk", todo="Use TARGET=PATH with at most 26 letters, digits, dots, - and _."
        )
    try:
        with Path(path).open("rb") as file:
            looks = "qcow2" if file.read(4) == _QCOW2_MAGIC else "raw"
    except OSError as error:
        raise UsageError(f"cannot open the image {path}: {error.strerror}") from error
    by_name = "qcow2" if path.endswith(".qcow2") else "raw"
    if not given and looks == "qcow2" and by_name != "qcow2":
        # A domain can write such a header into its raw disk, and have files of the host opened as its backing.
        raise UsageError(
            f"{path} looks like a qcow2 image but is not called .qcow2",
            todo=f"Write {target}=qcow2:{path} if it is one.",
        )
    if (given or by_name) == "qcow2" and looks != "qcow2":
        raise UsageError(f"{path} is not a qcow2 image", todo=f"Write {target}=raw:{path} if it is a raw disk.")
    return Image(target, str(Path(path).absolute()), given or by_name)


@dataclass(frozen=True, slots=True)
class DaemonPlace:
    """Where the daemon on some images has its socket; ``identity`` names the set of images.

    ``kept`` is there once a command ended and left the daemon on purpose.
    """

    identity: str
    socket: Path
    pidfile: Path
    log: Path
    kept: Path


def daemon_place(images: tuple[Image, ...], directory: Path) -> DaemonPlace:
    """The place for the daemon on these images below ``directory``; the same for the same files."""
    inodes = sorted((status.st_dev, status.st_ino) for status in (Path(image.path).stat() for image in images))
    name = "disk-" + hashlib.sha256(repr(inodes).encode()).hexdigest()[:16]
    return DaemonPlace(name, *(directory / f"{name}.{what}" for what in ("qmp", "pid", "log", "kept")))


def _arguments(place: DaemonPlace) -> list[str]:
    socket = str(place.socket).replace(",", ",,")  # after a single one QEMU sees another option
    argv = [qemu_program(PROGRAM), "--pidfile", str(place.pidfile)]
    return [*argv, "--chardev", f"socket,id=qmp,path={socket},server=on,wait=off", "--monitor", "chardev=qmp"]


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds locks on an image; ``images`` are all that it holds, if it is a storage daemon of ours."""

    pid: int
    program: str
    images: tuple[str, ...] = ()


def holders_of(image: str, but: int) -> tuple[Holder, ...]:
    """Who has locked an image, as far as we may see; ``but`` is our own daemon's pid.

    QEMU's locks belong to no process (fcntl(2), open file description locks), so the open files tell.
    """
    found = []
    wanted = Path(image).stat()
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == but:
            continue
        locked = _locked_files(process)
        if any(os.path.samestat(status, wanted) for status in locked.values()):
            argv = _command_line(process)
            pidfiles = {word for word in argv if re.search(r"/disk-[0-9a-f]{16}\.pid$", word)}
            images = tuple(sorted(locked.keys() - pidfiles)) if pidfiles else ()
            found.append(Holder(int(process.name), Path(argv[0]).name, images))
    return tuple(found)


def _command_line(process: Path) -> list[str]:
    try:
        line = os.fsdecode((process / "cmdline").read_bytes())
    except OSError:  # it ended meanwhile
        line = ""
    return line.split("\0") if line else ["?"]  # nothing stands there while a process begins, and when it has ended


def _locked_files(process: Path) -> dict[str, os.stat_result]:
    """The files with a name that a process has locked; none of one that is gone or that we may not look at."""
    locked = {}
    try:
        for handle in (process / "fd").iterdir():
            if "lock:" in (process / "fdinfo" / handle.name).read_text() and (status := handle.stat()).st_nlink:
                locked[str(handle.readlink())] = status
    except OSError:
        pass
    return locked


class OfflineDaemon:
    """The daemon on a stopped domain's images for the time of a session; blocking.

    It is started without any: see :mod:`pullback.plan.offline`.
    """

    def __init__(self, place: DaemonPlace) -> None:
        self._place = place
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: Watcher | None = None

    @property
    def found(self) -> bool:
        """Whether an earlier command's daemon was there, with the images open and something of ours in it."""
        return self._process is None

    def start(self) -> Line:
        """Find the daemon, or start an empty one.  DomainUnreachable, with its words, when it does not come up."""
        try:
            line = dial(str(self._place.socket))
        except DomainUnreachable:
            self.wait()
        else:
            if self._place.kept.exists():
                return line
            line.socket.close()
            # Its client was killed, and it may be ending already.
            self.wait(ending=line.peer.pid)
        with self._place.log.open("wb") as log:
            self._process = subprocess.Popen(
                _arguments(self._place),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._watcher = Watcher(self._process.pid)
        deadline = time.monotonic() + _START
        while not _written(self._place.pidfile):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise self._failed()
            time.sleep(0.005)
        return dial(str(self._place.socket))

    def _failed(self) -> DomainUnreachable:
        said = self._place.log.read_text(errors="replace").strip().splitlines()[-1:] or ["no word"]
        self.terminate()
        return DomainUnreachable(f"the storage daemon did not start: {said[0]}", means="Nothing was touched.")

    def leave(self) -> None:
        """Let the daemon live on: something of ours is in it."""
        self._place.kept.touch()
        if self._watcher is not None:
            self._watcher.release()

    def wait(self, ending: int | None = None) -> None:
        """Wait for the daemon to end, after ``quit`` or its maker's death; what its images hold is stored then.

        Process ``ending`` is asked to end.
        """
        pid = self._pid() if ending is None else ending
        deadline = time.monotonic() + _STOP
        asked = -ASK_EVERY
        while pid is not None and _alive(pid, self._process) and time.monotonic() < deadline:
            if ending is not None and time.monotonic() - asked >= ASK_EVERY:
                asked = time.monotonic()
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            time.sleep(0.005)
        if self._watcher is not None:
            self._watcher.release()
            self._watcher = None
        for path in (self._place.socket, self._place.pidfile, self._place.log, self._place.kept):
            path.unlink(missing_ok=True)

    def terminate(self) -> None:
        """End the daemon we started, in order, when it could not be told to quit; a found one is left alone."""
        if self._process is not None:
            self.wait(ending=self._process.pid)

    def _pid(self) -> int | None:
        if self._process is not None:
            return self._process.pid
        deadline = time.monotonic() + _WRITTEN
        while self._place.pidfile.exists() and time.monotonic() < deadline:
            if text := _written(self._place.pidfile):
                return int(text)
            time.sleep(0.005)
        return None


def _written(pidfile: Path) -> str:
    """What stands in a pidfile, once that is all: the daemon makes it first, and locks it."""
    try:
        text = pidfile.read_text()
    except OSError:
        return ""
    return text if re.fullmatch(r"[0-9]+\n", text) else ""


def _alive(pid: int, process: subprocess.Popen[bytes] | None) -> bool:
    if process is not None:
        return process.poll() is None
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    # One that an earlier session of this process started, and that nobody has asked for its exit code.
    return state != "Z"
