# SPDX-License-Identifier: Apache-2.0
"""Trees: what a directory holds, as the JSON that restic itself would write, byte for byte.

restic decodes and encodes a tree again when it checks or rewrites one; a different spelling would get another id.
So: Go's field order, its rules for leaving fields out, its way to escape, a newline at the end.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pullback.repository.blob import BlobId

# Go's os.FileMode keeps the type in its own high bits; the low nine are Unix permissions.
MODE_DIRECTORY = 1 << 31

# What Go writes for a time that was never set.
ZERO_TIME = "0001-01-01T00:00:00Z"
EPOCH = "1970-01-01T00:00:00Z"


# A directory of a disk of 90 TiB.  Python's objects take up to 25 times as much as the JSON they are made from.
MAX_TREE = 128 << 20


class TreeBroken(Exception):
    """A tree blob's document is not one.  Never leaves this package."""


@dataclass(frozen=True, slots=True)
class Node:
    """A file or directory in a tree; times are RFC 3339 text, `content` is None for all but files."""

    name: str
    type: str
    mode: int = 0
    mtime: str = ZERO_TIME
    atime: str = ZERO_TIME
    ctime: str = ZERO_TIME
    uid: int = 0
    gid: int = 0
    size: int = 0
    content: tuple[BlobId, ...] | None = None
    subtree: BlobId | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    """The nodes of a directory, in the byte order of their names."""

    nodes: tuple[Node, ...]

    def find(self, name: str) -> Node | None:
        """The node of that name."""
        return next((node for node in self.nodes if node.name == name), None)


def file_node(name: str, size: int, content: Iterable[BlobId], time: str, mode: int = 0o600) -> Node:
    """A file of root's with these blobs; every time is `time`."""
    return Node(name, "file", mode, time, time, time, size=size, content=tuple(content))


def directory_node(name: str, subtree: BlobId, time: str, mode: int = 0o700) -> Node:
    """A directory of root's; every time is `time`."""
    return Node(name, "dir", MODE_DIRECTORY | mode, time, time, time, subtree=subtree)


def encode_tree(nodes: Iterable[Node]) -> bytes:
    """The tree blob of these nodes, in whatever order they come; raises ValueError if two have one name."""
    ordered = sorted(nodes, key=lambda node: node.name.encode(errors="surrogateescape"))
    for first, second in itertools.pairwise(ordered):
        if first.name == second.name:
            raise ValueError(f"two nodes are called {first.name!r}")
    return b'{"nodes":[' + b",".join(go_json(_fields(node)) for node in ordered) + b"]}\n"


def _fields(node: Node) -> dict[str, Any]:
    # In the order of restic's struct; what it marks omitempty is left out when zero.
    fields: dict[str, Any] = {"name": quote(node.name), "type": node.type}
    if node.mode:
        fields["mode"] = node.mode
    fields |= {"mtime": node.mtime, "atime": node.atime, "ctime": node.ctime, "uid": node.uid, "gid": node.gid}
    if node.size:
        fields["size"] = node.size
    fields["content"] = None if node.content is None else [blob.hex() for blob in node.content]
    if node.subtree is not None:
        fields["subtree"] = node.subtree.hex()
    return fields


def decode_tree(document: bytes) -> Tree:
    """The inverse of encode_tree; fields we have no use for are passed over; raises TreeBroken."""
    if len(document) > MAX_TREE:
        raise TreeBroken(f"it has {len(document)} bytes, {MAX_TREE} at most make sense")
    try:
        nodes = json.loads(document)["nodes"] or []
        return Tree(tuple(_node(fields) for fields in nodes))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TreeBroken(f"{type(error).__name__}: {error}") from None


def _node(fields: dict[str, Any]) -> Node:
    content, subtree = fields.get("content"), fields.get("subtree")
    return Node(
        name=unquote(_text(fields["name"])),
        type=_text(fields["type"]),
        mode=_number(fields.get("mode", 0)),
        mtime=_text(fields.get("mtime", ZERO_TIME)),
        atime=_text(fields.get("atime", ZERO_TIME)),
        ctime=_text(fields.get("ctime", ZERO_TIME)),
        uid=_number(fields.get("uid", 0)),
        gid=_number(fields.get("gid", 0)),
        size=_number(fields.get("size", 0)),
        content=None if content is None else tuple(_blob(name) for name in content),
        subtree=None if subtree is None else _blob(subtree),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is not one")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError("a number is not one")
    return value


def _blob(name: Any) -> BlobId:
    raw = bytes.fromhex(name)
    if len(raw) != 32:
        raise ValueError("a blob id is not 32 bytes")
    return BlobId(raw)


def go_json(value: Any) -> bytes:
    """JSON as Go's encoder writes it: no spaces, UTF-8, and the characters dangerous in HTML escaped."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode()


_SHORT = {"\a": "a", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t", "\v": "v", "\\": "\\", '"': '"'}
_LONG = {short: character for character, short in _SHORT.items()} | {"'": "'"}
_WIDTHS = {"x": 2, "u": 4, "U": 8}


def quote(name: str) -> str:
    """A name as restic stores it: Go's strconv.Quote without the quotes; bytes that are no UTF-8 are surrogates."""
    if name.isprintable() and "\\" not in name and '"' not in name:
        return name
    return "".join(_quote_one(character) for character in name)


def _quote_one(character: str) -> str:
    code = ord(character)
    if character in _SHORT:
        return "\\" + _SHORT[character]
    if character.isprintable():
        return character
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x20 or code == 0x7F:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def unquote(stored: str) -> str:
    """The inverse of quote; raises ValueError for what Go would not read either."""
    if "\\" not in stored:
        return stored
    raw, position = bytearray(), 0
    while position < len(stored):
        character = stored[position]
        if character != "\\":
            raw += character.encode(errors="surrogateescape")
            position += 1
            continue
        code = stored[position + 1 : position + 2]
        if code in _LONG and code:
            raw += _LONG[code].encode()
            position += 2
            continue
        if code not in _WIDTHS:
            raise ValueError(f"a name holds the unknown escape \\{code}")
        digits = stored[position + 2 : position + 2 + _WIDTHS[code]]
        if len(digits) != _WIDTHS[code]:
            raise ValueError("a name ends within an escape")
        value = int(digits, 16)
        if value > 0x10FFFF:
            raise ValueError("a name holds a character beyond Unicode")
        raw += bytes([value]) if code == "x" else chr(value).encode()
        position += 2 + len(digits)
    return raw.decode(errors="surrogateescape")


def go_time(moment: datetime) -> str:
    """A time with a zone as Go writes it: RFC 3339, the fraction without trailing zeroes, Z for UTC."""
    moment = moment.astimezone(UTC)
    fraction = f".{moment.microsecond:06d}".rstrip("0") if moment.microsecond else ""
    return f"{moment:%Y-%m-%dT%H:%M:%S}{fraction}Z"


def parse_time(text: str) -> datetime:
    """The moment that Go wrote (nanoseconds are cut to microseconds); raises ValueError.

    So it does for the year 1 in a zone where it is the year 0 in UTC.
    """
    head, dot, rest = text.partition(".")
    if dot:
        digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        text = f"{head}.{digits[:6]:0<6}{rest[len(digits) :]}"
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    try:
        moment.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{text!r} is no time in UTC") from None
    return moment
