# SPDX-License-Identifier: Apache-2.0
"""Where repository, password and domain come from, what goes before what, and what is said of a wrong file."""

from __future__ import annotations

import os
import shlex
import stat
import sys
import threading
from pathlib import Path

import pytest

from pullback.cli import passwords
from pullback.cli.config import Config, DomainOptions, find_domain, load_config
from pullback.cli.options import repository_options
from pullback.cli.passwords import CacheOptions, RepositoryOptions, read_password, repository_opener
from pullback.errors import RepositoryMissing, UsageError
from pullback.repository import keys
from pullback.repository.crypto import Key
from pullback.repository.key_file import ScryptCost
from pullback.repository.local_store import LocalStore
from pullback.repository.location import is_local
from pullback.repository.repository import Repository
from pullback.repository.store import Store
from tests.support.cli import Terminal
from tests.support.product import Stage
from tests.support.restic import PASSWORD, Restic, needs_restic


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [*os.environ]:
        if name.startswith(("RESTIC_", "PULLBACK_CONFIG")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# -- the repository, and which password ---------------------------------------------------------------------------

FILE = Config(repository=RepositoryOptions("of-file", "file's file", None))


def test_the_location_is_the_command_lines_then_the_environments_then_the_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert repository_options(None, None, None, Config()).location is None
    assert repository_options(None, None, None, FILE).location == "of-file"
    monkeypatch.setenv("RESTIC_REPOSITORY_FILE", str(written(tmp_path / "where", " of-variable's-file \n")))
    assert repository_options(None, None, None, FILE).location == "of-variable's-file"
    monkeypatch.setenv("RESTIC_REPOSITORY", "of-variable")
    assert repository_options(None, None, None, FILE).location == "of-variable"
    assert repository_options("of-option", None, None, FILE).location == "of-option"


def test_the_password_comes_from_the_first_place_that_names_any(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def place(word: str) -> str:
        return str(written(tmp_path / word, f"{word}\n"))

    def chosen(file: str | None = None, command: str | None = None) -> str:
        return read_password(repository_options(None, file, command, config))

    config = Config(repository=RepositoryOptions(None, None, "echo config command"))
    assert chosen() == "config command"
    config = Config(repository=RepositoryOptions(None, place("config"), "echo no"))
    assert chosen() == "config"
    monkeypatch.setenv("RESTIC_PASSWORD", "variable")
    assert chosen() == "variable"
    monkeypatch.setenv("RESTIC_PASSWORD_COMMAND", "echo variable command")
    assert chosen() == "variable command"
    monkeypatch.setenv("RESTIC_PASSWORD_FILE", place("variable-file"))
    assert chosen() == "variable-file"
    assert chosen(command="echo option command") == "option command"
    assert chosen(file=place("option-file")) == "option-file"
    assert chosen(place("option-file"), "echo option command") == "option-file"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (RepositoryOptions(password_file="/nowhere/at/all"), "cannot read the password file /nowhere/at/all: No such"),
        (RepositoryOptions(password_file="/proc/self"), "cannot read the password file /proc/self: Is a directory"),
        (RepositoryOptions(password_file="/dev/null"), "the password file /dev/null is empty"),
        (RepositoryOptions(password_command="false"), "the password command ended with exit code 1"),
        (RepositoryOptions(password_command="true"), "the password command printed nothing"),
        (RepositoryOptions(password_command="/nowhere/at/all"), "cannot run the password command: "),
        (RepositoryOptions(password_command="echo 'open"), "cannot run the password command: No closing quotation"),
        (RepositoryOptions(password_command=""), "no password for the repository was given"),
        (RepositoryOptions(), "no password for the repository was given"),
        (RepositoryOptions(password=""), "no password for the repository was given"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_password_that_cannot_be_had_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, options: RepositoryOptions, says: str
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(UsageError, match=says):
        read_password(options)


def test_a_password_is_not_shown_with_the_options() -> None:
    assert "secret" not in repr(RepositoryOptions("there", password="secret"))


def test_a_new_password_is_asked_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["one", "one", "one", "two", "one"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(passwords.getpass, "getpass", lambda prompt: next(answers))
    assert read_password(RepositoryOptions(), confirm=True) == "one"
    with pytest.raises(UsageError, match="not the same"):
        read_password(RepositoryOptions(), confirm=True)
    assert read_password(RepositoryOptions()) == "one"


def answering(stage: Stage, password: str) -> tuple[int, str]:
    """Run ``pullback list`` at a terminal and give this password; exit code and what was shown."""
    environment = {key: value for key, value in stage.environment().items() if key != "RESTIC_PASSWORD"}
    with Terminal(stage.command("list"), environment) as terminal:
        assert terminal.read_until(b"Password for the repository: ")
        terminal.type(password)
        return terminal.end()


def test_at_a_terminal_the_password_is_asked_for_and_not_shown(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    code, shown = answering(stage, PASSWORD)
    assert code == 0
    assert "no backups" in shown
    assert PASSWORD not in shown
    code, shown = answering(stage, "wrong")
    assert code == 12
    assert "opens with this password" in shown


@needs_restic
@pytest.mark.parametrize("content", ["  two words \nand a line\r\n\n", "\ufeffmarked\n", "plain"])
def test_files_and_commands_mean_the_same_password_as_with_restic(tmp_path: Path, content: str) -> None:
    file = written(tmp_path / "password", content)
    password = read_password(RepositoryOptions(password_file=str(file)))
    Repository.init(LocalStore(tmp_path / "repo"), password, cost=ScryptCost(n=16, r=1, p=1))
    restic = Restic(tmp_path / "repo", password="")
    restic.run("snapshots", RESTIC_PASSWORD_FILE=str(file))
    if not content.startswith("\ufeff"):
        command = f"cat {shlex.quote(str(file))}"
        assert read_password(RepositoryOptions(password_command=command)) == password
        restic.run("snapshots", RESTIC_PASSWORD_COMMAND=command)


def test_while_a_repository_is_open_sighup_ends_nothing(tmp_path: Path) -> None:
    """restic sends it to ask whether the owner of a lock lives."""
    stage = Stage(tmp_path)
    script = (
        "import os, signal, sys\n"
        "from pullback.cli.passwords import RepositoryOptions, repository_opener\n"
        f"repository_opener(RepositoryOptions({str(stage.repo)!r}, password={PASSWORD!r}))\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", script]) == 0


def test_a_password_is_tried_before_anybody_waits_for_it_and_again_only_for_a_second_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage, find, tried = Stage(tmp_path), keys.find_key, threading.Event()
    times = 0

    def watched(store: Store, password: str) -> Key:
        nonlocal times
        times += 1
        tried.set()
        return find(store, password)

    monkeypatch.setattr(keys, "find_key", watched)
    monkeypatch.setattr("pullback.repository.repository.find_key", watched)
    opener = repository_opener(RepositoryOptions(str(stage.repo), password=PASSWORD), CacheOptions(none=True))
    assert tried.wait(30)
    first = opener()
    assert times == 1
    assert opener() is not first and times == 2


def test_what_is_wrong_with_a_repository_is_told_by_the_call_not_before(tmp_path: Path) -> None:
    opener = repository_opener(RepositoryOptions(str(tmp_path / "none"), password=PASSWORD), CacheOptions(none=True))
    for _ in range(2):
        with pytest.raises(RepositoryMissing):
            opener()


@pytest.mark.parametrize("location", ["/srv/backup", "local:relative", "backup", "s3:https://host/bucket"])
def test_only_a_directory_is_opened_ahead(location: str) -> None:
    """Whoever presses Ctrl-C does not wait for a store that is away."""
    assert is_local(location) == ("s3" not in location)


# -- the configuration file ---------------------------------------------------------------------------------------


def test_the_file_is_the_options_then_the_variables_then_the_users_then_the_systems(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def named(name: str) -> str:
        return str(written(tmp_path / name, f'[repository]\nlocation = "{name}"\n'))

    system = tmp_path / "system.toml"
    real = Path

    def path(*parts: str) -> Path:
        return system if parts == ("/etc/pullback/config.toml",) else real(*parts)

    path.home = real.home  # type: ignore[attr-defined]
    monkeypatch.setattr("pullback.cli.config.Path", path)
    assert load_config(None) == Config()
    named("system.toml")
    assert load_config(None).repository.location == "system.toml"
    named("home/pullback/config.toml")
    assert load_config(None).repository.location == "home/pullback/config.toml"
    monkeypatch.setenv("PULLBACK_CONFIG", named("variable.toml"))
    assert load_config(None).repository.location == "variable.toml"
    assert load_config(named("option.toml")).repository.location == "option.toml"


WRONG = [
    ("nonsense = 1", "nonsense is not known (there are repository, domain)"),
    ("repository = 1", "repository is not a table"),
    ("[repository]\nplace = 'x'", "repository.place is not known"),
    ("[repository]\nlocation = 1", "repository.location is not a text"),
    ("[repository]\npassword-file = []", "repository.password-file is not a text"),
    ("domain = 1", "domain is not a table"),
    ("[domain]\nweb = 'x'", "domain.web is not a table"),
    ("[domain.web]\nname = 'x'", "domain.web.qmp is missing"),
    ("[domain.web]\nqmp = 1", "domain.web.qmp is not a text"),
    ("[domain.web]\nqmp = '/x'\nsocket = '/y'", "domain.web.socket is not known"),
    ("[domain.web]\nqmp = '/x'\ndisks = 'vda'", "domain.web.disks is not a list of names"),
    ("[domain.web]\nqmp = '/x'\ndisks = [1]", "domain.web.disks is not a list of names"),
    ("[domain.web]\nqmp = '/x'\nscratch = true", "domain.web.scratch is not a text"),
]


@pytest.mark.parametrize(("text", "says"), WRONG, ids=[says for _, says in WRONG])
def test_what_is_wrong_in_a_file_is_named_with_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path / "config.toml", text)
    with pytest.raises(UsageError) as caught:
        load_config(str(path))
    assert caught.value.what.startswith(f"in the configuration {path}, {says}")


def test_a_file_that_is_no_configuration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    with pytest.raises(UsageError, match=f"cannot read the configuration {path}: No such file"):
        load_config(str(path))
    for content in (b"[repository", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"the configuration {path} is not TOML"):
            load_config(str(path))


def test_a_wrong_file_ends_a_command_with_2(tmp_path: Path) -> None:
    path = written(tmp_path / "config.toml", "nonsense = 1")
    done = Stage(tmp_path).cli("list", "--config", path)
    assert (done.code, done.out) == (2, "")
    assert str(path) in done.err
    assert "nonsense" in done.err


def test_a_domain_is_a_socket_or_a_name(tmp_path: Path) -> None:
    path = written(
        tmp_path / "config.toml",
        '[domain.web]\nqmp = "/run/web"\n'
        '[domain.db]\nqmp = "/run/db"\nname = "base"\ndisks = ["sda"]\nscratch = "/s"\n',
    )
    config = load_config(str(path))
    assert find_domain("web", config) == DomainOptions("/run/web", name="web")
    assert find_domain("db", config) == DomainOptions("/run/db", name="base", disks=("sda",), scratch="/s")
    assert find_domain("qmp:/run/a:b", config) == DomainOptions("/run/a:b")
    with pytest.raises(UsageError, match="It names web, db"):
        find_domain("nonsense", config)
    with pytest.raises(UsageError, match="There is no configuration file"):
        find_domain("web", Config())


def test_the_commands_use_the_file(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    password = written(tmp_path / "password", PASSWORD)
    text = f'[repository]\nlocation = "{stage.repo}"\npassword-file = "{password}"\n'
    written(tmp_path / "pullback" / "config.toml", text)  # XDG_CONFIG_HOME is the stage's place
    bare = ("RESTIC_REPOSITORY", "RESTIC_PASSWORD")
    assert stage.cli("list", unset=bare).code == 0
    assert stage.cli("list", "--repo", tmp_path / "none", unset=bare).code == 10
    assert stage.cli("list", env={"RESTIC_PASSWORD": "wrong"}, unset=bare[:1]).code == 12


def test_init_makes_a_repository_that_others_cannot_read(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    place = tmp_path / "new"
    assert stage.cli("init", "--repo", place).code == 0
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stage.cli("list", "--repo", place).out == "no backups\n"
    assert stage.cli("init", "--repo", place).code == 14
