# SPDX-License-Identifier: Apache-2.0
"""Backups to restore from, made without QEMU: many packs of little, so that there is much between begin and end."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

from lab import images
from pullback.engine.events import Event, silent
from pullback.engine.restore import Restore, RestoreRequest, RestoreResult
from pullback.model.manifest import DiskEntry, Manifest
from pullback.repository.blob import BlobKind
from pullback.repository.layout import SEGMENT, BackupBuilder
from pullback.repository.snapshots import Snapshot
from tests.support.backups import MOMENT, new_repository, open_repository

KIB = 1 << 10
MIB = 1 << 20
#: Chunks of a pack here.
_PER_PACK = 4
_CHUNK = 64 * KIB


def some_disk(size: int, seed: int) -> bytes:
    """Chunks of random bytes, and every third one of zeroes."""
    draw = random.Random(seed)
    pieces = [bytes(_CHUNK) if draw.random() < 0.3 else draw.randbytes(_CHUNK) for _ in range(-(-size // _CHUNK))]
    return b"".join(pieces)[:size]


class Kept:
    """A repository at ``place`` with backups of disks that are given as bytes (of one segment each)."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.repo = place / "repo"
        self.disks: dict[str, Mapping[str, bytes]] = {}
        new_repository(self.repo)

    def store(self, disks: Mapping[str, bytes]) -> str:
        """One more backup; its id."""
        repository = open_repository(self.repo)
        entries = tuple(
            DiskEntry(name, len(data), None, "full", "", None, "raw", 0, 0, 0) for name, data in disks.items()
        )
        manifest = Manifest("web", "", MOMENT, "crash", "7.2.22", "0.1.0", SEGMENT, entries)
        with repository.lock():
            with repository.new_writer() as writer:
                builder = BackupBuilder(repository, writer, "web", MOMENT)
                for name, data in disks.items():
                    builder.add_disk(name)
                    content = []
                    for start in range(0, len(data), _CHUNK * _PER_PACK):
                        with repository.new_writer() as own:
                            part = memoryview(data)[start : start + _CHUNK * _PER_PACK]
                            content += [
                                own.add(BlobKind.DATA, bytes(part[at : at + _CHUNK]))
                                for at in range(0, len(part), _CHUNK)
                            ]
                    if data:
                        builder.add_segment(name, 0, len(data), content)
                tree = builder.finish(manifest.to_bytes())
            repository.save_index()
            made = repository.save_snapshot(Snapshot(MOMENT, tree, (builder.path,), "web", tags=("pullback",)))
        self.disks[made] = dict(disks)
        return made

    def restore(self, backup: str, to: Path, emit: Callable[[Event], None] = silent, **more: object) -> RestoreResult:
        """Restore it in this process."""
        request = RestoreRequest(backup, to, **more)  # type: ignore[arg-type]
        return Restore(request, lambda: open_repository(self.repo), emit).run()

    def judge(self, backup: str, to: Path, image_format: str = "qcow2") -> None:
        """The images, and nothing else, are in the directory, and hold what was stored."""
        disks = self.disks[backup]
        assert sorted(path.name for path in to.iterdir()) == sorted(f"{name}.{image_format}" for name in disks)
        for name, data in disks.items():
            path = to / f"{name}.{image_format}"
            if image_format == "qcow2":
                images.check(path)
            assert images.info(path)["virtual-size"] == len(data)
            assert images.raw_bytes(path, image_format) == data, name


def data_bytes(disk: bytes) -> int:
    """Bytes of chunks that are not zero."""
    return sum(len(piece) for start in range(0, len(disk), _CHUNK) if any(piece := disk[start : start + _CHUNK]))
