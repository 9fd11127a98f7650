# SPDX-License-Identifier: Apache-2.0
"""What a value in a document may be.

Each function takes the text as it stands in the document and gives the value it means.  ValueError holds a clause
that goes on from "the value 'x' …": what is wrong with it, and what would be right.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable
from typing import TypeVar

from pullback.model.chain import is_checkpoint_name

T = TypeVar("T")
Check = Callable[[str], T]

#: The longest name of a snapshot and of a disk, in characters.
NAME_MAX = 64
DISK_NAME_MAX = 255
#: NBD protocol: a string is no longer than this, in bytes.
EXPORT_NAME_MAX = 4096
#: Linux: PATH_MAX without its closing zero byte, and the same for sun_path of a Unix socket, in bytes.
PATH_MAX = 4095
SOCKET_PATH_MAX = 107
HOST_MAX = 253

_SNAPSHOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+@-]*")
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_PORT = re.compile(r"[0-9]{1,5}")


def printable(character: str) -> bool:
    """Whether it can stand in a document and does nothing to a terminal: no control character, no half of a pair."""
    return unicodedata.category(character) not in ("Cc", "Cs") and character not in "\ufffe\uffff"


def quoted(text: str) -> str:
    """``text`` for an error message: in quotes, escaped, and not longer than one line."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def snapshot_name(text: str) -> str:
    """The name of a snapshot: 64 characters at most, the same ones as in a checkpoint's name."""
    if len(text) > NAME_MAX or not _SNAPSHOT.fullmatch(text):
        raise ValueError(
            "cannot name a snapshot: that takes letters, digits and ._:+@-, a letter or digit first, "
            f"at most {NAME_MAX} characters"
        )
    return text


def checkpoint_name(text: str) -> str:
    """The name of a checkpoint, by the rule of ``model.chain``."""
    if not is_checkpoint_name(text):
        raise ValueError("cannot name a checkpoint: that takes letters, digits and ._:+@-, a letter or digit first")
    return text


def disk_name(text: str) -> str:
    """The name of a disk: QEMU's to choose, so only what no device can be called is refused."""
    _text(text)
    if len(text) > DISK_NAME_MAX:
        raise ValueError(f"is too long for the name of a disk: {DISK_NAME_MAX} characters at most")
    return text


def export_name(text: str) -> str:
    """The name of an NBD export."""
    _text(text)
    if len(text.encode()) > EXPORT_NAME_MAX:
        raise ValueError(f"is too long for the name of an NBD export: {EXPORT_NAME_MAX} bytes at most")
    return text


def file_path(text: str) -> str:
    """An absolute path that means the same file to QEMU and to us."""
    _text(text)
    if not text.startswith("/"):
        raise ValueError("is not an absolute path: QEMU may have another working directory")
    if ".." in text.split("/"):
        raise ValueError("has a .. in it: write the path that is meant")
    if text.endswith(("/", "/.")):
        raise ValueError("is a directory, not a file")
    if len(text.encode()) > PATH_MAX:
        raise ValueError(f"is too long for a path: {PATH_MAX} bytes at most")
    return text


def socket_path(text: str) -> str:
    """The path of a Unix socket."""
    file_path(text)
    if len(text.encode()) > SOCKET_PATH_MAX:
        raise ValueError(f"is too long for the path of a Unix socket: {SOCKET_PATH_MAX} bytes at most")
    return text


def host(text: str) -> str:
    """An IP address without brackets, or a host name (RFC 1123, underscores let through)."""
    address, percent, zone = text.partition("%")
    try:
        six = ipaddress.ip_address(address).version == 6
        known = not percent or (six and _LABEL.fullmatch(zone) is not None)
    except ValueError:
        labels = text.split(".")
        # A name that ends in a number is a mistyped address (RFC 3696, section 2).
        known = len(text) <= HOST_MAX and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdecimal()
    if not known:
        raise ValueError("is neither the name of a host nor an IP address (without brackets)")
    return text


def port(text: str) -> int:
    """A TCP port."""
    if not _PORT.fullmatch(text) or not 1 <= int(text) <= 65535:
        raise ValueError('is not a port: that is a number from 1 to 65535; autoport="yes" takes a free one')
    return int(text)


def yes_or_no(text: str) -> bool:
    """A choice, in the words that libvirt's documents have for it."""
    if text not in ("yes", "no"):
        raise ValueError("is neither yes nor no")
    return text == "yes"


def one_of(*words: str) -> Check[str]:
    """The check that takes these words and no others."""

    def check(text: str) -> str:
        if text not in words:
            raise ValueError(f"is not known here: pullback knows {' and '.join(words)}")
        return text

    return check


def _text(text: str) -> None:
    if not text.strip():
        raise ValueError("is empty")
    if not all(map(printable, text)):
        raise ValueError("has a control character in it")
