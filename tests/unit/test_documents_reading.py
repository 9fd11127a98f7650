# SPDX-License-Identifier: Apache-2.0
"""What the documents of others may say, and the sentence for each thing they may not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pullback.documents.reading import parse_export, parse_snapshot
from pullback.documents.values import (
    ExportDisk,
    ExportDocument,
    IpAddress,
    SnapshotDisk,
    SnapshotDocument,
    UnixAddress,
)
from pullback.errors import UsageError

SNAPSHOT = """\
<?xml version="1.0" encoding="UTF-8"?>
<!-- every night -->
<domainblocksnapshot>
  <name>
    snapshot0
  </name>
  <checkpoint>night:1</checkpoint>
  <disk name='sda' type="file">
    <!-- on the fast disk -->
    <fleece file="/var/tmp/scratch of sda"/>
  </disk>
  <disk name='sdb' type="file"/>
  <disk name='größe &amp; mehr'/>
</domainblocksnapshot>
"""
EXPORT = """\
<domainblockexport type="nbd">
  <address type="ip" host="0.0.0.0" port="8000"/>
  <disk name="sda" exportname="sda-of-web" snapshot="snapshot0" checkpoint="B" readonly="yes"/>
  <disk name="sdb" snapshot="snapshot0" allcheckpoints="yes"/>
  <disk name="sdc" snapshot="snapshot0"><checkpoint name="B"/><checkpoint name="A"/></disk>
  <disk name="sdd" readonly="no"/>
</domainblockexport>
"""


def snapshot(inner: str) -> SnapshotDocument:
    return parse_snapshot(f"<domainblocksnapshot>\n{inner}\n</domainblocksnapshot>".encode())


def export(inner: str, address: str = '<address type="unix" path="/run/x.sock"/>') -> ExportDocument:
    return parse_export(f'<domainblockexport type="nbd">{address}\n{inner}\n</domainblockexport>'.encode())


def address(attributes: str) -> IpAddress | UnixAddress:
    return export('<disk name="sda"/>', f"<address {attributes}/>").address


def test_the_documents_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "xml.md").read_text()
    first, second, _ = re.findall(r"```xml\n(.*?)```", text, re.DOTALL)
    assert [disk.name for disk in parse_snapshot(first.encode()).disks] == ["sda", "sdb"]
    assert [disk.checkpoints for disk in parse_export(second.encode()).disks] == [("monday",), ("sunday", "monday"), ()]
    wrong = first.replace("/var/tmp/web-sda.scratch", "scratch").replace("  <checkpoint>monday</checkpoint>\n", "")
    with pytest.raises(UsageError) as caught:
        parse_snapshot(wrong.encode())
    assert f"\n      {caught.value}\n" in text


def test_a_snapshot_document():
    assert parse_snapshot(SNAPSHOT.encode()) == SnapshotDocument(
        (SnapshotDisk("sda", "/var/tmp/scratch of sda"), SnapshotDisk("sdb"), SnapshotDisk("größe & mehr")),
        name="snapshot0",
        checkpoint="night:1",
    )


def test_a_snapshot_document_need_not_say_more_than_disks():
    assert snapshot('<disk name="sda"/>') == SnapshotDocument((SnapshotDisk("sda"),))


def test_a_byte_order_mark_is_no_text():
    assert parse_snapshot(SNAPSHOT.encode("utf-8-sig")) == parse_snapshot(SNAPSHOT.encode())


def test_an_export_document():
    assert parse_export(EXPORT.encode()) == ExportDocument(
        IpAddress("0.0.0.0", 8000),
        (
            ExportDisk("sda", "sda-of-web", "snapshot0", ("B",)),
            ExportDisk("sdb", "sdb", "snapshot0", all_checkpoints=True),
            ExportDisk("sdc", "sdc", "snapshot0", ("B", "A")),
            ExportDisk("sdd", "sdd", read_only=False),
        ),
    )


@pytest.mark.parametrize(
    ("attributes", "meant"),
    [
        ('type="ip" host="backup-1.example" port="1"', IpAddress("backup-1.example", 1)),
        ('type="ip" host="::1" port="65535" autoport="no"', IpAddress("::1", 65535)),
        ('type="ip" host="fe80::1%eth0" autoport="yes" tls="yes"', IpAddress("fe80::1%eth0", tls=True)),
        ('type="unix" path="/run/x.sock"', UnixAddress("/run/x.sock")),
        ('type="unix" path="/run/x.sock" tls="yes"', UnixAddress("/run/x.sock", tls=True)),
    ],
)
def test_addresses(attributes: str, meant: IpAddress | UnixAddress):
    assert address(attributes) == meant


def test_a_choice_may_be_said_where_it_is_the_default():
    (disk,) = export('<disk name="a" snapshot="s" checkpoint="A" allcheckpoints="no" readonly="yes"/>').disks
    assert disk == ExportDisk("a", "a", "s", ("A",))


def test_one_disk_of_two_snapshots_under_two_names():
    disks = export('<disk name="a" snapshot="s1" exportname="x"/><disk name="a" snapshot="s2" exportname="y"/>').disks
    assert [disk.export_name for disk in disks] == ["x", "y"]


NO_SNAPSHOT_NAME = (
    "cannot name a snapshot: that takes letters, digits and ._:+@-, a letter or digit first, at most 64 characters"
)
NO_CHECKPOINT_NAME = "cannot name a checkpoint: that takes letters, digits and ._:+@-, a letter or digit first"
DISK = '<disk name="sda"/>'


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        ("", '<domainblocksnapshot> on line 1: it names no disk. Add a <disk name="…"/> for each disk.'),
        ("<name/>" + DISK, f"<name> on line 2: '' {NO_SNAPSHOT_NAME}."),
        ("<name>a b</name>" + DISK, f"<name> on line 2: 'a b' {NO_SNAPSHOT_NAME}."),
        ("<name>-a</name>" + DISK, f"<name> on line 2: '-a' {NO_SNAPSHOT_NAME}."),
        (f"<name>{'a' * 65}</name>" + DISK, f"<name> on line 2: '{'a' * 57}...' {NO_SNAPSHOT_NAME}."),
        (
            '<name id="1">a</name>' + DISK,
            "<name> on line 2: there is no attribute 'id' here. There are no attributes here.",
        ),
        ("<name>a<b/></name>" + DISK, "<b> on line 2: it cannot stand in <name>. Only text can."),
        (
            "<name>a</name>\n<name>a</name>" + DISK,
            "<name> on line 3: it stands in <domainblocksnapshot> a second time.",
        ),
        ("<checkpoint>A^B</checkpoint>" + DISK, f"<checkpoint> on line 2: 'A^B' {NO_CHECKPOINT_NAME}."),
        (
            "<creationTime>1525889631</creationTime>" + DISK,
            "<creationTime> on line 2: only pullback writes it, to say when a snapshot was made. Take the element out.",
        ),
        ("<disk/>", "<disk> on line 2: the attribute name is missing."),
        ('<disk name=" "/>', "<disk> on line 2: name ' ' is empty."),
        ('<disk name="a\u009b2J"/>', r"<disk> on line 2: name 'a\x9b2J' has a control character in it."),
        (
            f'<disk name="{"a" * 256}"/>',
            f"<disk> on line 2: name '{'a' * 57}...' is too long for the name of a disk: 255 characters at most.",
        ),
        (
            '<disk name="a" type="block"/>',
            "<disk> on line 2: type 'block' is not known here: pullback knows file.",
        ),
        (
            '<disk name="a" dev="b"/>',
            "<disk> on line 2: there is no attribute 'dev' here. Known attributes: name, type.",
        ),
        (
            '<disk name="a"><scratch/></disk>',
            "<scratch> on line 2: it cannot stand in <disk>. Known elements in <disk>: <fleece>.",
        ),
        (DISK + "\n" + DISK, "<disk> on line 3: disk 'sda' stands in the document already."),
        ("sda" + DISK, "<domainblocksnapshot> on line 1: it holds text: 'sda'."),
        (DISK + "sda", "<domainblocksnapshot> on line 1: it holds text: 'sda'."),
        ('<disk name="sda"><![CDATA[x]]></disk>', "<disk> on line 2: it holds text: 'x'."),
        ('<disk name="a">\n<fleece/></disk>', "<fleece> on line 3: the attribute file is missing."),
        (
            '<disk name="a"><fleece file="/a"/><fleece file="/b"/></disk>',
            "<fleece> on line 2: it stands in <disk> a second time.",
        ),
        (
            '<disk name="a"><fleece file="/s"/></disk>\n<disk name="b"><fleece file="//s/./"/></disk>',
            "<fleece> on line 3: file '//s/./' is a directory, not a file.",
        ),
        (
            '<disk name="a"><fleece file="/v/s"/></disk>\n<disk name="b"><fleece file="//v/.//s"/></disk>',
            "<disk> on line 3: its fleece is the same file as that of disk 'a'.",
        ),
    ],
)
def test_what_a_snapshot_document_may_not_say(inner: str, said: str):
    with pytest.raises(UsageError) as caught:
        snapshot(inner)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "is empty"),
        ("scratch", "is not an absolute path: QEMU may have another working directory"),
        ("json:{}", "is not an absolute path: QEMU may have another working directory"),
        ("/a/../b", "has a .. in it: write the path that is meant"),
        ("/..", "has a .. in it: write the path that is meant"),
        ("/", "is a directory, not a file"),
        ("//.", "is a directory, not a file"),
        ("/a/", "is a directory, not a file"),
        ("/a&#10;b", "has a control character in it"),
        ("/a\u0085b", "has a control character in it"),
        ("/" + "ü" * 2048, "is too long for a path: 4095 bytes at most"),
    ],
)
def test_paths(path: str, said: str):
    with pytest.raises(UsageError, match=f"<fleece> on line 2: file '.*' {said}"):
        snapshot(f'<disk name="a"><fleece file="{path}"/></disk>')


def test_the_longest_paths():
    path = "/" + "a" * 4094
    assert snapshot(f'<disk name="a"><fleece file="{path}"/></disk>').disks[0].scratch == path
    assert address(f'type="unix" path="{path[:107]}"') == UnixAddress(path[:107])


def test_dots_that_lead_nowhere_are_part_of_a_name():
    assert snapshot('<disk name="a"><fleece file="/v/..a/b.."/></disk>').disks[0].scratch == "/v/..a/b.."


NO_PORT = 'is not a port: that is a number from 1 to 65535; autoport="yes" takes a free one.'
NO_HOST = "is neither the name of a host nor an IP address (without brackets)."
PORTS = 'Write port="…" for a certain port, autoport="yes" for a free one.'


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ("", "the attribute type is missing."),
        ('type="tcp"', "type 'tcp' is not known here: pullback knows ip and unix."),
        ('type="ip" port="1"', "the attribute host is missing."),
        ('type="ip" host="h"', f"there is neither a port nor autoport. {PORTS}"),
        ('type="ip" host="h" autoport="no"', f"there is neither a port nor autoport. {PORTS}"),
        ('type="ip" host="h" port="1" autoport="yes"', f"port and autoport exclude each other. {PORTS}"),
        ('type="ip" host="h" port="0"', f"port '0' {NO_PORT}"),
        ('type="ip" host="h" port="65536"', f"port '65536' {NO_PORT}"),
        ('type="ip" host="h" port=" 1"', f"port ' 1' {NO_PORT}"),
        ('type="ip" host="h" port="١"', f"port '١' {NO_PORT}"),
        (f'type="ip" host="h" port="{"1" * 5000}"', f"port '{'1' * 57}...' {NO_PORT}"),
        ('type="ip" host="" port="1"', f"host '' {NO_HOST}"),
        ('type="ip" host="[::1]" port="1"', f"host '[::1]' {NO_HOST}"),
        ('type="ip" host="300.1.1.1" port="1"', f"host '300.1.1.1' {NO_HOST}"),
        ('type="ip" host="1.1.1.1%x" port="1"', f"host '1.1.1.1%x' {NO_HOST}"),
        ('type="ip" host="::1% x" port="1"', f"host '::1% x' {NO_HOST}"),
        ('type="ip" host="a..b" port="1"', f"host 'a..b' {NO_HOST}"),
        ('type="ip" host="-a" port="1"', f"host '-a' {NO_HOST}"),
        (f'type="ip" host="{"a" * 64}" port="1"', f"host '{'a' * 57}...' {NO_HOST}"),
        ('type="ip" host="a,b" port="1"', f"host 'a,b' {NO_HOST}"),
        (f'type="ip" host="{"a." * 127}a" port="1"', f"host '{('a.' * 29)[:57]}...' {NO_HOST}"),
        ('type="ip" host="h" port="1" tls="on"', "tls 'on' is neither yes nor no."),
        (
            'type="ip" host="h" port="1" path="/x"',
            "there is no attribute 'path' here. Known attributes: type, host, port, autoport, tls.",
        ),
        (
            'type="unix" path="/x" port="1"',
            "there is no attribute 'port' here. Known attributes: type, path, tls.",
        ),
        ('type="unix"', "the attribute path is missing."),
        ('type="unix" path="@x"', "path '@x' is not an absolute path: QEMU may have another working directory."),
        (
            f'type="unix" path="/{"a" * 107}"',
            f"path '/{'a' * 56}...' is too long for the path of a Unix socket: 107 bytes at most.",
        ),
    ],
)
def test_what_an_address_may_not_say(attributes: str, said: str):
    with pytest.raises(UsageError) as caught:
        address(attributes)
    assert str(caught.value) == f"<address> on line 1: {said}"


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        ("", '<domainblockexport> on line 1: it names no disk. Add a <disk name="…"/> for each disk.'),
        ('<disk name="a"/><address/>', "<address> on line 2: it stands in <domainblockexport> a second time."),
        ('<disk snapshot="s"/>', "<disk> on line 2: the attribute name is missing."),
        ('<disk name="a" snapshot="a/b"/>', f"<disk> on line 2: snapshot 'a/b' {NO_SNAPSHOT_NAME}."),
        ('<disk name="a" snapshot="s" checkpoint=""/>', f"<disk> on line 2: checkpoint '' {NO_CHECKPOINT_NAME}."),
        ('<disk name="a" exportname=""/>', "<disk> on line 2: exportname '' is empty."),
        (
            f'<disk name="a" exportname="{"ü" * 2049}"/>',
            f"<disk> on line 2: exportname '{'ü' * 57}...' is too long for the name of an NBD export: "
            "4096 bytes at most.",
        ),
        ('<disk name="a" readonly="true"/>', "<disk> on line 2: readonly 'true' is neither yes nor no."),
        (
            '<disk name="a" checkpoint="A"/>',
            "<disk> on line 2: changes since a checkpoint are those up to a snapshot, and it names none. "
            'Add snapshot="…".',
        ),
        (
            '<disk name="a" allcheckpoints="yes"/>',
            "<disk> on line 2: changes since a checkpoint are those up to a snapshot, and it names none. "
            'Add snapshot="…".',
        ),
        (
            '<disk name="a" snapshot="s" checkpoint="A" allcheckpoints="yes"/>',
            "<disk> on line 2: checkpoints and allcheckpoints exclude each other.",
        ),
        (
            '<disk name="a" snapshot="s" allcheckpoints="yes"><checkpoint name="A"/></disk>',
            "<disk> on line 2: checkpoints and allcheckpoints exclude each other.",
        ),
        (
            '<disk name="a" snapshot="s" checkpoint="A">\n<checkpoint name="B"/></disk>',
            "<checkpoint> on line 3: the <disk> has an attribute checkpoint already. Write all of them as elements.",
        ),
        (
            '<disk name="a" snapshot="s"><checkpoint name="B"/>\n<checkpoint name="B"/></disk>',
            "<checkpoint> on line 3: checkpoint 'B' stands in this <disk> already.",
        ),
        (
            '<disk name="a" snapshot="s"><checkpoint>B</checkpoint></disk>',
            "<checkpoint> on line 2: it holds text: 'B'.",
        ),
        (
            '<disk name="a"/>\n<disk name="b" exportname="a"/>',
            "<disk> on line 3: an export 'a' stands in the document already. Give each disk an exportname of its own.",
        ),
    ],
)
def test_what_an_export_document_may_not_say(inner: str, said: str):
    with pytest.raises(UsageError) as caught:
        export(inner)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("<domainblockexport/>", "<domainblockexport> on line 1: the attribute type is missing."),
        (
            '<domainblockexport type="fuse"/>',
            "<domainblockexport> on line 1: type 'fuse' is not known here: pullback knows nbd.",
        ),
        (
            '<domainblockexport type="nbd"><disk name="a"/></domainblockexport>',
            "<domainblockexport> on line 1: it has no <address>. Say where the NBD server is to listen.",
        ),
        (
            '<domainbackup mode="pull"/>',
            "<domainbackup> on line 1: a document of another kind: expected is <domainblockexport>.",
        ),
    ],
)
def test_what_an_export_document_must_say(document: str, said: str):
    with pytest.raises(UsageError) as caught:
        parse_export(document.encode())
    assert str(caught.value) == said
