# SPDX-License-Identifier: Apache-2.0
"""Where copies are kept on this machine of what a repository holds, so that it need not be read again.

    DIRECTORY                         mode 0700
    ├── CACHEDIR.TAG                  tells backup programs to pass it over (the Cache Directory Tagging convention)
    └── REPOSITORY-ID                 mode 0700; removed when it was not used for 30 days
        ├── pullback                  empty: the folder is ours; its time is that of the last use
        ├── index                     see index_cache
        └── snapshots/ID              see cached_store

All of it may be deleted at any time.  Whatever is wrong with it costs time, never a backup: a cache that cannot be
used is said once, and the work goes on without.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pullback.repository.store import ID_NAME

UNUSED_SECONDS = 30 * 24 * 3600
_LEFT_OVER_SECONDS = 24 * 3600
_MARK = "pullback"
_TEMPORARY = "-tmp-"
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# This file tells that the directory holds a cache of pullback.\n"


def default_cache_directory() -> Path:
    """PULLBACK_CACHE_DIR, else pullback in XDG_CACHE_HOME, else in ~/.cache."""
    if given := os.environ.get("PULLBACK_CACHE_DIR"):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "pullback"


class CacheFolder:
    """One repository's folder of a cache directory; every method may be called from any thread.

    `warn` gets a sentence when the folder cannot be used; from then on `usable` is false and no method does anything.
    """

    def __init__(self, directory: Path, repository_id: str, warn: Callable[[str], None] | None = None) -> None:
        self.directory = directory
        self.path = directory / repository_id
        self._warn = warn
        self._lock = threading.Lock()
        self._prepared = False
        self._given_up = False

    @property
    def usable(self) -> bool:
        """Whether files can be kept there; makes the folder at the first call."""
        with self._lock:
            prepare = not (self._prepared or self._given_up)
            self._prepared = True
        if prepare:
            with self.guarded():
                self._prepare()
        return not self._given_up

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Take an OSError of the block as the end of the cache's use."""
        try:
            yield
        except OSError as error:
            self.give_up(error.strerror or str(error))

    def give_up(self, why: str) -> None:
        """Use it no more in this process; says so, once."""
        with self._lock:
            first, self._given_up = not self._given_up, True
        if first and self._warn is not None:
            self._warn(
                f"the cache in {self.directory} cannot be used ({why}): this takes longer, and nothing is wrong with"
                " the backups; name another with --cache-dir, or use --no-cache"
            )

    def _prepare(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        found = self.path.stat()
        # What somebody else may write could be his: he must not choose what we believe to be stored.
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(0, f"{self.path} belongs to somebody else, or others may write there")
        tag = self.directory / "CACHEDIR.TAG"
        if not tag.exists():
            tag.write_bytes(_TAG)
        (self.path / _MARK).touch(mode=0o600)
        self._remove_left_overs()
        _remove_unused(self.directory)

    def _remove_left_overs(self) -> None:
        """What a killed process was about to write."""
        for path in [*self.path.glob(f"*{_TEMPORARY}*"), *self.path.glob(f"*/*{_TEMPORARY}*")]:
            if _age(path) > _LEFT_OVER_SECONDS:
                path.unlink(missing_ok=True)

    @contextmanager
    def replacing(self, name: str) -> Iterator[BinaryIO]:
        """A new file that takes the place of `name` when the block ends well; readers of the old one keep it.

        Raises OSError; then, and when the block raises, what was there stays.
        """
        path = self.path / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = path.with_name(f"{path.name}{_TEMPORARY}{secrets.token_hex(8)}")
        done = False
        try:
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "w+b") as file:
                yield file
            temporary.replace(path)
            done = True
        finally:
            if not done:
                temporary.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Delete a file of the cache."""
        with self.guarded():
            (self.path / name).unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0


def _remove_unused(directory: Path) -> None:
    """Folders of repositories that were not used for long.  Only those with our mark: restic's are named alike."""
    for folder in directory.iterdir():
        mark = folder / _MARK
        if ID_NAME.fullmatch(folder.name) and _age(mark) > UNUSED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
