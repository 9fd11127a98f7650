# SPDX-License-Identifier: Apache-2.0
"""The files of a repository, whatever they are stored on.

    config                     one, never changed
    keys/ID  index/ID          ID = SHA-256 of the stored bytes, 64 lower case hex digits
    snapshots/ID  locks/ID
    data/XX/ID                 XX = the first two digits of ID

Files are written whole, never changed, and seen by others only when complete (restic's "Repository Layout").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Protocol, TypeAlias

# Anything that holds bytes one after the other.
Bytes: TypeAlias = bytes | bytearray | memoryview

ID_NAME = re.compile(r"[0-9a-f]{64}")


class FileKind(StrEnum):
    """The kinds of repository files; the value is the directory they stand in."""

    CONFIG = "config"
    KEYS = "keys"
    DATA = "data"
    INDEX = "index"
    SNAPSHOTS = "snapshots"
    LOCKS = "locks"


class Store(Protocol):
    """Where repository files live; every method may be called from any thread.

    ``shows_late`` says that what another program wrote may be seen a moment later only.
    """

    location: str
    shows_late: bool

    def create(self) -> None:
        """Prepare an empty repository's directories; what stands there already stays."""

    def save(self, kind: FileKind, name: str, data: Bytes | Sequence[Bytes]) -> None:
        """Store a file, durable on return; after a failure or a crash it is there whole or not at all."""

    def load(self, kind: FileKind, name: str, offset: int = 0, length: int | None = None) -> Bytes:
        """Read `length` bytes at `offset` (all from there: None); raises Damaged if the file is missing or shorter."""

    def list(self, kind: FileKind) -> Iterator[tuple[str, int]]:
        """Names and sizes in bytes of all files of a kind, in no particular order."""

    def exists(self, kind: FileKind, name: str) -> bool:
        """Whether the file is there."""

    def remove(self, kind: FileKind, name: str) -> None:
        """Delete a file; one that is gone already is no error."""


def relative_path(kind: FileKind, name: str) -> str:
    """The place of a file below the repository's root, with slashes."""
    if kind is FileKind.CONFIG:
        return "config"
    if not ID_NAME.fullmatch(name):
        raise ValueError(f"{name!r} does not name a repository file")
    if kind is FileKind.DATA:
        return f"data/{name[:2]}/{name}"
    return f"{kind.value}/{name}"


def describe(kind: FileKind, name: str) -> str:
    """How a file is called in messages: `data/0123…` as in the store, so that a person finds it."""
    return "config" if kind is FileKind.CONFIG else f"{kind.value}/{name}"


def buffers(data: Bytes | Sequence[Bytes]) -> list[memoryview]:
    """The pieces of what is to be stored, as flat views of bytes."""
    pieces = [data] if isinstance(data, (bytes, bytearray, memoryview)) else data
    return [memoryview(piece).cast("B") for piece in pieces]
