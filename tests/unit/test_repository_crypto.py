# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import json

import pytest

from pullback.repository.crypto import OVERHEAD, Key, SealBroken, make_key_file
from pullback.repository.key_file import KeyFileInvalid, ScryptCost
from tests.support.backups import open_key_file

CHEAP = ScryptCost(n=16, r=1, p=1)

# Poly1305-AES, appendix B of D. J. Bernstein's paper: key r, AES key k, nonce n, message m, tag. The messages are
# what our sealing authenticates (its ciphertext), so they are fed in as ciphertexts: only the tag is compared.
PAPER = [
    (
        "851fc40c3467ac0be05cc20404f3f700",
        "ec074c835580741701425b623235add6",
        "fb447350c4e868c52ac3275cf9d4327e",
        "f3f6",
        "f4c633c3044fc145f84f335cb81953de",
    ),
    (
        "a0f3080000f46400d0c7e9076c834403",
        "75deaa25c09f208e1dc4ce6b5cad3fbf",
        "61ee09218d29b0aaed7e154a2c5509cc",
        "",
        "dd3fab2251f11ac759f0887129cc2ee7",
    ),
    (
        "48443d0bb0d21109c89a100b5ce2c208",
        "6acb5f61a7176dd320c5c1eb2edcdc74",
        "ae212a55399729595dea458bc621ff0e",
        "663cea190ffb83d89593f3f476b6bc24d7e679107ea26adb8caf6652d0656136",
        "0ee1c16bb73f0f4fd19881753c01cdbe",
    ),
]

# AES-256 in counter mode: NIST SP 800-38A, F.5.5.
CTR_KEY = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"
CTR_COUNTER = "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"
CTR_PLAIN = "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
CTR_CIPHER = "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"


@pytest.mark.parametrize(("r", "k", "nonce", "message", "tag"), PAPER)
def test_the_tag_is_poly1305_aes(r: str, k: str, nonce: str, message: str, tag: str) -> None:
    key = Key(bytes.fromhex(CTR_KEY), bytes.fromhex(k), bytes.fromhex(r))
    sealed = bytes.fromhex(nonce) + bytes.fromhex(message) + bytes.fromhex(tag)
    plain = key.open(sealed)
    assert len(plain) == len(message) // 2
    assert bytes(key.seal(plain, nonce=bytes.fromhex(nonce))) == sealed


def test_the_cipher_is_aes_256_in_counter_mode() -> None:
    key = Key(bytes.fromhex(CTR_KEY), b"k" * 16, b"r" * 16)
    sealed = key.seal(bytes.fromhex(CTR_PLAIN), nonce=bytes.fromhex(CTR_COUNTER))
    assert sealed[:16].hex() == CTR_COUNTER
    assert sealed[16:-16].hex() == CTR_CIPHER


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 262144])
def test_what_is_sealed_opens(size: int) -> None:
    key, plain = Key.generate(), bytes(range(256)) * (size // 256 + 1)
    sealed = key.seal(plain[:size])
    assert len(sealed) == size + OVERHEAD
    assert key.open(sealed) == plain[:size]


def test_sealing_leaves_the_rest_of_a_buffer_alone() -> None:
    buffer = bytearray(b"x" * 100)
    assert Key.generate().seal_into(b"12345", memoryview(buffer)) == 5 + OVERHEAD
    assert buffer[5 + OVERHEAD :] == b"x" * (100 - 5 - OVERHEAD)


def test_no_two_seals_are_alike() -> None:
    key = Key.generate()
    assert key.seal(b"same") != key.seal(b"same")


def test_every_changed_bit_is_noticed() -> None:
    key = Key.generate()
    sealed = key.seal(b"twenty bytes of text")
    for bit in range(len(sealed) * 8):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SealBroken):
            key.open(changed)
    for end in range(len(sealed)):
        with pytest.raises(SealBroken):
            key.open(sealed[:end])


def test_another_key_does_not_open() -> None:
    with pytest.raises(SealBroken):
        Key.generate().open(Key.generate().seal(b"text"))


def test_a_key_does_not_show_itself() -> None:
    key = Key(b"E" * 32, b"K" * 16, b"R" * 16)
    assert repr(key) == "Key(…)"


def _key_file(password: str) -> dict[str, object]:
    _, content = make_key_file(
        Key(b"E" * 32, b"K" * 16, b"R" * 16), password, created="2026-01-01T00:00:00Z", username="u", hostname="h",
        cost=CHEAP,
    )  # fmt: skip
    fields = json.loads(content)
    assert isinstance(fields, dict)
    return fields


def test_a_key_file_opens_with_its_password_only() -> None:
    content = json.dumps(_key_file("naïve päss")).encode()
    assert open_key_file(content, "naïve päss").encrypt == b"E" * 32
    with pytest.raises(SealBroken):
        open_key_file(content, "naive pass")


@pytest.mark.parametrize(
    "change",
    [
        {"kdf": "argon2"},
        {"N": 15},
        {"N": 0},
        {"N": 1 << 30},
        {"p": 1 << 40},
        {"N": 1 << 16, "r": 1},  # neither too much work nor memory, but not allowed by RFC 7914
        {"r": "8"},
        {"N": True},
        {"salt": "*"},
        {"data": 5},
        {"data": None},
    ],
)
def test_an_absurd_key_file_is_refused_at_once(change: dict[str, object]) -> None:
    content = json.dumps(_key_file("p") | change).encode()
    with pytest.raises(KeyFileInvalid):
        open_key_file(content, "p")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 3000])
def test_what_is_no_key_file_is_refused(content: bytes) -> None:
    with pytest.raises(KeyFileInvalid):
        open_key_file(content, "p")


def test_keys_of_the_wrong_length_or_all_zero_are_refused() -> None:
    for keys in [
        (b"E" * 31, b"K" * 16, b"R" * 16),
        (bytes(32), b"K" * 16, b"R" * 16),
        (b"E" * 32, bytes(16), b"R" * 16),
    ]:
        with pytest.raises(KeyFileInvalid):
            Key(*keys)
    document = json.dumps({"mac": {"k": "", "r": ""}, "encrypt": base64.b64encode(b"E" * 32).decode()}).encode()
    with pytest.raises(KeyFileInvalid):
        Key.from_json(document)
