# SPDX-License-Identifier: Apache-2.0
"""The commands that restic carries out: what it is given, what becomes of its end, and that backups stay right."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from lab.processes import wait_for
from lab.qemu import BareQemu
from pullback.engine import restic as pull
from pullback.engine.restic import RepositoryAccess
from pullback.errors import RepositoryLocked
from pullback.repository.local_store import LocalStore
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot
from tests.support.backups import CHEAP, MOMENT, new_repository, open_repository, store_backup
from tests.support.cli import MANIFEST, Terminal, filled_stage
from tests.support.product import MIB, Stage, forked, references, same
from tests.support.restic import PASSWORD, Restic, needs_restic

pytestmark = needs_restic

#: Says what it was given, then reads the password as restic does.
SPY = """#!/bin/sh
[ "$1" = version ] && {{ echo "restic {version} compiled"; exit 0; }}
printf '%s\\n' "$@" > "{place}/arguments"
tr '\\0' '\\n' < /proc/self/environ > "{place}/environment"
[ -z "$RESTIC_PASSWORD_FILE" ] || cat "$RESTIC_PASSWORD_FILE" > "{place}/password"
[ -z "$RESTIC_FROM_PASSWORD_FILE" ] || cat "$RESTIC_FROM_PASSWORD_FILE" > "{place}/from"
{then}
"""


def spy(place: Path, then: str = "", version: str = "0.14.0") -> dict[str, str]:
    """A program called restic; the environment in which it is the first one."""
    folder = place / "spy"
    folder.mkdir(exist_ok=True)
    program = folder / "restic"
    program.write_text(SPY.format(place=folder, then=then, version=version))
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return filled_stage(tmp_path)


def more_backups(stage: Stage, *domains: str) -> list[str]:
    """One backup of each of these, a day after the other; the ids of all there are, oldest first."""
    repository = open_repository(stage.repo)
    with repository.lock():
        for day, domain in enumerate(domains, 1):
            text = json.dumps({**MANIFEST, "domain": domain}).encode()
            store_backup(repository, {"vda": [os.urandom(1 << 20)]}, domain=domain, day=day, manifest=text)
    return stage.listed()


# -- what restic is given -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["variable", "file", "command"])
def test_the_password_goes_through_a_pipe_alone(stage: Stage, way: str) -> None:
    (file := stage.place / "password").write_text(f"{PASSWORD}\n")
    given = {
        "variable": {},
        "file": {"RESTIC_PASSWORD_FILE": str(file)},
        "command": {"RESTIC_PASSWORD_COMMAND": f"cat {file}"},
    }[way]
    unset = () if way == "variable" else ("RESTIC_PASSWORD",)
    done = stage.cli("prune", "--max-unused", "7%", env=spy(stage.place) | given, unset=unset)
    assert done.code == 0, done.err
    said = {name: (stage.place / "spy" / name).read_text() for name in ("arguments", "environment", "password")}
    assert said["password"] == PASSWORD
    assert said["arguments"] == "prune\n--max-unused=7%\n"
    assert PASSWORD not in said["environment"]
    assert f"RESTIC_REPOSITORY={stage.repo}\n" in said["environment"]
    assert "RESTIC_PASSWORD_COMMAND" not in said["environment"]


def test_two_passwords_for_a_copy(stage: Stage, tmp_path: Path) -> None:
    other = new_repository(tmp_path / "other")
    Restic(tmp_path / "other").run("key", "add", "--new-password-file", str(_written(tmp_path / "new", "another")))
    done = stage.cli("copy", "--to", tmp_path / "other", "--to-password-file", tmp_path / "new", env=spy(stage.place))
    assert done.code == 0, done.err
    assert other.id
    assert (stage.place / "spy" / "password").read_text() == "another"
    assert (stage.place / "spy" / "from").read_text() == PASSWORD


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_password_with_white_space_around_it(stage: Stage) -> None:
    """restic strips it from files, not from the variable: it has to open what was opened so before."""
    odd = "  spaces around  "
    variable = {"RESTIC_REPOSITORY": str(stage.place / "odd"), "RESTIC_PASSWORD": odd}
    assert stage.cli("init", env=variable).code == 0
    assert stage.cli("check", env=variable).code == 0
    Restic(stage.place / "odd", odd).check()
    (stage.place / "odd" / "config").unlink()  # nobody else has its password


@pytest.mark.parametrize(
    ("version", "words"), [("0.13.1", "too old"), ("0.9.6", "too old"), ("unknown", "does not say its version")]
)
def test_a_restic_that_will_not_do(stage: Stage, version: str, words: str) -> None:
    done = stage.cli("check", env=spy(stage.place, version=version))
    assert done.code == 2
    assert words in done.err
    assert "package restic" in done.err


def test_no_restic(stage: Stage, tmp_path: Path) -> None:
    done = stage.cli("check", env={"PATH": str(tmp_path)})
    assert (done.code, "restic is not installed" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("then", "code"),
    [
        ("exit 0", 0),
        ("exit 1", 14),
        ("exit 3", 14),
        ("exit 10", 10),
        ("exit 11", 11),
        ("exit 12", 12),
        ("echo 'repository is already locked by PID 1' >&2; exit 1", 11),
        ("echo 'Fatal: wrong password or no key found' >&2; exit 1", 12),
        ("echo 'Fatal: unable to open config file: gone' >&2; exit 1", 10),
        ("echo 'Fatal: repository contains errors' >&2; exit 1", 15),
        ("kill -9 $$", 14),
    ],
)
def test_what_becomes_of_its_exit_code(stage: Stage, then: str, code: int) -> None:
    done = stage.cli("check", env=spy(stage.place, then))
    assert done.code == code
    assert len([line for line in done.err.splitlines() if line.startswith("pullback: ")]) == (code != 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_waited_for(stage: Stage, number: int) -> None:
    ready, ended = stage.place / "ready", stage.place / "ended"
    # A shell that waits in `read` may miss a signal that comes just before.
    then = f'trap \'echo > "{ended}"; exit 130\' INT; echo > "{ready}"; while :; do sleep 0.1; done'
    with stage.running("prune", env=spy(stage.place, then)) as process:
        wait_for(ready.exists, "the program started")
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert ended.exists(), "it was not waited for"
    assert "interrupted" in err


def test_its_output_comes_as_it_is_made_also_on_a_terminal(stage: Stage) -> None:
    os.mkfifo(gate := stage.place / "gate")
    then = f'[ -t 1 ] && echo a-terminal; printf "half a line" >&2; read -r x < "{gate}"'
    with Terminal(stage.command("prune"), stage.environment(**spy(stage.place, then))) as terminal:
        assert terminal.read_until(b"half a line")
        gate.write_text("go\n")
        code, shown = terminal.end()
    assert code == 0
    assert "a-terminal" in shown


def test_a_reader_that_goes_away_ends_nothing(stage: Stage) -> None:
    ended = stage.place / "ended"
    then = f'for n in 1 2 3 4 5 6 7 8; do head -c 65536 /dev/zero; done; echo > "{ended}"'
    done = stage.cli(
        "prune", env=spy(stage.place, then), prefix=["bash", "-o", "pipefail", "-c", '"$@" | head -c 1', "-"]
    )
    assert done.code == 0
    assert ended.exists()


def test_a_locked_repository_is_waited_for(stage: Stage) -> None:
    lock = open_repository(stage.repo).lock()
    with lock:
        done = stage.cli("prune")
        assert done.code == 11
        assert "already locked" in done.err
        with stage.running("prune", "--lock-retry", "60") as process:
            assert process.stderr is not None
            wait_for(lambda: "waiting for the repository" in process.stderr.readline(), "it waits")  # type: ignore[union-attr]
            lock.release()
            process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("command", [["prune"], ["forget", "latest", "--prune"]], ids=["prune", "forget"])
def test_the_lock_of_a_killed_backup_is_in_nobodys_way(stage: Stage, command: list[str]) -> None:
    def die() -> int:
        open_repository(stage.repo).lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert forked(die) == -signal.SIGKILL
    assert len(list((stage.repo / "locks").iterdir())) == 1
    done = stage.cli(*command)
    assert done.code == 0, done.err
    assert "already locked" not in done.err
    assert list((stage.repo / "locks").iterdir()) == []


def test_who_is_waited_for_is_said_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every try restic says again who holds the lock; only another holder is news."""
    monkeypatch.setattr("pullback.engine.restic._RETRY_EVERY", 0.01)
    err, waits = bytearray(), list[str]()
    access = RepositoryAccess(str(stage.repo), PASSWORD)

    def prune(lock_retry: float) -> None:
        work = pull.Restic(
            ["prune"], access, err=err.extend, out=bytearray().extend, lock_retry=lock_retry, waiting=waits.append
        )
        with monkeypatch.context() as patch:
            patch.setenv("PATH", spy(stage.place, _LOCKED_FIVE_TIMES.format(place=stage.place))["PATH"])
            work.run()

    prune(60)
    assert [wait.split(",")[1] for wait in waits] == [f" which is locked by PID {one} on host" for one in (1, 2)]
    assert err == b"something else\n"
    (stage.place / "tries").unlink()
    with pytest.raises(RepositoryLocked):
        prune(0)
    assert b"already locked by PID 1" in err


_LOCKED_FIVE_TIMES = """
echo >> "{place}/tries"; n=$(wc -l < "{place}/tries")
[ $n -gt 5 ] && {{ echo something else >&2; exit 0; }}
echo "unable to create lock in backend: repository is already locked by PID $(( n > 3 ? 2 : 1 )) on host" >&2
echo "lock was created at some time ($n ms ago)" >&2; exit 1"""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("check --read-data-subset x", "--read-data-subset"),
        ("prune --max-unused abc", "--max-unused"),
        ("prune --max-unused 150%", "--max-unused"),
        ("key remove zzz", '"zzz"'),
        ("key add --new-password-file /nowhere", "/nowhere does not exist"),
        ("key add", "--new-password-file FILE"),
    ],
)
def test_what_restic_cannot_take_is_a_wrong_command_line(stage: Stage, words: str, says: str) -> None:
    done = stage.cli(*words.split())
    assert done.code == 2
    (said,) = (line for line in done.err.splitlines() if line.startswith("pullback: "))
    assert says in said


def test_a_copy_goes_to_another_repository_that_opens(stage: Stage, tmp_path: Path) -> None:
    done = stage.cli("copy", "--to", f"{stage.repo}/../{stage.repo.name}")
    assert (done.code, "is the repository that is copied from" in done.err) == (2, True), done.err
    Repository.init(LocalStore(tmp_path / "other"), "quite another", cost=CHEAP)
    done = stage.cli("copy", "--to", tmp_path / "other")
    assert (done.code, f"the other repository, {tmp_path}/other," in done.err) == (12, True), done.err
    assert "--to-password-file" in done.err
    (tmp_path / "other" / "config").unlink()  # nobody else has its password


# -- forget ---------------------------------------------------------------------------------------------------------


def test_each_domain_keeps_its_own_and_what_is_not_ours_stays(stage: Stage) -> None:
    foreign = Snapshot(MOMENT - timedelta(days=9), open_repository(stage.repo).find("latest").tree, ("/x",), "web")
    repository = open_repository(stage.repo)
    with repository.lock():
        other = repository.save_snapshot(foreign)
    first, second, mail, third = more_backups(stage, "web", "mail", "web")
    done = stage.cli("forget", "--keep-last", "1", "--dry-run", "--json")
    assert {one["id"] for one in done.event("retention")["keep"]} == {mail, third}
    assert {one["id"] for one in done.event("retention")["forget"]} == {first, second}
    assert stage.listed() == [first, second, mail, third]
    done = stage.cli("forget", "--keep-last", "1", "--domain", "mail", "--json")
    assert done.event("forgotten") == {"event": "forgotten", "backups": [], "pruned": False}
    done = stage.cli("forget", "--keep-last", "1", "--prune", "--json")
    assert done.event("forgotten") == {"event": "forgotten", "backups": [first, second], "pruned": True}
    assert stage.listed() == [mail, third]
    assert other in {one.id for one in open_repository(stage.repo).snapshots()}
    done = stage.cli("forget", other[:10])
    assert (done.code, "no backup of pullback's" in done.err) == (5, True)


def test_exactly_what_was_shown_is_forgotten(stage: Stage) -> None:
    """A backup stored after the question is neither looked at nor forgotten: restic is given ids."""
    more_backups(stage, "web")
    real = Restic(stage.repo).attempt("version").returncode
    assert real == 0
    stage.cli("forget", "--keep-last", "1", env=spy(stage.place, f"echo '{_answer(*stage.listed())}'"))
    assert (stage.place / "spy" / "arguments").read_text().split() == ["forget", stage.listed()[0]]


def _answer(going: str, staying: str) -> str:
    """What restic would say to the question, from which the second call's ids have to come."""
    one = {"id": going, "time": "2026-05-04T03:02:01Z", "hostname": "web"}
    two = {"id": staying, "time": "2026-05-05T03:02:01.123456789+02:00", "hostname": "web"}
    return json.dumps([{"keep": [two], "remove": [one], "reasons": [{"matches": ["last snapshot"]}]}])


@pytest.mark.parametrize(
    "arguments", [(), ("--prune",), ("latest", "--keep-last", "1"), ("--domain", "web"), ("--keep-last", "0")]
)
def test_forget_refuses_without_a_policy_or_with_two(stage: Stage, arguments: tuple[str, ...]) -> None:
    before = stage.listed()
    assert stage.cli("forget", *arguments).code == 2
    assert stage.listed() == before


@pytest.mark.parametrize("tag", ["no-such-tag", "pullback,no-such-tag"])
def test_a_policy_that_keeps_nothing_forgets_nothing(stage: Stage, tag: str) -> None:
    """restic would forget all of them: a word that is misspelt must not cost every backup of a domain."""
    before = more_backups(stage, "web", "mail")
    done = stage.cli("forget", "--keep-tag", tag, "--prune")
    assert (done.code, stage.listed()) == (5, before)
    assert "keeps none of the backups of mail (1), web (2)." in done.err
    assert "pullback forget BACKUP" in done.err
    assert stage.cli("forget", "--keep-tag", tag, "--keep-last", "1").code == 0
    assert stage.listed() == before[1:]


@pytest.mark.damages_repository("a broken snapshot file")
def test_what_cannot_be_read_is_told_and_not_forgotten(stage: Stage) -> None:
    first, second, third = more_backups(stage, "web", "web")
    whole = (path := stage.repo / "snapshots" / third).read_bytes()
    path.chmod(0o600)
    path.write_bytes(whole[:-1])
    done = stage.cli("forget", "--keep-last", "1", "--json")
    assert done.event("forgotten")["backups"] == [first]
    assert third in done.event("note")["message"]
    # What restic can read and we cannot: it says so itself here.
    done = stage.cli("forget", "--keep-last", "1", env=spy(stage.place, f"echo '{_answer(third, second)}'"))
    assert (done.code, f"would forget {third[:8]}" in done.err) == (5, True), done.err
    # What is to be kept has to be readable, too.
    done = stage.cli("forget", "--keep-last", "1", env=spy(stage.place, f"echo '{_answer(second, third)}'"))
    assert (done.code, "keeps none of the backups of web (1)" in done.err) == (5, True), done.err
    assert {one.name for one in path.parent.iterdir()} == {second, third}


def test_keys(stage: Stage) -> None:
    new = _written(stage.place / "new", "second password")
    assert stage.cli("key", "add", "--new-password-file", new).code == 0
    assert stage.cli("list", env={"RESTIC_PASSWORD": "second password"}).code == 0
    keys = stage.cli("key", "list", "--json").event("restic")["output"][0]
    (old,) = (key["id"] for key in keys if not key["current"])
    assert stage.cli("key", "remove", old).code == 0
    assert stage.cli("list", env={"RESTIC_PASSWORD": "second password"}).code == 12


# -- the next backup ------------------------------------------------------------------------------------------------


def test_after_the_newest_backup_is_forgotten_the_next_is_right(
    lab_dir: Path, bare_qemu: Callable[..., BareQemu]
) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", 2 * MIB)], running=True)
    made = []
    for turn in range(3):
        qemu.device_write("vda", turn * 300_000 // 512 * 512, 4096, turn + 1)
        made.append(stage.backup(qemu))
    assert stage.cli("forget", "latest", "--prune").code == 0
    assert stage.listed() == [made[0].id, made[1].id]
    qemu.device_write("vda", MIB, 4096, 9)
    state = references(qemu)
    result = stage.backup(qemu)
    (disk,) = result.manifest.disks
    assert disk.base is not None
    assert disk.base.backup == made[1].id
    same(stage.contents(result.id), state)
    shown = stage.cli("show", result.id).out
    assert f"of backup {made[1].id[:8]}, which is here" in shown
    assert stage.cli("forget", made[1].id).code == 0
    assert "which is not here any more, and not needed" in stage.cli("show", result.id).out
    stage.restic.check()


def test_a_copied_backup_is_a_base_only_as_long_as_its_checkpoint_stands(
    lab_dir: Path, bare_qemu: Callable[..., BareQemu]
) -> None:
    stage = Stage(lab_dir)
    second = lab_dir / "second"
    new_repository(second)
    qemu = bare_qemu([stage.disk("vda", 2 * MIB)], running=True)
    qemu.device_write("vda", 0, MIB, 1)
    stage.backup(qemu)
    qemu.device_write("vda", 4096, 4096, 2)
    state = references(qemu)
    first = stage.backup(qemu)
    assert stage.cli("copy", "--to", second, first.id).code == 0
    (copied,) = stage.listed(second)
    same(stage.contents(copied, second), state)

    qemu.device_write("vda", MIB, 4096, 3)
    state = references(qemu)
    built = stage.backup(qemu, repo=second)
    (disk,) = built.manifest.disks
    assert disk.base is not None
    assert disk.base.backup == copied, "its checkpoint stands, so it is as good a base as the original"
    same(stage.contents(built.id, second), state)
    elsewhere = {"RESTIC_REPOSITORY": str(second)}
    assert f"copied from backup {first.id}" in stage.cli("show", copied, env=elsewhere).out

    # The first repository merges its checkpoints away, and the second has nothing but the copy.
    assert stage.cli("forget", built.id, env=elsewhere).code == 0
    for turn in range(2):
        qemu.device_write("vda", turn * 8192, 4096, 4 + turn)
        stage.backup(qemu, keep_checkpoints=1)
    state = references(qemu)
    alone = stage.backup(qemu, repo=second)
    (disk,) = alone.manifest.disks
    assert disk.mode == "full"
    same(stage.contents(alone.id, second), state)
    Restic(second).check()
