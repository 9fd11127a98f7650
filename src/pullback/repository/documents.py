# SPDX-License-Identifier: Apache-2.0
"""Sealed files that are not packs: index, snapshot, lock, config (restic's "Unpacked Data Format").

sealed( JSON )                  version 1, and the config always
sealed( 2 | zstd( JSON ) )      version 2
"""

from __future__ import annotations

import hashlib

import zstandard

from pullback.errors import RepositoryUnsupported
from pullback.repository.blob import CompressionBroken, decompress_document
from pullback.repository.crypto import Key, SealBroken
from pullback.repository.damage import damaged
from pullback.repository.store import FileKind, Store, describe

_COMPRESSED = 2
_JSON_STARTS = b"[{"


def save_document(store: Store, key: Key, version: int, kind: FileKind, document: bytes) -> str:
    """Seal and store a JSON document; returns its name, the SHA-256 of the stored bytes in hex."""
    if version >= 2 and kind is not FileKind.CONFIG:
        document = bytes([_COMPRESSED]) + zstandard.ZstdCompressor().compress(document)
    sealed = key.seal(document)
    name = hashlib.sha256(sealed).hexdigest()
    store.save(kind, name, sealed)
    return name


def load_document(store: Store, key: Key, kind: FileKind, name: str) -> bytes:
    """The JSON of a stored document; raises Damaged, naming the file, unless all of it is as it was written."""
    sealed = store.load(kind, name)
    if kind is not FileKind.CONFIG and hashlib.sha256(sealed).hexdigest() != name:
        raise damaged(kind, name, "its SHA-256 is not its name")
    try:
        plain = key.open(sealed)
    except SealBroken as error:
        raise damaged(kind, name, str(error)) from None
    if plain[:1] and plain[0] in _JSON_STARTS:
        return plain
    if plain[:1] != bytes([_COMPRESSED]):
        raise RepositoryUnsupported(
            f"The repository's file {describe(kind, name)} is written in a way this version does not know",
            todo="A newer pullback may read it.",
        )
    try:
        return decompress_document(memoryview(plain)[1:])
    except CompressionBroken as error:
        raise damaged(kind, name, str(error)) from None
