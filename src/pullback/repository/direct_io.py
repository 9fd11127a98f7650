# SPDX-License-Identifier: Apache-2.0
"""Writing a file's bytes: large ones past the page cache (O_DIRECT, open(2)).

What was just backed up is not read again soon, and would drive what the host's domains need out of its memory.
Copying it there takes time, too: for fresh pages up to five times what the disk takes.
"""

from __future__ import annotations

import errno
import fcntl
import os

#: Smaller files are read again soon (index, trees), or are not worth it.
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


def _write_direct(handle: int, piece: memoryview) -> list[memoryview]:
    """Write what can be written past the page cache; the rest: at least what is not a multiple of a block."""
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:
        return [piece]  # the file system has no such thing
    try:
        while whole := piece.nbytes // _ALIGNMENT * _ALIGNMENT:
            piece = piece[os.writev(handle, [piece[:whole]]) :]
    except OSError as error:
        # Not aligned as the file system wants it, at once or after a write that ended early.
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags)
    return [piece] if piece.nbytes else []
