# SPDX-License-Identifier: Apache-2.0
"""Any document comes back as it was printed; any other bytes are refused, or mean what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from pullback.documents import checks
from pullback.documents.printing import print_domain, print_export, print_snapshot
from pullback.documents.reading import parse_export, parse_snapshot
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

ALNUM = "abcXYZ019"
names = st.builds(str.__add__, st.sampled_from(ALNUM), st.text(ALNUM + "._:+@-", max_size=63))
checkpoints = st.builds(str.__add__, st.sampled_from(ALNUM), st.text(ALNUM + "._:+@-", max_size=399))
characters = st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="\ufffe\uffff")
disk_names = st.text(characters, min_size=1, max_size=20).filter(str.strip)
pieces = st.text(characters, min_size=1, max_size=12).map(lambda text: text.replace("/", "-"))
paths = st.lists(pieces.filter(lambda piece: piece not in (".", "..")), min_size=1, max_size=4).map(
    lambda parts: "/" + "/".join(parts)
)
labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
hosts = st.one_of(
    st.lists(labels, min_size=1, max_size=3).map(".".join).filter(lambda host: not host.split(".")[-1].isdecimal()),
    st.ip_addresses().map(str),
)
snapshots = st.builds(
    SnapshotDocument,
    st.lists(
        st.builds(SnapshotDisk, disk_names, st.none() | paths),
        min_size=1,
        max_size=5,
        unique_by=(lambda disk: disk.name, lambda disk: disk.scratch or disk),
    ).map(tuple),
    st.none() | names,
    st.none() | checkpoints,
)
addresses = st.one_of(
    st.builds(IpAddress, hosts, st.none() | st.integers(1, 65535), st.booleans()),
    st.builds(UnixAddress, paths.filter(lambda path: len(path.encode()) <= 107), st.booleans()),
)
marks = st.one_of(
    st.fixed_dictionaries({"snapshot": st.none() | names}),
    st.fixed_dictionaries({"snapshot": names, "all_checkpoints": st.just(True)}),
    st.fixed_dictionaries(
        {"snapshot": names, "checkpoints": st.lists(checkpoints, min_size=1, max_size=3, unique=True).map(tuple)}
    ),
)


@st.composite
def export_disks(draw: st.DrawFn) -> ExportDisk:
    return ExportDisk(draw(disk_names), draw(disk_names), read_only=draw(st.booleans()), **draw(marks))


exports = st.builds(
    ExportDocument,
    addresses,
    st.lists(export_disks(), min_size=1, max_size=4, unique_by=lambda disk: disk.export_name).map(tuple),
)
KINDS = {"snapshot": (snapshots, print_snapshot, parse_snapshot), "export": (exports, print_export, parse_export)}
each_kind = pytest.mark.parametrize("kind", KINDS)
# What a mutation puts in: parts of documents, and of attacks on readers of XML.
TOKENS = [
    b"<!DOCTYPE a [<!ENTITY x '&x;'>]>",
    b"&x;",
    b"&#x1b;",
    b"<?x?>",
    b"<!---->",
    b"<![CDATA[",
    b"]]>",
    b"xmlns='u' ",
    b"<disk name='a'/>",
    b"<name>a</name>",
    b"<checkpoint name='B'/>",
    b" readonly='no'",
    b" allcheckpoints='yes'",
    b"..",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\0",
    b"\xc2\x9b",
    b">",
    b"/",
    b"'",
    b'"',
]


@each_kind
@settings(max_examples=200)
@given(data=st.data())
def test_a_printed_document_comes_back(kind: str, data: st.DataObject):
    values, show, parse = KINDS[kind]
    document = data.draw(values)
    assert parse(show(document).encode()) == document
    assert show(document) == show(replace(document))


@each_kind
@settings(max_examples=100)
@given(data=st.data())
def test_an_unknown_attribute_is_refused_with_its_place(kind: str, data: st.DataObject):
    values, show, parse = KINDS[kind]
    root = etree.fromstring(show(data.draw(values)))
    element = data.draw(st.sampled_from(list(root.iter())))
    name = data.draw(st.sampled_from(["foo", "Name", "filename", "n-a.m_e"]))
    element.set(name, "x")
    with pytest.raises(
        UsageError, match=f"^<{element.tag}> on line {element.sourceline}: there is no .* '{name}' here"
    ):
        parse(etree.tostring(root, encoding="utf-8"))


@each_kind
@settings(max_examples=100)
@given(data=st.data())
def test_an_unknown_element_is_refused_with_its_place(kind: str, data: st.DataObject):
    values, show, parse = KINDS[kind]
    root = etree.fromstring(show(data.draw(values)))
    element = data.draw(st.sampled_from(list(root.iter())))
    etree.SubElement(element, data.draw(st.sampled_from(["foo", "Disk", "domain"])))
    with pytest.raises(UsageError, match=f"^<(foo|Disk|domain)> on line [0-9]+: it cannot stand in <{element.tag}>"):
        parse(etree.tostring(root, encoding="utf-8"))


@st.composite
def mutants(draw: st.DrawFn, kind: str) -> bytes:
    values, show, _ = KINDS[kind]
    data = show(draw(values)).encode()
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 40)))
        new = draw(st.sampled_from([*TOKENS, data[start:end] * 2, b""]) | st.binary(max_size=4))
        data = data[:start] + new + data[end:]
    return data


@each_kind
@settings(max_examples=500)
@given(data=st.data())
def test_a_mutant_is_refused_or_means_what_it_says(kind: str, data: st.DataObject):
    _, show, parse = KINDS[kind]
    try:
        document = parse(data.draw(mutants(kind)))
    except UsageError as error:
        assert all(map(checks.printable, str(error)))
    else:
        assert parse(show(document).encode()) == document


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes):
    for parse in (parse_snapshot, parse_export):
        with pytest.raises(UsageError):
            parse(data)


any_text = st.text(st.characters(exclude_categories=()), max_size=10)
counts = st.integers(0, 1 << 63)
domains = st.builds(
    DomainDocument,
    any_text,
    any_text,
    st.lists(
        st.builds(
            DiskDocument,
            any_text,
            any_text,
            any_text,
            counts,
            st.lists(st.builds(CheckpointDocument, any_text, st.none() | any_text, counts, st.booleans())).map(tuple),
            st.lists(st.builds(BrokenBitmap, any_text, any_text)).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
    st.lists(snapshots, max_size=2).map(tuple),
    st.lists(exports, max_size=2).map(tuple),
)


@settings(max_examples=100)
@given(domains)
def test_any_domain_can_be_printed_and_its_parts_read(domain: DomainDocument):
    root = etree.fromstring(print_domain(domain))
    assert len(root.findall("disk")) == len(domain.disks)
    found = root.findall("domainblocksnapshot")
    assert tuple(parse_snapshot(etree.tostring(part, encoding="utf-8")) for part in found) == domain.snapshots
    found = root.findall("domainblockexport")
    assert tuple(parse_export(etree.tostring(part, encoding="utf-8")) for part in found) == domain.exports
