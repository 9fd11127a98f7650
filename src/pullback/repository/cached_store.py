# SPDX-License-Identifier: Apache-2.0
"""A remote store whose snapshot files are fetched once: they never change, and `list` reads all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from pullback.repository.cache_folder import CacheFolder
from pullback.repository.store import ID_NAME, Bytes, FileKind, Store, relative_path

_KEPT = FileKind.SNAPSHOTS


class CachedStore:
    """The Store `inner`, with copies of its snapshot files in `folder`."""

    def __init__(self, inner: Store, folder: CacheFolder) -> None:
        self._inner = inner
        self._folder = folder
        self.location = inner.location
        self.shows_late = inner.shows_late

    def create(self) -> None:
        """As the inner store does."""
        self._inner.create()

    def save(self, kind: FileKind, name: str, data: Bytes | Sequence[Bytes]) -> None:
        """Store a file in the inner store."""
        self._inner.save(kind, name, data)

    def load(self, kind: FileKind, name: str, offset: int = 0, length: int | None = None) -> Bytes:
        """Read a part of a file; a whole snapshot file from the copy, if its SHA-256 is right."""
        if kind is not _KEPT or offset or length is not None or not self._folder.usable:
            return self._inner.load(kind, name, offset, length)
        path = relative_path(kind, name)
        try:
            copy = (self._folder.path / path).read_bytes()
            if hashlib.sha256(copy).hexdigest() == name:
                return copy
        except OSError:
            pass  # not there yet, or unreadable: writing it anew tells
        content = self._inner.load(kind, name)
        with self._folder.guarded(), self._folder.replacing(path) as file:
            file.write(content)
        return content

    def list(self, kind: FileKind) -> Iterator[tuple[str, int]]:
        """Names and sizes, of the inner store; copies of snapshot files that are gone there are deleted."""
        found = list(self._inner.list(kind))
        if kind is _KEPT and self._folder.usable:
            with self._folder.guarded():
                self._drop_all_but({name for name, _ in found})
        yield from found

    def _drop_all_but(self, names: set[str]) -> None:
        copies = self._folder.path / _KEPT.value
        for path in copies.iterdir() if copies.is_dir() else ():
            if path.name not in names and ID_NAME.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def exists(self, kind: FileKind, name: str) -> bool:
        """Whether the inner store has the file."""
        return self._inner.exists(kind, name)

    def remove(self, kind: FileKind, name: str) -> None:
        """Delete a file in the inner store, and its copy."""
        self._inner.remove(kind, name)
        if kind is _KEPT and self._folder.usable:
            self._folder.remove(relative_path(kind, name))
