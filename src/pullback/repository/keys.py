# SPDX-License-Identifier: Apache-2.0
"""From a password to the key of a repository.

Apart from the rest: this takes longer than importing everything else, so it begins first.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pullback.errors import Damaged, WrongPassword
from pullback.repository.damage import damaged
from pullback.repository.key_file import KeyFile, KeyFileInvalid
from pullback.repository.store import FileKind, Store

if TYPE_CHECKING:
    from pullback.repository.crypto import Key


def find_key(store: Store, password: str) -> Key:
    """The key that one of the key files holds for this password.

    WrongPassword where none does, Damaged where those that do not are joined by a broken one.
    """
    broken: Damaged | None = None
    for name, _ in store.list(FileKind.KEYS):
        content = store.load(FileKind.KEYS, name)
        try:
            if hashlib.sha256(content).hexdigest() != name:
                raise KeyFileInvalid("its SHA-256 is not its name")
            if (key := _opened(KeyFile.parse(content), password)) is not None:
                return key
        except KeyFileInvalid as error:
            broken = damaged(FileKind.KEYS, name, str(error))
    if broken is not None:
        raise broken
    raise WrongPassword(
        f"No key of the repository {store.location} opens with this password",
        todo="Check RESTIC_PASSWORD, RESTIC_PASSWORD_FILE or RESTIC_PASSWORD_COMMAND.",
    )


def _opened(file: KeyFile, password: str) -> Key | None:
    """What the password opens; None if it is another's."""
    secret = file.derive(password)
    # By now others have imported this.
    from pullback.repository.crypto import Key, SealBroken

    try:
        return Key.of_file(file, secret)
    except SealBroken:
        return None
