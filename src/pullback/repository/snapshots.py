# SPDX-License-Identifier: Apache-2.0
"""Snapshot files: a backup exists when its snapshot file does.

restic calls a stored backup a snapshot; in pullback's words it is a backup, and the file is the snapshot file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pullback.errors import BackupNotFound, Damaged
from pullback.repository.blob import BlobId
from pullback.repository.tree import go_json, go_time, parse_time

LATEST = "latest"
SHORT = 8


class SnapshotBroken(Exception):
    """A snapshot file's document is not one.  Never leaves this package."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One backup: when, of which domain (hostname), and the tree that holds it.

    `id` is the SHA-256 of the stored file in hex, empty before it is stored; `parent` and `original` are such ids.
    """

    time: datetime
    tree: BlobId
    paths: tuple[str, ...]
    hostname: str = ""
    username: str = ""
    uid: int = 0
    gid: int = 0
    excludes: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    parent: str | None = None
    original: str | None = None
    program_version: str = ""
    id: str = field(default="", compare=False)

    @property
    def short_id(self) -> str:
        """The first eight digits, as restic shows them."""
        return self.id[:SHORT]


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """The JSON of a snapshot file; restic before 0.16 passes over program_version."""
    fields: dict[str, Any] = {"time": go_time(snapshot.time)}
    if snapshot.parent:
        fields["parent"] = snapshot.parent
    fields |= {"tree": snapshot.tree.hex(), "paths": list(snapshot.paths)}
    optional: dict[str, Any] = {
        "hostname": snapshot.hostname,
        "username": snapshot.username,
        "uid": snapshot.uid,
        "gid": snapshot.gid,
        "excludes": list(snapshot.excludes),
        "tags": list(snapshot.tags),
        "original": snapshot.original,
        "program_version": snapshot.program_version,
    }
    return go_json(fields | {name: value for name, value in optional.items() if value})


def decode_snapshot(document: bytes, name: str) -> Snapshot:
    """The snapshot in the file called `name`; unknown fields are passed over; raises SnapshotBroken."""
    try:
        fields = json.loads(document)
        tree = bytes.fromhex(fields["tree"])
        if len(tree) != 32:
            raise ValueError("the tree's id is not 32 bytes")
        return Snapshot(
            time=parse_time(fields["time"]),
            tree=BlobId(tree),
            paths=_texts(fields.get("paths")),
            hostname=_text(fields.get("hostname", "")),
            username=_text(fields.get("username", "")),
            uid=int(fields.get("uid", 0)),
            gid=int(fields.get("gid", 0)),
            excludes=_texts(fields.get("excludes")),
            tags=_texts(fields.get("tags")),
            parent=_optional(fields.get("parent")),
            original=_optional(fields.get("original")),
            program_version=_text(fields.get("program_version", "")),
            id=name,
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise SnapshotBroken(f"{type(error).__name__}: {error}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is not one")
    return value


def _optional(value: Any) -> str | None:
    return None if value is None else _text(value)


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(_text(value) for value in values or ())


@dataclass(frozen=True, slots=True)
class SnapshotFiles:
    """What a repository's snapshot files hold: the backups that can be read, oldest first, and by name what is broken.

    A broken file does not say whose backup it is: it may be of any domain, and the newest.
    """

    readable: tuple[Snapshot, ...]
    broken: Mapping[str, Damaged]

    def of(self, domain: str | None) -> SnapshotFiles:
        """Those of one domain, or all; broken ones stay, since each may be of it."""
        mine = tuple(one for one in self.readable if domain in (None, one.hostname))
        return SnapshotFiles(mine, self.broken)

    def find(self, spec: str) -> Snapshot:
        """The backup named by an id, a unique start of one, `latest` or `DOMAIN@latest`; raises BackupNotFound.

        Damaged where a broken file may be what is asked for: it could be the newest, or its name begins so.
        """
        name = spec.rpartition("@")[2]
        if self.broken and name == LATEST:
            raise Damaged(
                f"it cannot be told which backup is the newest: {next(iter(self.broken.values())).what}",
                todo="Name a backup by its id: pullback list shows those that can be read.",
            )
        for file, damage in self.broken.items():
            if name and file.startswith(name.lower()):
                raise Damaged(
                    f"{spec!r} may be a backup that cannot be read: {damage.what}",
                    means=damage.means,
                    todo="Give more digits if you mean another: pullback list shows those that can be read.",
                )
        return find_snapshot(self.readable, spec)


def find_snapshot(snapshots: Iterable[Snapshot], spec: str) -> Snapshot:
    """The backup that `spec` names: an id or a unique start of one, `latest`, or `DOMAIN@latest`.

    Raises BackupNotFound, with what there is, for none and for several.
    """
    known = sorted(snapshots, key=lambda snapshot: (snapshot.time, snapshot.id))
    domain, at, rest = spec.rpartition("@")
    if at:
        candidates = [snapshot for snapshot in known if snapshot.hostname == domain]
        if not candidates:
            raise BackupNotFound(f"There is no backup of a domain {domain!r} here", todo=_domains(known))
    else:
        candidates = known
    if rest == LATEST:
        if candidates:
            return candidates[-1]
        raise BackupNotFound("There is no backup in this repository yet")
    found = [snapshot for snapshot in candidates if rest and snapshot.id.startswith(rest.lower())]
    if len(found) == 1:
        return found[0]
    if found:
        raise BackupNotFound(
            f"{spec!r} names {len(found)} backups: {_some(found)}", todo="Give more digits of the one you mean."
        )
    raise BackupNotFound(f"There is no backup {spec!r} here", todo=_what_there_is(candidates))


def _what_there_is(known: Sequence[Snapshot]) -> str:
    if not known:
        return "The repository holds no backup yet."
    return f"The newest ones: {_some(known[::-1])}."


def _some(snapshots: Sequence[Snapshot]) -> str:
    shown = ", ".join(f"{one.short_id} ({one.hostname}, {one.time:%Y-%m-%d %H:%M %Z})" for one in snapshots[:5])
    return shown + (", …" if len(snapshots) > 5 else "")


def _domains(known: Sequence[Snapshot]) -> str:
    names = sorted({snapshot.hostname for snapshot in known})
    if not names:
        return "The repository holds no backup yet."
    return f"There are backups of: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}."
