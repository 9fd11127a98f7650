# SPDX-License-Identifier: Apache-2.0
"""Wrong input of every kind: one clear sentence, the documented exit code, nothing changed."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.monitor import Monitor
from lab.qemu import BareQemu
from pullback.errors import PullbackError
from tests.support.backups import new_repository, store_backup
from tests.support.product import MIB, Done, Stage, forked, leftovers

Start = Callable[..., BareQemu]


@contextmanager
def listener(path: Path, talk: Callable[[socket.socket], None]) -> Iterator[Path]:
    """A server on a unix socket that does ``talk`` with whoever connects."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        while True:
            try:
                link, _ = server.accept()
            except OSError:
                return
            with link:
                try:
                    talk(link)
                except OSError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield path
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def one_line(done: Done) -> str:
    """The error, which is one line and nothing else."""
    lines = done.err.splitlines()
    assert done.out == ""
    assert len(lines) == 1, done.err
    assert lines[0].startswith("pullback: ")
    return lines[0]


# -- sockets that are no domain -----------------------------------------------------------------------------------


def test_no_socket(lab_dir: Path) -> None:
    stage = Stage(lab_dir)
    dead = lab_dir / "dead"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(dead))
    for path, words in (
        (lab_dir / "nothing", "there is no QMP socket"),
        (stage.repo / "config", "is not a socket"),
        (lab_dir, "is not a socket"),
        (dead, "nobody listens"),
        (stage.repo / "config" / "below", "cannot connect"),
        (lab_dir / ("x" * 200), "no QMP socket"),
    ):
        done = stage.cli("backup", f"qmp:{path}")
        assert done.code == 4
        assert words in one_line(done)
        assert str(path) in done.err
    assert stage.listed() == []
    assert list((stage.repo / "locks").iterdir()) == []


def hang_up(link: socket.socket) -> None:
    """Close at once."""


def flood(link: socket.socket) -> None:
    while True:
        link.sendall(b"x" * 65536)


TALKS: dict[str, Callable[[socket.socket], Any]] = {
    "nbd": lambda link: (link.sendall(b"NBDMAGICIHAVEOPT\0\3"), link.recv(1)),
    "http": lambda link: (link.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"), link.recv(1)),
    "ssh": lambda link: (link.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"), link.recv(1)),
    "closes": hang_up,
    "json": lambda link: (link.sendall(b'{"hello": 1}\n'), link.recv(1)),
    "list": lambda link: (link.sendall(b"[]\n"), link.recv(1)),
    "empty greeting": lambda link: (link.sendall(b'{"QMP": {}}\n'), link.recv(1)),
    "odd greeting": lambda link: (link.sendall(b'{"QMP": {"version": 7, "capabilities": []}}\n'), link.recv(1)),
    "guest agent": lambda link: (link.sendall(b'{"return": {}}\n'), link.recv(1)),
    "not utf-8": lambda link: (link.sendall(b"\xff\xfe\n"), link.recv(1)),
    "deep": lambda link: (link.sendall(b"[" * 100_000 + b"\n"), link.recv(1)),
    "refuses": lambda link: (
        link.sendall(
            b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}\n'
        ),
        link.recv(99),
        link.sendall(b'{"error": {"class": "GenericError", "desc": "no"}}\n'),
        link.recv(1),
    ),
}


@pytest.mark.parametrize("talk", TALKS)
def test_a_socket_that_does_not_speak_qmp(lab_dir: Path, talk: str) -> None:
    stage = Stage(lab_dir)
    with listener(lab_dir / "s", TALKS[talk]) as path:
        done = stage.cli("backup", f"qmp:{path}", timeout=20)
    assert done.code == 4
    assert "QMP" in one_line(done)
    assert str(path) in done.err


def test_a_silent_listener_is_not_waited_for(lab_dir: Path) -> None:
    stage = Stage(lab_dir)
    with listener(lab_dir / "s", lambda link: (link.recv(1), None)[1]) as path:
        done = stage.cli("backup", f"qmp:{path}", timeout=20)
    assert done.code == 4
    assert "no greeting within 5 s" in one_line(done)


def test_a_flood_is_not_waited_for(lab_dir: Path) -> None:
    stage = Stage(lab_dir)
    with listener(lab_dir / "s", flood) as path:
        done = stage.cli("backup", f"qmp:{path}", timeout=20)
    assert done.code == 4
    one_line(done)


def test_a_monitor_in_use(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    other = Monitor(qemu.qmp_path)
    try:
        done = stage.cli_backup(qemu, timeout=20)
        assert done.code == 4
        line = one_line(done)
        assert "Another program holds this monitor" in line
        assert "second -qmp socket" in line
    finally:
        other.close()
    assert leftovers(qemu, stage.scratch) == []
    assert stage.cli_backup(qemu).code == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_socket_without_permission(lab_dir: Path, bare_qemu: Start, capfd: pytest.CaptureFixture[str]) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    qemu.directory.chmod(0o711)
    qemu.qmp_path.chmod(0o600)

    def as_nobody() -> int:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            stage.backup(qemu)
        except PullbackError as error:
            print(error, flush=True)
            return error.exit_code
        return 0

    assert forked(as_nobody) == 4
    said = capfd.readouterr().out
    assert f"no permission to open the QMP socket {qemu.qmp_path}" in said
    assert "as QEMU's user or as root" in said


# -- the repository and its password ------------------------------------------------------------------------------


def test_repository_and_password(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB)], running=True)
    (lab_dir / "empty").touch()
    cases: list[tuple[int, str, dict[str, Any]]] = [
        (10, "there is no repository", {"env": {"RESTIC_REPOSITORY": str(lab_dir / "missing")}}),
        (12, "password", {"env": {"RESTIC_PASSWORD": "wrong"}}),
        (2, "password", {"env": {"RESTIC_PASSWORD": ""}}),
        (2, "no password", {"unset": ["RESTIC_PASSWORD"]}),
        (2, "no repository", {"unset": ["RESTIC_REPOSITORY"]}),
        (2, "cannot read the password file", {"env": {"RESTIC_PASSWORD_FILE": str(lab_dir / "missing")}}),
        (2, "is empty", {"env": {"RESTIC_PASSWORD_FILE": str(lab_dir / "empty")}}),
        (2, "exit code 3", {"env": {"RESTIC_PASSWORD_COMMAND": "sh -c 'exit 3'"}}),
        (2, "cannot run the password command", {"env": {"RESTIC_PASSWORD_COMMAND": "/nowhere/at-all"}}),
    ]
    for code, words, more in cases:
        for arguments in (["backup", f"qmp:{qemu.qmp_path}"], ["list"], ["restore", "latest", "--to", lab_dir / "to"]):
            done = stage.cli(*arguments, **more)
            assert (done.code, words) == (code, words if words.lower() in one_line(done).lower() else done.err)
            if arguments[0] == "backup" and code != 2:
                break  # the others open the repository just so; spared, as opening costs time
    assert leftovers(qemu, stage.scratch) == []
    assert qemu.bitmaps("vda") == {}
    assert not (lab_dir / "to").exists()


def test_passwords_from_everywhere(lab_dir: Path) -> None:
    stage = Stage(lab_dir)
    (lab_dir / "pw").write_text("correct horse\n")
    for more in (
        {"RESTIC_PASSWORD_FILE": str(lab_dir / "pw")},
        {"RESTIC_PASSWORD_COMMAND": f"cat {lab_dir / 'pw'}"},
    ):
        assert stage.cli("list", env=more, unset=["RESTIC_PASSWORD"]).code == 0


def test_backups_that_are_not_there(lab_dir: Path) -> None:
    repo = lab_dir / "repo2"
    repository = new_repository(repo)
    with repository.lock():
        ids = [store_backup(repository, {"vda": [bytes(512)]}, day=day, domain="web") for day in range(17)]
    first = next(one for one in "0123456789abcdef" if sum(backup.startswith(one) for backup in ids) > 1)
    stage = Stage(lab_dir)
    to = lab_dir / "to"
    env = {"RESTIC_REPOSITORY": str(repo)}
    for spec, words in (
        ("zzzz", "There is no backup 'zzzz'"),
        (first, "names"),
        ("nobody@latest", "no backup of a domain 'nobody'"),
        ("web@", "There is no backup"),
    ):
        done = stage.cli("restore", spec, "--to", to, env=env)
        assert done.code == 13
        assert words in one_line(done)
        assert not to.exists()
    nothing = stage.cli("restore", "latest", "--to", to)
    assert nothing.code == 13
    assert "no backup in this repository yet" in one_line(nothing)
    # The manifest of these is none: said as such, with the backup's name.
    damaged = stage.cli("restore", ids[0], "--to", to, env=env)
    assert damaged.code == 8
    assert not to.exists()
    assert "damaged" in stage.cli("list", env=env).out


# -- the command line and the configuration -----------------------------------------------------------------------


def test_domains_that_nobody_knows(lab_dir: Path) -> None:
    stage = Stage(lab_dir)
    for spec in ("web", "qmp:", "tcp:1.2.3.4", ""):
        done = stage.cli("backup", spec)
        assert done.code == 2
        one_line(done)
    assert stage.cli("backup", "qmp:relative").code == 4
    assert stage.cli("restore", "latest", "--to", lab_dir / "to", "--format", "vmdk").code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("domain = [", "is not TOML"),
        ('[domain.web]\nname = "x"', "domain.web.qmp is missing"),
        ("[domain.web]\nqmp = 1", "domain.web.qmp is not a text"),
        ('[domain.web]\nqmp = "/x"\ndisks = "vda"', "domain.web.disks is not a list"),
        ('[domain.web]\nqmp = "/x"\ncolour = "red"', "domain.web.colour is not known"),
        ("[repository]\nplace = 1", "repository.place is not known"),
        ("domain = 1", "domain is not a table"),
        ("[other]\n", "other is not known"),
    ],
)
def test_a_configuration_with_an_error(lab_dir: Path, text: str, words: str) -> None:
    stage = Stage(lab_dir)
    path = lab_dir / "config.toml"
    path.write_text(text)
    done = stage.cli("backup", "web", "--config", path)
    assert done.code == 2
    assert words in one_line(done)
    assert str(path) in done.err


def test_a_configuration_that_is_not_there(lab_dir: Path) -> None:
    stage = Stage(lab_dir)
    done = stage.cli("backup", "web", "--config", lab_dir / "missing.toml")
    assert done.code == 2
    assert "cannot read the configuration" in one_line(done)
    (lab_dir / "binary").write_bytes(b"\xff\xfe")
    assert "not TOML" in one_line(stage.cli("backup", "web", "--config", lab_dir / "binary"))


def test_a_domain_of_the_configuration(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", MIB), stage.disk("vdb", MIB)], running=True)
    (lab_dir / "pw").write_text("correct horse\n")
    (lab_dir / "config.toml").write_text(
        f'[repository]\nlocation = "{stage.repo}"\npassword-file = "{lab_dir}/pw"\n'
        f'[domain.web]\nqmp = "{qemu.qmp_path}"\nname = "web-server"\ndisks = ["vdb"]\nscratch = "{stage.scratch}"\n'
    )
    unset = ["RESTIC_REPOSITORY", "RESTIC_PASSWORD"]
    env = {"PULLBACK_CONFIG": str(lab_dir / "config.toml")}
    done = stage.cli("backup", "web", "--json", env=env, unset=unset)
    assert done.code == 0
    assert done.event("backup")["domain"] == "web-server"
    assert [disk["target"] for disk in done.event("backup")["disks"]] == ["vdb"]
    listed = stage.cli("list", "web-server", "--json", env=env, unset=unset)
    assert len(listed.event("backups")["backups"]) == 1


def test_init(lab_dir: Path) -> None:
    stage = Stage(lab_dir)
    env = {"RESTIC_REPOSITORY": str(lab_dir / "new")}
    assert stage.cli("init", env=env).code == 0
    assert stage.cli("list", env=env).out == "no backups\n"
    assert subprocess.run(["restic", "snapshots"], env=stage.environment(**env), capture_output=True).returncode == 0
    again = stage.cli("init", env=env)
    assert again.code == 14
    assert "There is a repository" in one_line(again)
    (lab_dir / "used").mkdir()
    (lab_dir / "used" / "file").write_text("x")
    assert stage.cli("init", env=env | {"RESTIC_PASSWORD": "", "RESTIC_REPOSITORY": str(lab_dir / "x")}).code == 2
    assert not (lab_dir / "x" / "config").exists()


def test_errors_as_json(lab_dir: Path) -> None:
    stage = Stage(lab_dir)
    done = stage.cli("backup", f"qmp:{lab_dir}/nothing", "--json")
    assert done.code == 4
    assert [(event["event"], event["exit_code"]) for event in done.events] == [("error", 4)]
    assert "there is no QMP socket" in done.events[0]["message"]
    assert done.err == ""
