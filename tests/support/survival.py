# SPDX-License-Identifier: Apache-2.0
"""The faults that tests put in, counted: a table at the end of a run says how often each was tried and survived.

    with survives(Fault.KILLED_AT_A_COMMAND):
        ... one fault, and all that has to hold after it

    @pytest.mark.fault(Fault.NBD_RESET)     the whole test is one

``docs/guarantees.md`` says what is promised under each of them; a test holds it to this list.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import StrEnum

import pytest


class Fault(StrEnum):
    """What may happen to a backup or a restore, in the order of the table."""

    KILLED_AT_A_COMMAND = "pullback killed (SIGKILL) before, inside or after a QMP command"
    STOPPED_AT_A_COMMAND = "pullback ended (SIGTERM, SIGINT) before, inside or after a QMP command"
    KILLED_IN_THE_DATA = "pullback killed while data flows over NBD"
    STOPPED_IN_THE_DATA = "pullback ended while data flows over NBD"
    KILLED_AT_A_STORE_CALL = "pullback killed at a call that changes the repository"
    KILLED_IN_A_PROOF = "pullback killed or ended while it compares"
    KILLED_IN_A_RESTORE = "pullback killed or ended in a restore to new images"
    KILLED_IN_PLACE = "pullback killed or ended in a restore in place"
    KILLED_IN_AN_INSTANT_RESTORE = "pullback killed or ended in an instant restore"
    QEMU_REFUSES = "QEMU refuses a command"
    QEMU_KILLED = "QEMU killed before, inside or after a QMP command"
    QEMU_KILLED_IN_THE_DATA = "QEMU killed while data flows"
    HOST_GONE = "QEMU and pullback killed together, images as they were (power cut)"
    MONITOR_CUT = "the monitor cut after byte n"
    REPLY_LATE = "a reply delayed past its deadline, the command executed"
    REPLY_NEVER = "a reply that never comes"
    NBD_RESET = "the NBD connection reset"
    NBD_ERROR = "an NBD error reply"
    NBD_SHORT = "an NBD reply cut short"
    NBD_LIE = "a lying NBD reply"
    SCRATCH_FULL = "the scratch full or refused"
    REPOSITORY_FULL = "the repository full or read-only"
    REPOSITORY_FAILS = "the repository fails in the middle"
    REPOSITORY_DAMAGED = "a file of the repository damaged, swapped or lost"
    STORE_ERROR = "the S3 store fails, lies or breaks off"
    STORE_SLOW = "the S3 store slow or away for a while"
    TARGET_FULL = "the target of a restore full"
    FROZEN_PROCESS = "pullback stopped (SIGSTOP) for a while, the domain writing"
    CLOCK_JUMP = "the clock set back or forward"
    TWO_AT_ONCE = "two at once"


#: Points of a kind are tried each ``step``-th, so that a run has an end; with this set, all of them.
_ALL = bool(os.environ.get("PULLBACK_TEST_ALL"))


def points(first: int, end: int, step: int) -> range:
    """The numbers of the points to try, of all from ``first`` to before ``end``."""
    return range(first, end, 1 if _ALL else step)


_Counts = dict[str, list[int]]
_counted: _Counts = {}


@contextmanager
def survives(fault: Fault) -> Iterator[None]:
    """Count one fault that is put in by the body, and that it was survived if the body ends without an exception."""
    counts = _counted.setdefault(fault.name, [0, 0])
    counts[0] += 1
    yield
    counts[1] += 1


def taken() -> _Counts:
    """What was counted since the last call: by the name of a fault how often it was tried, how often survived."""
    counts = dict(_counted)
    _counted.clear()
    return counts


def summed(found: Iterable[Mapping[str, list[int]]]) -> list[tuple[Fault, int, int]]:
    """The counts of all tests, in the order of the table."""
    runs: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    for counts in found:
        for name, (tried, well) in counts.items():
            runs[name] += tried
            survived[name] += well
    return [(fault, runs[fault.name], survived[fault.name]) for fault in Fault if runs[fault.name]]


def table(rows: list[tuple[Fault, int, int]]) -> list[str]:
    """The table's lines."""
    width = max(len(fault) for fault, _, _ in rows)
    lines = [f"{'fault':{width}}  {'times':>6}  {'survived':>8}"]
    lines += [f"{fault:{width}}  {runs:6}  {well:8}" for fault, runs, well in rows]
    lines.append(f"{'all':{width}}  {sum(row[1] for row in rows):6}  {sum(row[2] for row in rows):8}")
    return lines


class FaultTable:
    """The plugin: what a test counted goes with its report (also from another process), the table is printed last."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        taken()
        try:
            with ExitStack() as faults:
                for marker in item.iter_markers("fault"):
                    faults.enter_context(survives(*marker.args))
                return (yield)
        finally:
            if counts := taken():
                item.user_properties.append(("faults", counts))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        found = [
            value
            for reports in terminalreporter.stats.values()
            for report in reports
            if getattr(report, "when", None) == "call"
            for name, value in report.user_properties
            if name == "faults"
        ]
        if rows := summed(found):
            terminalreporter.section("faults")
            for line in table(rows):
                terminalreporter.write_line(line)
