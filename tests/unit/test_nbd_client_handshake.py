# SPDX-License-Identifier: Apache-2.0
"""Handshakes byte by byte, written down by hand from the NBD protocol document, not with our own constants."""

from __future__ import annotations

from struct import pack

import pytest

from pullback.errors import NbdProtocolError, NbdRefused
from pullback.nbd.client_handshake import ClientHandshake

HELLO = b"NBDMAGIC" + b"IHAVEOPT"
FIXED = HELLO + b"\x00\x03"
REPLY = bytes.fromhex("0003e889045565a9")
EXPORT, GO, ABORT, LIST, STARTTLS, STRUCTURED, SET_CONTEXT = 1, 7, 2, 3, 5, 8, 10
ACK, SERVER, INFO, CONTEXT = 1, 2, 3, 4
UNSUP, POLICY, TLS_REQD, UNKNOWN = (0x80000000 + number for number in (1, 2, 5, 6))
SIZE_INFO = pack(">HQH", 0, 1 << 30, 0b1100101)


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + pack(">II", number, len(data)) + data


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return REPLY + pack(">III", number, kind, len(data)) + data


def go(name: bytes) -> bytes:
    return option(GO, pack(">I", len(name)) + name + pack(">HHH", 2, 3, 2))


def converse(handshake: ClientHandshake, *turns: tuple[bytes, bytes]) -> None:
    """Play the server: say each first part, and expect exactly the second in return."""
    for said, expected in turns:
        handshake.receive(said)
        assert handshake.data_to_send() == expected


def test_everything_a_modern_server_offers() -> None:
    handshake = ClientHandshake("disk", ["base:allocation", "qemu:dirty-bitmap:a"])
    set_data = pack(">I4sI", 4, b"disk", 2) + pack(">I15s", 15, b"base:allocation")
    set_data += pack(">I19s", 19, b"qemu:dirty-bitmap:a")
    converse(
        handshake,
        (FIXED, b"\x00\x00\x00\x03" + option(STRUCTURED)),
        (reply(STRUCTURED, ACK), option(SET_CONTEXT, set_data)),
        (reply(SET_CONTEXT, CONTEXT, pack(">I", 7) + b"qemu:dirty-bitmap:a"), b""),
        (reply(SET_CONTEXT, ACK), go(b"disk")),
        (reply(GO, INFO, SIZE_INFO), b""),
        (reply(GO, INFO, pack(">HIII", 3, 512, 65536, 0x2000000)), b""),
        (reply(GO, INFO, pack(">H", 2) + "für später".encode()), b""),
        (reply(GO, INFO, pack(">H", 99) + b"whatever"), b""),
        (reply(GO, ACK), b""),
    )
    assert handshake.done
    info = handshake.info
    assert (info.name, info.size, int(info.flags)) == ("disk", 1 << 30, 0b1100101)
    assert (info.min_block, info.preferred_block, info.max_payload) == (512, 65536, 32 << 20)
    assert info.contexts == {"qemu:dirty-bitmap:a": 7}
    assert info.description == "für später"
    assert info.structured_replies


def test_one_byte_at_a_time() -> None:
    handshake = ClientHandshake("")
    sent = b""
    stream = FIXED + reply(STRUCTURED, ACK) + reply(GO, INFO, SIZE_INFO) + reply(GO, ACK)
    for byte in stream:
        assert not handshake.done
        handshake.receive(bytes([byte]))
        sent += handshake.data_to_send()
    assert handshake.done
    assert sent == b"\x00\x00\x00\x03" + option(STRUCTURED) + go(b"")


def test_a_server_without_structured_replies_has_no_contexts() -> None:
    handshake = ClientHandshake("", ["base:allocation"])
    converse(
        handshake,
        (FIXED, b"\x00\x00\x00\x03" + option(STRUCTURED)),
        (reply(STRUCTURED, UNSUP), go(b"")),
        (reply(GO, INFO, SIZE_INFO) + reply(GO, ACK), b""),
    )
    assert handshake.done
    assert not handshake.info.structured_replies
    assert handshake.info.contexts == {}
    assert (handshake.info.min_block, handshake.info.max_payload) == (1, 32 << 20)


@pytest.mark.parametrize(("flags", "padding"), [(3, b""), (1, bytes(124))])
def test_a_server_without_go_gets_the_older_option(flags: int, padding: bytes) -> None:
    handshake = ClientHandshake("x")
    converse(
        handshake,
        (HELLO + pack(">H", flags), pack(">I", flags) + option(STRUCTURED)),
        (reply(STRUCTURED, ACK), go(b"x")),
        (reply(GO, UNSUP), option(EXPORT, b"x")),
        (pack(">QH", 4096, 1), b""),
    )
    assert handshake.done is not bool(padding)
    if padding:
        handshake.receive(padding)
    assert handshake.done
    assert handshake.info.size == 4096


def test_a_server_that_is_not_even_fixed_newstyle() -> None:
    handshake = ClientHandshake("x", ["base:allocation"])
    converse(handshake, (HELLO + b"\0\0", b"\0\0\0\0" + option(EXPORT, b"x")))
    handshake.receive(pack(">QH", 4096, 1) + bytes(124))
    assert handshake.done
    assert not handshake.info.structured_replies
    assert handshake.abort() == b""


def test_unknown_export() -> None:
    handshake = ClientHandshake("nope")
    handshake.receive(FIXED)
    handshake.receive(reply(STRUCTURED, ACK))
    with pytest.raises(NbdRefused, match=r"'nope'.*no such export.*: sorry") as caught:
        handshake.receive(reply(GO, UNKNOWN, b"sorry"))
    assert caught.value.errno == 2
    assert handshake.abort() == option(ABORT)


def test_tls_is_required_and_we_have_none() -> None:
    handshake = ClientHandshake("x")
    handshake.receive(FIXED)
    with pytest.raises(NbdRefused, match="requires TLS") as caught:
        handshake.receive(reply(STRUCTURED, TLS_REQD))
    assert caught.value.errno == 1


def test_not_a_byte_leaves_between_the_agreement_on_tls_and_tls() -> None:
    handshake = ClientHandshake("x", tls=True)
    converse(handshake, (FIXED, b"\x00\x00\x00\x03" + option(STARTTLS)), (reply(STARTTLS, ACK), b""))
    assert handshake.starttls
    handshake.tls_started()
    assert handshake.data_to_send() == option(STRUCTURED)
    assert not handshake.starttls


def test_bytes_smuggled_in_before_tls_are_refused() -> None:
    handshake = ClientHandshake("x", tls=True)
    handshake.receive(FIXED)
    with pytest.raises(NbdProtocolError, match="nobody asked for"):
        handshake.receive(reply(STARTTLS, ACK) + reply(STRUCTURED, ACK))


@pytest.mark.parametrize("kind", [UNSUP, POLICY])
def test_no_tls_where_it_was_asked_for_is_the_end(kind: int) -> None:
    handshake = ClientHandshake("x", tls=True)
    handshake.receive(FIXED)
    with pytest.raises(NbdRefused, match="encrypt"):
        handshake.receive(reply(STARTTLS, kind))
    with pytest.raises(NbdRefused, match="encrypt"):
        ClientHandshake("x", tls=True).receive(HELLO + b"\0\0")


def test_list() -> None:
    handshake = ClientHandshake(listing=True)
    converse(
        handshake,
        (FIXED, b"\x00\x00\x00\x03" + option(LIST)),
        (reply(LIST, SERVER, pack(">I", 1) + b"a"), b""),
        (reply(LIST, SERVER, pack(">I", 0) + b"the default"), b""),
        (reply(LIST, ACK), option(ABORT)),
    )
    assert handshake.done
    assert handshake.exports == [("a", ""), ("", "the default")]


def test_a_list_without_end() -> None:
    handshake = ClientHandshake(listing=True)
    handshake.receive(FIXED)
    with pytest.raises(NbdProtocolError, match="lists more than"):
        for _ in range(20_000):
            handshake.receive(reply(LIST, SERVER, pack(">I", 1) + b"a"))


GO_STAGE = (FIXED, reply(STRUCTURED, ACK))
CONTEXT_STAGE = (FIXED, reply(STRUCTURED, ACK))


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ([b"HTTP/1.1 400 Bad Request\r\n"], "does not speak NBD"),
        ([b"NBDMAGIC" + bytes.fromhex("0000420281861253") + bytes(20)], "old-style"),
        ([HELLO[:15] + b"?\0\3"], "version that does not exist"),
        ([FIXED, b"?" + reply(STRUCTURED, ACK)[1:]], "right number"),
        ([FIXED, reply(GO, ACK)], "answered option 7"),
        ([FIXED, reply(STRUCTURED, ACK, b"x")], "not empty"),
        ([FIXED, reply(STRUCTURED, INFO)], "reply type 3"),
        ([FIXED, reply(STRUCTURED, ACK)[:16] + pack(">I", 1 << 20)], "1048576 bytes long"),
        ([*GO_STAGE, reply(GO, ACK)], "without telling its size"),
        ([*GO_STAGE, reply(GO, INFO, b"\0")], "without a type"),
        ([*GO_STAGE, reply(GO, INFO, SIZE_INFO + b"x")], "wrong number of bytes"),
        ([*GO_STAGE, reply(GO, INFO, pack(">HQH", 0, 1 << 63, 1))], "claims an export"),
        ([*GO_STAGE, reply(GO, INFO, pack(">HIII", 3, 513, 4096, 65536))], "minimum block of 513"),
        ([*GO_STAGE, reply(GO, INFO, pack(">HIII", 3, 131072, 131072, 1 << 20))], "minimum block of 131072"),
        ([*GO_STAGE, reply(GO, INFO, pack(">HIII", 3, 512, 256, 65536))], "preferred block of 256"),
        ([*GO_STAGE, reply(GO, INFO, pack(">HIII", 3, 512, 512, 511))], "largest payload of 511"),
        ([*GO_STAGE, reply(GO, INFO, pack(">H", 2) + b"\xff")], "not UTF-8"),
        ([*GO_STAGE, reply(GO, INFO, pack(">H", 2) + b"x" * 4097)], "4097 bytes"),
        ([*GO_STAGE, reply(GO, INFO, SIZE_INFO) + reply(GO, ACK) + b"x"], "nobody asked for"),
    ],
)
def test_a_server_that_breaks_the_protocol(said: list[bytes], complaint: str) -> None:
    handshake = ClientHandshake("x")
    with pytest.raises(NbdProtocolError, match=complaint):
        for data in said:
            handshake.receive(data)
    with pytest.raises(NbdProtocolError, match=complaint):
        handshake.receive(FIXED)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ([pack(">I", 1) + b"base:other"], "nobody asked for"),
        ([b"\0"], "too few bytes"),
        ([pack(">I", 1) + b"base:allocation"] * 2, "twice"),
        ([pack(">I", 1) + b"base:allocation", pack(">I", 1) + b"x:1"], "twice"),
    ],
)
def test_contexts_that_make_no_sense(said: list[bytes], complaint: str) -> None:
    handshake = ClientHandshake("x", ["base:allocation", "x:"])
    with pytest.raises(NbdProtocolError, match=complaint):
        for data in [*CONTEXT_STAGE, *(reply(SET_CONTEXT, CONTEXT, part) for part in said)]:
            handshake.receive(data)


@pytest.mark.parametrize("name", ["x" * 4097, "a\0b"])
def test_names_that_nbd_cannot_carry(name: str) -> None:
    with pytest.raises(NbdRefused, match="longer than NBD allows"):
        ClientHandshake(name)
