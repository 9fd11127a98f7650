# SPDX-License-Identifier: Apache-2.0
"""Replies byte by byte, written down by hand from the NBD protocol document."""

from __future__ import annotations

from struct import pack

import pytest

from pullback.errors import NbdProtocolError, NbdRefused
from pullback.nbd.client_codec import ClientCodec, Completed
from pullback.nbd.protocol import ExportInfo, TransmissionFlag

ALL = TransmissionFlag(0b1111_1111_1101)
INFO = ExportInfo("x", 1 << 40, ALL, contexts={"base:allocation": 5, "x:y": 6})
SIMPLE_INFO = ExportInfo("x", 1 << 40, ALL, structured_replies=False)
NONE, DATA, HOLE, STATUS, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 0x8001, 0x8002
DONE = 1


def chunk(kind: int, cookie: int, body: bytes = b"", flags: int = DONE, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return bytes.fromhex("668e33ef") + pack(">HHQI", flags, kind, cookie, size) + body


def simple(cookie: int, error: int = 0, payload: bytes = b"") -> bytes:
    return bytes.fromhex("67446698") + pack(">IQ", error, cookie) + payload


def feed(codec: ClientCodec, data: bytes) -> list[Completed]:
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


def reading(length: int = 16, offset: int = 100) -> tuple[ClientCodec, bytearray]:
    codec = ClientCodec(INFO)
    buffer = bytearray(b"?" * length)
    assert codec.read(offset, memoryview(buffer))[0] == 1
    return codec, buffer


def test_requests_as_the_document_has_them() -> None:
    codec = ClientCodec(INFO)
    magic = bytes.fromhex("25609513")
    assert codec.read(1, memoryview(bytearray(2)))[1] == magic + pack(">HHQQI", 0, 0, 1, 1, 2)
    assert codec.write(3, 4, fua=True)[1] == magic + pack(">HHQQI", 1, 1, 2, 3, 4)
    assert codec.flush()[1] == magic + pack(">HHQQI", 0, 3, 3, 0, 0)
    assert codec.trim(5, 6)[1] == magic + pack(">HHQQI", 0, 4, 4, 5, 6)
    zeroes = codec.write_zeroes(7, 0xFFFFFFFF, no_hole=True, fast=True)
    assert zeroes[1] == magic + pack(">HHQQI", 0b10010, 6, 5, 7, 0xFFFFFFFF)
    assert codec.block_status(8, 9, one=True)[1] == magic + pack(">HHQQI", 0b1000, 7, 6, 8, 9)
    assert codec.disconnect() == magic + pack(">HHQQI", 0, 2, 0, 0, 0)
    assert codec.pending == 6


def test_the_payload_lands_in_the_callers_buffer_itself() -> None:
    codec, buffer = reading(1 << 20)
    head = chunk(DATA, 1, pack(">Q", 100), length=8 + (1 << 20))
    assert feed(codec, head) == []
    assert codec.in_payload
    target = codec.buffer()
    assert target.obj is buffer
    assert len(target) == 1 << 20


def test_pieces_in_any_order_between_other_replies() -> None:
    codec, buffer = reading()
    cookie, _ = codec.flush()
    stream = chunk(DATA, 1, pack(">Q", 112) + b"dddd", flags=0)
    stream += chunk(HOLE, 1, pack(">QI", 104, 8), flags=0)
    stream += simple(cookie)
    stream += chunk(DATA, 1, pack(">Q", 100) + b"aaaa", flags=0)
    stream += chunk(NONE, 1)
    assert [(event.cookie, event.error) for event in feed(codec, stream)] == [(cookie, None), (1, None)]
    assert buffer == b"aaaa" + bytes(8) + b"dddd"
    assert codec.pending == 0


def test_a_hole_overwrites_what_the_buffer_held() -> None:
    codec, buffer = reading(5 << 20)
    assert len(feed(codec, chunk(HOLE, 1, pack(">QI", 100, 5 << 20)))) == 1
    assert buffer == bytes(5 << 20)


def test_unstructured_read() -> None:
    codec = ClientCodec(SIMPLE_INFO)
    buffer = bytearray(4)
    codec.read(0, memoryview(buffer))
    codec.flush()
    assert [event.cookie for event in feed(codec, simple(1, payload=b"abcd") + simple(2))] == [1, 2]
    assert buffer == b"abcd"


def test_a_refused_read_leaves_the_connection_usable() -> None:
    for error in (
        chunk(ERROR, 1, pack(">IH", 13, 5) + b"gone!"),
        chunk(ERROR_OFFSET, 1, pack(">IH", 13, 5) + b"gone!" + pack(">Q", 104)),
        chunk(0x8055, 1, pack(">IH", 13, 5) + b"gone!" + b"of a kind from the future"),
        chunk(ERROR, 1, pack(">IH", 13, 5) + b"gone!", flags=0) + chunk(ERROR, 1, pack(">IH", 5, 0)),
        chunk(DATA, 1, pack(">Q", 100) + bytes(4), flags=0) + chunk(ERROR, 1, pack(">IH", 13, 5) + b"gone!"),
    ):
        codec, _ = reading()
        (event,) = feed(codec, error)
        assert isinstance(event.error, NbdRefused)
        assert event.error.errno == 13
        assert "read 16 bytes at 100" in str(event.error)
        assert "EACCES (permission denied)" in str(event.error)
        assert "gone!" in str(event.error)
        codec.flush()
        assert len(feed(codec, simple(2))) == 1


def test_block_status_in_every_context() -> None:
    codec = ClientCodec(INFO)
    codec.block_status(0, 100)
    stream = chunk(STATUS, 1, pack(">IIIII", 6, 10, 1, 190, 0), flags=0)
    stream += chunk(STATUS, 1, pack(">III", 5, 60, 3))
    (event,) = feed(codec, stream)
    found = {name: list(zip(*extents, strict=True)) for name, extents in event.extents.items()}
    # The last extent may reach beyond the request, and is cut there.
    assert found == {"x:y": [(10, 1), (90, 0)], "base:allocation": [(60, 3)]}


STATUS_OK = chunk(STATUS, 1, pack(">III", 5, 100, 0), flags=0)


@pytest.mark.parametrize(
    "stream",
    [
        b"\0" * 16,
        chunk(NONE, 2),
        simple(2),
        simple(1),
        chunk(NONE, 1),
        chunk(NONE, 1, flags=0),
        chunk(NONE, 1, b"x"),
        chunk(DATA, 1, pack(">Q", 100) + bytes(15)),
        chunk(DATA, 1, pack(">Q", 100)),
        chunk(DATA, 1, pack(">Q", 100), length=8 + 17),
        chunk(DATA, 1, pack(">Q", 101), length=8 + 16),
        chunk(DATA, 1, pack(">Q", 99), length=8 + 16),
        chunk(DATA, 1, pack(">Q", 100) + bytes(8), flags=0) + chunk(DATA, 1, pack(">Q", 107), length=8 + 8),
        chunk(DATA, 1, pack(">Q", 100) + bytes(8), flags=0) + chunk(HOLE, 1, pack(">QI", 104, 12)),
        chunk(HOLE, 1, pack(">QI", 100, 0)),
        chunk(HOLE, 1, pack(">QI", 100, 17)),
        chunk(HOLE, 1, pack(">QIB", 100, 16, 0)),
        chunk(ERROR, 1, pack(">IH", 0, 0)),
        chunk(ERROR, 1, pack(">IH", 5, 1)),
        chunk(ERROR, 1, pack(">I", 5)),
        chunk(ERROR, 1, pack(">IH", 5, 5000) + bytes(5000)),
        chunk(ERROR, 1, length=1 << 20),
        chunk(ERROR_OFFSET, 1, pack(">IHQ", 5, 0, 116)),
        chunk(ERROR_OFFSET, 1, pack(">IH", 5, 0)),
        chunk(STATUS, 1, pack(">III", 5, 16, 0)),
        chunk(3, 1, b"x"),
        chunk(0x7FFF, 1),
        chunk(ERROR, 1, pack(">IH", 5, 0), flags=0) * 2000,
    ],
)
def test_a_server_that_breaks_the_protocol_on_a_read(stream: bytes) -> None:
    codec, _ = reading()
    with pytest.raises(NbdProtocolError):
        feed(codec, stream)
    with pytest.raises(NbdProtocolError):
        codec.buffer()


@pytest.mark.parametrize(
    "stream",
    [
        simple(1),
        chunk(NONE, 1),
        STATUS_OK + chunk(NONE, 1),
        STATUS_OK + STATUS_OK,
        chunk(STATUS, 1, pack(">III", 7, 100, 0)),
        chunk(STATUS, 1, pack(">III", 5, 0, 0)),
        chunk(STATUS, 1, pack(">I", 5)),
        chunk(STATUS, 1, pack(">IIIH", 5, 100, 0, 0)),
        chunk(STATUS, 1, pack(">IIIII", 5, 100, 0, 1, 0)),
        chunk(STATUS, 1, pack(">I", 5), length=4 + 8 * (2 << 20) + 8),
        chunk(DATA, 1, pack(">Q", 0) + b"x"),
    ],
)
def test_a_server_that_breaks_the_protocol_on_a_block_status(stream: bytes) -> None:
    codec = ClientCodec(INFO)
    codec.block_status(0, 100)
    with pytest.raises(NbdProtocolError):
        feed(codec, stream)


def test_structured_replies_that_were_never_negotiated() -> None:
    codec = ClientCodec(SIMPLE_INFO)
    codec.flush()
    with pytest.raises(NbdProtocolError, match="right number"):
        feed(codec, chunk(NONE, 1))


def test_a_read_cut_into_too_many_pieces() -> None:
    codec, _ = reading(1 << 20)
    with pytest.raises(NbdProtocolError, match="more than 65536 pieces"):
        for at in range(0, 1 << 20, 2):
            feed(codec, chunk(HOLE, 1, pack(">QI", 100 + at, 1), flags=0))


READ_ONLY = ExportInfo("x", 1000, TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY)
BLOCKY = ExportInfo("x", 10_000, ALL, min_block=4096, max_payload=8192)


def test_what_cannot_be_asked_is_refused_before_anything_is_sent() -> None:
    buffer = memoryview(bytearray(8192))
    for ask, errno in (
        (lambda: ClientCodec(READ_ONLY).write(0, 1), 1),
        (lambda: ClientCodec(READ_ONLY).flush(), 95),
        (lambda: ClientCodec(READ_ONLY).block_status(0, 1), 22),
        (lambda: ClientCodec(READ_ONLY).read(993, buffer[:8]), 22),
        (lambda: ClientCodec(READ_ONLY).read(-1, buffer[:8]), 22),
        (lambda: ClientCodec(READ_ONLY).read(0, buffer[:0]), 22),
        (lambda: ClientCodec(READ_ONLY).read(0, buffer[:8].toreadonly()), 22),
        (lambda: ClientCodec(BLOCKY).read(0, buffer[:512]), 22),
        (lambda: ClientCodec(BLOCKY).trim(512, 4096), 22),
        (lambda: ClientCodec(BLOCKY).write(0, 10_000), 75),
        (lambda: ClientCodec(INFO).trim(0, 1 << 32), 75),
        (lambda: ClientCodec(ExportInfo("x", 1 << 20, TransmissionFlag(1))).trim(0, 1), 95),
        (lambda: ClientCodec(ExportInfo("x", 1 << 20, TransmissionFlag(1))).write(0, 1, fua=True), 95),
    ):
        with pytest.raises(NbdRefused) as caught:
            ask()
        assert caught.value.errno == errno
    # The last block of an export may be short.
    ClientCodec(BLOCKY).read(8192, buffer[: 10_000 - 8192])


def test_requests_under_way_are_limited() -> None:
    codec = ClientCodec(INFO)
    for _ in range(1024):
        codec.flush()
    with pytest.raises(NbdRefused, match="More than 1024"):
        codec.flush()
