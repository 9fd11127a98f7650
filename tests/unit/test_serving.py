# SPDX-License-Identifier: Apache-2.0
"""Serving a backup: certificates that are none, and reading ahead into what is lost."""

from __future__ import annotations

import asyncio
import os
from contextlib import closing
from pathlib import Path

import pytest

from pullback.engine.chunk_cache import ChunkCache
from pullback.engine.events import silent
from pullback.engine.serving import Serve, ServeRequest, served_disks
from pullback.engine.walking import walk
from pullback.errors import Damaged, RepositoryError, UsageError
from pullback.model.units import CHUNK, MIB
from pullback.nbd.address import TcpAddress
from pullback.repository.blob import BlobKind
from pullback.repository.repository import Repository
from tests.support.backups import new_repository, open_repository
from tests.support.serving import Model, spoil, store_models


def test_certificates_that_cannot_be_used_are_refused_before_the_repository_is_opened(tmp_path: Path) -> None:
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        (tmp_path / name).write_text("no certificate\n")

    def opened() -> Repository:
        pytest.fail("it was opened")

    serve = Serve(ServeRequest("latest", address=TcpAddress("127.0.0.1", 0), tls=str(tmp_path)), opened, silent)
    with pytest.raises(UsageError, match=r"the certificates in .* cannot be used: .+ It needs ca-cert\.pem, server-c"):
        asyncio.run(serve.run())


def test_reading_ahead_into_what_is_lost_fails_nobody_who_does_not_read_there(tmp_path: Path) -> None:
    new_repository(tmp_path / "repo")
    chunks = tuple(os.urandom(CHUNK) for _ in range(8))
    backup = store_models(open_repository(tmp_path / "repo"), {"vda": Model(chunks)}, segment=MIB)
    repository = open_repository(tmp_path / "repo")
    tree = next(piece.tree for piece in walk(repository, repository.find(backup)) if piece.number == 1)
    (place,) = repository.index.lookup_all(BlobKind.TREE, tree)
    spoil(next((tmp_path / "repo" / "data").glob(f"*/{place.pack_id.hex()}")), place.offset + 20)
    told: list[tuple[int, int]] = []

    def tell(target: str, offset: int, length: int, error: RepositoryError) -> None:
        told.append((offset, length))

    with closing(ChunkCache(repository, 64 * MIB, 1)) as cache:
        disk = served_disks(repository, cache, repository.find(backup), (), tell)[1]["vda"]
        for number in range(3):
            assert told == []
            assert bytes(disk.read(number * CHUNK, CHUNK)) == chunks[number]
        assert told == [(MIB, MIB)], "the third step forward is read ahead of, into the next segment"
        assert bytes(disk.read(3 * CHUNK, CHUNK)) == chunks[3]
        with pytest.raises(Damaged):
            disk.read(MIB, CHUNK)
    assert told == [(MIB, MIB)]
