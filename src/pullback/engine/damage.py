# SPDX-License-Identifier: Apache-2.0
"""What damaged packs touch: which bytes of which disks of which backups, and what another pack still has.

Every blob that lies in a damaged pack is read there, alone.  So what is asked for is bounded by the damage: nothing is
kept of the backups that it does not touch but the ids of their segments' trees.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pullback.engine.walking import Piece, walk
from pullback.errors import Damaged, RepositoryUnsupported
from pullback.model.extents import Span
from pullback.model.manifest import Manifest, parse_manifest
from pullback.plan.damage import joined, on_disk, segment_span, touched_spans
from pullback.repository.blob import BlobId, BlobKind, BlobLocation, PackId
from pullback.repository.layout import SEGMENT, StoredBackup
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot
from pullback.repository.store import FileKind, describe

#: In place of a pack, for blobs that no index file lists.
UNLISTED = PackId(b"")


@dataclass(frozen=True, slots=True)
class Touched:
    """What of a backup a damage touches: ``spans`` of ``disk``, all of the backup where that is None.

    ``lost`` is False where another pack has the same bytes.
    """

    backup: str
    domain: str
    time: datetime
    disk: str | None
    spans: tuple[Span, ...]
    lost: bool


@dataclass(frozen=True, slots=True)
class Damage:
    """A damaged file of the repository, the blobs in it that cannot be read, and what that touches."""

    file: str
    reason: str
    blobs: tuple[str, ...] = ()
    touched: tuple[Touched, ...] = ()


@dataclass(frozen=True, slots=True)
class _Verdict:
    """In which packs a blob is broken, and whether it can be read from another."""

    bad: tuple[PackId, ...]
    readable: bool


@dataclass(slots=True)
class _Found:
    """What one pack's damage touches, as it is found."""

    blobs: set[BlobId] = field(default_factory=set)
    spans: dict[tuple[int, str | None, bool], list[Span]] = field(default_factory=lambda: defaultdict(list))


_SOUND = _Verdict((), True)


class DamageMap:
    """Finds what the ``suspects``, packs with the reason each is suspected for, touch in any of the backups."""

    def __init__(
        self,
        repository: Repository,
        suspects: Mapping[PackId, str],
        sizes: Mapping[PackId, int],
        check_stop: Callable[[], None],
    ) -> None:
        self._repository = repository
        self._suspects = suspects
        self._sizes = sizes
        self._check_stop = check_stop
        self._verdicts: dict[tuple[BlobKind, BlobId], _Verdict] = {}
        self._sound: dict[BlobId, int] = {}  # sizes of segments that no damage touches, by their tree
        self._found: dict[PackId, _Found] = defaultdict(_Found)

    def read(self, backups: list[Snapshot]) -> list[Damage]:
        """All damages, each with every one of these backups that it touches."""
        for number, snapshot in enumerate(backups):
            self._read_backup(number, snapshot)
        files = dict(self._suspects)
        if UNLISTED in self._found:
            files[UNLISTED] = "no index file lists blobs that backups need"
        return [self._damage(pack, reason, backups) for pack, reason in sorted(files.items())]

    def _damage(self, pack: PackId, reason: str, backups: list[Snapshot]) -> Damage:
        found = self._found.get(pack, _Found())
        touched = [
            Touched(
                backups[number].id,
                backups[number].hostname,
                backups[number].time.astimezone(UTC),
                disk,
                joined(spans),
                lost,
            )
            for (number, disk, lost), spans in found.spans.items()
        ]
        name = describe(FileKind.DATA, pack.hex()) if pack else FileKind.INDEX.value
        return Damage(name, reason, tuple(sorted(blob.hex() for blob in found.blobs)), tuple(touched))

    def _read_backup(self, number: int, snapshot: Snapshot) -> None:
        manifest = _manifest(self._repository, snapshot)
        segment_size = manifest.segment_size if manifest is not None else SEGMENT
        for piece in walk(self._repository, snapshot, self._sound):
            self._check_stop()
            if piece.number == 0 and manifest is None:  # with the manifest lost, the first segment tells the size
                segment_size = piece.size or self._sound.get(piece.tree, SEGMENT)
            if piece.content is None:
                continue
            touched = list(self._touched(piece, manifest, segment_size))
            if not touched and piece.number is not None:
                self._sound[piece.tree] = piece.size
            for pack, lost, spans, blobs in touched:
                self._found[pack].spans[number, piece.disk, lost] += spans
                self._found[pack].blobs |= blobs

    def _touched(
        self, piece: Piece, manifest: Manifest | None, segment_size: int
    ) -> Iterator[tuple[PackId, bool, list[Span], set[BlobId]]]:
        """For each pack with damage that touches this directory: lost or not, the disk's spans, the blobs."""
        tree = self._verdict(BlobKind.TREE, piece.tree)
        for pack in tree.bad:
            yield pack, not tree.readable, _all_of(piece, manifest, segment_size), {piece.tree}
        blobs = {blob: self._verdict(BlobKind.DATA, blob) for blob in piece.content or ()}
        for pack in {pack for verdict in blobs.values() for pack in verdict.bad}:
            for lost in (True, False):
                hit = {blob for blob, one in blobs.items() if pack in one.bad and one.readable is not lost}
                if not hit:
                    continue
                if piece.number is None:  # the manifest
                    yield pack, lost, [], hit
                else:
                    spans = touched_spans(self._lengths(piece), piece.size, hit.__contains__)
                    yield pack, lost, on_disk(spans, piece.number, segment_size), hit

    def _lengths(self, piece: Piece) -> list[tuple[BlobId, int | None]]:
        lengths: dict[BlobId, int | None] = {}
        for blob in set(piece.content or ()):
            place = self._repository.index.lookup(BlobKind.DATA, blob)
            lengths[blob] = None if place is None else place.uncompressed_length
        return [(blob, lengths[blob]) for blob in piece.content or ()]

    def _verdict(self, kind: BlobKind, blob: BlobId) -> _Verdict:
        known = self._verdicts.get((kind, blob))
        if known is not None:
            return known
        places = list(self._repository.index.lookup_all(kind, blob))
        if places and not any(place.pack_id in self._suspects for place in places):
            return _SOUND
        bad = [place.pack_id for place in places if place.pack_id in self._suspects and not self._opens(blob, place)]
        verdict = _Verdict(tuple(dict.fromkeys(bad)) if places else (UNLISTED,), len(bad) < len(places))
        self._verdicts[kind, blob] = verdict
        return verdict

    def _opens(self, blob: BlobId, place: BlobLocation) -> bool:
        if place.offset + place.length > self._sizes.get(place.pack_id, 0):
            return False
        store = self._repository.store
        try:
            sealed = store.load(FileKind.DATA, place.pack_id.hex(), place.offset, place.length)
            self._repository.open_blob(blob, place, sealed)
        except Damaged:
            return False
        return True


def _all_of(piece: Piece, manifest: Manifest | None, segment_size: int) -> list[Span]:
    """What is lost with a directory's tree; no span where that cannot be said, or is more than a disk."""
    entry = manifest.disk(piece.disk) if manifest is not None and piece.disk is not None else None
    if piece.disk is None or (entry is None and piece.number is None):
        return []
    size = entry.virtual_size if entry is not None else ((piece.number or 0) + 1) * segment_size
    return [Span(0, size) if piece.number is None else segment_span(piece.number, segment_size, size)]


def _manifest(repository: Repository, snapshot: Snapshot) -> Manifest | None:
    try:
        return parse_manifest(StoredBackup(repository, snapshot).manifest_bytes())
    except (Damaged, RepositoryUnsupported):
        return None


def backups_hurt(damages: Iterable[Damage]) -> set[str]:
    """The ids of backups that cannot be read whole."""
    return {one.backup for damage in damages for one in damage.touched if one.lost}
