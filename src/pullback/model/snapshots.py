# SPDX-License-Identifier: Apache-2.0
"""Snapshots and exports as QEMU holds them: read back from names, since nothing of them is kept anywhere else.

    node    pb-<id>-<number>-scratch | filter | access      one of each per disk of a snapshot, and perhaps readers
    job     pullback-<id>-<number>                          where the job method made the filter
    export  pullback-<id>-<number>-x<export name in hex>    and -c<checkpoint in hex> for each context that it shows

``id`` is a letter for who holds it and 8 hex digits; ``number`` counts the disks.  What does not fit a node's name (31
bytes) stands in *marks*: dirty bitmaps that record nothing, whose names (up to 1023 bytes) are short JSON texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pullback.model.chain import NAME_MAX
from pullback.model.facts import ID_PREFIX, NODE_PREFIX, Bitmap, Device, Export, Facts, Job, Node

#: Who holds a snapshot: one backup run, or whoever asked for it by name.
PRIVATE, PUBLIC = "b", "s"
#: Exports of a domain's own disks, for writing; they belong to no snapshot.
WRITABLE = "w"
#: Exports of a domain's own disks that a restore in place writes through; they end with it.
RESTORING = "r"

#: The nodes of a view that can be believed, in the order they are taken away.
VIEW_ROLES = ("view", "align", "deny", "void")
#: Nodes that read a frozen view, or are read beside it, in the order they are taken away.
READER_ROLES = ("target", "window", "probe", *VIEW_ROLES)

#: Before this version, a request on a frozen view that begins in a range the domain has overwritten and ends beyond it
#: is answered with the domain's new data (hbitmap_status() says of such a range that nothing was saved: seen on 7.2.22,
#: mended in 8.0).  A public snapshot has the nodes of ``VIEW_ROLES`` there, or it was never finished.
FROZEN_VIEW_EXACT = (8, 0, 0)

_NODE = re.compile(re.escape(NODE_PREFIX) + r"([a-z][0-9a-f]{8})-([0-9]{1,9})-([a-z]+)")
_ID = re.compile(
    re.escape(ID_PREFIX)
    + r"([a-z][0-9a-f]{8})-([0-9]{1,9})(?:-(create|push|probe|saved|x([0-9a-f]*)((?:-c[0-9a-f]*)*)))?"
)

_SNAPSHOT_MARK = "pullback-snapshot:"
_SERVER_MARK = "pullback-nbd-server:"
_UNFINISHED_MARK = "pullback-restoring:"
#: On the scratch nodes of a snapshot that was made while the guest's file systems were frozen.
FROZEN_MARK = "pullback-frozen:[]"

#: The bitmap on a scratch that records what old data was saved to it, where QEMU's frozen views are not exact.
SAVED_MAP = "pullback-saved"


@dataclass(frozen=True, slots=True)
class SnapshotMark:
    """What a disk's part of a snapshot says of itself; it is on the scratch node, before anything is frozen.

    ``time`` is ISO 8601, when the snapshot was asked for; ``checkpoint`` is the one made at its instant, or None.
    """

    name: str
    target: str
    node: str
    time: str
    checkpoint: str | None

    def bitmap_name(self) -> str:
        """The mark as a bitmap's name."""
        return _SNAPSHOT_MARK + json.dumps(
            [self.name, self.target, self.node, self.time, self.checkpoint], separators=(",", ":"), ensure_ascii=False
        )


@dataclass(frozen=True, slots=True)
class ServerMark:
    """Where QEMU's NBD server listens, and that it is ours; on every frozen view that is exported there.

    ``kind`` is "unix" (``place`` a path) or "inet" (``place`` is HOST:PORT); ``tls`` the directory of certificates.
    """

    kind: str
    place: str
    tls: str | None = None

    def bitmap_name(self) -> str:
        """The mark as a bitmap's name."""
        return _SERVER_MARK + json.dumps([self.kind, self.place, self.tls], separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class UnfinishedMark:
    """That a restore in place writes to a disk, or was cut short; on the disk itself and kept in its image.

    ``backup`` is the id of the backup that is restored, ``repository`` that of its repository.
    """

    repository: str
    backup: str

    def bitmap_name(self) -> str:
        """The mark as a bitmap's name."""
        return _UNFINISHED_MARK + json.dumps([self.repository, self.backup], separators=(",", ":"))


def _decoded(name: str, prefix: str, length: int) -> list[Any] | None:
    if not name.startswith(prefix):
        return None
    try:
        fields = json.loads(name.removeprefix(prefix))
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, list) or len(fields) != length:
        return None
    if not all(isinstance(field, str) for field in fields[:-1]) or not isinstance(fields[-1], str | None):
        return None
    return fields


def fits(mark: SnapshotMark | ServerMark) -> bool:
    """Whether QEMU takes a bitmap of this name."""
    return len(mark.bitmap_name().encode()) <= NAME_MAX


def snapshot_mark(node: Node) -> SnapshotMark | None:
    """The snapshot mark on a node; one that an image brought along is none."""
    for bitmap in node.bitmaps:
        if bitmap.persistent:
            continue
        if fields := _decoded(bitmap.name, _SNAPSHOT_MARK, 5):
            return SnapshotMark(*fields)
    return None


def server_mark(node: Node) -> ServerMark | None:
    """The server mark on a node; one that an image brought along is none."""
    for bitmap in node.bitmaps:
        if bitmap.persistent:
            continue
        if fields := _decoded(bitmap.name, _SERVER_MARK, 3):
            return ServerMark(*fields)
    return None


def frozen_mark(node: Node) -> bool:
    """Whether a node says that the file systems were frozen; one that an image brought along does not."""
    return any(bitmap.name == FROZEN_MARK and not bitmap.persistent for bitmap in node.bitmaps)


def unfinished_marks(bitmaps: Iterable[Bitmap]) -> tuple[UnfinishedMark, ...]:
    """What the bitmaps of a disk say of restores in place that did not end; an inconsistent one says it as well.

    Only names that we give: an image may bring along the same words spelt otherwise, which no mark's name removes.
    """
    found = ((bitmap.name, _decoded(bitmap.name, _UNFINISHED_MARK, 2)) for bitmap in bitmaps)
    marks = ((name, UnfinishedMark(*fields)) for name, fields in found if fields and None not in fields)
    return tuple(mark for name, mark in marks if mark.bitmap_name() == name)


def is_mark(name: str) -> bool:
    """Whether a bitmap of this name is a mark and no map of changes."""
    return name == FROZEN_MARK or name.startswith((_SNAPSHOT_MARK, _SERVER_MARK, _UNFINISHED_MARK))


@dataclass(frozen=True, slots=True)
class Names:
    """The names of everything that belongs to disk ``number`` of snapshot ``snapshot``."""

    snapshot: str
    number: int

    def node(self, role: str) -> str:
        """A block node of it: scratch, filter, access, or a passing one."""
        return f"{NODE_PREFIX}{self.snapshot}-{self.number}-{role}"

    def id(self, role: str = "") -> str:
        """A job of it."""
        return f"{ID_PREFIX}{self.snapshot}-{self.number}" + (f"-{role}" if role else "")

    def export(self, name: str, checkpoints: Iterable[str] = ()) -> str:
        """The export of it called ``name``, which shows what changed since these checkpoints.

        No query tells which bitmaps an export shows, and a frozen view may have several exports.
        """
        return self.id("-".join([f"x{name.encode().hex()}", *(f"c{point.encode().hex()}" for point in checkpoints)]))


@dataclass(frozen=True, slots=True)
class SnapshotPart:
    """One disk of a snapshot, as far as it is there."""

    names: Names
    scratch: Node | None = None
    filter: Node | None = None
    access: Node | None = None
    job: Job | None = None
    mark: SnapshotMark | None = None
    readers: tuple[Node, ...] = ()

    @property
    def target(self) -> str:
        return self.mark.target if self.mark else f"disk {self.names.number}"

    @property
    def viewed(self) -> bool:
        """Whether its frozen view can be read, and is frozen.

        When somebody else cancels the job of one, its view stays, and reads as the disk does now.
        """
        return self.access is not None and self.filter is not None

    @property
    def best_view(self) -> Node | None:
        """The node that readers are given: the view that can be believed where there is one, else the plain one."""
        view = self.names.node("view")
        return next((node for node in self.readers if node.name == view), self.access)


@dataclass(frozen=True, slots=True)
class ExportState:
    """An export of ours; ``checkpoints`` are the changed-block contexts that it shows."""

    id: str
    snapshot: str
    number: int
    name: str
    node: str
    server: ServerMark | None
    checkpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SnapshotState:
    """A snapshot as QEMU has it; ``whole`` unless it was never finished, or was given up below another one.

    ``exact`` says that QEMU's own frozen views can be believed.
    """

    id: str
    parts: tuple[SnapshotPart, ...]
    exact: bool = True

    @property
    def whole(self) -> bool:
        believable = self.exact or self.private or all(part.best_view is not part.access for part in self.parts)
        viewed = all(part.viewed and part.mark is not None for part in self.parts)
        return bool(self.parts) and believable and viewed

    @property
    def private(self) -> bool:
        return self.id.startswith(PRIVATE)

    def _mark(self) -> SnapshotMark | None:
        return next((part.mark for part in self.parts if part.mark is not None), None)

    @property
    def name(self) -> str:
        mark = self._mark()
        return mark.name if mark else self.id

    @property
    def time(self) -> str:
        mark = self._mark()
        return mark.time if mark else ""

    @property
    def checkpoint(self) -> str | None:
        mark = self._mark()
        return mark.checkpoint if mark else None

    @property
    def frozen(self) -> bool:
        """Whether the guest's file systems were frozen at its instant."""
        return bool(self.parts) and all(part.scratch is not None and frozen_mark(part.scratch) for part in self.parts)


def _parts(facts: Facts) -> dict[tuple[str, int], dict[str, Any]]:
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for name, node in facts.nodes.items():
        match = _NODE.fullmatch(name)
        if match and match[3] == "filter" and "file" not in node.children:
            continue  # there is nothing to put back in its place
        if match and match[3] in ("scratch", "filter", "access", *READER_ROLES):
            found.setdefault((match[1], int(match[2])), {})[match[3]] = node
    for job in facts.jobs:
        if (match := _ID.fullmatch(job.id)) and match[3] is None:
            found.setdefault((match[1], int(match[2])), {})["job"] = job
    return found


def read_snapshots(facts: Facts) -> tuple[SnapshotState, ...]:
    """All snapshots that left anything in QEMU, oldest first; finished, half made and given up ones."""
    by_id: dict[str, list[SnapshotPart]] = {}
    for (snapshot, number), pieces in sorted(_parts(facts).items()):
        scratch = pieces.get("scratch")
        mark = snapshot_mark(scratch) if scratch else None
        readers = tuple(pieces.pop(role) for role in READER_ROLES if role in pieces)
        part = SnapshotPart(Names(snapshot, number), **pieces, mark=mark, readers=readers)
        by_id.setdefault(snapshot, []).append(part)
    for snapshot in _idle_ids(facts):
        by_id.setdefault(snapshot, [])
    exact = facts.version >= FROZEN_VIEW_EXACT
    states = (SnapshotState(snapshot, tuple(parts), exact) for snapshot, parts in by_id.items())
    return tuple(sorted(states, key=lambda state: (state.time, state.id)))


def _idle_ids(facts: Facts) -> Iterator[str]:
    """Snapshots of which only a finished job or an export is left."""
    for name in [job.id for job in facts.jobs] + [export.id for export in facts.exports]:
        if (match := _ID.fullmatch(name)) and not match[1].startswith(WRITABLE):
            yield match[1]


def read_exports(facts: Facts) -> tuple[ExportState, ...]:
    """All exports of ours, in QEMU's order."""
    found = []
    for export in facts.exports:
        match = _ID.fullmatch(export.id)
        if match is None or match[4] is None:
            continue
        node = facts.nodes.get(export.node)
        contexts = tuple(_text(piece) for piece in match[5].split("-c")[1:])
        server = server_mark(node) if node else None
        found.append(ExportState(export.id, match[1], int(match[2]), _text(match[4]), export.node, server, contexts))
    return tuple(found)


def _text(digits: str) -> str:
    return bytes.fromhex(digits).decode(errors="replace") if len(digits) % 2 == 0 else digits


def owner_of(export_or_job: str) -> str | None:
    """The snapshot that an export or job id belongs to; None when it is not ours."""
    match = _ID.fullmatch(export_or_job)
    return match[1] if match else None


def filter_stack(facts: Facts, device: Device) -> list[SnapshotPart]:
    """Our filters under a device, topmost first."""
    parts = {
        part.filter.name: part for state in read_snapshots(facts) for part in state.parts if part.filter is not None
    }
    stack = []
    node: Node | None = facts.nodes.get(device.root)
    while node is not None and node.name in parts:
        stack.append(parts[node.name])
        node = facts.nodes.get(node.children.get("file", ""))
    return stack


def foreign_exports(facts: Facts) -> tuple[Export, ...]:
    """NBD exports that are not ours: QEMU's one NBD server is in use by somebody else."""
    return tuple(export for export in facts.exports if export.type == "nbd" and owner_of(export.id) is None)


def current_server(facts: Facts) -> ServerMark | None:
    """Where our NBD server listens; None when none of ours runs (or nobody knows)."""
    marks: Mapping[str, ServerMark | None] = {name: server_mark(node) for name, node in facts.nodes.items()}
    return next((mark for mark in marks.values() if mark is not None), None)
