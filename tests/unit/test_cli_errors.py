# SPDX-License-Identifier: Apache-2.0
"""How commands end: exit codes, one sentence, JSON where it was asked for, never a traceback; and what they load."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pullback.cli import backups, main, reporter
from pullback.cli.interrupts import Interrupted, run_interruptible
from pullback.errors import PullbackError, Refused
from pullback.repository.local_store import LocalStore
from pullback.repository.snapshots import Snapshot
from tests.support.backups import MOMENT, new_repository, open_repository, store_backup
from tests.support.cli import filled_stage
from tests.support.product import Done, Stage

Command = Callable[..., Done]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run ``pullback`` in this process, with nothing of whoever runs the tests in its environment."""
    for name in [*os.environ]:
        if name.startswith(("RESTIC_", "PULLBACK_")) and name != "PULLBACK_TEST_SESSION":
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nothing"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    # It is set for the life of a process; this one lives on.
    monkeypatch.setattr("pullback.repository.locks.survive_restic_probe", lambda: None)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["pullback", *arguments])
        code = 0
        try:
            main.main()
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return filled_stage(tmp_path)


WITH_XML = (
    ["--snapshot", "s"],
    ["--disk", "d"],
    ["--since", "A"],
    ["--all-checkpoints"],
    ["--socket", "/s"],
    ["--listen", "h"],
    ["--export-name", "a=b"],
    ["--writable"],
)

WRONG = [
    ([], "no command was given"),
    (["nonsense"], "nonsense"),
    (["--nonsense"], "--nonsense"),
    (["backup"], "DOMAIN"),
    (["backup", "web"], "'web' is neither qmp:PATH, nor disk:PATH, nor a domain of the configuration"),
    (["backup", "qmp:"], "qmp: is followed by no path"),
    (["backup", "qmp:/x"], "no repository was named"),
    (["backup", "qmp:/x", "--keep-checkpoints", "0"], "--keep-checkpoints"),
    (["backup", "qmp:/x", "--lock-retry", "-1"], "--lock-retry"),
    (["backup", "qmp:/x", "--name"], "--name"),
    (["init"], "no repository was named"),
    (["init", "--repo", "s3:https://host"], "does not name a bucket"),
    (["list", "--repo", "/nowhere"], "no password for the repository was given"),
    (["list", "web", "other"], "other"),
    (["list", "--nonsense"], "--nonsense"),
    (["restore", "latest"], "--to"),
    (["restore", "latest", "--to", "x", "--format", "vmdk"], "'vmdk' is no format of images"),
    (["backup", "disk:"], "disk: is followed by no path"),
    (["snapshot"], "Missing command"),
    (["snapshot", "nonsense"], "nonsense"),
    (["snapshot", "create"], "DOMAIN"),
    (["snapshot", "create", "web"], "'web' is neither"),
    (["snapshot", "create", "qmp:/x", "--method", "magic"], "'magic' is no method to freeze with"),
    (["snapshot", "create", "qmp:/x", "one", "--xml", "/d"], "--xml says which disks, name and checkpoint"),
    (["snapshot", "create", "qmp:/x", "--checkpoint", "c", "--xml", "/d"], "--xml says which disks"),
    (["snapshot", "create", "qmp:/x", "--disk", "d", "--xml", "/d"], "--xml says which disks"),
    (["snapshot", "create", "qmp:/x", "--xml", "/nowhere"], "cannot read /nowhere"),
    (["snapshot", "delete", "qmp:/x"], "NAME"),
    (["snapshot", "list", "disk:/nowhere.qcow2"], "cannot open the image /nowhere.qcow2"),
    (["snapshot", "list", "disk:a=/dev/null,a=/dev/zero"], "two images are called a"),
    (["snapshot", "list", "disk:x y=/dev/null"], "'x y' cannot name a disk"),
    (["export", "start", "qmp:/x", "--snapshot", "s"], "one of --socket and --listen"),
    (
        ["export", "start", "qmp:/x", "--snapshot", "s", "--socket", "/s", "--listen", "h"],
        "one of --socket and --listen",
    ),
    (["export", "start", "qmp:/x", "--socket", "/s"], "no snapshot was named"),
    (["export", "start", "qmp:/x", "--snapshot", "s", "--listen", "h:x"], "'h:x' is not HOST or HOST:PORT"),
    (["export", "start", "qmp:/x", "--snapshot", "s", "--listen", "h:65536"], "'h:65536' is not HOST or HOST:PORT"),
    (
        ["export", "start", "qmp:/x", "--snapshot", "s", "--socket", "/s", "--since", "A", "--all-checkpoints"],
        "--since and --all-checkpoints cannot both be given",
    ),
    (["export", "start", "qmp:/x", "--socket", "/s", "--writable", "--since", "A"], "changes need a snapshot"),
    (["export", "start", "qmp:/x", "--snapshot", "s", "--socket", "/s", "--export-name", "x"], "'x' is not DISK=NAME"),
    (["export", "start", "qmp:/x", "--snapshot", "s", "--socket", "/s", "--export-name", "=x"], "is not DISK=NAME"),
    *((["export", "start", "qmp:/x", "--xml", "/d", *more], "--xml says what to export where") for more in WITH_XML),
    (["export", "start", "qmp:/x", "--xml", "/nowhere"], "cannot read /nowhere"),
    (["checkpoint", "delete", "qmp:/x"], "NAME"),
    (["checkpoint", "size", "qmp:/x"], "NAME"),
    (["domain", "show"], "DOMAIN"),
    (["domain", "list", "web"], "web"),
    (["forget", "--keep-last", "1", "--keep-tag", ","], "--keep-tag is followed by an empty tag"),
    (["forget", "--keep-tag", "a,,b"], "--keep-tag is followed by an empty tag"),
    (["forget", "--keep-last", "1", "--keep-within", "abc"], "'abc' is no span of time"),
    (["forget", "--keep-within=-3d"], "'-3d' is no span of time"),
    (["forget", "--keep-within", "0d0h"], "'0d0h' is no span of time"),
    (["forget", "--keep-within", "3"], "'3' is no span of time"),
    (["forget", "--keep-last", "-1"], "--keep-last"),
    (["forget", "--keep-daily", "0"], "--keep-daily"),
    *(
        (["list", "--repo", "/x", option, ""], f"{option} is followed by an empty text")
        for option in ("--config", "-r")
    ),
    (["backup", "qmp:/x", "--name", ""], "--name is followed by an empty text"),
    (["backup", "qmp:/x", "--name="], "--name is followed by an empty text"),
    (["backup", "qmp:/x", "--scratch", " "], "--scratch is followed by an empty text"),
    (["verify", "--domain", ""], "--domain is followed by an empty text"),
    (["forget", "--keep-last", "1", "--keep-tag", ""], "--keep-tag is followed by an empty text"),
    (["forget", "--keep-within="], "--keep-within is followed by an empty text"),
    (["restore", "latest", "--to", ""], "--to is followed by an empty text"),
    (["show", ""], "an argument is an empty text"),
    (["recover"], "DOMAIN"),
    (["recover", "qmp:/x", "--nonsense"], "--nonsense"),
]


GROUPS = ("domain", "checkpoint", "snapshot", "export")
COMMANDS = ("init", "backup", "list", "restore", "recover", *GROUPS)


def words_of_command(arguments: list[str]) -> int:
    """How many words say which command it is."""
    return 2 if arguments[0] in GROUPS else 1


def shown(value: object) -> str | None:
    """A parameter as a part of the test's name."""
    return " ".join(value) or "nothing" if isinstance(value, list) else None


@pytest.mark.parametrize(("arguments", "says"), WRONG, ids=shown)
def test_a_wrong_command_line_is_one_line_and_2(command: Command, arguments: list[str], says: str) -> None:
    done = command(*arguments)
    assert done.code == 2
    assert not done.out
    assert says in done.err
    assert done.err.startswith("pullback: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith(".\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [one for one in WRONG if one[0] and one[0][0] in COMMANDS and len(one[0]) >= words_of_command(one[0])],
    ids=shown,
)
def test_with_json_it_is_one_object_on_standard_output(command: Command, arguments: list[str], says: str) -> None:
    # Not at the end: `--name` would take it for its value.
    words = words_of_command(arguments)
    done = command(*arguments[:words], "--json", *arguments[words:])
    assert not done.err
    (event,) = done.events
    assert (done.code, event["event"], event["exit_code"]) == (2, "error", 2)
    assert says in event["message"]


def test_help_and_version_are_0(command: Command) -> None:
    for arguments in (
        ["--help"],
        ["backup", "--help"],
        ["snapshot", "--help"],
        ["export", "start", "--help"],
        ["--version"],
    ):
        done = command(*arguments)
        assert (done.code, done.err) == (0, "")
        assert "pullback" in done.out


ON_A_DOMAIN = [
    ["domain", "show"],
    ["checkpoint", "list"],
    ["checkpoint", "size", "c"],
    ["checkpoint", "delete", "c"],
    ["snapshot", "create"],
    ["snapshot", "list"],
    ["snapshot", "delete", "s"],
    ["export", "start", "--snapshot", "s", "--socket", "/s"],
    ["export", "list"],
    ["export", "stop"],
    ["recover"],
]


@pytest.mark.parametrize("words", ON_A_DOMAIN, ids=shown)
def test_a_domain_that_is_not_there_is_4(command: Command, tmp_path: Path, words: list[str]) -> None:
    length = words_of_command(words)
    done = command(*words[:length], f"qmp:{tmp_path}/none", *words[length:])
    assert (done.code, done.out, done.err.count("\n")) == (4, "", 1)
    assert f"{tmp_path}/none" in done.err


@pytest.mark.parametrize(
    ("words", "document", "says"),
    [
        (["snapshot", "create"], "<domainblocksnapshot>", "line"),
        (["snapshot", "create"], "<domain/>", "domain"),
        (["snapshot", "create"], '<domainblocksnapshot><disk name="a"><flece/></disk></domainblocksnapshot>', "flece"),
        (["export", "start"], "nonsense", "line"),
        (["export", "start"], '<domainblockexport type="nbd"/>', "address"),
        (["export", "start"], "<!DOCTYPE a><domainblockexport/>", "type"),
    ],
)
def test_a_wrong_document_is_one_line_and_2(
    command: Command, tmp_path: Path, words: list[str], document: str, says: str
) -> None:
    (path := tmp_path / "document.xml").write_text(document)
    done = command(*words, "qmp:/x", "--xml", str(path))
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert says in done.err


def test_a_document_with_two_snapshots_or_tls_needs_more(command: Command, tmp_path: Path) -> None:
    address = '<address type="ip" host="h" port="1" tls="yes"/>'
    disks = '<disk name="a" snapshot="s"/><disk name="b" snapshot="{}"/>'
    (path := tmp_path / "document.xml").write_text(
        f'<domainblockexport type="nbd">{address}{disks.format("t")}</domainblockexport>'
    )
    done = command("export", "start", "qmp:/x", "--xml", str(path))
    assert (done.code, "disks of 2 snapshots" in done.err) == (2, True)
    path.write_text(f'<domainblockexport type="nbd">{address}{disks.format("s")}</domainblockexport>')
    done = command("export", "start", "qmp:/x", "--xml", str(path))
    assert (done.code, "wants TLS" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("failure", "code"),
    [(Refused("a thing is so", means="Nothing was touched.", todo="Do that."), 5), (PullbackError("it failed"), 1)],
)
def test_an_error_gives_its_exit_code(
    command: Command, monkeypatch: pytest.MonkeyPatch, failure: PullbackError, code: int
) -> None:
    monkeypatch.setattr(backups, "find_domain", failing(failure))
    done = command("backup", "x")
    assert (done.code, done.out, done.err) == (code, "", f"pullback: {failure}\n")


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_defect_is_1_and_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backups, "find_domain", failing(ZeroDivisionError("division by zero")))
    done = command("backup", "x")
    assert done.code == 1
    assert not done.out
    assert done.err.count("\n") == 1
    assert "a defect of pullback: ZeroDivisionError: division by zero" in done.err
    done = command("backup", "x", "--json")
    assert (done.code, done.err) == (1, "")
    assert done.event("error")["exit_code"] == 1


def test_a_defect_can_be_looked_into(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backups, "find_domain", failing(ZeroDivisionError()))
    monkeypatch.setenv("PULLBACK_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        command("backup", "x")


@pytest.mark.parametrize("error", [Interrupted(), KeyboardInterrupt(), EOFError()])
def test_an_interruption_is_130(command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr(backups, "find_domain", failing(error))
    done = command("backup", "x")
    assert (done.code, done.out, done.err.count("\n")) == (130, "", 1)
    assert command("backup", "x", "--json").event("error")["exit_code"] == 130


def test_a_pipe_that_broke_inside_is_a_defect(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a reader of our output may go away unnoticed."""

    async def broken() -> None:
        raise BrokenPipeError

    monkeypatch.setattr(backups, "find_domain", lambda *_: run_interruptible(broken()))
    assert command("backup", "x").code == 1


# -- where the output goes ----------------------------------------------------------------------------------------


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """The writing end of a pipe that nobody reads."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    yield write_end
    os.close(write_end)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["list", "--help"], 0),
        (["--version"], 0),
        (["list"], 0),
        (["list", "--json"], 0),
        (["list", "--nonsense"], 2),
        (["list", "--nonsense", "--json"], 2),
        (["restore", "latest", "--to", "OUT", "--json"], 0),
    ],
    ids=shown,
)
def test_a_reader_who_went_away_changes_nothing(
    stage: Stage, closed_pipe: int, arguments: list[str], code: int
) -> None:
    words = [str(stage.place / "out") if word == "OUT" else word for word in arguments]
    done = subprocess.run(
        stage.command(*words),
        env=stage.environment(),
        stdin=subprocess.DEVNULL,
        stdout=closed_pipe,
        stderr=subprocess.PIPE if code == 0 else closed_pipe,
        timeout=60,
        check=False,
    )
    assert done.returncode == code
    assert not done.stderr
    assert ("OUT" in arguments) == (stage.place / "out" / "vda.qcow2").exists()


def test_a_full_disk_under_the_output_is_told(stage: Stage) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            stage.command("list"), env=stage.environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "pullback: cannot write to standard output: No space left on device.\n"


@pytest.mark.parametrize(
    ("arguments", "code"), [(["list"], 0), (["check"], 0), (["show", "nothing"], 13), (["--help"], 0)], ids=shown
)
def test_closed_streams_lead_nowhere(stage: Stage, arguments: list[str], code: int) -> None:
    """Their numbers must not become a repository's files, which restic would then write its words into."""
    done = stage.cli(*arguments, prefix=["sh", "-c", 'exec "$@" <&- >&-', "-"])
    assert (done.code, done.out, done.err == "") == (code, "", code == 0)
    done = stage.cli(*arguments, prefix=["sh", "-c", 'exec "$@" 2>&-', "-"])
    assert (done.code, done.err, done.out != "") == (code, "", code == 0)


@pytest.mark.parametrize("json", [(), ("--json",)])
def test_what_somebody_wrote_into_a_repository_moves_no_terminal(
    command: Command, stage: Stage, monkeypatch: pytest.MonkeyPatch, json: tuple[str, ...]
) -> None:
    for name, value in stage.environment().items():
        monkeypatch.setenv(name, value)
    odd = "a\x1b]0;title\x07\r\nb\x9b2J\u202ec\ud800d"
    repository = open_repository(stage.repo)
    with repository.lock():
        store_backup(repository, {"vda": [b"x"]}, domain=odd.replace("\ud800", ""), day=1)
    for words in (["list"], ["forget", "--keep-last", "1", "--dry-run"], ["show", "nobody@latest"], ["show", "latest"]):
        done = command(*words, *json)
        said = done.out + done.err
        assert not set(said.replace("\n", "")) & set(odd) - set("abcd]0;title2J"), said
        assert "\\u001b]0;title\\u0007\\u000d\\u000ab\\u009b2J\\u202ec" in said.replace("\\r\\n", "\\u000d\\u000a")
    assert reporter.visible(odd) == r"a\u001b]0;title\u0007\u000d\u000ab\u009b2J\u202ec\ud800d"


def test_letters_that_the_locale_does_not_have_are_escaped(stage: Stage) -> None:
    repository = open_repository(stage.repo)
    with repository.lock():
        store_backup(repository, {"vda": [b"x"]}, domain="wéb", day=1)
    done = stage.cli("list", env={"PYTHONIOENCODING": "ascii"})
    assert (done.code, r"w\xe9b" in done.out) == (0, True)


def test_results_and_notes_go_different_ways(command: Command, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stage.environment().items():
        monkeypatch.setenv(name, value)
    done = command("restore", "latest", "--to", str(stage.place / "out"))
    assert done.code == 0, done.err
    assert "restored backup" in done.out
    done = command("restore", "latest", "--to", str(stage.place / "out"))
    assert (done.code, done.out) == (9, "")
    done = command("restore", "latest", "--to", str(stage.place / "out2"), "--json")
    assert not done.err
    assert [event["event"] for event in done.events][-2:] == ["progress", "restore"]


@pytest.mark.parametrize("words", ["show", "verify", "forget", "copy --to COPY", "restore --to OUT"])
def test_latest_beside_a_broken_snapshot_file_is_not_an_older_backup(
    command: Command, stage: Stage, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    for name, value in stage.environment().items():
        monkeypatch.setenv(name, value)
    repository = open_repository(stage.repo)
    with repository.lock():
        newest = repository.save_snapshot(Snapshot(MOMENT, repository.find("latest").tree, ("/web",), "web"))
    new_repository(stage.place / "copy")
    (path := stage.repo / "snapshots" / newest).chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1])
    name, *more = words.replace("COPY", str(stage.place / "copy")).replace("OUT", str(stage.place / "out")).split()
    for spec in ("latest", "web@latest", newest[:20]):
        done = command(name, spec, *more)
        assert (done.code, newest in done.err, done.err.count("\n")) == (8, True, 1)
    assert len([*(stage.repo / "snapshots").iterdir()]) == 2


@pytest.mark.parametrize("words", ["show", "verify"])
def test_what_another_program_stored_is_not_taken_for_damaged(
    command: Command, stage: Stage, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    for name, value in stage.environment().items():
        monkeypatch.setenv(name, value)
    repository = open_repository(stage.repo)
    with repository.lock():
        foreign = repository.save_snapshot(Snapshot(MOMENT, repository.find("latest").tree, ("/etc/x",), "mail"))
    done = command(words, foreign[:12])
    assert (done.code, "another program stored it, of mail" in done.err) == (5, True), done.err
    assert command("verify", "--all").code == 0
    for others in (["restore", "--to"], ["restore", "--instant", "--to"], ["serve", "--socket"]):
        out = stage.place / "out"
        done = command(others[0], foreign[:12], *others[1:], str(out))
        assert (done.code, "another program stored it, of mail" in done.err) == (5, True), done.err
        assert not out.exists()
    # One whose tag was taken off is still one of ours.
    with repository.lock():
        bare = repository.save_snapshot(Snapshot(MOMENT, repository.find("web@latest").tree, ("/web",), "web"))
    assert command(words, bare[:12]).code == 0


def test_a_directory_with_other_things_in_it_becomes_no_repository(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESTIC_PASSWORD", "x")
    (tmp_path / "home" / "letters").mkdir(parents=True)
    done = command("init", "--repo", str(tmp_path / "home"))
    assert (done.code, "not empty: it holds letters." in done.err) == (2, True), done.err
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letters"]
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    assert command("init", "--repo", str(tmp_path / "disk")).code == 0
    (tmp_path / "disk" / "config").unlink()  # nobody else has its password


def test_what_may_not_be_read_is_worded_so(command: Command, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stage.environment().items():
        monkeypatch.setenv(name, value)
    # Root may read everything.
    monkeypatch.setattr(
        LocalStore, "load", lambda store, *_: store._tell("read from", PermissionError(errno.EACCES, ""))
    )
    done = command("list", "--no-cache")
    assert (done.code, "permission is denied" in done.err, "may read there" in done.err) == (14, True, True), done.err


def test_a_table_lines_up() -> None:
    lines = reporter.table(("A", "LONG"), [("aaaa", "b"), ("c", "dddddd")])
    assert lines == ["A     LONG", "aaaa  b", "c     dddddd"]


# -- what is loaded -----------------------------------------------------------------------------------------------

HEAVY = ("qemu.qmp", "cryptography", "obstore", "zstandard", "lxml", "rich.progress")

LOADED = """
import sys
from pullback.cli.main import main
try:
    main()
except SystemExit:
    pass
print(*(name for name in sys.modules), file=sys.stderr)
"""


def loaded_by(stage: Stage, *arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments],
        env=stage.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(done.stderr.splitlines()[-1].split()) & set(HEAVY)


@pytest.mark.parametrize("arguments", ["--help", "backup --help", "--version", "nonsense", "backup", "backup web"])
def test_help_and_wrong_command_lines_load_nothing_heavy(stage: Stage, arguments: str) -> None:
    assert not loaded_by(stage, *arguments.split())


def test_real_work_loads_what_it_needs(stage: Stage) -> None:
    assert loaded_by(stage, "list") == {"cryptography", "zstandard"}
