# SPDX-License-Identifier: Apache-2.0
"""A plan: QMP commands as values, each with the reason it is there.

The same value is executed, printed by ``--dry-run``, and compared with golden files in tests.  There is no list of
undo steps: whatever stopped a plan half-way, the way back is to observe QEMU again and plan the clean-up from what is
there (``plan.cleanup``).  So the end of a backup, its failure and what a killed process left behind are one path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class JobConcluded:
    """Wait until job ``id`` has concluded, take its error as the step's, and dismiss it."""

    id: str


@dataclass(frozen=True, slots=True)
class JobGone:
    """Wait until job ``id`` is listed no more; ``job-cancel`` only asks for it."""

    id: str


@dataclass(frozen=True, slots=True)
class ExportDeleted:
    """Wait until export ``id`` is gone; ``block-export-del`` only asks for it."""

    id: str


@dataclass(frozen=True, slots=True)
class Step:
    """One QMP command, why it is sent, and what to wait for after its reply.

    Of an ``optional`` one an error of QEMU's is no failure: what it undoes may not have happened.
    """

    execute: str
    arguments: Mapping[str, Any]
    why: str
    wait: JobConcluded | JobGone | ExportDeleted | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Paused:
    """Steps during which the domain must not run: ``stop`` before, ``cont`` after, whatever happens.

    The domain is only continued if it was this ``stop`` that stopped it.
    """

    steps: tuple[Step, ...]
    why: str
    before: tuple[Step, ...] = field(default=())


Action = Step | Paused


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions in the order they are carried out; the first failure ends it."""

    actions: tuple[Action, ...] = ()

    def __add__(self, other: Plan) -> Plan:
        return Plan(self.actions + other.actions)

    def __bool__(self) -> bool:
        return bool(self.actions)

    def commands(self) -> Iterator[Step]:
        """Every command in order, the ``stop`` and ``cont`` of a pause included."""
        for action in self.actions:
            if isinstance(action, Step):
                yield action
                continue
            yield from action.before
            yield Step("stop", {}, action.why)
            yield from action.steps
            yield Step("cont", {}, "the domain goes on, if it was running before")


def transaction(actions: Iterable[Mapping[str, Any]], why: str) -> Step:
    """One QMP ``transaction``: all of its actions happen at one instant, or none."""
    return Step("transaction", {"actions": list(actions)}, why)
