# SPDX-License-Identifier: Apache-2.0
"""A repository in a local directory: durable, atomic, laid out and permitted as restic does.

    write XX/ID-tmp-RANDOM → fsync file → rename to XX/ID → fsync XX

A crash leaves at most a file with `-tmp-` in its name, which nobody lists.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from pullback.errors import Damaged, RepositoryError, UsageError
from pullback.repository.damage import DAMAGE_MEANS, DAMAGE_TODO
from pullback.repository.direct_io import read_part, write_all
from pullback.repository.store import ID_NAME, Bytes, FileKind, buffers, describe, relative_path

_ADVICE = {
    errno.ENOSPC: ("there is no space left", "Make room there, or forget and prune old backups, and run it again."),
    errno.EDQUOT: ("the disk quota is used up", "Make room there, or raise the quota, and run it again."),
    errno.EACCES: ("permission is denied", "Run it as a user who may write there."),
    errno.EPERM: ("permission is denied", "Run it as a user who may write there."),
    errno.EROFS: ("the file system is read-only", "Mount it writable and run it again."),
    errno.ENOENT: ("it is not there", "Check the path, and that it is mounted."),
    errno.EIO: ("the device reports an input/output error", "Check the disk, then the repository with restic check."),
}

_READING = ("read from", "list", "look into")


class LocalStore:
    """A Store in the directory `root`."""

    shows_late = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)

    def _path(self, kind: FileKind, name: str) -> Path:
        return self.root / relative_path(kind, name)

    def _modes(self) -> tuple[int, int]:
        """Modes of new files and directories: for the owner, and the group too if the config is (as restic does)."""
        try:
            group = (self.root / "config").stat().st_mode & stat.S_IRGRP
        except OSError:
            group = 0
        return (0o440, 0o750) if group else (0o400, 0o700)

    def create(self) -> None:
        """Make the directory and all those below it, durably; UsageError where other things lie."""
        with self._told("create"):
            self._refuse_occupied()
            for parent in reversed([self.root, *self.root.parents]):
                if not parent.is_dir():
                    parent.mkdir(mode=0o700)
                    _fsync_directory(parent.parent)
            names = [kind.value for kind in FileKind if kind is not FileKind.CONFIG]
            for name in [*names, *(f"data/{number:02x}" for number in range(256))]:
                (self.root / name).mkdir(mode=0o700, exist_ok=True)
            _fsync_directory(self.root / "data")
            _fsync_directory(self.root)

    def _refuse_occupied(self) -> None:
        ours = {*(kind.value for kind in FileKind), "lost+found"}
        strange = [entry.name for entry in _scan(self.root) if entry.name not in ours and "-tmp-" not in entry.name]
        if strange:
            named = ", ".join(sorted(strange)[:3]) + (", …" if strange[3:] else "")
            raise UsageError(
                f"the directory {self.location} is no repository and is not empty: it holds {named}",
                means="Nothing was made there.",
                todo="Choose an empty directory, or one that is not there yet.",
            )

    def save(self, kind: FileKind, name: str, data: Bytes | Sequence[Bytes]) -> None:
        """Store a file; on return its bytes and its name are on the disk."""
        path = self._path(kind, name)
        file_mode, directory_mode = self._modes()
        temporary = path.with_name(f"{path.name}-tmp-{os.urandom(8).hex()}")
        with self._told("write to"):
            try:
                handle = _create(temporary)
            except FileNotFoundError:
                # restic makes all directories at once; others (a copy tool that drops empty ones) may not.
                if not self.root.is_dir():
                    raise
                path.parent.mkdir(mode=directory_mode, parents=True, exist_ok=True)
                _fsync_directory(path.parent.parent)
                handle = _create(temporary)
            try:
                try:
                    write_all(handle, buffers(data))
                    os.fchmod(handle, file_mode)
                    os.fsync(handle)
                finally:
                    os.close(handle)
                os.rename(temporary, path)  # noqa: PTH104  (tests watch the order of these calls)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _fsync_directory(path.parent)

    def load(self, kind: FileKind, name: str, offset: int = 0, length: int | None = None) -> Bytes:
        """Read a part of a file; raises Damaged if it is missing or ends early."""
        path = self._path(kind, name)
        with self._told("read from"):
            try:
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise _lost(f"{describe(kind, name)} is missing") from None
            try:
                size = os.fstat(handle).st_size
                wanted = max(size - offset, 0) if length is None else length
                if offset + wanted > size:
                    raise _lost(
                        f"{describe(kind, name)} is too short: {size} bytes, at least {offset + wanted} were expected"
                    )
                content = read_part(handle, offset, wanted)
                if len(content) < wanted:
                    raise _lost(f"{describe(kind, name)} is too short: it became so while it was read")
                return content
            finally:
                os.close(handle)

    def list(self, kind: FileKind) -> Iterator[tuple[str, int]]:
        """Names and sizes; skips what is not a repository file, and files that vanish meanwhile."""
        with self._told("list"):
            if kind is FileKind.CONFIG:
                found = _entries(self.root, lambda name: name == "config")
            elif kind is FileKind.DATA:
                folders = [Path(name.path) for name in _scan(self.root / "data") if name.is_dir()]
                found = [entry for folder in folders for entry in _entries(folder, _is_id)]
            else:
                found = _entries(self.root / kind.value, _is_id)
        yield from found

    def exists(self, kind: FileKind, name: str) -> bool:
        """Whether the file is there; a directory we may not look into is an error, not an absence."""
        with self._told("look into"):
            try:
                self._path(kind, name).stat()
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def remove(self, kind: FileKind, name: str) -> None:
        """Delete a file, durably."""
        path = self._path(kind, name)
        with self._told("remove from"):
            path.unlink(missing_ok=True)
            _fsync_directory(path.parent)

    @contextmanager
    def _told(self, verb: str) -> Iterator[None]:
        """Turn an OSError into a sentence."""
        try:
            yield
        except OSError as error:
            self._tell(verb, error)

    def _tell(self, verb: str, error: OSError) -> NoReturn:
        reason, todo = _ADVICE.get(error.errno or 0, (error.strerror or str(error), None))
        if todo is not None and verb in _READING:
            todo = todo.replace("may write there", "may read there")
        raise RepositoryError(
            f"Cannot {verb} the repository {self.location}: {reason}",
            means="Backups stored earlier are untouched.",
            todo=todo,
        ) from error


def _lost(what: str) -> Damaged:
    return Damaged(f"The repository's file {what}", means=DAMAGE_MEANS, todo=DAMAGE_TODO)


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_id(name: str) -> bool:
    return ID_NAME.fullmatch(name) is not None


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _entries(folder: Path, wanted: Callable[[str], bool]) -> list[tuple[str, int]]:
    found = []
    for entry in _scan(folder):
        if wanted(entry.name):
            try:
                found.append((entry.name, entry.stat().st_size))
            except FileNotFoundError:
                continue
    return found
