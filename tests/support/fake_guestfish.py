# SPDX-License-Identifier: Apache-2.0
"""A guestfish without libguestfs: it answers what pullback asks, from a tar archive, and fails as it is told to.

FAKE_GUESTFISH holds words: ``kvm-fails`` (it starts only with force_tcg), ``no-start``, ``no-kernel``, ``mute`` (it
never answers `run`), ``dies`` (it ends when files are asked for), ``archive=FILE`` (what tar-out of any directory
sends), ``broken`` (its file system cannot be mounted), ``lingers`` (it does not end with its input).
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

WORDS = os.environ.get("FAKE_GUESTFISH", "").split()
FILE = "st_ino: 5\nst_mode: 33188\nst_size: 6\nst_mtime_sec: 981158400\nst_mtime_nsec: 0"
DIRECTORY = "st_ino: 6\nst_mode: 16877\nst_size: 4096\nst_mtime_sec: 981158400\nst_mtime_nsec: 0"


def install(place: Path) -> dict[str, str]:
    """Put it into ``place``; the environment that finds it there first."""
    place.mkdir()
    program = place / "guestfish"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n')
    program.chmod(0o755)
    return {"PATH": f"{place}:{os.environ['PATH']}"}


def words_of(line: bytes) -> list[str]:
    """A command line's words, as guestfish reads them."""
    words = shlex.split(line.decode().replace("\\x", "\\\\x"))
    return [
        os.fsdecode(re.sub(rb"\\x(..)", lambda hit: bytes.fromhex(hit[1].decode()), word.encode())) for word in words
    ]


def run() -> str:
    if "mute" in WORDS:
        time.sleep(600)
    if "no-kernel" in WORDS:
        return "libguestfs: error: /usr/bin/supermin exited with error status 1."
    tcg = "force_tcg" in os.environ["LIBGUESTFS_BACKEND_SETTINGS"]
    if "no-start" in WORDS or ("kvm-fails" in WORDS and not tcg):
        return "libguestfs: error: appliance closed the connection unexpectedly."
    return ""


def stats(names: str) -> str:
    known = {"hello": FILE, "etc": DIRECTORY}
    return "\n".join(
        known.get(name, "st_ino: -1\nst_mode: 0\nst_size: 0\nst_mtime_sec: 0\nst_mtime_nsec: 0")
        for name in names.split()
    )


def send(pipe: str, content: bytes) -> str:
    if "dies" in WORDS:
        sys.exit(1)
    with open(pipe, "wb") as target:
        target.write(content)
    return ""


def stat(path: str) -> str:
    return DIRECTORY if path == "/" else "libguestfs: error: lstatns_stub: lstat: No such file or directory"


def mount(device: str, place: str) -> str:
    return "libguestfs: error: mount_ro: bad superblock" if "broken" in WORDS else ""


def archive() -> bytes:
    (path,) = [word.partition("=")[2] for word in WORDS if word.startswith("archive=")] or [""]
    return Path(path).read_bytes()


ANSWERS: dict[str, Callable[..., str]] = {
    "run": run,
    "list-filesystems": lambda: "/dev/sda1: ext4\n/dev/sda2: unknown",
    "vfs-label": lambda device: "root",
    "vfs-uuid": lambda device: "0123-4567" if device == "/dev/sda1" else "libguestfs: error: there is none",
    "blockdev-getsize64": lambda device: "1048576",
    "mount-ro": mount,
    "lstatns": stat,
    "lstatnslist": lambda directory, names: stats(names),
    "ls0": lambda path, pipe: send(pipe, b"hello\0"),
    "download": lambda path, pipe: send(pipe, b"hello\n"),
    "tar-out": lambda path, pipe: send(pipe, archive()),
    "echo": lambda *words: " ".join(words),
}

if __name__ == "__main__":
    for line in sys.stdin.buffer:
        command, *given = words_of(line)
        print(ANSWERS.get(command.removeprefix("-"), lambda *words: "")(*given), flush=True)
    if "lingers" in WORDS:
        time.sleep(600)
