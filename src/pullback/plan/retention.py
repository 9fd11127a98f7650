# SPDX-License-Identifier: Apache-2.0
"""Names of the checkpoints that ``backup`` makes, and which of them it merges away again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime

_OWN = r"-\d{8}T\d{6}Z-[0-9a-f]{4}"


def checkpoint_name(repository_id: str, time: datetime, salt: str) -> str:
    """``<first 8 of the repository's id>-<UTC time>-<4 hex digits>``: whose it is can be told from the name."""
    return f"{repository_id[:8]}-{time.astimezone(UTC):%Y%m%dT%H%M%SZ}-{salt}"


def made_by_backups(points: Iterable[str]) -> set[str]:
    """Those that backups made, into whichever repository: losing them costs no more than a full read."""
    own = re.compile(r"[0-9a-f]{8}" + _OWN)
    return {point for point in points if own.fullmatch(point)}


def checkpoints_to_remove(points: Iterable[str], repository_id: str, keep: int) -> set[str]:
    """Of a repository's own checkpoints all but the newest ``keep`` (at least one).

    ``points`` are in the chain's order, oldest first; it counts, not the time in a name: clocks are set back, and two
    backups fit into one second.  Checkpoints of other repositories and those a user named are never among them.
    """
    own = re.compile(re.escape(repository_id[:8]) + _OWN)
    mine = [point for point in points if own.fullmatch(point)]
    return set(mine[: -max(keep, 1)])
