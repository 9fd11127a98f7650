# SPDX-License-Identifier: Apache-2.0
"""Reading blobs from a store whose answers are not always what it holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pullback.errors import Damaged
from pullback.repository.blob import BlobKind
from pullback.repository.local_store import LocalStore
from pullback.repository.repository import Repository
from pullback.repository.store import FileKind
from tests.support.backups import new_repository
from tests.support.restic import PASSWORD


class Flipping(LocalStore):
    """Flips a bit in its next ``wrong`` answers about packs."""

    wrong = 0

    def load(self, kind: FileKind, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = bytearray(super().load(kind, name, offset, length))
        if kind is FileKind.DATA and self.wrong:
            self.wrong -= 1
            data[len(data) // 2] ^= 1
        return bytes(data)


def test_one_wrong_answer_is_asked_for_again_and_two_are_damage(tmp_path: Path) -> None:
    made = new_repository(tmp_path / "repo")
    content = os.urandom(5000)
    with made.new_writer() as writer:
        blob = writer.add(BlobKind.DATA, content)
    made.save_index()
    store = Flipping(tmp_path / "repo")
    repository = Repository.open(store, PASSWORD)
    store.wrong = 1
    assert repository.load_blob(BlobKind.DATA, blob) == content
    store.wrong = 2
    with pytest.raises(Damaged, match=blob.hex()):
        repository.load_blob(BlobKind.DATA, blob)
