# SPDX-License-Identifier: Apache-2.0
"""Both halves of the codec against each other, and each against nonsense."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.errors import NbdProtocolError, NbdRefused
from pullback.nbd import protocol as p
from pullback.nbd.address import TcpAddress, UnixAddress, parse_uri
from pullback.nbd.client_codec import ClientCodec, Completed
from pullback.nbd.client_handshake import ClientHandshake
from pullback.nbd.extents import merge_extents, pack_extents, parse_extents
from pullback.nbd.server_codec import ClientRequest, ServerCodec
from pullback.nbd.server_handshake import ServerHandshake
from tests.support.fuzzing import fuzz

SIZE = 4096
FLAGS = p.TransmissionFlag(0b1111_1111_1101)
EXPORTS = {
    "": p.ExportInfo("", SIZE, FLAGS, contexts={"base:allocation": 1, "x:y": 9}),
    "b": p.ExportInfo("b", 1 << 20, p.TransmissionFlag(3), min_block=512, description="B"),
}
SPLITS = st.lists(st.integers(1, 40), min_size=1, max_size=20)


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    at = turn = 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        yield data[at : at + size]
        at, turn = at + size, turn + 1


def feed(codec: ClientCodec | ServerCodec, data: bytes) -> Iterator[Completed | ClientRequest]:
    rest = memoryview(data)
    while rest:
        buffer = codec.buffer()
        assert len(buffer) > 0
        count = min(len(buffer), len(rest))
        buffer[:count] = rest[:count]
        rest = rest[count:]
        codec.received(count)
        while (event := codec.next_event()) is not None:
            yield event


@given(
    SPLITS, st.sampled_from(["", "b", "nope"]), st.lists(st.sampled_from(["base:allocation", "x:", "no:x"]), max_size=3)
)
def test_handshakes_meet(splits: list[int], name: str, contexts: list[str]) -> None:
    client = ClientHandshake(name, list(dict.fromkeys(contexts)))
    server = ServerHandshake(EXPORTS)
    try:
        while not client.done:
            for part in cut(server.data_to_send(), splits):
                client.receive(part)
            for part in cut(client.data_to_send(), splits):
                server.receive(part)
    except NbdRefused as error:
        assert name == "nope"
        assert error.errno == p.ENOENT
        return
    assert server.done
    assert server.info is not None
    assert client.info.size == EXPORTS[name].size
    assert client.info.flags == server.info.flags
    assert client.info.contexts == server.info.contexts
    expected = {"base:allocation"} & set(contexts) if name == "" else set()
    assert set(client.info.contexts) == expected
    assert client.info.min_block == EXPORTS[name].min_block


class World:
    """A client's requests, carried out by a model, through both codecs."""

    def __init__(self, structured: bool, splits: list[int]) -> None:
        contexts = {"base:allocation": 1} if structured else {}
        info = p.ExportInfo("", SIZE, FLAGS, contexts=contexts, structured_replies=structured)
        self.structured = structured
        self.splits = splits
        self.client = ClientCodec(info)
        self.server = ServerCodec(info)
        self.data = bytearray(range(256)) * (SIZE // 256)

    def carry(self, sent: bytes, pieces: list[int], broken: bool) -> bytes:
        """Let the server do it; return its reply."""
        replies = b""
        for part in cut(sent, self.splits):
            for event in feed(self.server, part):
                assert isinstance(event, ClientRequest)
                replies += self.reply(event, pieces, broken)
        return replies + self.server.data_to_send()

    def reply(self, client: ClientRequest, pieces: list[int], broken: bool) -> bytes:
        request, server = client.request, self.server
        if broken:
            return server.reply_error(client, p.NbdErrno.EIO, "ö" * 10)
        start, end = request.offset, request.offset + request.length
        match request.command:
            case p.Command.READ if self.structured:
                return b"".join(self.pieces(client, pieces))
            case p.Command.READ:
                return server.reply_data(client) + self.data[start:end]
            case p.Command.WRITE:
                self.data[start:end] = client.data
            case p.Command.WRITE_ZEROES | p.Command.TRIM:
                self.data[start:end] = bytes(end - start)
            case p.Command.BLOCK_STATUS:
                return server.reply_extents(client, {"base:allocation": [(min(7, end - start), 3)]})
        return server.reply_done(client)

    def pieces(self, client: ClientRequest, sizes: list[int]) -> Iterator[bytes]:
        spans = []
        at, turn, end = client.request.offset, 0, client.request.offset + client.request.length
        while at < end:
            size = min(sizes[turn % len(sizes)], end - at)
            spans.append((at, size))
            at, turn = at + size, turn + 1
        spans.reverse()
        for at, size in spans:
            done = (at, size) == spans[-1]
            data = self.data[at : at + size]
            if data == bytes(size):
                yield self.server.reply_hole(client, at, size, done=done)
            else:
                yield self.server.reply_data_piece(client, at, size, done=done) + data


REQUESTS = st.tuples(
    st.sampled_from(["read", "write", "zero", "trim", "flush", "status"]),
    st.integers(-2, SIZE + 2),
    st.integers(0, 600),
    st.lists(st.integers(1, 90), min_size=1, max_size=5),
    st.booleans(),
)


@given(st.booleans(), SPLITS, st.lists(REQUESTS, max_size=12))
def test_what_is_asked_is_done(
    structured: bool, splits: list[int], requests: list[tuple[str, int, int, list[int], bool]]
) -> None:
    world = World(structured, splits)
    for command, offset, length, pieces, broken in requests:
        before = bytes(world.data)
        buffer = bytearray(b"?" * length)
        payload = bytes(reversed(range(256))) * 3
        try:
            if command == "read":
                _, sent = world.client.read(offset, memoryview(buffer))
            elif command == "write":
                _, sent = world.client.write(offset, length)
                sent += payload[:length]
            elif command == "zero":
                _, sent = world.client.write_zeroes(offset, length)
            elif command == "trim":
                _, sent = world.client.trim(offset, length)
            elif command == "flush":
                _, sent = world.client.flush()
            else:
                _, sent = world.client.block_status(offset, length)
        except NbdRefused:
            assert offset < 0 or length < 1 or offset + length > SIZE or (command == "status" and not structured)
            continue
        reply = world.carry(sent, pieces, broken)
        events = [event for part in cut(reply, splits) for event in feed(world.client, part)]
        assert len(events) == 1
        done = events[0]
        assert isinstance(done, Completed)
        assert (done.error is not None) == broken
        assert world.client.pending == 0
        if broken:
            assert world.data == before
        elif command == "read":
            assert buffer == before[offset : offset + length]
        elif command == "write":
            assert world.data == before[:offset] + payload[:length] + before[offset + length :]
        elif command == "status":
            assert merge_extents(offset, [done.extents["base:allocation"]]) == [(offset, min(7, length), 3)]


# Nonsense: random bytes, and, since those hardly ever get past the first number, headers with random fields.

U16, U32, U64 = (st.one_of(st.integers(0, 16), st.integers(0, 2**bits - 1)) for bits in (16, 32, 64))
STRUCTURED = st.builds(
    lambda flags, kind, cookie, length, body: pack(">IHHQI", 0x668E33EF, flags, kind, cookie, length) + body,
    st.integers(0, 1),
    st.one_of(st.sampled_from([0, 1, 2, 5, 0x8001, 0x8002]), U16),
    st.integers(0, 4),
    st.one_of(st.integers(0, 40), U32),
    st.binary(max_size=64),
)
HOLES = st.builds(
    lambda flags, offset, size: pack(">IHHQIQI", 0x668E33EF, flags, 2, 1, 12, offset, size),
    st.integers(0, 1),
    st.integers(90, 140),
    st.integers(0, 40),
)
SIMPLE = st.builds(lambda error, cookie: pack(">IIQ", 0x67446698, error, cookie), U32, st.integers(0, 4))
REPLIES = st.lists(st.one_of(STRUCTURED, HOLES, SIMPLE, st.binary(max_size=64)), max_size=12).map(b"".join)
OPTION_REPLIES = st.lists(
    st.builds(
        lambda option, kind, body, extra: pack(">QIII", 0x3E889045565A9, option, kind, len(body) + extra) + body,
        st.sampled_from([3, 5, 7, 8, 10]),
        st.one_of(st.integers(0, 5), st.integers(0x80000000, 0x8000000B), U32),
        st.one_of(
            st.binary(max_size=40),
            st.builds(lambda *fields: pack(">HQH", *fields), st.just(0), U64, U16),
            st.builds(lambda *fields: pack(">HIII", *fields), st.just(3), U32, U32, U32),
        ),
        st.sampled_from([0, 0, 0, 1, 2**31]),
    ),
    max_size=8,
).map(b"".join)
GREETINGS = st.one_of(st.just(b"NBDMAGICIHAVEOPT\0\3"), st.just(b"NBDMAGICIHAVEOPT\0\0"), st.binary(max_size=40))


@given(GREETINGS, OPTION_REPLIES, SPLITS, st.booleans(), st.booleans())
def test_a_client_survives_any_handshake(
    greeting: bytes, said: bytes, splits: list[int], tls: bool, listing: bool
) -> None:
    handshake = ClientHandshake("x", ["base:allocation"], tls=tls, listing=listing)
    try:
        for part in cut(greeting + said, splits):
            handshake.receive(part)
            assert len(handshake.data_to_send()) < 1000
            if handshake.starttls:
                handshake.tls_started()
    except (NbdProtocolError, NbdRefused) as error:
        with pytest.raises(type(error)):
            handshake.receive(b"x")
    assert len(handshake._received) <= p.MAX_OPTION_DATA  # what is stored has the stated limit


@given(REPLIES, SPLITS, st.booleans())
@settings(max_examples=300)
def test_a_client_survives_any_reply(said: bytes, splits: list[int], structured: bool) -> None:
    contexts = {"base:allocation": 1} if structured else {}
    codec = ClientCodec(p.ExportInfo("", SIZE, FLAGS, contexts=contexts, structured_replies=structured))
    buffer = bytearray(b"?" * 32)
    codec.read(100, memoryview(buffer))
    codec.write(0, 10)
    if structured:
        codec.block_status(0, 1000)
    finished: set[int] = set()
    try:
        for part in cut(said, splits):
            for event in feed(codec, part):
                assert isinstance(event, Completed)
                assert event.cookie not in finished
                finished.add(event.cookie)
                for lengths, _ in event.extents.values():
                    assert 0 < sum(lengths) <= 1000
    except NbdProtocolError:
        with pytest.raises(NbdProtocolError):
            codec.buffer()
    assert codec.pending + len(finished) == 2 + structured


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.booleans()), max_size=12),
    st.permutations(range(12)),
)
def test_a_read_is_complete_exactly_when_its_pieces_are(spans: list[tuple[int, int, bool]], order: list[int]) -> None:
    """Against a model that marks bytes one by one."""
    codec = ClientCodec(p.ExportInfo("", SIZE, FLAGS))
    buffer = bytearray(20)
    codec.read(0, memoryview(buffer))
    marks = [0] * 20
    valid = True
    stream = b""
    for index in order:
        if index >= len(spans):
            continue
        offset, size, hole = spans[index]
        valid = valid and size > 0 and offset + size <= 20
        for at in range(offset, min(20, offset + size)):
            marks[at] += 1
        valid = valid and max(marks) <= 1
        if hole:
            stream += pack(">IHHQIQI", 0x668E33EF, 0, 2, 1, 12, offset, size)
        else:
            stream += pack(">IHHQIQ", 0x668E33EF, 0, 1, 1, 8 + size, offset) + b"d" * size
    stream += pack(">IHHQI", 0x668E33EF, 1, 0, 1, 0)
    if valid and marks == [1] * 20:
        assert len(list(feed(codec, stream))) == 1
    else:
        with pytest.raises(NbdProtocolError):
            list(feed(codec, stream))


CLIENT_OPTIONS = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.builds(
            lambda option, body, extra: pack(">QII", 0x49484156454F5054, option, len(body) + extra) + body,
            st.one_of(st.integers(0, 12), U32),
            st.one_of(
                st.binary(max_size=40),
                st.sampled_from([b"", pack(">IH", 0, 0), pack(">II", 0, 0), pack(">III", 0, 1, 0)]),
            ),
            st.sampled_from([0, 0, 0, 1, 2**31]),
        ),
    ),
    max_size=8,
).map(b"".join)
CLIENT_REQUESTS = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.builds(
            lambda flags, kind, offset, length: pack(">IHHQQI", 0x25609513, flags, kind, 1, offset, length),
            st.one_of(st.integers(0, 32), U16),
            st.one_of(st.integers(0, 8), U16),
            st.one_of(st.integers(0, SIZE), U64),
            st.one_of(st.integers(0, 64), U32),
        ),
    ),
    max_size=12,
).map(b"".join)


@given(U32, CLIENT_OPTIONS, SPLITS, st.booleans())
def test_a_server_survives_any_client(flags: int, said: bytes, splits: list[int], tls: bool) -> None:
    handshake = ServerHandshake(EXPORTS, tls=tls)
    try:
        for part in cut(pack(">I", flags % 8) + said, splits):
            handshake.receive(part)
            if handshake.starttls:
                handshake.tls_started()
    except NbdProtocolError:
        return
    assert len(handshake._received) <= p.MAX_OPTION_DATA + p.OPTION.size


@given(CLIENT_REQUESTS, SPLITS, st.booleans())
def test_only_requests_that_fit_reach_a_backend(said: bytes, splits: list[int], read_only: bool) -> None:
    flags = p.TransmissionFlag(3) if read_only else FLAGS
    codec = ServerCodec(p.ExportInfo("", SIZE, flags, contexts={"base:allocation": 1}))
    try:
        for part in cut(said, splits):
            for event in feed(codec, part):
                assert isinstance(event, ClientRequest)
                request = event.request
                assert request.command in {*p.Command} - {p.Command.DISC, p.Command.CACHE}
                assert 0 <= request.offset <= request.offset + request.length <= SIZE
                assert len(event.data) == (request.length if request.command is p.Command.WRITE else 0)
                assert not read_only or request.command in (p.Command.READ, p.Command.BLOCK_STATUS)
    except NbdProtocolError:
        pass


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 3)), max_size=20), st.integers(1, 300))
def test_extents_cover_exactly_or_are_refused(pairs: list[tuple[int, int]], limit: int) -> None:
    lengths = [length for length, _ in pairs]
    good = bool(pairs) and 0 not in lengths and sum(lengths[:-1]) < limit
    try:
        found = merge_extents(1000, [parse_extents(pack_extents(pairs), limit)])
    except NbdProtocolError:
        assert not good
        return
    assert good
    flat = [flags for length, flags in pairs for _ in range(length)][:limit]
    assert [flags for _, length, flags in found for _ in range(length)] == flat
    at = 1000
    for offset, length, _ in found:
        assert offset == at
        at += length
    assert all(one[2] != two[2] for one, two in pairwise(found))


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), st.text(min_size=1), st.booleans())
def test_uris_read_back(export: str, path: str, tls: bool) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        path = "/plain"
    for address in (UnixAddress(path), TcpAddress("h", 1)):
        uri = parse_uri(address.uri(export, tls=tls))
        assert (uri.address, uri.export, uri.tls) == (address, export, tls)


# What is valid up to some byte, and what says more than it has.


def recorded() -> tuple[bytes, bytes]:
    """What a server and a client say in a handshake that succeeds."""
    client, server = ClientHandshake("", ["base:allocation"]), ServerHandshake(EXPORTS)
    said: tuple[list[bytes], list[bytes]] = ([], [])
    while not client.done:
        said[0].append(server.data_to_send())
        client.receive(said[0][-1])
        said[1].append(client.data_to_send())
        server.receive(said[1][-1])
    return b"".join(said[0]), b"".join(said[1])


SERVER_SAID, CLIENT_SAID = recorded()


@fuzz(60)
@given(st.booleans(), st.integers(0, max(len(SERVER_SAID), len(CLIENT_SAID))), st.binary(max_size=80), SPLITS)
def test_a_handshake_that_goes_wrong_at_any_byte(of_client: bool, end: int, then: bytes, splits: list[int]) -> None:
    handshake: ClientHandshake | ServerHandshake
    handshake, said = ClientHandshake("", ["base:allocation"]), SERVER_SAID
    if of_client:
        handshake, said = ServerHandshake(EXPORTS), CLIENT_SAID
    for part in cut(said[:end], splits):
        handshake.receive(part)
    assert handshake.done == (end >= len(said))
    if not handshake.done:
        try:
            for part in cut(then, splits):
                handshake.receive(part)
        except (NbdProtocolError, NbdRefused):
            pass
        assert len(handshake._received) <= p.MAX_OPTION_DATA + p.OPTION.size


def replies_of_a_server() -> bytes:
    """To the read of bytes 100 to 132, the write and the block status that `client_with_requests` sends."""
    server = ServerCodec(p.ExportInfo("", SIZE, FLAGS, contexts={"base:allocation": 1}))
    sent = b"".join(client_with_requests()[1])
    read, write, status = [one for one in feed(server, sent) if isinstance(one, ClientRequest)]
    parts = [server.reply_hole(read, 100, 12, done=False), server.reply_data_piece(read, 112, 20, done=True), b"d" * 20]
    parts += [server.reply_done(write), server.reply_extents(status, {"base:allocation": [(1000, 3)]})]
    return b"".join(map(bytes, parts))


def client_with_requests() -> tuple[ClientCodec, list[bytes]]:
    codec = ClientCodec(p.ExportInfo("", SIZE, FLAGS, contexts={"base:allocation": 1}))
    sent = [codec.read(100, memoryview(bytearray(32)))[1], codec.write(0, 10)[1] + bytes(10)]
    return codec, [*sent, codec.block_status(0, 1000)[1]]


REPLIED = replies_of_a_server()


@fuzz(60)
@given(st.integers(0, len(REPLIED)), st.binary(min_size=1, max_size=80), SPLITS)
def test_replies_that_go_wrong_at_any_byte(end: int, then: bytes, splits: list[int]) -> None:
    codec, _ = client_with_requests()
    done = [event for part in cut(REPLIED[:end], splits) for event in feed(codec, part)]
    assert codec.pending == 3 - len(done)
    assert (codec.pending == 0) == (end == len(REPLIED))
    try:
        for part in cut(then, splits):
            for event in feed(codec, part):
                done.append(event)  # noqa: PERF402  (what came before the failure counts)
    except NbdProtocolError:
        with pytest.raises(NbdProtocolError):
            codec.buffer()
    assert codec.pending + len(done) == 3


def peak_of(call: Callable[[], object]) -> int:
    """Bytes of memory that a call takes at most; it may end with a protocol error."""
    tracemalloc.start()
    try:
        call()
    except NbdProtocolError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


GIANTS = [1 << 16, 1 << 24, 1 << 31, (1 << 32) - 1]


@pytest.mark.parametrize("length", GIANTS)
@pytest.mark.parametrize("kind", [0, 1, 2, 5, 6, 7, 0x8001, 0x8002, 0xFFFF])
def test_a_length_that_lies_takes_no_memory(kind: int, length: int) -> None:
    """A chunk says how long it is before it is there: nothing is kept for it beyond what was asked for."""
    for cookie in (1, 2, 3):
        codec, _ = client_with_requests()
        said = pack(">IHHQI", 0x668E33EF, 1, kind, cookie, length) + bytes(8)
        assert peak_of(lambda codec=codec, said=said: list(feed(codec, said))) < (64 << 10)  # type: ignore[misc]


@pytest.mark.parametrize("length", GIANTS)
def test_an_option_or_a_write_that_lies_about_its_length_takes_little(length: int) -> None:
    """A write has a place for its payload from the start: 32 MiB is what a client may send, and no more."""
    start = pack(">I", 3)
    for option in (1, 3, 6, 7, 9, 10, 77):
        server = ServerHandshake(EXPORTS)
        said = start + pack(">QII", 0x49484156454F5054, option, length) + bytes(100)
        assert peak_of(lambda server=server, said=said: server.receive(said)) < (64 << 10)  # type: ignore[misc]
        client = ClientHandshake("", ["base:allocation"])
        answer = b"NBDMAGICIHAVEOPT\0\3" + pack(">QIII", 0x3E889045565A9, option, 3, length) + bytes(100)
        assert peak_of(lambda client=client, answer=answer: client.receive(answer)) < (64 << 10)  # type: ignore[misc]
    codec = ServerCodec(p.ExportInfo("", 1 << 40, FLAGS))
    request = pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, length)
    most = length + (64 << 10) if length <= p.DEFAULT_MAX_PAYLOAD else 64 << 10
    assert peak_of(lambda: list(feed(codec, request))) < most
