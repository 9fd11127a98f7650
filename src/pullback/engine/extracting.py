# SPDX-License-Identifier: Apache-2.0
"""Writing files that an image chose the names of, below one directory and nowhere else.

Nothing is written through a link of the image's: what is there while files are written are directories and files that
we made, and links come last.  Nothing is replaced, nothing gets a device, an owner or a set-user-ID bit.
"""

from __future__ import annotations

import errno
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol, cast

from pullback.errors import FilesError, RestoreError
from pullback.plan.files import parts_below, printable

_PIECE = 1 << 16
_ZEROES = bytes(_PIECE)
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
#: Permissions; not set-user-ID, set-group-ID and sticky.
_PERMISSIONS = 0o777

Parts = tuple[str, ...]


class Source(Protocol):
    """Where bytes come from."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file that was not written, and why; ``harmless`` if nothing is lost by it."""

    path: str
    reason: str
    harmless: bool = False


@dataclass(slots=True)
class Extraction:
    """Files below ``root``, an existing directory; :meth:`finish` makes links and sets directories' times."""

    root: Path
    files: int = 0
    bytes_written: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    _directories: dict[Parts, tuple[int, int]] = field(default_factory=dict)
    _links: list[tuple[Parts, str, int]] = field(default_factory=list)

    def directory(self, parts: Parts, mode: int, mtime: int) -> None:
        """A directory, with those above it; ``mtime`` in nanoseconds."""
        with self._one(parts):
            self._path(parts).mkdir(parents=True, exist_ok=True)
            self._directories[parts] = (mode, mtime)

    def link(self, parts: Parts, target: str, mtime: int) -> None:
        """A symbolic link, whatever it leads to; it is made at the end."""
        self._links.append((parts, target, mtime))

    def file(self, parts: Parts, mode: int, mtime: int, source: Source) -> None:
        """A file with all of what ``source`` has; zeroes become holes."""
        with self._one(parts):
            path = self._path(parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as target:
                size = 0
                while piece := source.read(_PIECE):
                    size += len(piece)
                    if _ZEROES.startswith(piece):
                        target.seek(len(piece), os.SEEK_CUR)
                    else:
                        target.write(piece)
                target.truncate(size)
                target.flush()
                os.fchmod(target.fileno(), mode & _PERMISSIONS)
                os.utime(target.fileno(), ns=(mtime, mtime))
            self.files += 1
            self.bytes_written += size

    def tree(self, parts: Parts, source: Source) -> None:
        """What a tar archive holds, below ``parts``; FilesError if it is no archive, or ends too early."""
        try:
            # A stream: it only has to have read().
            stream = cast("IO[bytes]", source)
            with tarfile.open(fileobj=stream, mode="r|", encoding="utf-8", errors="surrogateescape") as archive:
                for member in archive:
                    self._member(archive, member, parts)
        except tarfile.TarError as error:
            raise FilesError(f"libguestfs sent no whole archive: {printable(str(error))}") from error

    def finish(self) -> None:
        """Make the links, and give directories their permissions and times, the deepest first."""
        for parts, target, mtime in self._links:
            with self._one(parts):
                path = self._path(parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(target)
                os.utime(path, ns=(mtime, mtime), follow_symlinks=False)
                self.files += 1
        for parts, (mode, mtime) in sorted(self._directories.items(), key=lambda one: -len(one[0])):
            with self._one(parts):
                path = self._path(parts)
                path.chmod(mode & _PERMISSIONS)
                os.utime(path, ns=(mtime, mtime))

    def _member(self, archive: tarfile.TarFile, member: tarfile.TarInfo, parts: Parts) -> None:
        below = parts_below(member.name)
        mtime = int(member.mtime * 10**9)
        if below is None:
            self.left_out.append(LeftOut(member.name, "its name leads elsewhere"))
        elif member.isdir():
            self.directory(parts + below, member.mode, mtime)
        elif member.issym():
            self.link(parts + below, member.linkname, mtime)
        elif member.islnk():
            self._hard_link(parts + below, parts, member.linkname)
        elif member.isreg():
            content = archive.extractfile(member)
            assert content is not None
            self.file(parts + below, member.mode, mtime, content)
        else:
            self.left_out.append(LeftOut("/".join(parts + below), "it is a device, a FIFO or a socket", harmless=True))

    def _hard_link(self, parts: Parts, top: Parts, name: str) -> None:
        other = parts_below(name)
        if other is None:
            self.left_out.append(LeftOut("/".join(parts), "it is a link to a name that leads elsewhere"))
            return
        if link := next((link for link in self._links if link[0] == top + other), None):
            self._links.append((parts, *link[1:]))  # another name of a symbolic link
            return
        with self._one(parts):
            path = self._path(parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(self._path(top + other), path, follow_symlinks=False)
            self.files += 1

    def _path(self, parts: Parts) -> Path:
        return self.root.joinpath(*parts)

    @contextmanager
    def _one(self, parts: Parts) -> Iterator[None]:
        """A name that this file system cannot take costs that file only; no room ends everything."""
        try:
            yield
        except (OSError, ValueError, OverflowError) as error:
            said = getattr(error, "strerror", None) or str(error)
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise RestoreError(
                    f"cannot write to {self.root}: {said}",
                    means="What was extracted before is there.",
                    todo="Make room, and extract to a new directory.",
                ) from error
            self.left_out.append(LeftOut("/".join(parts), said))
