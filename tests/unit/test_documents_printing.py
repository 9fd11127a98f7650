# SPDX-License-Identifier: Apache-2.0
"""Printed documents, character by character."""

from __future__ import annotations

from pathlib import Path

import pytest
from lxml import etree

from pullback.documents.printing import print_domain, print_export, print_snapshot
from pullback.documents.reading import parse_snapshot
from pullback.documents.values import (
    BrokenBitmap,
    CheckpointDocument,
    DiskDocument,
    DomainDocument,
    ExportDisk,
    ExportDocument,
    IpAddress,
    SnapshotDisk,
    SnapshotDocument,
    UnixAddress,
)
from pullback.errors import UsageError
from pullback.model.units import GIB, MIB

SNAPSHOT = SnapshotDocument(
    (SnapshotDisk("sda", "/var/tmp/a&b"), SnapshotDisk("größe")), "snapshot0", "night", creation_time=1525889631
)
EXPORT = ExportDocument(
    IpAddress("::1", 8000, tls=True),
    (
        ExportDisk("sda", "sda-of-web", "snapshot0", ("B",)),
        ExportDisk("sdb", "sdb", "snapshot0", ("B", "A")),
        ExportDisk("sdc", "sdc", "snapshot0", all_checkpoints=True),
        ExportDisk("sdd", "sdd", read_only=False),
    ),
)
DOMAIN = DomainDocument(
    "web",
    "1b4e28ba-2fa1-11d2-883f-0016d3cca427",
    (
        DiskDocument(
            "sda",
            "#block144",
            "qcow2",
            1 << 40,
            (CheckpointDocument("A", None, 65536, False), CheckpointDocument("B", "A", 0, True)),
            (BrokenBitmap("pullback-D^C", 'its bitmap is "inconsistent"'),),
        ),
        DiskDocument("sdb", "n", "raw", 0),
    ),
    (SnapshotDocument((SnapshotDisk("sda"),), "s"),),
    (ExportDocument(UnixAddress("/run/x.sock"), (ExportDisk("sda", "sda", "s"),)),),
)


def test_a_snapshot():
    assert print_snapshot(SNAPSHOT) == (
        """\
<domainblocksnapshot>
  <name>snapshot0</name>
  <creationTime>1525889631</creationTime>
  <checkpoint>night</checkpoint>
  <disk name="sda" type="file">
    <fleece file="/var/tmp/a&amp;b"/>
  </disk>
  <disk name="größe" type="file"/>
</domainblocksnapshot>
"""
    )


def test_a_snapshot_that_exists_is_no_request():
    with pytest.raises(UsageError, match="<creationTime> on line 3: only pullback writes it"):
        parse_snapshot(print_snapshot(SNAPSHOT).encode())


def test_an_export():
    assert print_export(EXPORT) == (
        """\
<domainblockexport type="nbd">
  <address type="ip" host="::1" port="8000" tls="yes"/>
  <disk name="sda" exportname="sda-of-web" snapshot="snapshot0" checkpoint="B" readonly="yes"/>
  <disk name="sdb" exportname="sdb" snapshot="snapshot0" readonly="yes">
    <checkpoint name="B"/>
    <checkpoint name="A"/>
  </disk>
  <disk name="sdc" exportname="sdc" snapshot="snapshot0" allcheckpoints="yes" readonly="yes"/>
  <disk name="sdd" exportname="sdd" readonly="no"/>
</domainblockexport>
"""
    )


def test_a_free_port():
    document = print_export(ExportDocument(IpAddress("h"), (ExportDisk("a", "a"),)))
    assert '  <address type="ip" host="h" autoport="yes" tls="no"/>\n' in document


def test_a_domain():
    assert print_domain(DOMAIN) == (
        """\
<domain>
  <name>web</name>
  <uuid>1b4e28ba-2fa1-11d2-883f-0016d3cca427</uuid>
  <disk name="sda" node="#block144" driver="qcow2" size="1099511627776">
    <checkpoint name="A" size="65536" recording="no"/>
    <checkpoint name="B" parent="A" size="0" recording="yes"/>
    <broken bitmap="pullback-D^C" reason="its bitmap is &quot;inconsistent&quot;"/>
  </disk>
  <disk name="sdb" node="n" driver="raw" size="0"/>
  <domainblocksnapshot>
    <name>s</name>
    <disk name="sda" type="file"/>
  </domainblocksnapshot>
  <domainblockexport type="nbd">
    <address type="unix" path="/run/x.sock" tls="no"/>
    <disk name="sda" exportname="sda" snapshot="s" readonly="yes"/>
  </domainblockexport>
</domain>
"""
    )


def test_the_domain_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "xml.md").read_text()
    reason = "a bitmap between this checkpoint and now is missing or inconsistent"
    points = (CheckpointDocument("sunday", None, MIB, False), CheckpointDocument("monday", "sunday", 65536, True))
    disk = DiskDocument("sda", "node-sda", "qcow2", 10 * GIB, points, (BrokenBitmap("pullback-friday", reason),))
    assert f"```xml\n{print_domain(DomainDocument('web', DOMAIN.uuid, (disk,)))}```\n" in text


def test_a_domain_without_anything():
    assert print_domain(DomainDocument("web", "", ())) == "<domain>\n  <name>web</name>\n</domain>\n"


def test_what_cannot_be_printed_is_replaced():
    odd = "a\0\x1b[2J\x9b\n\ud800\uffff😀"
    document = print_domain(DomainDocument(odd, odd, (DiskDocument(odd, odd, odd, 1),)))
    shown = "a\ufffd\ufffd[2J\ufffd\ufffd\ufffd\ufffd😀"
    root = etree.fromstring(document)
    disk = root.find("disk")
    assert disk is not None
    assert [root.findtext("name"), root.findtext("uuid"), *disk.attrib.values()] == [shown] * 5 + ["1"]
