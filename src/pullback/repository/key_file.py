# SPDX-License-Identifier: Apache-2.0
"""Key files, as they can be read without a key: what the password is to cost, and what it opens (restic's "Keys").

Trying a password takes longer than all else before a backup, so this imports little.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from nacl.bindings import crypto_pwhash_scryptsalsa208sha256_ll as scrypt

from pullback.repository.store import Bytes

# A key file is not sealed, so its costs are bounded before we pay them: 1 GiB of memory, 64 times restic's work.
MAX_SCRYPT_MEMORY = 1 << 30
MAX_SCRYPT_WORK = 1 << 26

#: Bytes that a password is made into: the three parts of a key.
DERIVED_SIZE = 64


class KeyFileInvalid(Exception):
    """A key file does not have the form of one.  Never leaves this package."""


@dataclass(frozen=True, slots=True)
class ScryptCost:
    """What deriving a key from a password costs: 128·n·r bytes of memory, n·r·p steps (about 0.2 s by default).

    The default is one of those that OWASP's Password Storage Cheat Sheet names as the least for scrypt.  restic takes
    what needs 0.5 s on the machine of `restic init`: the same n and r, p 5 or 6.
    """

    n: int = 32768
    r: int = 8
    p: int = 3

    def derive(self, password: str, salt: bytes) -> bytes:
        """What a password stands for, DERIVED_SIZE bytes; raises KeyFileInvalid for impossible or absurd costs."""
        if min(self.n - 1, self.r, self.p) < 1 or self.n & (self.n - 1):
            raise KeyFileInvalid("its scrypt numbers are impossible")
        if 128 * self.n * self.r > MAX_SCRYPT_MEMORY or self.n * self.r * self.p > MAX_SCRYPT_WORK:
            raise KeyFileInvalid("its scrypt numbers ask for more than 1 GiB of memory or minutes of work")
        secret = password.encode(errors="surrogateescape")
        try:
            return scrypt(secret, salt, self.n, self.r, self.p, dklen=DERIVED_SIZE, maxmem=2 * MAX_SCRYPT_MEMORY)
        except (ValueError, MemoryError, RuntimeError) as error:
            raise KeyFileInvalid(f"scrypt refused its numbers ({type(error).__name__})") from None


@dataclass(frozen=True, slots=True)
class KeyFile:
    """What stands in a key file; ``sealed`` are the repository's keys, sealed with what the password stands for."""

    cost: ScryptCost
    salt: bytes
    sealed: bytes

    @classmethod
    def parse(cls, content: Bytes) -> Self:
        """Raises KeyFileInvalid for a broken one."""
        try:
            fields = json.loads(bytes(content))
            if not isinstance(fields, Mapping) or fields["kdf"] != "scrypt":
                raise KeyFileInvalid("it does not use scrypt")
            cost = ScryptCost(_int(fields["N"]), _int(fields["r"]), _int(fields["p"]))
            return cls(cost, from_base64(fields["salt"]), from_base64(fields["data"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise KeyFileInvalid(f"it is not a key file ({type(error).__name__})") from None

    def derive(self, password: str) -> bytes:
        """What a password stands for here; raises as :meth:`ScryptCost.derive`."""
        return self.cost.derive(password, self.salt)


def from_base64(text: object) -> bytes:
    """The bytes that a JSON value stands for; raises TypeError or ValueError."""
    if not isinstance(text, str):
        raise TypeError("not base64 text")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def _int(value: object) -> int:
    if type(value) is not int:
        raise TypeError("not a number")
    return value
