# SPDX-License-Identifier: Apache-2.0
"""Files in a backup: its disks served at a private socket, read by libguestfs's appliance, listed or extracted."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pullback.engine.appliance import Appliance, Deadlines, guestfish_program
from pullback.engine.events import Emit, Event, Note, Serving
from pullback.engine.extracting import Extraction, LeftOut
from pullback.engine.serving import Serve, ServeRequest
from pullback.errors import FilesError, RestoreError, TargetExists, UsageError
from pullback.nbd.address import UnixAddress, parse_uri
from pullback.plan.files import (
    FileSystem,
    Stat,
    choose_filesystem,
    image_path,
    parse_filesystems,
    parse_stats,
    printable,
    the_one_with,
)
from pullback.repository.repository import Repository

#: Files asked for at a time: an answer has an end.
_AT_ONCE = 500
#: Names that need no thought within a list of guestfish's.
_PLAIN = re.compile(r"[A-Za-z0-9_.,:+@%=~-]+")

_NOTHING = "Nothing was extracted."


@dataclass(frozen=True, slots=True)
class FilesRequest:
    """What to read: without ``paths`` the file systems are listed, without ``to`` the paths are, else extracted.

    ``filesystem`` is a device of the list, a label or a UUID; if empty, it is the one that has all paths.
    """

    backup: str
    paths: tuple[str, ...] = ()
    to: Path | None = None
    filesystem: str = ""
    disks: tuple[str, ...] = ()
    lock_retry: float = 0.0


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of a backup; ``path`` as its file system has it."""

    path: str
    stat: Stat


@dataclass(frozen=True, slots=True)
class FilesResult:
    """What was found; of ``entries`` and ``extraction`` what was asked for."""

    backup: str
    filesystems: tuple[FileSystem, ...]
    filesystem: FileSystem | None = None
    entries: tuple[FileEntry, ...] = ()
    extraction: Extraction | None = None

    @property
    def left_out(self) -> list[LeftOut]:
        return self.extraction.left_out if self.extraction else []


class Files:
    """One look into a backup; :meth:`stop` is to be called in the event loop of :meth:`run`."""

    def __init__(
        self,
        request: FilesRequest,
        open_repository: Callable[[], Repository],
        emit: Emit,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._request = replace(request, paths=tuple(dict.fromkeys(image_path(path) for path in request.paths)))
        self._emit = emit
        self._deadlines = deadlines
        self._served: asyncio.Future[Serving] | None = None
        self._server = Serve(
            ServeRequest(request.backup, request.disks, lock_retry=request.lock_retry), open_repository, self._hear
        )
        self._appliance: Appliance | None = None
        self._stopped = False

    def stop(self) -> None:
        """End soon; ``run`` raises."""
        self._stopped = True
        if self._appliance is not None:
            self._appliance.stop()
        self._server.stop()

    async def run(self) -> FilesResult:
        """List or extract.

        UsageError for what is not there or not installed, TargetExists if the directory has something in it, FilesError
        where libguestfs fails, RestoreError where files cannot be written: what was extracted before then stays.
        """
        guestfish_program()
        if self._request.to is not None:
            _check_empty(self._request.to)
        self._served = asyncio.get_running_loop().create_future()
        serving = asyncio.ensure_future(self._server.run())
        try:
            served: set[asyncio.Future[Any]] = {serving, self._served}
            await asyncio.wait(served, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                await serving
                raise FilesError("reading files was interrupted before it began")
            reading = asyncio.ensure_future(asyncio.to_thread(self._read, self._served.result()))
            await asyncio.wait({serving, reading}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done() and self._appliance is not None:
                self._appliance.stop()  # the server is gone: its lock was lost
            await asyncio.wait({reading})
            if serving.done():
                await serving
            return reading.result()
        finally:
            self._server.stop()
            await asyncio.wait({serving})

    def _hear(self, event: Event) -> None:
        if isinstance(event, Serving):
            assert self._served is not None
            self._served.set_result(event)
        else:
            self._emit(event)

    # -- in a thread ----------------------------------------------------------------------------------------------

    def _read(self, served: Serving) -> FilesResult:
        disks = [export.disk for export in served.exports]
        address = parse_uri(served.exports[0].uri).address
        assert isinstance(address, UnixAddress)
        with Appliance(address.path, disks, lambda text: self._emit(Note(text + ".")), self._deadlines) as appliance:
            self._appliance = appliance
            if self._stopped:
                appliance.stop()
            appliance.start()
            reader = FilesReader(appliance, disks)
            found = tuple(reader.filesystems())
            if not self._request.paths:
                return FilesResult(served.backup, found)
            chosen = reader.mount(found, self._request.filesystem, self._request.paths)
            if self._request.to is None:
                entries = [entry for path in self._request.paths for entry in reader.list(path)]
                return FilesResult(served.backup, found, chosen, tuple(entries))
            extraction = reader.extract(self._request.paths, self._request.to)
            return FilesResult(served.backup, found, chosen, extraction=extraction)


class FilesReader:
    """The file systems of the ``disks`` that a started appliance has, in this order."""

    def __init__(self, appliance: Appliance, disks: Sequence[str]) -> None:
        self._appliance = appliance
        self._disks = disks

    def filesystems(self) -> Iterator[FileSystem]:
        """All of them, with label, UUID and size where they have one."""
        for one in parse_filesystems(self._appliance.call("list-filesystems"), self._disks):
            device = one.device
            yield replace(
                one,
                label=self._asked("vfs-label", device),
                uuid=self._asked("vfs-uuid", device),
                size=int(self._asked("blockdev-getsize64", device) or 0),
            )

    def _asked(self, *words: str) -> str:
        """An answer, or nothing where a file system knows none."""
        try:
            return self._appliance.call(*words).strip()
        except FilesError:
            self._appliance.call("ping-daemon")  # raises if it was the appliance that failed
            return ""

    def mount(self, found: Sequence[FileSystem], wanted: str, paths: Sequence[str]) -> FileSystem:
        """Mount the one called ``wanted``, or the only one that has all ``paths``; UsageError if there is none."""
        if wanted:
            chosen = choose_filesystem(found, wanted)
            if not chosen.has_files:
                raise FilesError(f"{printable(chosen.device)} is {printable(chosen.kind)}, which cannot be read")
            self._appliance.call("mount-ro", chosen.device, "/")
            missing = [path for path in paths if self._stat(path) is None]
            if missing:
                raise UsageError(f"there is no {printable(missing[0])} in {printable(chosen.device)}")
            return chosen
        unread: list[str] = []
        holding = [one for one in found if one.has_files and self._holds(one, paths, unread)]
        if unread and not holding:
            raise FilesError(
                f"no file system that can be read has {', '.join(map(printable, paths))}, and {', '.join(unread)}",
                means="The backup is untouched.",
            )
        chosen = the_one_with(paths, holding, found)
        self._appliance.call("mount-ro", chosen.device, "/")
        return chosen

    def _holds(self, filesystem: FileSystem, paths: Sequence[str], unread: list[str]) -> bool:
        """Whether it has all of them; one that cannot be mounted goes to ``unread``, with the reason."""
        try:
            self._appliance.call("mount-ro", filesystem.device, "/")
        except FilesError as error:
            self._appliance.call("ping-daemon")
            unread.append(f"{printable(filesystem.device)} cannot be read ({error.what})")
            return False
        held = all(self._stat(path) is not None for path in paths)
        self._appliance.call("umount-all")
        return held

    def _stat(self, path: str) -> Stat | None:
        """What is known of a file, of a link itself; None if it is not there."""
        directory, _, name = path.rpartition("/")
        if name and _PLAIN.fullmatch(name):
            (found,) = self._stats(directory or "/", [name]) or [None]
            return found
        try:
            (found,) = parse_stats(self._appliance.call("lstatns", path))
            return found
        except FilesError:
            self._appliance.call("ping-daemon")
            return None

    def _stats(self, directory: str, names: Sequence[str]) -> list[Stat | None]:
        """The same of plain names in a directory."""
        try:
            return parse_stats(self._appliance.call("lstatnslist", directory, " ".join(names)))
        except FilesError:
            self._appliance.call("ping-daemon")
            return [None] * len(names)

    def list(self, path: str) -> Iterator[FileEntry]:
        """What a directory holds, by name; of anything else itself."""
        found = self._stat(path)
        if found is None:
            return
        if not stat.S_ISDIR(found.mode):
            yield FileEntry(path, found)
            return
        content = self._appliance.transfer("ls0", path)
        sent = bytearray()
        while piece := content.read(1 << 20):
            sent += piece
        names = sorted(os.fsdecode(name) for name in bytes(sent).split(b"\0") if name)
        stats: dict[str, Stat | None] = dict.fromkeys(names)
        plain = [name for name in names if _PLAIN.fullmatch(name)]
        for at in range(0, len(plain), _AT_ONCE):
            some = plain[at : at + _AT_ONCE]
            stats |= zip(some, self._stats(path, some), strict=True)
        for name in names:
            known = stats[name] or self._stat(f"{path.rstrip('/')}/{name}")
            if known is not None:
                yield FileEntry(f"{path.rstrip('/')}/{name}", known)

    def extract(self, paths: Sequence[str], to: Path) -> Extraction:
        """All of it, below ``to`` under its whole path; RestoreError if that cannot be written."""
        try:
            to.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable("make", to, error) from error
        extraction = Extraction(to)
        for path in paths:
            self._extract(extraction, path)
        extraction.finish()
        return extraction

    def _extract(self, extraction: Extraction, path: str) -> None:
        found = self._stat(path)
        parts = tuple(part for part in path.split("/") if part)
        if found is None:
            extraction.left_out.append(LeftOut(path, "it cannot be read"))
        elif stat.S_ISDIR(found.mode):
            archive = self._appliance.transfer("tar-out", path)
            extraction.tree(parts, archive)
            archive.finish()
        elif stat.S_ISREG(found.mode):
            content = self._appliance.transfer("download", path)
            extraction.file(parts, found.mode, found.mtime, content)
            content.finish()
        elif stat.S_ISLNK(found.mode):
            extraction.link(parts, self._appliance.call("readlink", path), found.mtime)
        else:
            extraction.left_out.append(LeftOut(path, "it is a device, a FIFO or a socket", harmless=True))


def _check_empty(to: Path) -> None:
    """TargetExists unless ``to`` is an empty directory or not there: nothing of the image meets what is there."""
    try:
        if not to.exists() and not to.is_symlink():
            return
        if to.is_dir() and not any(to.iterdir()):
            return
    except OSError as error:
        raise _unusable("look into", to, error) from error
    raise TargetExists(f"{to} is not an empty directory", means=_NOTHING, todo="Choose a new one: it is made.")


def _unusable(what: str, to: Path, error: OSError) -> RestoreError:
    return RestoreError(f"cannot {what} {to}: {error.strerror}", means=_NOTHING, todo="Choose another directory.")
