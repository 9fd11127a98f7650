# SPDX-License-Identifier: Apache-2.0
"""The server's half of the NBD handshake, without I/O.

What a client may get wrong is answered with the protocol's own errors; NbdProtocolError means «hang up».  TLS is
either off or required from the first option on: a server that leaves the choice to its clients can be talked out
of it (section «Protocol downgrade attacks»).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace

from pullback.errors import NbdProtocolError
from pullback.nbd import protocol as p
from pullback.nbd.protocol import Option, Reply

_Needs = Generator[int, bytes, None]
_Handled = Generator[int, bytes, bool]
_HANDSHAKE_FLAGS = p.HandshakeFlag.FIXED_NEWSTYLE | p.HandshakeFlag.NO_ZEROES


class ServerHandshake:
    """One client's way to one of ``exports`` (by name; ``contexts`` of each is what it offers, with ids).

    Ends with ``done``; ``info`` is then the export as negotiated, or None if the client left.
    """

    def __init__(self, exports: Mapping[str, p.ExportInfo], *, tls: bool = False) -> None:
        self._exports = exports
        self._tls_required = tls
        self._encrypted = False
        self._received = bytearray()
        self._outgoing = bytearray()
        self._client_flags = p.HandshakeFlag(0)
        self._structured = False
        self._selected: tuple[str, dict[str, int]] = ("", {})
        self.starttls = False
        self.done = False
        self.info: p.ExportInfo | None = None
        self._conversation = self._converse()
        self._need = next(self._conversation)

    def data_to_send(self) -> bytes:
        """Take the bytes that are to be sent now; may be empty."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def receive(self, data: bytes) -> None:
        """Take bytes from the client, split anywhere; NbdProtocolError means that it is to be cut off."""
        self._received += data
        self._advance()

    def tls_started(self) -> None:
        """Go on after the driver has encrypted the connection."""
        self.starttls = False
        self._encrypted = True
        self._advance()

    def _advance(self) -> None:
        while not self.done and not self.starttls and len(self._received) >= self._need:
            data = bytes(self._received[: self._need])
            del self._received[: self._need]
            try:
                self._need = self._conversation.send(data)
            except StopIteration:
                self.done = True
        if self._received and (self.done or self.starttls):
            raise NbdProtocolError("The NBD client did not wait for the reply to its last option")

    def _converse(self) -> _Needs:
        self._outgoing += p.GREETING.pack(p.MAGIC, p.OPTION_MAGIC, _HANDSHAKE_FLAGS)
        (flags,) = p.CLIENT_FLAGS.unpack((yield p.CLIENT_FLAGS.size))
        if flags & ~int(_HANDSHAKE_FLAGS):
            raise NbdProtocolError("The NBD client sets flags that nobody offered")
        self._client_flags = p.HandshakeFlag(flags)
        for _ in range(p.MAX_OPTIONS):
            if (yield from self._option()):
                return
        raise NbdProtocolError(f"The NBD client sent more than {p.MAX_OPTIONS} options")

    def _option(self) -> _Handled:
        """Answer one option; tell whether it was the last."""
        magic, option, length = p.OPTION.unpack((yield p.OPTION.size))
        if magic != p.OPTION_MAGIC:
            raise NbdProtocolError("The NBD client's option does not start with the right number")
        if length > p.MAX_OPTION_DATA:
            raise NbdProtocolError(f"The NBD client sent an option of {length} bytes")
        data = (yield length) if length else b""
        if option == Option.EXPORT_NAME:
            self._export_name(data)
            return True
        if p.HandshakeFlag.FIXED_NEWSTYLE not in self._client_flags:
            raise NbdProtocolError("The NBD client uses options without having said that it knows how")
        if option == Option.ABORT:
            self._reply(option, Reply.ACK)
            return True
        if option == Option.STARTTLS:
            if self._start_tls(data):
                yield 0  # the driver encrypts the connection before anything else happens
            return False
        if self._tls_required and not self._encrypted:
            self._reply(option, Reply.ERR_TLS_REQD)
            return False
        return self._answer(option, data)

    def _answer(self, option: int, data: bytes) -> bool:
        try:
            match option:
                case Option.LIST:
                    self._list(data)
                case Option.STRUCTURED_REPLY:
                    self._structured_reply(data)
                case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                    self._meta_contexts(Option(option), data)
                case Option.INFO | Option.GO:
                    return self._go(Option(option), data)
                case _:
                    self._reply(option, Reply.ERR_UNSUP)
        except _Invalid as error:
            self._reply(option, Reply.ERR_INVALID, str(error).encode())
        return False

    def _start_tls(self, data: bytes) -> bool:
        if data or self._encrypted:
            self._reply(Option.STARTTLS, Reply.ERR_INVALID)
        elif not self._tls_required:
            self._reply(Option.STARTTLS, Reply.ERR_POLICY, b"this server has no certificate")
        else:
            self._reply(Option.STARTTLS, Reply.ACK)
            self.starttls = True
        return self.starttls

    def _list(self, data: bytes) -> None:
        if data:
            raise _Invalid("a list takes no data")
        for name, export in self._exports.items():
            self._reply(Option.LIST, Reply.SERVER, _string(name) + export.description.encode())
        self._reply(Option.LIST, Reply.ACK)

    def _structured_reply(self, data: bytes) -> None:
        if data:
            raise _Invalid("structured replies take no data")
        self._structured = True
        self._reply(Option.STRUCTURED_REPLY, Reply.ACK)

    def _meta_contexts(self, option: Option, data: bytes) -> None:
        if not self._structured:
            raise _Invalid("metadata contexts need structured replies")
        fields = _Fields(data)
        name = fields.string()
        queries = [fields.string() for _ in range(min(fields.u32(), len(data)))]
        fields.end()
        export = self._exports.get(name)
        if export is None:
            self._reply(option, Reply.ERR_UNKNOWN, b"no such export")
            return
        listing = option is Option.LIST_META_CONTEXT
        chosen = {
            context: number
            for context, number in export.contexts.items()
            if context in queries or (listing and (not queries or f"{context.partition(':')[0]}:" in queries))
        }
        if not listing:
            self._selected = (name, chosen)
        for context, number in chosen.items():
            self._reply(option, Reply.META_CONTEXT, p.U32.pack(0 if listing else number) + context.encode())
        self._reply(option, Reply.ACK)

    def _go(self, option: Option, data: bytes) -> bool:
        fields = _Fields(data)
        name = fields.string()
        wishes = [fields.u16() for _ in range(fields.u16())]
        fields.end()
        export = self._exports.get(name)
        if export is None:
            self._reply(option, Reply.ERR_UNKNOWN, b"no such export")
            return False
        if export.min_block > 1 and p.Info.BLOCK_SIZE not in wishes and option is Option.GO:
            self._reply(option, Reply.ERR_BLOCK_SIZE_REQD)
            return False
        info = self._negotiated(name, export)
        self._reply(option, Reply.INFO, p.INFO_EXPORT.pack(p.Info.EXPORT, info.size, info.flags))
        if p.Info.NAME in wishes:
            self._reply(option, Reply.INFO, p.U16.pack(p.Info.NAME) + name.encode())
        if p.Info.DESCRIPTION in wishes and info.description:
            self._reply(option, Reply.INFO, p.U16.pack(p.Info.DESCRIPTION) + info.description.encode())
        if p.Info.BLOCK_SIZE in wishes:
            sizes = (info.min_block, info.preferred_block, info.max_payload)
            self._reply(option, Reply.INFO, p.INFO_BLOCK_SIZE.pack(p.Info.BLOCK_SIZE, *sizes))
        self._reply(option, Reply.ACK)
        if option is Option.GO:
            self.info = info
            return True
        return False

    def _export_name(self, data: bytes) -> None:
        # This option has no error reply: hanging up is all that is left.
        name = data.decode(errors="replace")
        export = self._exports.get(name)
        if export is None or (self._tls_required and not self._encrypted):
            raise NbdProtocolError(f"The NBD client asked for export {name[:64]!r}, which it cannot have")
        self.info = self._negotiated(name, export)
        self._outgoing += p.EXPORT_NAME_REPLY.pack(self.info.size, self.info.flags)
        if p.HandshakeFlag.NO_ZEROES not in self._client_flags:
            self._outgoing += bytes(p.EXPORT_NAME_PADDING)

    def _negotiated(self, name: str, export: p.ExportInfo) -> p.ExportInfo:
        selected_for, contexts = self._selected
        flags = export.flags | p.TransmissionFlag.HAS_FLAGS
        if self._structured:
            flags |= p.TransmissionFlag.SEND_DF
        return replace(
            export,
            name=name,
            flags=flags,
            contexts=contexts if selected_for == name else {},
            structured_replies=self._structured,
        )

    def _reply(self, option: int, kind: Reply, data: bytes = b"") -> None:
        self._outgoing += p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, option, kind, len(data)) + data


class _Invalid(Exception):
    """The data of an option does not have the form that the option prescribes."""


class _Fields:
    """Take the data of an option apart from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _take(self, count: int) -> bytes:
        data = self._data[self._at : self._at + count]
        if len(data) < count:
            raise _Invalid("the option's data ends too early")
        self._at += count
        return data

    def u16(self) -> int:
        return int.from_bytes(self._take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self._take(4), "big")

    def string(self) -> str:
        length = self.u32()
        if length > p.MAX_STRING:
            raise _Invalid("a string is too long")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise _Invalid("a string is not UTF-8") from None

    def end(self) -> None:
        if self._at != len(self._data):
            raise _Invalid("the option has more data than it says")


def _string(text: str) -> bytes:
    data = text.encode()
    return p.U32.pack(len(data)) + data
