# SPDX-License-Identifier: Apache-2.0
"""Files in a backup: which of its file systems is meant, and how names that an image chose are written.

Every name that comes out of an image is somebody else's: it may hold control characters for a terminal, a newline for
who reads lines, bytes that are no text, and ``..`` for who writes files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pullback.errors import UsageError

#: What guestfish says of block devices that hold nothing to mount.
_NO_FILES = {"unknown", "swap", "LVM2_member", "crypto_LUKS", "BitLocker"}
_LONGEST_PATH = 4095


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A file system in a backup.

    ``device`` is libguestfs's name of it (``/dev/sda2``: the first disk's second partition), ``disk`` the backup's
    disk, or empty where it spans several.  ``size`` is bytes of its device, 0 where that is not known.
    """

    device: str
    disk: str
    kind: str
    label: str = ""
    uuid: str = ""
    size: int = 0

    @property
    def has_files(self) -> bool:
        """Whether it may be mounted at all."""
        return self.kind not in _NO_FILES


@dataclass(frozen=True, slots=True)
class Stat:
    """What a file system says of a file; ``mode`` with the bits of its type, ``mtime`` in nanoseconds since 1970."""

    mode: int
    size: int
    mtime: int


def quoted(word: str) -> str:
    """One word of a guestfish command line, whatever bytes it has."""
    if re.fullmatch(r"[A-Za-z0-9/_.:-]+", word):
        return word
    return '"' + "".join(f"\\x{byte:02x}" for byte in _bytes(word)) + '"'


def _bytes(text: str) -> bytes:
    """What the file system holds: bytes that are no UTF-8 stand in text as Python's file names have them."""
    return text.encode("utf-8", "surrogateescape")


def printable(name: str) -> str:
    """A name as it can be shown anywhere: backslashes, and what is not printable text, as ``\\xNN`` of its bytes."""
    return "".join(
        char if char.isprintable() and char != "\\" else "".join(f"\\x{byte:02x}" for byte in _bytes(char))
        for char in name
    )


def image_path(path: str) -> str:
    """A path in a file system, absolute and without empty or ``.`` parts; UsageError for ``..`` and for a long one."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in path or len(_bytes(path)) > _LONGEST_PATH:
        raise UsageError(f"{printable(path)!r} is no path in a file system of a backup", todo="Write it without ..")
    return "/" + "/".join(parts)


def parts_below(name: str) -> tuple[str, ...] | None:
    """The parts of a name in an archive, relative to where it is unpacked; None if it leads elsewhere."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    return None if name.startswith("/") or ".." in parts or "\0" in name else parts


def parse_filesystems(text: str, disks: Sequence[str]) -> list[FileSystem]:
    """The answer of ``list-filesystems``, a ``DEVICE: TYPE`` a line; disks are named in the order they were added."""
    found = []
    for line in text.splitlines():
        device, colon, kind = line.rpartition(": ")
        if colon:
            found.append(FileSystem(device, _disk_of(device, disks), kind))
    return found


def _disk_of(device: str, disks: Sequence[str]) -> str:
    """The disk of ``/dev/sda2``: the drives are called a to z, then aa."""
    match = re.fullmatch(r"(?:btrfsvol:)?/dev/sd([a-z]{1,2})[0-9]*(?:/.*)?", device)
    if match is None:
        return ""
    number = 0
    for letter in match[1]:
        number = number * 26 + ord(letter) - ord("a") + 1
    return disks[number - 1] if number <= len(disks) else ""


def choose_filesystem(found: Sequence[FileSystem], wanted: str) -> FileSystem:
    """The file system with this device, label or UUID; UsageError if there is none, or more than one."""
    chosen = [one for one in found if one.device == wanted] or [one for one in found if wanted in (one.label, one.uuid)]
    if len(chosen) == 1:
        return chosen[0]
    problem = f"{len(chosen)} file systems are" if chosen else "no file system is"
    raise UsageError(f"{problem} called {printable(wanted)}", todo=f"There are: {named(found)}.")


def the_one_with(paths: Sequence[str], holding: Sequence[FileSystem], found: Sequence[FileSystem]) -> FileSystem:
    """The one of those ``holding`` all ``paths``; UsageError if there is none, or more than one."""
    if len(holding) == 1:
        return holding[0]
    asked = ", ".join(printable(path) for path in paths)
    if not holding:
        raise UsageError(f"no file system of this backup has {asked}", todo=f"There are: {named(found)}.")
    raise UsageError(f"several file systems have {asked}", todo=f"Choose with --filesystem: {named(holding)}.")


def named(filesystems: Sequence[FileSystem]) -> str:
    """File systems in a sentence."""
    said = [
        f"{printable(one.device)} ({printable(one.kind)}{', ' + printable(one.label) if one.label else ''})"
        for one in filesystems
    ]
    return ", ".join(said) or "none that libguestfs knows"


def parse_stats(text: str) -> list[Stat | None]:
    """The answers of ``lstatns`` (one) and ``lstatnslist`` (many); None for a file that is not there."""
    fields = re.findall(r"^\s*st_(ino|mode|size|mtime_sec|mtime_nsec): (-?[0-9]+)$", text, re.MULTILINE)
    found: list[Stat | None] = []
    for group in zip(*[iter(fields)] * 5, strict=False):
        value = {name: int(number) for name, number in group}
        there = value["ino"] != -1
        mtime = value["mtime_sec"] * 10**9 + value["mtime_nsec"]
        found.append(Stat(value["mode"], value["size"], mtime) if there else None)
    return found
