# SPDX-License-Identifier: Apache-2.0
"""What is said of a repository's files that are not as they were written."""

from __future__ import annotations

from pullback.errors import Damaged
from pullback.repository.store import FileKind, describe

DAMAGE_MEANS = "Backups that need it cannot be read whole; others are not affected."
DAMAGE_TODO = "Run restic check --read-data on the repository, and see restic's chapter on repairing one."


def damaged(kind: FileKind, name: str, why: str) -> Damaged:
    """The error for a file whose bytes are not what was written."""
    return Damaged(
        f"The repository's file {describe(kind, name)} is damaged: {why}", means=DAMAGE_MEANS, todo=DAMAGE_TODO
    )
