# SPDX-License-Identifier: Apache-2.0
"""How a backup stands in the repository: as a directory that restic can list, mount and restore.

    /DOMAIN                     the snapshot file's one path
    ├── domain.json             the manifest
    └── DISK
        ├── 0000                a segment: 256 MiB of the disk
        │   └── 0000.raw        its content: a list of blobs
        └── 0001 …              the last one may be shorter

`cat DISK/*/*.raw` is the raw disk.  Each segment has a directory of its own, whose tree does not say when it was
stored: an unchanged segment has the same tree id in every backup and is shared as a whole.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pullback.errors import Damaged, UsageError
from pullback.repository.blob import BlobId, BlobKind
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot
from pullback.repository.tree import EPOCH, Node, Tree, directory_node, encode_tree, file_node, go_time
from pullback.repository.writer import PackWriter

SEGMENT = 256 << 20
MANIFEST = "domain.json"

_MANIFEST_PIECE = 4 << 20
# Longer numbers are no disk's, and Python refuses to read very long ones.
SEGMENT_NAME = re.compile(r"[0-9]{4,9}")
# The definition of a domain is most of it.
_MAX_MANIFEST = 64 << 20
_MAX_NAME = 255


def check_name(name: str, what: str) -> str:
    """A domain's or disk's name that may become a directory's; raises UsageError for others."""
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise UsageError(f"{name!r} cannot be the name of a {what}", todo="It may not be empty, '.', '..' or hold '/'.")
    if len(name.encode(errors="surrogateescape")) > _MAX_NAME:
        raise UsageError(f"The name of a {what} is longer than {_MAX_NAME} bytes: {name[:40]!r}…")
    return name


def check_disk_name(name: str) -> str:
    """A disk's name; `domain.json` is the manifest's."""
    if name == MANIFEST:
        raise UsageError(f"{name!r} cannot be the name of a disk", todo="Give the disk another name.")
    return check_name(name, "disk")


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """Segment `number` of a disk: the tree of its directory, and how many bytes of the disk it holds."""

    number: int
    subtree_id: BlobId
    size: int


class BackupBuilder:
    """Collects segments, from any thread, and builds the directory around them.

    `writer` is used by finish() and by add_segment() calls that bring none; threads bring their own.
    """

    def __init__(self, repository: Repository, writer: PackWriter, domain: str, time: datetime) -> None:
        self._repository = repository
        self._writer = writer
        self._domain = check_name(domain, "domain")
        self._time = go_time(time)
        self._disks: dict[str, dict[int, BlobId]] = {}
        self._lock = threading.Lock()

    @property
    def path(self) -> str:
        """What the snapshot file's paths must hold."""
        return f"/{self._domain}"

    def add_disk(self, disk: str) -> None:
        """Make sure the disk has a directory, even if it has no segment (its size is 0)."""
        with self._lock:
            self._disks.setdefault(check_disk_name(disk), {})

    def add_segment(
        self, disk: str, number: int, size: int, content: Sequence[BlobId], writer: PackWriter | None = None
    ) -> BlobId:
        """Store the directory of a segment of `size` bytes made of these blobs; returns its tree's id."""
        # Epoch, not now: the tree's id must depend on the content alone.
        tree = encode_tree([file_node(f"{number:04d}.raw", size, content, EPOCH)])
        subtree = (writer or self._writer).add(BlobKind.TREE, tree)
        self.keep_segment(disk, number, subtree)
        return subtree

    def keep_segment(self, disk: str, number: int, subtree_id: BlobId) -> None:
        """Take a segment over, unchanged and whole, from an earlier backup in this repository."""
        self.add_disk(disk)
        with self._lock:
            if number in self._disks[disk]:
                raise ValueError(f"segment {number} of {disk} was given twice")
            self._disks[disk][number] = subtree_id

    def finish(self, manifest_json: bytes) -> BlobId:
        """Store the manifest and the directories; returns the id of the tree for the snapshot file.

        Raises ValueError if a segment is missing.  The writer is not flushed.
        """
        pieces = range(0, len(manifest_json), _MANIFEST_PIECE)
        content = [self._writer.add(BlobKind.DATA, manifest_json[start : start + _MANIFEST_PIECE]) for start in pieces]
        nodes = [file_node(MANIFEST, len(manifest_json), content, self._time)]
        nodes += [self._directory(disk, self._disk_nodes(disk)) for disk in self._disks]
        return self._writer.add(BlobKind.TREE, encode_tree([self._directory(self._domain, nodes)]))

    def _directory(self, name: str, nodes: list[Node]) -> Node:
        return directory_node(name, self._writer.add(BlobKind.TREE, encode_tree(nodes)), self._time)

    def _disk_nodes(self, disk: str) -> list[Node]:
        segments = self._disks[disk]
        missing = [number for number in range(len(segments)) if number not in segments]
        if missing:
            raise ValueError(f"segment {missing[0]} of {disk} is missing")
        # All names of one disk are equally long, so that their order as text is the order on the disk.
        width = max(4, len(str(len(segments) - 1)))
        return [directory_node(f"{number:0{width}d}", segments[number], EPOCH) for number in sorted(segments)]


class StoredBackup:
    """A backup read back, whether pullback stored it or `restic backup` did from such a directory.

    Everything raises Damaged if the repository is, or if the snapshot does not hold this layout.
    """

    def __init__(self, repository: Repository, snapshot: Snapshot) -> None:
        self._repository = repository
        self.snapshot = snapshot
        self._root = self._find_root()

    def _find_root(self) -> Tree:
        if len(self.snapshot.paths) != 1:
            raise self._wrong(f"it holds {len(self.snapshot.paths)} paths, not one")
        tree = self._repository.load_tree(self.snapshot.tree)
        for name in self.snapshot.paths[0].split("/"):
            if name not in ("", "."):
                tree = self._enter(tree, name)
        return tree

    def _wrong(self, why: str) -> Damaged:
        return Damaged(
            f"The backup {self.snapshot.short_id} is not laid out as a backup of a domain: {why}",
            todo="Choose another backup; restic restore can still read this one.",
        )

    def _enter(self, tree: Tree, name: str) -> Tree:
        node = tree.find(name)
        if node is None or node.type != "dir" or node.subtree is None:
            raise self._wrong(f"there is no directory {name!r}")
        return self._repository.load_tree(node.subtree)

    def manifest_bytes(self) -> bytes:
        """The manifest as it was stored."""
        node = self._root.find(MANIFEST)
        if node is None or node.content is None:
            raise self._wrong(f"there is no {MANIFEST}")
        # One large blob named again and again is a few bytes here, and all of the memory there.
        size = sum(length or 0 for length in self._repository.index.lengths(BlobKind.DATA, node.content))
        if size > _MAX_MANIFEST:
            raise self._wrong(f"its {MANIFEST} has {size} bytes")
        return b"".join(self._repository.load_blob(BlobKind.DATA, blob) for blob in node.content)

    def disks(self) -> list[str]:
        """The names of the disks."""
        return [node.name for node in self._root.nodes if node.type == "dir"]

    def subtrees(self, disk: str) -> list[BlobId]:
        """The trees of a disk's segments, in order; none of them is read."""
        nodes = [node for node in self._enter(self._root, disk).nodes if node.type == "dir"]
        numbered = sorted((self._number(disk, node), node.subtree) for node in nodes if node.subtree is not None)
        if [number for number, _ in numbered] != list(range(len(nodes))):
            raise self._wrong(f"segments of the disk {disk} are missing")
        return [subtree for _, subtree in numbered]

    def segments(self, disk: str) -> list[SegmentRef]:
        """The segments of a disk, in order; reads the trees of the first and the last one only."""
        subtrees = self.subtrees(disk)
        if not subtrees:
            return []
        full, last = self._file(subtrees[0]).size, self._file(subtrees[-1]).size
        return [
            SegmentRef(number, subtree, last if number == len(subtrees) - 1 else full)
            for number, subtree in enumerate(subtrees)
        ]

    def _number(self, disk: str, node: Node) -> int:
        if not SEGMENT_NAME.fullmatch(node.name):
            raise self._wrong(f"the disk {disk} holds a directory {node.name!r}")
        return int(node.name)

    def _file(self, subtree: BlobId) -> Node:
        nodes = self._repository.load_tree(subtree).nodes
        if len(nodes) != 1 or nodes[0].content is None:
            raise self._wrong("a segment does not hold one file")
        return nodes[0]

    def content(self, segment: SegmentRef) -> list[tuple[BlobId, int]]:
        """The blobs of a segment in order, each with its plain length in bytes; they add up to the segment's size."""
        node = self._file(segment.subtree_id)
        content = node.content or ()
        distinct = list(dict.fromkeys(content))
        lengths: dict[BlobId, int] = {}
        for blob, length in zip(distinct, self._repository.index.lengths(BlobKind.DATA, distinct), strict=True):
            if length is None:
                raise Damaged(f"The data blob {blob.hex()} of the backup {self.snapshot.short_id} is missing")
            lengths[blob] = length
        blobs = [(blob, lengths[blob]) for blob in content]
        total = sum(length for _, length in blobs)
        if not total == node.size == segment.size:
            raise self._wrong(f"segment {segment.number} has {total} bytes instead of {segment.size}")
        return blobs
