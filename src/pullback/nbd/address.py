# SPDX-License-Identifier: Apache-2.0
"""Where an NBD server listens, and how that is written as a URI.

The NBD URI specification: ``nbd://HOST[:PORT]/EXPORT``, ``nbd+unix:///EXPORT?socket=PATH``, and ``nbds`` in
place of ``nbd`` where TLS is a must.  The export is everything after the first slash of the path, decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from pullback.errors import UsageError

DEFAULT_PORT: Final = 10809


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix socket at ``path``."""

    path: str

    def uri(self, export: str = "", *, tls: bool = False) -> str:
        """Write the URI of ``export`` at this address; ``parse_uri`` reads it back."""
        return f"{'nbds' if tls else 'nbd'}+unix:///{_quote(export)}?socket={_quote(self.path)}"

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP port; ``host`` is a name, an IPv4 or an IPv6 address without brackets."""

    host: str
    port: int = DEFAULT_PORT

    def uri(self, export: str = "", *, tls: bool = False) -> str:
        """Write the URI of ``export`` at this address; ``parse_uri`` reads it back."""
        return f"{'nbds' if tls else 'nbd'}://{self}/{_quote(export)}"

    def __str__(self) -> str:
        host = f"[{quote(self.host, safe=':')}]" if ":" in self.host else quote(self.host, safe="")
        return f"{host}:{self.port}"


Address = UnixAddress | TcpAddress


@dataclass(frozen=True, slots=True)
class NbdUri:
    """An export at an address; ``tls`` says that the connection must be encrypted."""

    address: Address
    export: str
    tls: bool


def parse_uri(text: str) -> NbdUri:
    """Read an NBD URI; UsageError says what is wrong with it."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"{text!r} is not an NBD URI: {error}") from error
    if parts.fragment:
        raise UsageError(f"{text!r} is not an NBD URI: it has a fragment", todo="Write a # in a name as %23.")
    scheme, _, transport = parts.scheme.partition("+")
    if scheme not in ("nbd", "nbds") or transport not in ("", "tcp", "unix"):
        raise UsageError(f"{text!r} is not an NBD URI: it does not start with nbd, nbds, nbd+unix or nbds+unix")
    if parts.path and not parts.path.startswith("/"):
        raise UsageError(f"{text!r} is not an NBD URI: its path does not start with a slash")
    export = _unquote(text, parts.path[1:])
    if transport == "unix":
        return NbdUri(_unix(text, parts.netloc, parts.query), export, scheme == "nbds")
    if not parts.hostname:
        raise UsageError(f"{text!r} names no host", todo="For a Unix socket write nbd+unix:///EXPORT?socket=PATH.")
    return NbdUri(
        TcpAddress(_unquote(text, parts.hostname), DEFAULT_PORT if port is None else port), export, scheme == "nbds"
    )


def _unix(text: str, netloc: str, query: str) -> UnixAddress:
    # Not parse_qsl: that is for HTML forms and would read a plus sign in a path as a space.
    pairs = [pair.partition("=") for pair in query.split("&")]
    sockets = [_unquote(text, value) for key, _, value in pairs if key == "socket"]
    if netloc or len(sockets) != 1 or not sockets[0]:
        raise UsageError(
            f"{text!r} does not name one Unix socket", todo="Write nbd+unix:///EXPORT?socket=PATH (three slashes)."
        )
    return UnixAddress(sockets[0])


def _quote(text: str) -> str:
    return quote(text, safe="/")


def _unquote(uri: str, text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError as error:
        raise UsageError(f"{uri!r} is not an NBD URI: its percent-encoding is not UTF-8") from error
