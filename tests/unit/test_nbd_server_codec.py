# SPDX-License-Identifier: Apache-2.0
"""What our server answers, byte by byte, written down by hand from the NBD protocol document."""

from __future__ import annotations

from struct import pack

import pytest

from pullback.errors import NbdProtocolError
from pullback.nbd.protocol import ExportInfo, NbdErrno, TransmissionFlag
from pullback.nbd.server_codec import ClientRequest, ServerCodec
from pullback.nbd.server_handshake import ServerHandshake

REPLY = bytes.fromhex("0003e889045565a9")
EXPORT, ABORT, LIST, STARTTLS, GET_INFO, GO, STRUCTURED, LIST_CONTEXT, SET_CONTEXT, EXTENDED = (
    1,
    2,
    3,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
)
ACK, SERVER, INFO, CONTEXT = 1, 2, 3, 4
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, BLOCK_SIZE_REQD = (0x80000000 + number for number in (1, 2, 3, 5, 6, 8))
EXPORTS = {
    "a": ExportInfo("a", 4096, TransmissionFlag(1), contexts={"base:allocation": 1, "x:y": 2}, description="first"),
    "big": ExportInfo("big", 1 << 20, TransmissionFlag(1), min_block=512),
}


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + pack(">II", number, len(data)) + data


def string(text: bytes) -> bytes:
    return pack(">I", len(text)) + text


def start(flags: int = 3, *, tls: bool = False) -> ServerHandshake:
    handshake = ServerHandshake(EXPORTS, tls=tls)
    assert handshake.data_to_send() == b"NBDMAGICIHAVEOPT\0\3"
    handshake.receive(pack(">I", flags))
    return handshake


def ask(handshake: ServerHandshake, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    handshake.receive(option(number, data))
    sent = handshake.data_to_send()
    replies = []
    while sent:
        assert sent[:8] == REPLY
        echoed, kind, length = (int.from_bytes(sent[at : at + 4], "big") for at in (8, 12, 16))
        assert echoed == number
        replies.append((kind, sent[20 : 20 + length]))
        sent = sent[20 + length :]
    return replies


def test_go_tells_what_was_asked_and_ends_the_handshake() -> None:
    handshake = start()
    assert ask(handshake, STRUCTURED) == [(ACK, b"")]
    wishes = pack(">HHHH", 3, 1, 2, 3)
    answer = ask(handshake, GO, string(b"a") + wishes)
    assert answer == [
        (INFO, pack(">HQH", 0, 4096, 1 | 1 << 7)),
        (INFO, b"\0\1a"),
        (INFO, b"\0\2first"),
        (INFO, pack(">HIII", 3, 1, 4096, 32 << 20)),
        (ACK, b""),
    ]
    assert handshake.done
    assert handshake.info is not None
    assert handshake.info.contexts == {}


def test_info_does_not_end_it() -> None:
    handshake = start()
    assert ask(handshake, GET_INFO, string(b"a") + b"\0\0") == [(INFO, pack(">HQH", 0, 4096, 1)), (ACK, b"")]
    assert not handshake.done


def test_contexts_belong_to_one_export() -> None:
    for name, contexts in ((b"a", {"base:allocation": 1}), (b"big", {})):
        handshake = start()
        ask(handshake, STRUCTURED)
        query = string(b"a") + pack(">I", 2) + string(b"base:allocation") + string(b"no:such")
        assert ask(handshake, SET_CONTEXT, query) == [(CONTEXT, b"\0\0\0\1base:allocation"), (ACK, b"")]
        ask(handshake, GO, string(name) + pack(">HH", 1, 3))
        assert handshake.info is not None
        assert handshake.info.contexts == contexts


def test_listing_contexts() -> None:
    handshake = start()
    assert ask(handshake, LIST_CONTEXT, string(b"a") + pack(">I", 0))[0][0] == INVALID
    ask(handshake, STRUCTURED)
    both = [(CONTEXT, b"\0\0\0\0base:allocation"), (CONTEXT, b"\0\0\0\0x:y"), (ACK, b"")]
    assert ask(handshake, LIST_CONTEXT, string(b"a") + pack(">I", 0)) == both
    assert ask(handshake, LIST_CONTEXT, string(b"a") + pack(">I", 1) + string(b"x:")) == both[1:]
    assert ask(handshake, LIST_CONTEXT, string(b"no") + pack(">I", 0))[0][0] == UNKNOWN


@pytest.mark.parametrize(
    ("number", "data", "kind"),
    [
        (EXTENDED, b"", UNSUP),
        (77, b"whatever", UNSUP),
        (STARTTLS, b"", POLICY),
        (LIST, b"x", INVALID),
        (STRUCTURED, b"x", INVALID),
        (GO, b"", INVALID),
        (GO, string(b"a"), INVALID),
        (GO, string(b"a") + b"\0\1", INVALID),
        (GO, string(b"a") + b"\0\0x", INVALID),
        (GO, pack(">I", 0xFFFFFFFF) + b"a", INVALID),
        (GO, string(b"\xff") + b"\0\0", INVALID),
        (GO, string(b"nope") + b"\0\0", UNKNOWN),
        (GO, string(b"big") + b"\0\0", BLOCK_SIZE_REQD),
    ],
)
def test_a_client_that_errs_gets_an_error_and_may_go_on(number: int, data: bytes, kind: int) -> None:
    handshake = start()
    assert [kind for kind, _ in ask(handshake, number, data)] == [kind]
    assert not handshake.done
    assert ask(handshake, LIST) == [(SERVER, string(b"a") + b"first"), (SERVER, string(b"big")), (ACK, b"")]


def test_abort() -> None:
    handshake = start()
    assert ask(handshake, ABORT) == [(ACK, b"")]
    assert handshake.done
    assert handshake.info is None


@pytest.mark.parametrize(("flags", "padding"), [(3, 0), (1, 124), (0, 124)])
def test_the_old_option(flags: int, padding: int) -> None:
    handshake = start(flags)
    handshake.receive(option(EXPORT, b"a"))
    assert handshake.data_to_send() == pack(">QH", 4096, 1) + bytes(padding)
    assert handshake.done


def test_tls_comes_first() -> None:
    handshake = start(tls=True)
    for number in (LIST, STRUCTURED, GO, 77):
        assert ask(handshake, number) == [(TLS_REQD, b"")]
    assert ask(handshake, STARTTLS) == [(ACK, b"")]
    assert handshake.starttls
    handshake.tls_started()
    assert ask(handshake, STARTTLS) == [(INVALID, b"")]
    assert ask(handshake, STRUCTURED) == [(ACK, b"")]


@pytest.mark.parametrize(
    ("tls", "said"),
    [
        (False, [pack(">I", 4)]),
        (False, [pack(">I", 0x80000001)]),
        (False, [pack(">I", 3), b"IHAVEOPTx" * 3]),
        (False, [pack(">I", 3), b"X" * 16]),
        (False, [pack(">I", 3), b"IHAVEOPT" + pack(">II", LIST, 1 << 20)]),
        (False, [pack(">I", 3), option(EXPORT, b"nope")]),
        (False, [pack(">I", 0), option(LIST)]),
        (False, [pack(">I", 3), *[option(77)] * 2000]),
        (False, [pack(">I", 3), option(ABORT) + b"x"]),
        (True, [pack(">I", 3), option(EXPORT, b"a")]),
        (True, [pack(">I", 3), option(STARTTLS) + option(STRUCTURED)]),
    ],
)
def test_who_is_cut_off(tls: bool, said: list[bytes]) -> None:
    handshake = ServerHandshake(EXPORTS, tls=tls)
    with pytest.raises(NbdProtocolError):
        for data in said:
            handshake.receive(data)


# Transmission

ALL = TransmissionFlag(0b0000_1111_1101)
EXPORT_INFO = ExportInfo("x", 1 << 30, ALL, contexts={"base:allocation": 5})
PLAIN_INFO = ExportInfo("x", 1 << 30, ALL, structured_replies=False)
READ_ONLY_INFO = ExportInfo("x", 1 << 30, TransmissionFlag(3))


def request(command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> bytes:
    return bytes.fromhex("25609513") + pack(">HHQQI", flags, command, 99, offset, length) + payload


def feed(codec: ServerCodec, data: bytes) -> list[ClientRequest]:
    rest = memoryview(data)
    events = []
    while rest:
        buffer = codec.buffer()
        count = min(len(buffer), len(rest))
        buffer[:count] = rest[:count]
        rest = rest[count:]
        codec.received(count)
        while (event := codec.next_event()) is not None:
            events.append(event)
    return events


def test_a_write_lands_in_the_buffer_that_the_driver_made() -> None:
    buffers = []

    def allocate(length: int) -> memoryview:
        buffers.append(memoryview(bytearray(length)))
        return buffers[-1]

    codec = ServerCodec(EXPORT_INFO, allocate=allocate)
    (event,) = feed(codec, request(1, 512, 4, 1, b"abcd"))
    assert event.data is buffers[0]
    assert bytes(event.data) == b"abcd"
    assert codec.reply_done(event) == bytes.fromhex("67446698") + pack(">IQ", 0, 99)


def test_replies_as_the_document_has_them() -> None:
    codec = ServerCodec(EXPORT_INFO)
    (read,) = feed(codec, request(0, 512, 4))
    chunk = bytes.fromhex("668e33ef")
    assert codec.reply_data(read) == chunk + pack(">HHQIQ", 1, 1, 99, 12, 512)
    assert codec.reply_hole(read, 512, 4, done=True) == chunk + pack(">HHQIQI", 1, 2, 99, 12, 512, 4)
    assert codec.reply_error(read, NbdErrno.EIO, "oh") == chunk + pack(">HHQIIH", 1, 0x8001, 99, 8, 5, 2) + b"oh"
    (status,) = feed(codec, request(7, 0, 100))
    expected = chunk + pack(">HHQIIIIII", 0, 5, 99, 20, 5, 60, 3, 40, 0) + chunk + pack(">HHQI", 1, 0, 99, 0)
    assert codec.reply_extents(status, {"base:allocation": [(60, 3), (40, 0)]}) == expected
    (one,) = feed(codec, request(7, 0, 100, 8))
    assert codec.reply_extents(one, {"base:allocation": [(60, 3), (40, 0)]})[20:32] == pack(">III", 5, 60, 3)
    plain = ServerCodec(PLAIN_INFO)
    (read,) = feed(plain, request(0, 512, 4))
    assert plain.reply_data(read) == bytes.fromhex("67446698") + pack(">IQ", 0, 99)
    assert plain.reply_error(read, NbdErrno.EIO, "oh") == bytes.fromhex("67446698") + pack(">IQ", 5, 99)


@pytest.mark.parametrize(
    ("info", "sent", "errno"),
    [
        (EXPORT_INFO, request(0, 1 << 30, 1), 22),
        (EXPORT_INFO, request(0, 0, (32 << 20) + 1), 22),
        (EXPORT_INFO, request(0, 0, 4, flags=2), 22),
        (EXPORT_INFO, request(0, 0, 4, flags=1 << 15), 22),
        (EXPORT_INFO, request(1, (1 << 30) - 1, 2, payload=b"ab"), 28),
        (EXPORT_INFO, request(1, 0, 2, 8, payload=b"ab"), 22),
        (EXPORT_INFO, request(6, 1 << 30, 1), 28),
        (EXPORT_INFO, request(4, 1 << 30, 1), 22),
        (EXPORT_INFO, request(3, 1, 0), 22),
        (EXPORT_INFO, request(5, 0, 1), 22),
        (EXPORT_INFO, request(1234), 22),
        (PLAIN_INFO, request(7, 0, 1), 22),
        (READ_ONLY_INFO, request(1, 0, 2, payload=b"ab"), 1),
        (READ_ONLY_INFO, request(4, 0, 2), 1),
        (READ_ONLY_INFO, request(3), 22),
    ],
)
def test_bad_requests_get_the_errors_of_the_document(info: ExportInfo, sent: bytes, errno: int) -> None:
    codec = ServerCodec(info)
    good = request(0, 0, 1)
    assert [event.request.length for event in feed(codec, sent + good)] == [1]
    answer = codec.data_to_send()
    at = 20 if info.structured_replies else 4
    assert int.from_bytes(answer[at : at + 4], "big") == errno


@pytest.mark.parametrize("sent", [b"?" * 28, request(1, 0, (32 << 20) + 1), request(2) + request(0, 0, 1)])
def test_who_is_cut_off_in_transmission(sent: bytes) -> None:
    with pytest.raises(NbdProtocolError):
        feed(ServerCodec(EXPORT_INFO), sent)
