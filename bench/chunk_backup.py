# SPDX-License-Identifier: Apache-2.0
"""One backup of a stopped disk by the product, cut by a given strategy, in this process; prints what it stored.

`python -m bench.chunk_backup COLD HOT WIDELY SEGMENT IMAGE REPOSITORY`

The sizes are the product's constants, set before anything that uses them is imported.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from pathlib import Path
from typing import Any

from pullback.model import units

PASSWORD = "bench"


def set_sizes(cold: int, hot: int, widely: int, segment: int) -> None:
    """Cut like this from now on; ``widely`` 0 cuts no segment as a whole."""
    units.CHUNK, units.HOT_CHUNK, units.SEGMENT = cold, hot, segment
    from pullback.repository import layout

    layout.SEGMENT = segment
    from pullback.plan import grid

    grid.WIDELY = widely or 1
    if not widely:
        grid.FEWEST = 1 << 60


def new_packs(repository: Any, before: set[str]) -> dict[str, int]:
    """What the index files that came since then say of the new packs, in bytes and numbers of blobs."""
    from pullback.repository.blob import BlobKind
    from pullback.repository.documents import load_document
    from pullback.repository.index import decode_index
    from pullback.repository.store import FileKind

    found = {"index": 0, "data": 0, "chunks": 0, "trees": 0, "tree_blobs": 0}
    for name, size in repository.store.list(FileKind.INDEX):
        if name in before:
            continue
        found["index"] += size
        packs, _ = decode_index(load_document(repository.store, repository._key, FileKind.INDEX, name))
        for _, blobs in packs:
            tree = blobs[0].kind is BlobKind.TREE
            found["trees" if tree else "data"] += sum(blob.length for blob in blobs)
            found["tree_blobs" if tree else "chunks"] += len(blobs)
    return found


def run(image: str, place: str) -> dict[str, Any]:
    """Back the image up and tell what that stored."""
    from pullback.engine.backup import BackupRequest, run_backup
    from pullback.engine.domain import DomainAddress
    from pullback.engine.events import silent
    from pullback.repository.local_store import LocalStore
    from pullback.repository.repository import Repository
    from pullback.repository.store import FileKind

    def opened() -> Repository:
        return Repository.open(LocalStore(Path(place)), PASSWORD)

    before = {name for name, _ in opened().store.list(FileKind.INDEX)}
    request = BackupRequest(DomainAddress(images=f"vda=qcow2:{image}", name="bench"), scratch=str(Path(image).parent))
    made = asyncio.run(run_backup(request, opened, silent))
    disk = made.manifest.disks[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    told = {"seconds": made.seconds, "mode": disk.mode, "read": disk.bytes_read, "new": disk.bytes_new, "peak": peak}
    return told | new_packs(opened(), before)


if __name__ == "__main__":
    set_sizes(*map(int, sys.argv[1:5]))
    print(json.dumps(run(*sys.argv[5:7])))
