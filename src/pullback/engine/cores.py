# SPDX-License-Identifier: Apache-2.0
"""How many cores there are for this process: what affinity and cgroups leave of them, not what the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """Threads that can run at a time, at least 1: the cores we may use, or fewer where a cgroup's quota says so."""
    allowed = len(os.sched_getaffinity(0))
    quotas = [quota for text in _limits() if (quota := quota_cores(text)) is not None]
    return max(1, min([allowed, *quotas]))


def quota_cores(text: str) -> int | None:
    """Cores that a cgroup's ``cpu.max`` allows, rounded up; None for no limit."""
    words = text.split()
    if len(words) != 2 or not all(word.isdecimal() for word in words) or not int(words[1]):
        return None
    return math.ceil(int(words[0]) / int(words[1]))


def _limits() -> Iterable[str]:
    """``cpu.max`` of our cgroup (version 2) and of all above it; each of them holds."""
    own = "/"
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        if line.startswith("0::/"):
            own = line.removeprefix("0::")
    place = PurePosixPath(own)
    for one in (place, *place.parents):
        yield _text(_CGROUPS / str(one).lstrip("/") / "cpu.max")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
