# SPDX-License-Identifier: Apache-2.0
"""Which bytes of a disk are touched when blobs of the repository cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from pullback.model.extents import Span, merged

Blob = TypeVar("Blob", bound=bytes)


def touched_spans(
    content: Sequence[tuple[Blob, int | None]], size: int, touched: Callable[[Blob], bool]
) -> tuple[Span, ...]:
    """Spans, in a file of ``size`` bytes made of these blobs with their lengths, that touched blobs fill.

    A blob without a length is unknown to every index file, and touched.  Where there are several, all from the first to
    the last of them counts: nothing says where between them one ends.
    """
    unknown = [number for number, (_, length) in enumerate(content) if length is None]
    first, last = (unknown[0], unknown[-1]) if unknown else (len(content), len(content))
    head, tail = content[:first], content[last + 1 :]
    spans = _spans(head, 0, touched)
    if unknown:
        begin = sum(length or 0 for _, length in head)
        end = max(size - sum(length or 0 for _, length in tail), begin)
        spans += [(begin, end - begin), *_spans(tail, end, touched)]
    return tuple(merged(spans))


def _spans(
    content: Sequence[tuple[Blob, int | None]], offset: int, touched: Callable[[Blob], bool]
) -> list[tuple[int, int]]:
    found = []
    for blob, length in content:
        if touched(blob):
            found.append((offset, length or 0))
        offset += length or 0
    return found


def segment_span(number: int, segment_size: int, virtual_size: int) -> Span:
    """The bytes of the disk that segment ``number`` holds."""
    begin = min(number * segment_size, virtual_size)
    return Span(begin, min(segment_size, virtual_size - begin))


def on_disk(spans: Iterable[Span], number: int, segment_size: int) -> list[Span]:
    """Spans of segment ``number`` as spans of the disk."""
    return [Span(number * segment_size + span.offset, span.length) for span in spans]


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same bytes, sorted, with neighbours made one."""
    return tuple(merged(sorted(spans)))
