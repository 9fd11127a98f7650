# SPDX-License-Identifier: Apache-2.0
"""The client's half of the NBD handshake, without I/O.

    driver                        ClientHandshake
      │   data_to_send() ◄──────────┤
      ├── receive(bytes) ──────────►│      until .done or an exception
      │   .starttls is True ◄───────┤      upgrade the socket, then tls_started()

One generator is the whole conversation: it yields how many bytes it needs next, so it reads like the protocol
document from top to bottom.  The order of options is STARTTLS, STRUCTURED_REPLY, SET_META_CONTEXT, GO; what an
older server does not know is done without, except TLS.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

from pullback.errors import NbdProtocolError, NbdRefused
from pullback.nbd import protocol as p

_Needs = Generator[int, bytes, None]


class ClientHandshake:
    """One handshake for one export, or (``listing=True``) for the list of exports.

    ``contexts`` are metadata contexts by name; a name that ends with a colon asks for all below it.  Raises
    NbdRefused when the server says no (with ENOENT for an unknown export) and NbdProtocolError when it does not
    follow the protocol.  After NbdRefused, ``abort()`` is what to send before closing.
    """

    def __init__(
        self, export: str = "", contexts: Sequence[str] = (), *, tls: bool = False, listing: bool = False
    ) -> None:
        for name in (export, *contexts):
            if len(name.encode()) > p.MAX_STRING or "\0" in name:
                raise NbdRefused(f"The name {name[:64]!r} is longer than NBD allows, or holds a NUL", p.NbdErrno.EINVAL)
        if len(contexts) > p.MAX_CONTEXTS:
            raise NbdRefused(f"More than {p.MAX_CONTEXTS} metadata contexts were asked for", p.NbdErrno.EINVAL)
        self._export = export
        self._wanted = tuple(contexts)
        self._tls = tls
        self._listing = listing
        self._received = bytearray()
        self._outgoing = bytearray()
        self._fixed = False
        self._no_zeroes = False
        self._failure: NbdProtocolError | NbdRefused | None = None
        self.starttls = False
        self.done = False
        self.info = p.ExportInfo(export, 0, p.TransmissionFlag(0), structured_replies=False)
        self.exports: list[tuple[str, str]] = []  # name and description, in the server's order
        self._conversation = self._converse()
        self._need = next(self._conversation)

    def data_to_send(self) -> bytes:
        """Take the bytes that are to be sent now; may be empty."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def receive(self, data: bytes) -> None:
        """Take bytes from the server, split anywhere."""
        if self._failure is not None:
            raise self._failure
        self._received += data
        try:
            self._advance()
        except (NbdProtocolError, NbdRefused) as error:
            self._failure = error
            raise

    def tls_started(self) -> None:
        """Go on after the driver has encrypted the connection."""
        self.starttls = False
        self._advance()

    def abort(self) -> bytes:
        """Return the bytes that end the negotiation politely; empty where the protocol has no way to."""
        return p.OPTION.pack(p.OPTION_MAGIC, p.Option.ABORT, 0) if self._fixed else b""

    def _advance(self) -> None:
        while not self.done and not self.starttls and len(self._received) >= self._need:
            data = bytes(self._received[: self._need])
            del self._received[: self._need]
            try:
                self._need = self._conversation.send(data)
            except StopIteration:
                self.done = True
        if self._received and (self.done or self.starttls):
            # Before TLS this is an injection by someone in between; after the handshake nobody asked for anything.
            raise NbdProtocolError("The NBD server sent bytes that nobody asked for")

    # The conversation

    def _converse(self) -> _Needs:
        yield from self._greet()
        if self._tls:
            yield from self._upgrade()
        if self._listing:
            yield from self._list()
            return
        if self._fixed:
            yield from self._structured_replies()
            if self._wanted and self.info.structured_replies:
                yield from self._set_contexts()
            if (yield from self._go()):
                return
        yield from self._export_name()

    def _greet(self) -> _Needs:
        magic, version, bits = p.GREETING.unpack((yield p.GREETING.size))
        if magic != p.MAGIC:
            raise NbdProtocolError("The peer does not speak NBD")
        if version == p.OLDSTYLE_MAGIC:
            raise NbdProtocolError("The NBD server speaks only the old-style handshake of 2010 and before")
        if version != p.OPTION_MAGIC:
            raise NbdProtocolError("The NBD server greets with a version that does not exist")
        flags = p.HandshakeFlag(bits & 0b11)
        self._fixed = p.HandshakeFlag.FIXED_NEWSTYLE in flags
        self._no_zeroes = p.HandshakeFlag.NO_ZEROES in flags
        if not self._fixed and (self._tls or self._listing):
            wish = "encrypt the connection" if self._tls else "list its exports"
            raise NbdRefused(f"The NBD server is too old to {wish}", p.NbdErrno.ENOTSUP)
        self._outgoing += p.CLIENT_FLAGS.pack(flags)

    def _upgrade(self) -> _Needs:
        self._send(p.Option.STARTTLS)
        kind, data = yield from self._reply(p.Option.STARTTLS)
        if kind != p.Reply.ACK:
            raise self._refusal(kind, data, "encrypt the connection")
        self.starttls = True
        yield 0  # not a byte more leaves before the driver has upgraded the connection

    def _structured_replies(self) -> _Needs:
        self._send(p.Option.STRUCTURED_REPLY)
        kind, data = yield from self._reply(p.Option.STRUCTURED_REPLY)
        if kind == p.Reply.ERR_TLS_REQD:
            raise self._refusal(kind, data, "talk without TLS")
        self.info = replace(self.info, structured_replies=kind == p.Reply.ACK)

    def _set_contexts(self) -> _Needs:
        queries = b"".join(_string(name) for name in self._wanted)
        option = p.Option.SET_META_CONTEXT
        self._send(option, _string(self._export) + p.U32.pack(len(self._wanted)) + queries)
        contexts: dict[str, int] = {}
        for _ in range(p.MAX_CONTEXTS + 1):
            kind, data = yield from self._reply(option)
            if kind == p.Reply.META_CONTEXT:
                name, number = self._context(data)
                if name in contexts or number in contexts.values():
                    raise NbdProtocolError(f"The NBD server named metadata context {name!r} or its id twice")
                contexts[name] = number
                continue
            # An error here (a server without contexts, an unknown export) leaves none; GO will say what is wrong.
            self.info = replace(self.info, contexts=contexts if kind == p.Reply.ACK else {})
            return
        raise NbdProtocolError("The NBD server named more metadata contexts than were asked for")

    def _context(self, data: bytes) -> tuple[str, int]:
        if len(data) < 4:
            raise NbdProtocolError("The NBD server named a metadata context in too few bytes")
        name = _text(data[4:], "metadata context")
        if not any(name == wanted or (wanted.endswith(":") and name.startswith(wanted)) for wanted in self._wanted):
            raise NbdProtocolError(f"The NBD server selected metadata context {name!r}, which nobody asked for")
        return name, p.U32.unpack_from(data)[0]

    def _go(self) -> Generator[int, bytes, bool]:
        wishes = (p.Info.BLOCK_SIZE, p.Info.DESCRIPTION)
        numbers = b"".join(p.U16.pack(wish) for wish in wishes)
        self._send(p.Option.GO, _string(self._export) + p.U16.pack(len(wishes)) + numbers)
        seen = False
        for _ in range(p.MAX_OPTION_REPLIES):
            kind, data = yield from self._reply(p.Option.GO)
            if kind == p.Reply.INFO:
                seen = self._take_info(data) or seen
            elif kind == p.Reply.ACK:
                if not seen:
                    raise NbdProtocolError("The NBD server granted the export without telling its size")
                return True
            elif kind == p.Reply.ERR_UNSUP:
                return False
            else:
                raise self._refusal(kind, data, f"give access to export {self._export!r}")
        raise NbdProtocolError("The NBD server never finished describing the export")

    def _take_info(self, data: bytes) -> bool:
        """Note one piece of information; tell whether it was the size."""
        if len(data) < 2:
            raise NbdProtocolError("The NBD server sent an information reply without a type")
        match p.U16.unpack_from(data)[0]:
            case p.Info.EXPORT:
                if len(data) != p.INFO_EXPORT.size:
                    raise NbdProtocolError("The NBD server described the export in the wrong number of bytes")
                _, size, flags = p.INFO_EXPORT.unpack(data)
                self._set_size(size, flags)
                return True
            case p.Info.DESCRIPTION:
                self.info = replace(self.info, description=_text(data[2:], "description"))
            case p.Info.BLOCK_SIZE:
                self._set_block_sizes(data)
        return False  # the protocol has clients ignore kinds they do not know

    def _set_size(self, size: int, flags: int) -> None:
        if size > p.MAX_SIZE:
            raise NbdProtocolError(f"The NBD server claims an export of {size} bytes")
        self.info = replace(self.info, size=size, flags=p.TransmissionFlag(flags))

    def _set_block_sizes(self, data: bytes) -> None:
        if len(data) != p.INFO_BLOCK_SIZE.size:
            raise NbdProtocolError("The NBD server told its block sizes in the wrong number of bytes")
        _, least, preferred, payload = p.INFO_BLOCK_SIZE.unpack(data)
        if not _power_of_two(least) or least > p.MAX_MIN_BLOCK:
            raise NbdProtocolError(f"The NBD server claims a minimum block of {least} bytes")
        if not _power_of_two(preferred) or preferred < least:
            raise NbdProtocolError(f"The NBD server claims a preferred block of {preferred} bytes")
        if payload < least:
            raise NbdProtocolError(f"The NBD server claims a largest payload of {payload} bytes")
        # A server may allow 4 GiB; a payload beyond the default buys nothing, so our own limit stands.
        payload = min(payload, p.DEFAULT_MAX_PAYLOAD) // least * least
        self.info = replace(self.info, min_block=least, preferred_block=preferred, max_payload=payload)

    def _export_name(self) -> _Needs:
        # The only option of servers before 2011, and the fallback where GO is unknown.  A refusal is a hang-up.
        self._outgoing += p.OPTION.pack(p.OPTION_MAGIC, p.Option.EXPORT_NAME, len(self._export.encode()))
        self._outgoing += self._export.encode()
        size, flags = p.EXPORT_NAME_REPLY.unpack((yield p.EXPORT_NAME_REPLY.size))
        self._set_size(size, flags)
        if not self._no_zeroes:
            yield p.EXPORT_NAME_PADDING

    def _list(self) -> _Needs:
        self._send(p.Option.LIST)
        for _ in range(p.MAX_OPTION_REPLIES):
            kind, data = yield from self._reply(p.Option.LIST)
            if kind == p.Reply.ACK:
                self._outgoing += self.abort()
                return
            if kind != p.Reply.SERVER:
                raise self._refusal(kind, data, "list its exports")
            length = p.U32.unpack_from(data)[0] if len(data) >= 4 else len(data)
            if length > len(data) - 4:
                raise NbdProtocolError("The NBD server listed an export whose name is longer than the message")
            name, description = data[4 : 4 + length], data[4 + length :]
            self.exports.append((_text(name, "export name"), _text(description, "description")))
        raise NbdProtocolError(f"The NBD server lists more than {p.MAX_OPTION_REPLIES - 1} exports")

    # Messages

    def _send(self, option: p.Option, data: bytes = b"") -> None:
        self._outgoing += p.OPTION.pack(p.OPTION_MAGIC, option, len(data)) + data

    def _reply(self, option: p.Option) -> Generator[int, bytes, tuple[int, bytes]]:
        magic, echoed, kind, length = p.OPTION_REPLY.unpack((yield p.OPTION_REPLY.size))
        if magic != p.OPTION_REPLY_MAGIC:
            raise NbdProtocolError("The NBD server's reply to an option does not start with the right number")
        if echoed != option:
            raise NbdProtocolError(f"The NBD server answered option {echoed} in place of {option.name}")
        if length > p.MAX_OPTION_DATA:
            raise NbdProtocolError(f"The NBD server's reply to {option.name} is {length} bytes long")
        data = (yield length) if length else b""
        if kind == p.Reply.ACK and data:
            raise NbdProtocolError(f"The NBD server's acknowledgement of {option.name} is not empty")
        if not kind & p.REPLY_ERROR_BIT and kind not in _EXPECTED[option]:
            raise NbdProtocolError(f"The NBD server answered {option.name} with reply type {kind}")
        return kind, data

    def _refusal(self, kind: int, data: bytes, wish: str) -> NbdRefused:
        reason = f": {_text(data[: p.MAX_STRING], 'error message')}" if data else ""
        if kind == p.Reply.ERR_TLS_REQD:
            reason += "; it requires TLS"
        errno = p.REPLY_ERRNO.get(kind, p.NbdErrno.EINVAL)
        return NbdRefused(f"The NBD server refused to {wish}, {p.errno_name(errno)}{reason}", errno)


_EXPECTED: dict[p.Option, tuple[p.Reply, ...]] = {
    p.Option.STARTTLS: (p.Reply.ACK,),
    p.Option.STRUCTURED_REPLY: (p.Reply.ACK,),
    p.Option.SET_META_CONTEXT: (p.Reply.ACK, p.Reply.META_CONTEXT),
    p.Option.GO: (p.Reply.ACK, p.Reply.INFO),
    p.Option.LIST: (p.Reply.ACK, p.Reply.SERVER),
}


def _string(text: str) -> bytes:
    data = text.encode()
    return p.U32.pack(len(data)) + data


def _text(data: bytes, what: str) -> str:
    if len(data) > p.MAX_STRING:
        raise NbdProtocolError(f"The NBD server sent a {what} of {len(data)} bytes; {p.MAX_STRING} are allowed")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise NbdProtocolError(f"The NBD server sent a {what} that is not UTF-8") from error


def _power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
