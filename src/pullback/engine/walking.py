# SPDX-License-Identifier: Apache-2.0
"""A backup's trees, top down, as far as they can be read: one that is lost hides only what is below it."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from pullback.errors import Damaged
from pullback.repository.blob import BlobId
from pullback.repository.layout import MANIFEST, SEGMENT_NAME
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot
from pullback.repository.tree import Tree


@dataclass(frozen=True, slots=True)
class Piece:
    """A directory of a backup: of a segment (``number`` of ``disk``), of a disk, or one above all disks.

    ``content`` are the blobs of its one file: the segment's, or the manifest; empty for others, None where the tree
    was not loaded.  ``wrong`` says what is not as it should be; ``lost`` that the tree could not be read.
    """

    tree: BlobId
    disk: str | None = None
    number: int | None = None
    content: tuple[BlobId, ...] | None = ()
    size: int = 0
    wrong: str = ""
    lost: bool = False


def walk(repository: Repository, snapshot: Snapshot, known: Container[BlobId] = ()) -> Iterator[Piece]:
    """Every directory of a backup; segments whose trees are in ``known`` are not loaded."""
    if len(snapshot.paths) != 1:
        yield Piece(snapshot.tree, wrong=f"it holds {len(snapshot.paths)} paths, not one")
        return
    place = snapshot.tree
    for name in [part for part in snapshot.paths[0].split("/") if part not in ("", ".")]:
        tree, piece = _load(repository, Piece(place))
        yield piece
        if tree is None:
            return
        node = tree.find(name)
        if node is None or node.subtree is None:
            yield Piece(place, wrong=f"there is no directory {name!r}")
            return
        place = node.subtree
    tree, piece = _load(repository, Piece(place))
    manifest = tree.find(MANIFEST) if tree is not None else None
    if manifest is not None and manifest.content is not None:
        piece = Piece(place, content=manifest.content, size=manifest.size)
    elif tree is not None:
        piece = Piece(place, wrong=f"there is no {MANIFEST}")
    yield piece
    for node in tree.nodes if tree is not None else ():
        if node.type == "dir" and node.subtree is not None:
            yield from _walk_disk(repository, node.name, node.subtree, known)


def _walk_disk(repository: Repository, disk: str, place: BlobId, known: Container[BlobId]) -> Iterator[Piece]:
    tree, piece = _load(repository, Piece(place, disk))
    yield piece
    for node in tree.nodes if tree is not None else ():
        if node.type != "dir" or node.subtree is None:
            continue
        if not SEGMENT_NAME.fullmatch(node.name):
            yield Piece(place, disk, wrong=f"the disk {disk} holds a directory {node.name!r}")
        elif node.subtree in known:
            yield Piece(node.subtree, disk, int(node.name), content=None)
        else:
            yield _segment(repository, Piece(node.subtree, disk, int(node.name)))


def _segment(repository: Repository, piece: Piece) -> Piece:
    tree, piece = _load(repository, piece)
    if tree is None:
        return piece
    if len(tree.nodes) != 1 or tree.nodes[0].content is None:
        return Piece(piece.tree, piece.disk, piece.number, wrong="a segment does not hold one file")
    return Piece(piece.tree, piece.disk, piece.number, tree.nodes[0].content, tree.nodes[0].size)


def _load(repository: Repository, piece: Piece) -> tuple[Tree | None, Piece]:
    try:
        return repository.load_tree(piece.tree), piece
    except Damaged as error:
        return None, Piece(piece.tree, piece.disk, piece.number, wrong=error.what, lost=True)
