# SPDX-License-Identifier: Apache-2.0
"""Files in a backup: names that an image chose, archives that lie, and a libguestfs that fails in every way."""

from __future__ import annotations

import io
import os
import signal
import stat
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lab.processes import wait_for
from pullback.engine.appliance import Appliance, Deadlines
from pullback.engine.extracting import Extraction
from pullback.errors import FilesError, RestoreError, UsageError
from pullback.plan.files import (
    FileSystem,
    Stat,
    choose_filesystem,
    image_path,
    parse_filesystems,
    parse_stats,
    parts_below,
    printable,
    quoted,
    the_one_with,
)
from tests.support import fake_guestfish
from tests.support.cli import filled_stage
from tests.support.product import Stage

ROOTS = FileSystem("/dev/sda2", "vda", "ext4", "root", "1-2")
DATA = FileSystem("/dev/vg/data", "", "xfs", "root", "3-4")
SWAP = FileSystem("/dev/sda3", "vda", "swap")

# -- names --------------------------------------------------------------------------------------------------------


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert printable("plain name, ü") == "plain name, ü"
    assert printable("\x1b[2J\n\x9b\\") == "\\x1b[2J\\x0a\\xc2\\x9b\\x5c"
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    assert printable("\u202egnp.exe") == "\\xe2\\x80\\xaegnp.exe"  # it would be read from right to left


@pytest.mark.parametrize(
    "name", ["/etc/it's", '/a "b" \\c', "/new\nline -run", os.fsdecode(b"/caf\xe9"), "", "a | sh", "#"]
)
def test_a_quoted_word_is_one_word_whatever_it_holds(name: str) -> None:
    line = quoted(name)
    assert fake_guestfish.words_of(line.encode()) == [name]
    assert line.isascii()
    assert "\n" not in line


def test_paths_lead_nowhere_else() -> None:
    assert image_path("etc//./passwd/") == "/etc/passwd"
    assert image_path("/") == "/"
    for wrong in ("/etc/../..", "..", "/a\0b", "/" + "a" * 5000):
        with pytest.raises(UsageError):
            image_path(wrong)
    assert parts_below("./etc/a b") == ("etc", "a b")
    assert parts_below(".") == ()
    assert [parts_below(name) for name in ("/etc/passwd", "../x", "a/../../x")] == [None, None, None]


def test_a_file_system_is_chosen_by_device_label_or_uuid() -> None:
    found = [ROOTS, DATA, SWAP]
    assert choose_filesystem(found, "/dev/sda2") is ROOTS
    assert choose_filesystem(found, "3-4") is DATA
    with pytest.raises(UsageError, match="2 file systems are called root"):
        choose_filesystem(found, "root")
    with pytest.raises(UsageError, match=r"no file system is called x. There are: /dev/sda2 \(ext4, root\)"):
        choose_filesystem(found, "x")
    assert the_one_with(["/etc"], [DATA], found) is DATA
    with pytest.raises(UsageError, match="no file system of this backup has /etc"):
        the_one_with(["/etc"], [], found)
    with pytest.raises(UsageError, match="several file systems have /"):
        the_one_with(["/"], [ROOTS, DATA], found)
    assert [one.has_files for one in found] == [True, True, False]


def test_answers_of_libguestfs_are_read() -> None:
    text = "/dev/sda1: vfat\n/dev/sdab2: ext4\n/dev/vg/a: b: xfs\nbtrfsvol:/dev/sdb/root: btrfs\n/dev/sdc: unknown\n"
    found = parse_filesystems(text, ["vda", "vdb"])
    assert [(one.device, one.disk, one.kind) for one in found] == [
        ("/dev/sda1", "vda", "vfat"),
        ("/dev/sdab2", "", "ext4"),
        ("/dev/vg/a: b", "", "xfs"),
        ("btrfsvol:/dev/sdb/root", "vdb", "btrfs"),
        ("/dev/sdc", "", "unknown"),
    ]
    assert parse_stats(f"[0] = {{\n{fake_guestfish.FILE}\n}}\n{fake_guestfish.stats('none')}") == [
        Stat(0o100644, 6, 981158400 * 10**9),
        None,
    ]


# -- extracting ---------------------------------------------------------------------------------------------------


def member(name: str, kind: bytes = tarfile.REGTYPE, **more: object) -> tarfile.TarInfo:
    one = tarfile.TarInfo(name)
    one.type, one.mode, one.mtime = kind, 0o644, 981158400
    for key, value in more.items():
        setattr(one, key, value)
    return one


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as writing:
        for one, content in members:
            one.size = len(content)
            writing.addfile(one, io.BytesIO(content))
    return out.getvalue()


def everything_in(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


def test_an_archive_that_lies_writes_nothing_elsewhere(tmp_path: Path) -> None:
    (root := tmp_path / "out").mkdir()
    (outside := tmp_path / "outside").mkdir()
    (outside / "victim").write_text("mine")
    content = archive(
        (member("../escaped"), b"x"),
        (member(f"{outside}/absolute"), b"x"),
        (member("a/../../escaped"), b"x"),
        (member("link", tarfile.SYMTYPE, linkname=str(outside)), b""),
        (member("link/through"), b"x"),
        (member("up", tarfile.SYMTYPE, linkname="../outside/victim"), b""),
        (member("up"), b"overwritten"),
        (member("hard", tarfile.LNKTYPE, linkname=str(outside / "victim")), b""),
        (member("hard2", tarfile.LNKTYPE, linkname="../outside/victim"), b""),
        (member("null", tarfile.CHRTYPE, devmajor=1, devminor=3), b""),
        (member("pipe", tarfile.FIFOTYPE), b""),
        (member("good", mode=0o6755), b"good"),
        (member("good"), b"twice"),
    )
    extraction = Extraction(root)
    extraction.tree(("etc",), io.BytesIO(content))
    extraction.finish()
    assert everything_in(outside) == {"victim"}
    assert (outside / "victim").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "outside"}
    # A directory came where a link was wanted: the link is what is left out.
    assert everything_in(root) == {"etc", "etc/link", "etc/link/through", "etc/up", "etc/good"}
    assert (root / "etc/good").read_bytes() == b"good"
    assert stat.S_IMODE((root / "etc/good").stat().st_mode) == 0o755
    assert (root / "etc/good").stat().st_mtime == 981158400
    assert [one.path for one in extraction.left_out if one.harmless] == ["etc/null", "etc/pipe"]
    assert len([one for one in extraction.left_out if not one.harmless]) == 8


def test_links_directories_and_holes_are_made_as_they_were(tmp_path: Path) -> None:
    content = archive(
        (member(".", tarfile.DIRTYPE, mode=0o755), b""),
        (member("./dir", tarfile.DIRTYPE, mode=0o500), b""),
        (member("./dir/file"), bytes(1 << 20) + b"end"),
        (member("./dir/abs", tarfile.SYMTYPE, linkname="/etc/shadow"), b""),
        (member("./again", tarfile.LNKTYPE, linkname="./dir/file"), b""),
        (member("./abs2", tarfile.LNKTYPE, linkname="./dir/abs"), b""),
    )
    extraction = Extraction(tmp_path)
    extraction.tree((), io.BytesIO(content))
    extraction.finish()
    assert not extraction.left_out
    assert os.readlink(tmp_path / "dir/abs") == os.readlink(tmp_path / "abs2") == "/etc/shadow"
    assert (tmp_path / "dir/file").read_bytes() == bytes(1 << 20) + b"end"
    assert (tmp_path / "dir/file").stat().st_blocks < 256
    assert (tmp_path / "again").stat().st_ino == (tmp_path / "dir/file").stat().st_ino
    assert stat.S_IMODE((tmp_path / "dir").stat().st_mode) == 0o500
    assert (tmp_path / "dir").stat().st_mtime == 981158400
    assert (extraction.files, extraction.bytes_written) == (4, (1 << 20) + 3)


def test_an_archive_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    content = archive((member("file"), bytes(5000)))
    with pytest.raises(FilesError, match="no whole archive"):
        Extraction(tmp_path).tree((), io.BytesIO(content[:3000]))


def test_no_room_ends_it(tmp_path: Path) -> None:
    with pytest.raises(RestoreError, match="No space left"):
        Extraction(tmp_path).file(("a",), 0o644, 0, Full())


class Full:
    def read(self, size: int, /) -> bytes:
        raise OSError(28, "No space left on device")


# -- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return filled_stage(tmp_path)


@pytest.fixture
def guestfish(tmp_path: Path) -> dict[str, str]:
    return fake_guestfish.install(tmp_path / "bin")


def test_without_kvm_it_starts_all_the_same(stage: Stage, guestfish: dict[str, str]) -> None:
    done = stage.cli("files", "latest", env={**guestfish, "FAKE_GUESTFISH": "kvm-fails"})
    assert done.code == 0
    assert "takes longer" in done.err
    lines = [line.split() for line in done.out.splitlines()[1:]]
    assert lines[0] == ["/dev/sda1", "vda", "ext4", "1.00", "MiB", "root", "0123-4567"]
    assert lines[1] == ["/dev/sda2", "vda", "unknown", "1.00", "MiB", "root", "-"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("no-start", 17, "cannot run: appliance closed"),
        ("no-kernel", 17, "linux-image-cloud-amd64"),
        ("dies", 17, "guestfish ended"),
    ],
)
def test_a_libguestfs_that_fails_is_exit_code_17(
    stage: Stage, guestfish: dict[str, str], words: str, code: int, said: str
) -> None:
    done = stage.cli("files", "latest", "/etc", env={**guestfish, "FAKE_GUESTFISH": words})
    assert done.code == code
    assert said in done.err
    assert "The backup is untouched" in done.err


def test_what_is_missing_is_said_before_anything_is_opened(stage: Stage, tmp_path: Path) -> None:
    done = stage.cli("files", "latest", env={"PATH": str(tmp_path)})
    assert done.code == 2
    assert "apt install guestfish" in done.err


def test_files_go_into_a_new_or_empty_directory_only(stage: Stage, guestfish: dict[str, str], tmp_path: Path) -> None:
    done = stage.cli("files", "latest", "/hello", "--to", tmp_path / "new", env=guestfish)
    assert done.code == 0
    assert (tmp_path / "new/hello").read_bytes() == b"hello\n"
    assert stage.cli("files", "latest", "/hello", "--to", tmp_path / "new", env=guestfish).code == 9
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert stage.cli("files", "latest", "/hello", "--to", tmp_path / "link", env=guestfish).code == 9
    assert stage.cli("files", "latest", "--to", tmp_path / "newer", env=guestfish).code == 2
    assert stage.cli("files", "latest", "/no/such", "--to", tmp_path / "newer", env=guestfish).code == 2
    assert not (tmp_path / "newer").exists()


def test_what_cannot_be_extracted_into_is_said(stage: Stage, guestfish: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for to, said in (("x" * 300, "cannot look into"), ("file/below", "cannot make")):
        done = stage.cli("files", "latest", "/hello", "--to", tmp_path / to, env=guestfish)
        assert done.code == 9
        assert f"{said} {tmp_path / to}: " in done.err
        assert "Nothing was extracted. Choose another directory." in done.err


@pytest.mark.parametrize(
    ("words", "path", "code", "said"),
    [
        ("", "/no such", 2, "no file system of this backup has /no such."),
        ("broken", "/hello", 17, "has /hello, and /dev/sda1 cannot be read (libguestfs cannot mount-ro: mount_ro: bad"),
    ],
)
def test_why_a_path_is_not_found_is_said(
    stage: Stage, guestfish: dict[str, str], words: str, path: str, code: int, said: str
) -> None:
    """A file system that cannot be mounted may well have it."""
    done = stage.cli("files", "latest", path, env={**guestfish, "FAKE_GUESTFISH": words})
    assert done.code == code
    assert said in done.err


def test_an_archive_that_lies_is_exit_code_9(stage: Stage, guestfish: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "lies").write_bytes(archive((member("../\x1b[2Jescaped"), b"x"), (member("good"), b"x")))
    told = {**guestfish, "FAKE_GUESTFISH": f"archive={tmp_path / 'lies'}"}
    done = stage.cli("files", "latest", "/etc", "--to", tmp_path / "new", env=told)
    assert done.code == 9
    assert "left out ../\\x1b[2Jescaped: its name leads elsewhere" in done.out
    assert "\x1b" not in done.out + done.err
    assert everything_in(tmp_path / "new") == {"etc", "etc/good"}


def test_an_interrupted_one_leaves_nothing_running(stage: Stage, guestfish: dict[str, str], tmp_path: Path) -> None:
    environment = {**guestfish, "FAKE_GUESTFISH": "mute", "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    with stage.running("files", "latest", env=environment) as process:
        (pid,) = wait_for(lambda: fakes_below(process.pid), timeout=30, what="guestfish")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130
    assert not Path(f"/proc/{pid}").exists()
    assert not list((tmp_path / "tmp").iterdir())
    assert not list((stage.repo / "locks").iterdir())


def fakes_below(parent: int) -> list[int]:
    return [pid for pid in children(parent) if b"fake_guestfish" in if_there(Path(f"/proc/{pid}/cmdline"))]


def children(parent: int) -> Iterator[int]:
    for task in Path(f"/proc/{parent}/task").iterdir():
        yield from map(int, if_there(task / "children").split())


def if_there(path: Path) -> bytes:
    """What is said of a process or a thread, which may end before or while it is read: then nothing."""
    with suppress(OSError):
        return path.read_bytes()
    return b""


def test_one_that_never_answers_is_ended(
    guestfish: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**guestfish, "FAKE_GUESTFISH": "mute", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(FilesError, match="does not answer"),
        Appliance(str(tmp_path / "nbd"), ["vda"], lambda text: None, Deadlines(without_kvm=1.0)) as appliance,
    ):
        appliance.start()


def test_one_that_does_not_end_is_ended(
    guestfish: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**guestfish, "FAKE_GUESTFISH": "lingers", "TMPDIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", None)
    with Appliance(str(tmp_path / "nbd"), ["vda"], lambda text: None, Deadlines(ending=0.1)) as appliance:
        appliance.start()
        (pid,) = fakes_below(os.getpid())
    assert not Path(f"/proc/{pid}").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"bin"}


def test_the_repository_s_password_is_not_handed_on(
    guestfish: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin/guestfish"
    program.write_text(program.read_text().replace("exec", f"env >{tmp_path}/env; exec"))
    for name, value in {**guestfish, "RESTIC_PASSWORD": "secret", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(name, value)
    with Appliance(str(tmp_path / "nbd"), ["vda"], lambda text: None) as appliance:
        appliance.start()
    assert "LIBGUESTFS_BACKEND=direct" in (tmp_path / "env").read_text()
    assert "secret" not in (tmp_path / "env").read_text()


def test_a_restore_to_where_nothing_can_be_says_what_to_do(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = stage.cli("restore", "latest", "--to", tmp_path / "file" / "below")
    assert done.code == 9
    assert "Not a directory. Nothing was written. Name another directory with --to." in done.err
