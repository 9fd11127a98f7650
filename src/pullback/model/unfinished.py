# SPDX-License-Identifier: Apache-2.0
"""What an unfinished image of a restore knows of itself: the small JSON file beside it, and how it is read back.

Somebody else's file may lie under the same name, so reading trusts nothing: what is not exactly ours is None.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from pullback.model.extents import Span, merged

FORMAT = 1
_KIND = "unfinished restore"


@dataclass(frozen=True, slots=True)
class Unfinished:
    """One image: of which disk of which backup, and the ranges of it that are durable.

    ``inode`` is the image file's number, 0 before it was made.  ``modified`` is the file's time of modification
    (nanoseconds) when it was whole and about to get its name, else 0.
    """

    repository: str
    backup: str
    disk: str
    format: str
    virtual_size: int
    inode: int = 0
    modified: int = 0
    done: tuple[Span, ...] = ()

    def same_work(self, other: Unfinished) -> bool:
        """Whether both are about the same image, however far it is."""
        return self.started() == other.started()

    def started(self) -> Unfinished:
        """The same before anything was done."""
        return replace(self, inode=0, modified=0, done=())

    def to_bytes(self) -> bytes:
        """The JSON document, UTF-8."""
        return json.dumps({"pullback": _KIND, "version": FORMAT, **asdict(self)}, ensure_ascii=True).encode()


def parse_unfinished(data: bytes) -> Unfinished | None:
    """The state in ``data``; None if it is not one, or one of another version."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or (document.get("pullback"), document.get("version")) != (_KIND, FORMAT):
        return None
    words = {key: document.get(key) for key in ("repository", "backup", "disk", "format")}
    numbers = {key: document.get(key) for key in ("virtual_size", "inode", "modified")}
    done = _spans(document.get("done"), numbers["virtual_size"])
    if done is None or not all(isinstance(word, str) for word in words.values()):
        return None
    if not all(map(_is_size, numbers.values())):
        return None
    known: dict[str, Any] = {**words, **numbers}
    return Unfinished(done=done, **known)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _spans(value: Any, size: Any) -> tuple[Span, ...] | None:
    """Sorted spans within the disk, as they were written; anything else is None."""
    if not isinstance(value, list) or not _is_size(size):
        return None
    spans = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_size, pair)):
            return None
        spans.append(Span(*pair))
    if merged(spans) != spans or (spans and spans[-1].end > size) or sorted(spans) != spans:
        return None
    return tuple(spans)
