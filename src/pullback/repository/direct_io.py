# SPDX-License-Identifier: Apache-2.0
"""A file's bytes, large parts of it past the page cache (O_DIRECT, open(2)).

What was just backed up or restored is not read again soon, and would drive what the host's domains need out of its
memory.  Copying it there takes time, too: for fresh pages up to five times what the disk takes.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pullback.repository.store import Bytes

#: Smaller ones are needed again soon (index, trees), or are not worth it.
_DIRECT_FROM = 1 << 20
#: What file systems want offsets, lengths and addresses to be multiples of, at most.
_ALIGNMENT = 4096
_MAX_PIECES = 512  # below IOV_MAX (1024)


def write_all(handle: int, pieces: list[memoryview]) -> None:
    """Write flat views of bytes one after the other; raises OSError, and then any part may have been written."""
    pieces = [piece for piece in pieces if piece.nbytes]
    if len(pieces) == 1 and pieces[0].nbytes >= _DIRECT_FROM:
        pieces = _write_direct(handle, pieces[0])
    while pieces:
        written = os.writev(handle, pieces[:_MAX_PIECES])
        while pieces and written >= pieces[0].nbytes:
            written -= pieces.pop(0).nbytes
        if written:
            pieces[0] = pieces[0][written:]


def read_part(handle: int, offset: int, length: int) -> Bytes:
    """Read ``length`` bytes at ``offset``, fewer where the file ends; raises OSError.

    What the page cache has comes from there, which is quicker than the disk.
    """
    if length < _DIRECT_FROM:
        return _read_on(handle, offset, length)
    begin = offset // _ALIGNMENT * _ALIGNMENT
    wanted = offset + length - begin
    pages = mmap.mmap(-1, -(-wanted // _ALIGNMENT) * _ALIGNMENT, mmap.MAP_PRIVATE)
    with suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(pages)
    got = _read_cached(handle, begin, view[:wanted])
    if got < wanted:
        got = _read_direct(handle, begin, view, got // _ALIGNMENT * _ALIGNMENT)
    while got < wanted and (more := os.preadv(handle, [view[got:wanted]], begin + got)):
        got += more
    return view[offset - begin : min(got, wanted)]


def _read_on(handle: int, offset: int, length: int) -> bytes:
    parts = [os.pread(handle, length, offset)]
    while (got := sum(map(len, parts))) < length and (more := os.pread(handle, length - got, offset + got)):
        parts.append(more)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_cached(handle: int, begin: int, view: memoryview) -> int:
    """Read what of it is at hand from the start on; how much that was."""
    got = 0
    with suppress(OSError):  # nothing more, or a file system that cannot say
        while got < len(view) and (more := os.preadv(handle, [view[got:]], begin + got, os.RWF_NOWAIT)):
            got += more
    return got


def _read_direct(handle: int, begin: int, view: memoryview, got: int) -> int:
    """Read on from the disk after the first ``got`` bytes; how many there are now, fewer than all if it cannot."""
    with _direct(handle) as possible:
        while possible and got < len(view):
            more = os.preadv(handle, [view[got:]], begin + got)
            got += more
            if more % _ALIGNMENT or not more:
                break  # the end of the file
    return got


def _write_direct(handle: int, piece: memoryview) -> list[memoryview]:
    """Write what can be written past the page cache; the rest: at least what is not a multiple of a block."""
    with _direct(handle) as possible:
        while possible and (whole := piece.nbytes // _ALIGNMENT * _ALIGNMENT):
            piece = piece[os.writev(handle, [piece[:whole]]) :]
    return [piece] if piece.nbytes else []


@contextmanager
def _direct(handle: int) -> Iterator[bool]:
    """Have the block work past the page cache; whether that is possible.  It ends where a file system refuses."""
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:
        yield False  # the file system has no such thing
        return
    try:
        yield True
    except OSError as error:
        # Not aligned as the file system wants it, at once or after a part that ended early.
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags)
