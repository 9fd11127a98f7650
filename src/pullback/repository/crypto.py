# SPDX-License-Identifier: Apache-2.0
"""Sealing and opening: AES-256-CTR with Poly1305-AES (restic's "Keys, Encryption and MAC").

    nonce (16) | ciphertext (n) | tag (16)

The nonce starts the counter mode, and enciphered with AES-128 it is Poly1305's one-time half of the key.
The tag covers the ciphertext only.  Of 256 KiB, AES takes 40 us and releases the interpreter's lock, Poly1305
takes 24 us and holds it (cryptography 50).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.poly1305 import Poly1305

from pullback.repository.key_file import KeyFile, KeyFileInvalid, ScryptCost, from_base64
from pullback.repository.store import Bytes

NONCE_SIZE = 16
TAG_SIZE = 16
OVERHEAD = NONCE_SIZE + TAG_SIZE


class SealBroken(Exception):
    """The tag does not fit: other key or changed bytes.  Never leaves this package."""


class Key:
    """One set of keys: 32 bytes for AES-256, 16 (`k`) for AES-128 over the nonce, 16 (`r`) for Poly1305."""

    __slots__ = ("_cipher", "_k", "_nonce_cipher", "_r", "encrypt")

    def __init__(self, encrypt: bytes, mac_k: bytes, mac_r: bytes) -> None:
        if (len(encrypt), len(mac_k), len(mac_r)) != (32, 16, 16):
            raise KeyFileInvalid("a key has the wrong length")
        if not any(encrypt) or not any(mac_k) or not any(mac_r):
            raise KeyFileInvalid("a key is all zero")
        self.encrypt = encrypt
        self._k = mac_k
        self._r = mac_r
        self._cipher = algorithms.AES(encrypt)
        self._nonce_cipher = Cipher(algorithms.AES(mac_k), modes.ECB())

    def __repr__(self) -> str:
        return "Key(…)"

    @classmethod
    def generate(cls) -> Key:
        """Fresh random keys."""
        return cls(os.urandom(32), os.urandom(16), os.urandom(16))

    @classmethod
    def derived(cls, secret: bytes) -> Key:
        """The keys that a password stands for, of the DERIVED_SIZE bytes that it was made into."""
        return cls(secret[:32], secret[32:48], secret[48:])

    @classmethod
    def of_file(cls, file: KeyFile, secret: bytes) -> Key:
        """The keys in a key file; raises SealBroken for a wrong password, KeyFileInvalid for a broken file."""
        return cls.from_json(cls.derived(secret).open(file.sealed))

    def _one_time(self, nonce: Bytes) -> bytes:
        return self._r + self._nonce_cipher.encryptor().update(nonce)

    def seal(self, plaintext: Bytes, *, nonce: bytes | None = None) -> bytearray:
        """The sealed form, OVERHEAD bytes longer; `nonce` (16 bytes, never twice) is for test vectors."""
        size = memoryview(plaintext).nbytes
        sealed = bytearray(size + OVERHEAD)
        self.seal_into(plaintext, memoryview(sealed), nonce=nonce)
        return sealed

    def seal_into(self, plaintext: Bytes, into: memoryview, *, nonce: bytes | None = None) -> int:
        """Seal into the start of `into` (writable, flat) and return how many bytes that took."""
        size = memoryview(plaintext).nbytes
        nonce = os.urandom(NONCE_SIZE) if nonce is None else nonce
        end = NONCE_SIZE + size
        into[:NONCE_SIZE] = nonce
        # update_into wants a block less one of spare room behind the text; the tag's place is that.
        Cipher(self._cipher, modes.CTR(nonce)).encryptor().update_into(plaintext, into[NONCE_SIZE : end + TAG_SIZE])
        into[end : end + TAG_SIZE] = Poly1305.generate_tag(self._one_time(nonce), into[NONCE_SIZE:end])
        return end + TAG_SIZE

    def open(self, sealed: Bytes) -> bytes:
        """The plaintext; raises SealBroken unless every byte is as it was sealed with this key."""
        view = memoryview(sealed)
        if view.nbytes < OVERHEAD:
            raise SealBroken("too short")
        nonce = bytes(view[:NONCE_SIZE])
        text = view[NONCE_SIZE:-TAG_SIZE]
        try:
            Poly1305.verify_tag(self._one_time(nonce), text, bytes(view[-TAG_SIZE:]))
        except InvalidSignature:
            raise SealBroken("the tag does not fit") from None
        return Cipher(self._cipher, modes.CTR(nonce)).encryptor().update(text)

    def to_json(self) -> bytes:
        """As it stands, sealed, in a key file."""
        mac = {"k": _base64(self._k), "r": _base64(self._r)}
        return json.dumps({"mac": mac, "encrypt": _base64(self.encrypt)}, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, document: bytes) -> Key:
        """The inverse of to_json; raises KeyFileInvalid."""
        try:
            fields = json.loads(document)
            return cls(from_base64(fields["encrypt"]), from_base64(fields["mac"]["k"]), from_base64(fields["mac"]["r"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise KeyFileInvalid(f"the keys inside cannot be read ({type(error).__name__})") from None


def make_key_file(
    master: Key, password: str, *, created: str, username: str, hostname: str, cost: ScryptCost
) -> tuple[str, bytes]:
    """A key file (its name and its bytes) that opens `master` with `password`; `created` is RFC 3339."""
    salt = os.urandom(64)
    sealed = Key.derived(cost.derive(password, salt)).seal(master.to_json())
    fields = {
        "created": created,
        "username": username,
        "hostname": hostname,
        "kdf": "scrypt",
        "N": cost.n,
        "r": cost.r,
        "p": cost.p,
        "salt": _base64(salt),
        "data": _base64(sealed),
    }
    content = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    return hashlib.sha256(content).hexdigest(), content


def _base64(data: Bytes) -> str:
    return base64.b64encode(data).decode()
