# SPDX-License-Identifier: Apache-2.0
"""Exports on a real QEMU: addresses, names, changes since checkpoints, what is refused, and what is left."""

from __future__ import annotations

import json
import os
import socket
import ssl
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab import images
from lab.processes import run
from lab.qemu import BareQemu, qemu_version, short_directory
from pullback.errors import TransferError
from pullback.nbd.address import Address, TcpAddress, parse_uri
from pullback.nbd.blocking import NbdConnection
from tests.support.api import BLOCK, Api, by_everybody, by_nbdcopy, contexts, dirty_map, inside, scribble, state_of
from tests.support.product import MIB, Stage, reference

SIZE = 2 * MIB


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    """A domain with a qcow2 disk vda and a raw disk vdb, a snapshot "own" with a checkpoint "two", one "bare" without.

    Checkpoints on vda are one, two (at "own") and three; blocks 1 and 2 changed from one to two.
    """
    with ExitStack() as stack:
        place = short_directory()
        stack.callback(lambda: run(["rm", "-rf", place]))
        stage = Stage(place)
        disks = [stage.disk("vda", SIZE), stage.disk("vdb", SIZE, "raw")]
        qemu = stack.enter_context(BareQemu(disks, running=True))
        api = Api(stage, qemu)
        qemu.device_write("vda", 0, SIZE, 0x11)
        qemu.device_write("vdb", 0, SIZE, 0x12)
        for point in ("one", "two"):
            api.snapshot("own", "--checkpoint", point)
            if point == "one":
                api.do("snapshot", "delete", "own")
                scribble(qemu, "vda", {1, 2})
        api.snapshot("bare")
        scribble(qemu, "vda", {5})
        api.snapshot("later", "--checkpoint", "three")
        api.do("snapshot", "delete", "later")
        yield api
        for name in ("own", "bare"):
            api.do("snapshot", "delete", name)
        assert api.clean() == []


@pytest.fixture(autouse=True)
def nothing_exported(api: Api) -> Iterator[None]:
    """Every test ends with no export, and no mark of one."""
    before = state_of(api.qemu)
    yield
    api.do("export", "stop")
    assert state_of(api.qemu)[2] == before[2] == [[], []]
    assert [node["node-name"] for node in api.qemu.qmp("query-named-block-nodes", flat=True)]
    assert api.do("export", "list")["exports"] == []


def test_a_uri_works_as_it_is_printed(api: Api) -> None:
    # Newer qemu-img decodes the socket's path twice (seen on 10.0.13), so there a percent sign must not be in it.
    percent = "%2F" if qemu_version() < (9, 1, 0) else ""
    place = api.stage.place / f"so\"cket, {percent}' é }}"
    done = api.attempt("export", "start", "--snapshot", "own", "-d", "vda", "--since", "one", "--socket", place)
    (uri,) = done.out.splitlines()
    assert by_everybody(uri, api.stage.place)[BLOCK * 6] == 0x11
    assert dirty_map(uri, "one") == {1, 2}
    assert api.do("export", "list")["exports"][0]["uri"] == uri
    assert api.attempt("export", "list").out.splitlines()[1].split()[:3] == ["vda", "own", "one"]
    assert f"export vda of snapshot own: {uri}, changes since one" in api.attempt("domain", "show").out
    assert [export["uri"] for export in api.show()["exports"]] == [uri]


def test_a_free_port_is_taken_and_told(api: Api) -> None:
    done = api.attempt("export", "start", "--snapshot", "own", "--listen", "127.0.0.1", "--insecure")
    uris = done.out.split()
    ports = {address.port for uri in uris if isinstance(address := parse_uri(uri).address, TcpAddress)}
    assert len(uris) == 2 and len(ports) == 1 and 0 not in ports
    assert len(by_nbdcopy(uris[1])) == SIZE


def test_another_export_where_the_server_listens_already(api: Api) -> None:
    """A free port is not asked for twice: there is one server."""
    first = api.do("export", "start", "--snapshot", "own", "-d", "vda", "--listen", "127.0.0.1", "--insecure")
    more = ("--snapshot", "own", "-d", "vdb", "--listen")
    second = api.do("export", "start", *more, "127.0.0.1", "--insecure")
    servers = {parse_uri(one["exports"][0]["uri"]).address for one in (first, second)}
    assert len(servers) == 1
    other = ("--snapshot", "bare", "--listen", "127.0.0.1:1", "--insecure", "--export-name", "vda=a", "-d", "vda")
    api.refused(5, "listens at 127.0.0.1:", "export", "start", *other)
    assert len(api.do("export", "list")["exports"]) == 2


def test_a_second_export_at_another_address_is_refused(api: Api) -> None:
    api.export("own", "-d", "vda")
    before = state_of(api.qemu)
    words = ("export", "start", "--snapshot", "own", "-d", "vdb", "--socket", api.stage.place / "other")
    api.refused(5, f"listens at {api.stage.place}/nbd already", *words)
    assert state_of(api.qemu) == before
    assert set(api.export("own", "-d", "vdb")) == {"vdb"}
    assert {export["name"] for export in api.do("export", "list")["exports"]} == {"vda", "vdb"}


def test_one_of_two_exports_is_stopped(api: Api) -> None:
    uris = api.export("own")
    api.refused(2, "there is no export nope", "export", "stop", "nope")
    assert api.do("export", "stop", "vda")["exports"] == ["vda"]
    assert len(by_nbdcopy(uris["vdb"])) == SIZE
    assert [export["name"] for export in api.do("export", "list")["exports"]] == ["vdb"]


@pytest.mark.parametrize("listen", ["127.0.0.1", "127.0.0.1:10999", "[::1]"])
def test_tcp_without_tls_needs_a_word(api: Api, listen: str) -> None:
    api.refused(2, "without TLS lets everybody", "export", "start", "--snapshot", "own", "--listen", listen)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("own", "--since", "nope"), "changes of vda since nope are not known"),
        (("bare", "--since", "one"), "no checkpoint was made at its instant"),
        (("own", "--since", "three"), "is older, or was deleted"),
        (("own", "-d", "vdb", "--since", "one"), "a raw image cannot store dirty bitmaps"),
    ],
)
def test_changes_that_are_not_known_are_refused(api: Api, words: tuple[str, ...], sentence: str) -> None:
    before = state_of(api.qemu)
    place = ("--socket", api.stage.place / "nbd")
    disk = () if "-d" in words else ("-d", "vda")
    api.refused(5, sentence, "export", "start", "--snapshot", *words, *disk, *place)
    assert state_of(api.qemu) == before


def test_all_checkpoints(api: Api) -> None:
    """Those before the snapshot's own; the disk that is not tracked has none."""
    uris = api.export("own", "--all-checkpoints")
    assert contexts(uris["vda"]) == {"one"}
    assert contexts(uris["vdb"]) == set()
    uris = api.export("bare", "--all-checkpoints", "--export-name", "vda=a", "--export-name", "vdb=b")
    assert contexts(uris["a"]) == set()


def test_the_own_checkpoint_has_no_changes(api: Api) -> None:
    assert dirty_map(api.export("own", "-d", "vda", "--since", "two")["vda"], "two") == set()


def test_changes_are_lent_to_one_export_at_a_time(api: Api) -> None:
    uri = api.export("own", "-d", "vda", "--since", "one")["vda"]
    again = ("-d", "vda", "--since", "one", "--export-name", "vda=again")
    words = ("export", "start", "--snapshot", "own", "--socket", api.stage.place / "nbd", *again)
    api.refused(5, "QEMU can offer them only once", *words)
    assert dirty_map(uri, "one") == {1, 2}
    api.do("export", "stop")
    assert dirty_map(api.export("own", *again)["again"], "one") == {1, 2}


def test_each_export_of_a_view_tells_its_own_changes(api: Api) -> None:
    """The frozen view has the maps of all of them, and no query tells whose each is."""
    first = api.export("own", "-d", "vda", "--since", "one")
    second = api.export("own", "-d", "vda", "--since", "two", "--export-name", "vda=b")
    third = api.export("own", "-d", "vda", "--export-name", "vda=c")
    uris = first | second | third
    for listed in (api.do("export", "list")["exports"], api.show()["exports"]):
        told = {one["name"]: set(one["checkpoints"]) for one in listed}
        assert told == {"vda": {"one"}, "b": {"two"}, "c": set()}
        assert told == {name: contexts(uri) for name, uri in uris.items()}


def test_trims_of_a_snapshot_are_refused_before_8_0(api: Api) -> None:
    before = state_of(api.qemu)
    words = ("export", "start", "--snapshot", "own", "-d", "vda", "--writable", "--socket", api.stage.place / "nbd")
    if qemu_version() < (8, 0, 0):
        api.refused(5, "before QEMU 8.0 one that others read is offered read-only", *words)
        assert state_of(api.qemu) == before
        return
    done = api.attempt(*words)
    assert done.code == 0, done.err
    where = parse_uri(done.out.strip())
    with NbdConnection.connect(where.address, where.export) as connection:
        connection.trim(BLOCK, BLOCK)
        assert connection.read(0, BLOCK) == b"\x11" * BLOCK
        with pytest.raises(TransferError):
            connection.read(BLOCK, BLOCK)


def test_long_names_of_many_checkpoints_are_told_again(api: Api) -> None:
    """They stand in the export's id."""
    points = [f"{number}{'x' * 399}" for number in range(4)]
    for point in points:
        api.snapshot("short", "--checkpoint", point)
        api.do("snapshot", "delete", "short")
    api.snapshot("long", "--checkpoint", "last")
    api.export("long", "-d", "vda", "--all-checkpoints")
    (found,) = api.do("export", "list")["exports"]
    assert found["checkpoints"][-4:] == points
    assert set(found["checkpoints"]) == contexts(found["uri"])
    api.do("snapshot", "delete", "long")
    for point in (*points, "last"):
        api.do("checkpoint", "delete", point)


NAMES = ["a b", "é,ü", 'quote"', "}'{", "new\nline", "?x#y%41&", "/slash/", "-", "\\"]


def test_any_name_can_be_an_export_s(api: Api) -> None:
    for name in NAMES:
        uri = api.export("own", "-d", "vdb", "--export-name", f"vdb={name}")[name]
        assert len(by_nbdcopy(uri)) == SIZE
    assert sorted(export["name"] for export in api.do("export", "list")["exports"]) == sorted(NAMES)
    for name in NAMES:
        assert api.do("export", "stop", name)["exports"] == [name]


def test_names_that_cannot_be(api: Api) -> None:
    before = state_of(api.qemu)
    place = ("--socket", api.stage.place / "nbd")
    start = ("export", "start", "--snapshot", "own", *place)
    api.refused(2, "", *start, "-d", "vda", "--export-name", f"vda={'x' * 5000}")
    api.refused(2, "there is an export same already", *start, "--export-name", "vda=same", "--export-name", "vdb=same")
    api.refused(2, "no disk vdz to name", *start, "--export-name", "vdz=a")
    api.refused(2, "has no disk vdz", *start, "-d", "vdz")
    api.refused(2, "at most 107 bytes", "export", "start", "--snapshot", "own", "--socket", "/tmp/" + "x" * 120)
    done = api.attempt("export", "start", *start[2:], "-d", "vda", "--export-name", "vda=\udcff", env={})
    assert done.code == 2, done.err
    # What the options alone tell is said before anything is connected to.
    nobody = Api(api.stage, api.qemu)
    nobody.domain = f"qmp:{api.stage.place}/nobody"
    for said, *words in (
        ("empty text", "--listen", ""),
        ("no HOST", "--listen", ":10809"),
        ("without TLS", "--listen", "127.0.0.1"),
        ("at most 107 bytes", "--socket", "/tmp/" + "x" * 120),
        ("holds no server-cert.pem", "--socket", "nbd", "--tls", api.stage.place),
        ("at most 4096 bytes", *place, "--export-name", f"vda={'x' * 5000}"),
    ):
        nobody.refused(2, said, "export", "start", "--snapshot", "own", *words)
    nobody.refused(2, "cannot name a snapshot", "snapshot", "create", "a b")
    nobody.refused(2, "cannot name a checkpoint", "snapshot", "create", "--checkpoint", "a b")
    assert state_of(api.qemu) == before


def test_another_program_s_server_is_left_alone(api: Api) -> None:
    """With an export of its own, or only just started."""
    qemu, theirs = api.qemu, api.stage.place / "theirs"
    qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(theirs)}})
    words = ("export", "start", "--snapshot", "own", "--socket", api.stage.place / "nbd")
    try:
        before = state_of(qemu)
        api.refused(4, "in use by another program", *words)
        assert state_of(qemu)[1:] == before[1:]
        qemu.qmp("block-export-add", id="theirs", type="nbd", node_name="node-vdb", name="theirs")
        api.refused(4, "another program exports disks", *words)
        assert len(by_nbdcopy(f"nbd+unix:///theirs?socket={theirs}")) == SIZE
        qemu.qmp("block-export-del", id="theirs")
    finally:
        qemu.qmp("nbd-server-stop")
    assert len(api.export("own")) == 2


# -- where it listens ---------------------------------------------------------------------------------------------


def _lay(path: Path, kind: str) -> socket.socket | None:
    """Put something there; a socket that has to be kept open for it."""
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        (path.parent / "image").write_text("precious")
        path.symlink_to("image")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        if kind != "dead socket":
            listener.listen(0)
        return listener
    return None


def _what_lies_there(path: Path) -> tuple[int, int, int, int]:
    """All but the times: a connection that is accepted changes when a socket was last read."""
    found = path.lstat()
    return found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize("kind", ["file", "directory", "link", "fifo", "live socket", "busy socket"])
def test_nothing_that_lies_at_the_path_is_lost(api: Api, kind: str) -> None:
    """QEMU unlinks whatever is there before it listens."""
    place = short_directory()
    path = place / "nbd"
    with ExitStack() as stack:
        stack.callback(lambda: run(["rm", "-rf", place]))
        if listener := _lay(path, kind):
            stack.enter_context(listener)
        if kind == "busy socket":  # whoever else connects would wait
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
        before, here = _what_lies_there(path), state_of(api.qemu)
        document = place / "export.xml"
        document.write_text(
            f"<domainblockexport type='nbd'><address type='unix' path='{path}'/>"
            "<disk name='vda' snapshot='own'/></domainblockexport>"
        )
        said = "another program listens" if "socket" in kind else f"it is a {kind}"
        api.refused(2, said, "export", "start", "--snapshot", "own", "--socket", path)
        api.refused(2, said, "export", "start", "--snapshot", "own", "--socket", path, "--dry-run")
        api.refused(2, said, "export", "start", "--xml", document)
        image = images.create(place / "vda.qcow2", MIB)
        done = inside(["export", "start", f"disk:{image}", "--writable", "--socket", str(path)], {})
        assert (done.code, said in done.err) == (2, True), done.err
        assert (_what_lies_there(path), state_of(api.qemu)) == (before, here)
        if kind in ("file", "link"):
            assert path.read_text() == "precious"


def test_qemu_unlinks_what_lies_at_the_path_of_a_socket(api: Api) -> None:
    path = api.stage.place / "precious"
    path.write_text("precious")
    api.qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    try:
        assert path.is_socket()
    finally:
        api.qemu.qmp("nbd-server-stop")
    assert not path.exists()


def test_a_dead_socket_is_replaced(api: Api) -> None:
    path = api.stage.place / "nbd"
    listener = _lay(path, "dead socket")
    assert listener is not None
    listener.close()
    assert len(by_nbdcopy(api.export("own")["vdb"])) == SIZE


def test_who_may_connect(lab_dir: Path, bare_qemu: Callable[..., BareQemu]) -> None:
    """Whatever QEMU's umask is: its owner; the scratch has no name any more."""
    before = os.umask(0)
    try:
        stage = Stage(lab_dir)
        qemu = bare_qemu([stage.disk("vda", SIZE)], running=True)
    finally:
        os.umask(before)
    api = Api(stage, qemu)
    api.snapshot("own")
    lab_dir.chmod(0o755)
    place = {"type": "unix", "data": {"path": str(lab_dir / "nbd")}}
    qemu.qmp("nbd-server-start", addr=place)
    assert stat.S_IMODE((lab_dir / "nbd").stat().st_mode) & 0o002
    qemu.qmp("nbd-server-stop")
    api.export("own")
    assert stat.S_IMODE(os.stat(lab_dir / "nbd").st_mode) == 0o600
    assert list(stage.scratch.rglob("*")) == []
    api.do("export", "stop")
    if os.geteuid() == 0:
        _as_another_user(api)
    api.do("snapshot", "delete", "own")
    assert api.clean() == []


def _as_another_user(api: Api) -> None:
    """Who may not change the socket's mode, exports only where its directory keeps others out."""
    user, place = "64322", api.stage.place / "theirs"
    place.mkdir(mode=0o700)
    os.chown(place, int(user), int(user))
    api.qemu.directory.chmod(0o755)
    prefix = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"]
    words = ("export", "start", api.domain, "--snapshot", "own", "--socket")
    unset = ["XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"]
    try:
        before = state_of(api.qemu)
        done = api.stage.cli(*words, api.stage.place / "nbd", prefix=prefix, unset=unset)
        assert (done.code, "everybody on this host could connect" in done.err) == (5, True), done.err
        assert state_of(api.qemu) == before
        done = api.stage.cli(*words, place / "nbd", prefix=prefix, unset=unset)
        assert done.code == 0, done.err
    finally:
        run(["rm", "-rf", f"/tmp/pullback-{user}"])


# -- TLS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(api: Api) -> Path:
    """A directory with an authority, a server's and a client's certificate; and other/ with another authority's."""
    place = api.stage.place / "tls"
    for directory in (place, place / "other"):
        directory.mkdir()
        _authority(directory)
        for who in ("server", "client"):
            _certificate(directory, who)
    return place


def _openssl(place: Path, *words: str) -> None:
    run(["openssl", *words], cwd=place)


def _authority(place: Path) -> None:
    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=authority")
    uses = ("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    _openssl(place, *new, *uses, "-keyout", "ca-key.pem", "-out", "ca-cert.pem")


def _certificate(place: Path, who: str) -> None:
    (place / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    ask = ("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={who}", "-keyout", f"{who}-key.pem")
    _openssl(place, *ask, "-out", "ask.pem")
    sign = ("x509", "-req", "-in", "ask.pem", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial")
    _openssl(place, *sign, "-days", "2", "-extfile", "ext", "-out", f"{who}-cert.pem")


def _context(place: Path, client: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(place / "ca-cert.pem"))
    if client is not None:
        context.load_cert_chain(str(client / "client-cert.pem"), str(client / "client-key.pem"))
    return context


def _read_with(address: Address, context: ssl.SSLContext) -> None:
    with NbdConnection.connect(address, "vda", tls=context) as connection:
        connection.read(0, 512)


@pytest.mark.parametrize("where", ["tcp", "unix"])
def test_tls(api: Api, certificates: Path, where: str) -> None:
    place = ("--listen", "127.0.0.1") if where == "tcp" else ("--socket", api.stage.place / "nbd")
    words = ("--snapshot", "own", "-d", "vda", "--since", "one", *place, "--tls", certificates)
    (export,) = api.do("export", "start", *words)["exports"]
    found = parse_uri(export["uri"])
    assert found.tls

    with NbdConnection.connect(found.address, "vda", tls=_context(certificates, certificates)) as connection:
        assert connection.read(0, 512) == b"\x11" * 512
    joiner = "&" if "?" in export["uri"] else "?"
    trusted = f"{export['uri']}{joiner}tls-certificates={certificates}"
    if where == "tcp":  # libnbd wants a host name to check, which a unix socket has not
        assert json.loads(run(["nbdinfo", "--json", trusted]))["TLS"] is True

    for client in (None, certificates / "other"):
        with pytest.raises(TransferError):
            _read_with(found.address, _context(certificates, client))
    with pytest.raises(TransferError):
        NbdConnection.connect(found.address, "vda")
    assert api.qemu.running()

    api.do("export", "stop")
    assert "pullback-tls" not in {one["name"] for one in api.qemu.qmp("qom-list", path="/objects")}


def test_certificates_that_are_not_there(api: Api) -> None:
    for place in (("--listen", "127.0.0.1"), ("--socket", api.stage.place / "nbd")):
        words = ("export", "start", "--snapshot", "own", *place, "--tls", api.stage.place)
        api.refused(2, "holds no server-cert.pem", *words)


def test_certificates_that_a_document_does_not_ask_for(api: Api, certificates: Path) -> None:
    """Without a word the disks would go unencrypted."""
    document = api.stage.place / "export.xml"
    document.write_text(
        f"<domainblockexport type='nbd'><address type='unix' path='{api.stage.place}/nbd'/>"
        "<disk name='vda' snapshot='own'/></domainblockexport>"
    )
    api.refused(2, "says nothing of TLS", "export", "start", "--xml", document, "--tls", certificates)


# -- found again --------------------------------------------------------------------------------------------------


def test_found_again_by_another_process(api: Api) -> None:
    words = ("--snapshot", "own", "--socket", api.stage.place / "nbd", "--since", "two", "-d", "vda")
    started = api.attempt("export", "start", *words, env={})
    assert started.code == 0, started.err
    (found,) = api.do("export", "list")["exports"]
    assert found["uri"] == started.out.strip()
    assert found["checkpoints"] == ["two"]
    listed = subprocess.run(["nbdinfo", "--size", found["uri"]], capture_output=True, text=True, check=True)
    assert int(listed.stdout) == SIZE
    assert reference(api.qemu, "vdb")[0] == 0x12
