# SPDX-License-Identifier: Apache-2.0
"""Lists of extents, hundreds of thousands at a time: no loop in Python where the interpreter has one in C."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, compress, groupby
from operator import eq
from typing import Final

from pullback.errors import NbdProtocolError

Extents = tuple["array[int]", "array[int]"]  # lengths in bytes and flags, side by side

_U32: Final = "I"
assert array(_U32).itemsize == 4  # true wherever CPython runs


def parse_extents(payload: bytes | bytearray, limit: int, *, one: bool = False) -> Extents:
    """Read the descriptors of one block status chunk for a request of ``limit`` bytes.

    The last extent may reach beyond the request (section «NBD_CMD_BLOCK_STATUS»: unless only one was asked for)
    and is cut there.  Anything else that does not fit raises NbdProtocolError.
    """
    if not payload or len(payload) % 8:
        raise NbdProtocolError(f"The NBD server sent {len(payload)} bytes of extents, which is no whole number of them")
    numbers = array(_U32)
    numbers.frombytes(payload)
    if sys.byteorder == "little":
        numbers.byteswap()
    lengths, flags = numbers[0::2], numbers[1::2]
    if 0 in lengths:
        raise NbdProtocolError("The NBD server sent an empty extent")
    before_last = sum(lengths) - lengths[-1]
    if before_last >= limit or (one and (len(lengths) > 1 or lengths[0] > limit)):
        raise NbdProtocolError("The NBD server sent more extents than were asked for")
    lengths[-1] = min(lengths[-1], limit - before_last)
    return lengths, flags


def pack_extents(extents: Iterable[tuple[int, int]]) -> bytes:
    """Write ``(length, flags)`` as the descriptors of a block status chunk."""
    numbers = array(_U32, chain.from_iterable(extents))
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()


def merge_extents(offset: int, parts: Iterable[Extents]) -> list[tuple[int, int, int]]:
    """Join consecutive ``parts`` from ``offset`` on into ``(offset, length, flags)``, equal neighbours as one."""
    lengths, flags = array(_U32), array(_U32)
    for more_lengths, more_flags in parts:
        lengths.extend(more_lengths)
        flags.extend(more_flags)
    if any(map(eq, flags, flags[1:])):
        runs = [
            (sum(length for _, length in run), flag) for flag, run in groupby(zip(flags, lengths, strict=True), _flag)
        ]
        sizes = [size for size, _ in runs]  # not an array: a run may be longer than 4 GiB
        return list(zip(accumulate(sizes, initial=offset), sizes, (flag for _, flag in runs), strict=False))
    return list(zip(accumulate(lengths, initial=offset), lengths, flags, strict=False))


def marked_extents(offset: int, parts: Iterable[Extents], mask: int) -> Iterator[tuple[int, int]]:
    """What of consecutive ``parts`` from ``offset`` on has any flag of ``mask``, as ``(offset, length)``."""
    for lengths, flags in parts:
        yield from compress(zip(accumulate(lengths, initial=offset), lengths, strict=False), map(mask.__and__, flags))
        offset += sum(lengths)


def _flag(pair: tuple[int, int]) -> int:
    return pair[0]


def cut_extents(extents: Extents, length: int) -> Extents:
    """Return the part of ``extents`` that covers their first ``length`` bytes."""
    lengths, flags = extents
    ends = array("Q", accumulate(lengths))
    if ends[-1] <= length:
        return extents
    last = bisect_left(ends, length)
    cut = lengths[: last + 1]
    cut[last] -= ends[last] - length
    return cut, flags[: last + 1]
