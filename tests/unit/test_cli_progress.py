# SPDX-License-Identifier: Apache-2.0
"""Progress: a bar on a terminal, a line now and then elsewhere, events with --json."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pullback.cli import reporter
from pullback.cli.reporter import Reporter
from pullback.engine.events import DiskPlanned, Frozen, Note, Progress
from pullback.model.units import GIB, MIB
from tests.support.cli import Terminal, filled_stage


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(reporter, "time", made)
    return made


def test_without_a_terminal_there_is_a_line_every_five_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    teller = Reporter(json_lines=False)
    for second in range(1, 13):
        clock.now += 1
        teller.emit(Progress("backup", second * 100 * MIB, 4 * GIB))
    said = capsys.readouterr()
    assert not said.out
    assert said.err.splitlines() == [
        "backup: 600 MiB of 4.00 GiB, 100 MiB/s, 35.0 s to go",
        "backup: 1.07 GiB of 4.00 GiB, 100 MiB/s, 30.0 s to go",
    ]


def test_the_rate_of_the_next_work_is_its_own(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    teller = Reporter(json_lines=False)
    clock.now += 100
    teller.emit(Progress("backup", GIB, GIB))
    for second in range(7):
        teller.emit(Progress("prove", second * 100 * MIB, 4 * GIB))
        clock.now += 1
    assert capsys.readouterr().err.splitlines() == ["prove: 500 MiB of 4.00 GiB, 100 MiB/s, 36.0 s to go"]


def test_short_work_has_no_line_of_progress(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    teller = Reporter(json_lines=False)
    for done in (0, MIB, 2 * MIB):
        clock.now += 1
        teller.emit(Progress("restore", done, 2 * MIB))
    clock.now += 60
    teller.emit(Progress("restore", 2 * MIB, 2 * MIB))
    assert capsys.readouterr() == ("", "")


def test_nothing_done_yet_has_no_time_to_go(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    teller = Reporter(json_lines=False)
    for _ in range(2):
        teller.emit(Progress("backup", 0, GIB))
        clock.now += 6
    teller.emit(Progress("backup", 0, GIB))
    assert capsys.readouterr().err.splitlines()[-1] == "backup: 0 B of 1.00 GiB, 0 B/s"


def test_events_become_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    teller = Reporter(json_lines=False)
    teller.emit(Note("Leaving out cd0: the drive is empty."))
    teller.emit(DiskPlanned("vda", "full", "for a reason", 10 * GIB))
    teller.emit(Frozen("2026-05-04T03:02:01+00:00", "point", 5.5))
    teller.emit(Frozen("2026-05-04T03:02:01+00:00", "point", 0))
    said = capsys.readouterr()
    assert not said.out
    assert said.err.splitlines() == [
        "Leaving out cd0: the drive is empty.",
        "vda: full (for a reason), 10.0 GiB",
        "frozen at 2026-05-04T03:02:01+00:00, the domain stood still for 5.5 ms",
        "frozen at 2026-05-04T03:02:01+00:00, the domain was not paused",
    ]


def test_with_json_every_event_is_a_line_of_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    teller = Reporter(json_lines=True)
    teller.emit(Note("one\nline"))
    teller.emit(Progress("backup", 1, 2))
    said = capsys.readouterr()
    assert not said.err
    assert [json.loads(line) for line in said.out.splitlines()] == [
        {"event": "note", "message": "one\nline"},
        {"event": "progress", "work": "backup", "done": 1, "total": 2},
    ]


def test_on_a_terminal_there_is_a_bar_with_rate_and_time_to_go(tmp_path: Path) -> None:
    stage = filled_stage(tmp_path)
    out = tmp_path / "standard-output"
    command = stage.command("restore", "latest", "--to", tmp_path / "out")
    environment = stage.environment(TERM="xterm", COLUMNS="100", NO_COLOR="1")
    with Terminal(["/bin/sh", "-c", f'exec "$0" "$@" >{out}', *command], environment) as terminal:
        code, shown = terminal.end()
    assert code == 0
    text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", shown)
    assert re.search(r"restore ━+ +1\.0/1\.0 MiB +[\d.]+ [KMG]iB/s +\d:\d\d:\d\d", text), text
    assert "restored backup" not in text
    assert "restored backup" in out.read_text()


def test_in_a_pipe_there_are_plain_lines_only(tmp_path: Path) -> None:
    done = filled_stage(tmp_path).cli("restore", "latest", "--to", tmp_path / "out", env={"TERM": "xterm"})
    assert done.code == 0
    assert "\x1b" not in done.out + done.err
    assert "━" not in done.err
