# SPDX-License-Identifier: Apache-2.0
"""A limit in bytes per second that threads share: a token bucket, and the waiting for it.

Whoever wants bytes reserves them and waits until they are paid for.  What was not used is kept for 50 ms only, and
nothing larger than 50 ms' worth is asked for at once: so no 100 ms are more than twice over, and no second more than
a tenth.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pullback.errors import UsageError
from pullback.model.units import KIB, human_bytes

#: Seconds for which what was not used is kept: a thread that wakes up late may catch up on so much.
CREDIT = 0.05
#: Seconds' worth that is asked for at once, at most, unless that were less than the smallest piece.
_PIECE_SECONDS = 0.05
_SMALLEST_PIECE = 4 * KIB
#: Bytes a second below which even the smallest piece would be a burst.
LEAST = 64 * KIB


@dataclass(slots=True)
class Bucket:
    """``per_second`` bytes flow; what was granted is paid for at ``paid``.  Knows no clock."""

    per_second: int
    paid: float

    def grant(self, now: float, length: int) -> float:
        """Reserve bytes; the seconds to wait until they are paid for."""
        self.paid = max(self.paid, now - CREDIT) + length / self.per_second
        return max(0.0, self.paid - now)


def piece_size(per_second: int, most: int) -> int:
    """Bytes to ask for at once: a power of two, at most ``most``, which is one as well."""
    piece = most
    while piece > _SMALLEST_PIECE and piece > per_second * _PIECE_SECONDS:
        piece //= 2
    return piece


class Rate:
    """A limit for all threads of one transfer together; 0 bytes per second is none.

    UsageError below 64 KiB per second.
    """

    def __init__(self, per_second: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        if per_second and per_second < LEAST:
            raise UsageError(
                f"a limit of {human_bytes(per_second)} a second is too small",
                todo=f"Give at least {LEAST // KIB}K, or no limit.",
            )
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._clock = clock
        self._bucket = Bucket(per_second, clock()) if per_second else None

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self._bucket is not None

    def piece(self, most: int) -> int:
        """Bytes to ask for at once, at most ``most``, a power of two."""
        return piece_size(self._bucket.per_second, most) if self._bucket else most

    def take(self, length: int) -> None:
        """Wait until so many bytes may move; at once when there is no limit, or after ``stop``."""
        if self._bucket is None or self._stopped.is_set():
            return
        with self._lock:
            seconds = self._bucket.grant(self._clock(), length)
        if seconds:
            self._stopped.wait(seconds)

    def stop(self) -> None:
        """Let all who wait go on at once, from any thread: what they do is to end."""
        self._stopped.set()
