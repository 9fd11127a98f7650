# SPDX-License-Identifier: Apache-2.0
"""Documents that mean harm: refused, without reading any other file and without taking long or much."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pullback.documents import element
from pullback.documents.element import BYTES_MAX, ELEMENTS_MAX, LINES_MAX, load
from pullback.documents.reading import parse_snapshot
from pullback.errors import UsageError

GOOD = b"<domainblocksnapshot><disk name='sda'/></domainblocksnapshot>"
BOMB = (
    b'<!DOCTYPE d [<!ENTITY a "0123456789">'
    + b"".join(b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(9))
    + b"]>\n<domainblocksnapshot><disk name='&j;'/></domainblocksnapshot>"
)


def refused(data: bytes) -> str:
    with pytest.raises(UsageError) as caught:
        parse_snapshot(data)
    assert caught.value.exit_code == 2
    assert len(str(caught.value)) < 400
    return str(caught.value)


def test_the_good_one_is_good():
    assert parse_snapshot(GOOD).disks[0].name == "sda"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "line 1 is not XML: Document is empty."),
        (b"sda", "line 1 is not XML: "),
        (GOOD[:-3], "line 1 is not XML: "),
        (GOOD + b"x", "line 1 is not XML: Extra content"),
        (b"\n" + GOOD.replace(b"sda", b"\0"), "line 2 is not XML: "),
        (GOOD.replace(b"sda", b"&#0;"), "line 1 is not XML: "),
        (GOOD.replace(b"sda", b"&sda;"), "line 1 is not XML: Entity 'sda' not defined"),
        (GOOD.replace(b"'sda'", b"'a' name='b'"), "line 1 is not XML: Attribute name redefined"),
        (GOOD.replace(b"sda", b"\xff"), "the document is not UTF-8: byte 33 cannot stand there"),
        (GOOD.decode().encode("utf-16"), "the document is not UTF-8: byte 0"),
        (GOOD.decode().encode("utf-16-le"), "line 1 is not XML: "),
        (b"<?xml version='1.0' encoding='utf-7'?>" + GOOD, "the document says that its encoding is 'utf-7'. Write it"),
        (b'<?xml version="1.0" encoding="latin-1"?>' + GOOD, "the document says that its encoding is 'latin-1'"),
        (
            b"\xef\xbb\xbf<?xml version='1.0' encoding='utf-7'?>" + GOOD,
            "the document says that its encoding is 'utf-7'.",
        ),
        (b"<!DOCTYPE d>\n" + GOOD, "there is a document type declaration on line 1. Take the"),
        (b"\n\n<!DOCTYPE d SYSTEM 'x.dtd'>" + GOOD, "there is a document type declaration on line 3."),
        (b"<?php x?>" + GOOD, "there is a processing instruction on line 1."),
        (GOOD.replace(b"<disk", b"\n<?x?><disk"), "there is a processing instruction on line 2."),
        (GOOD + b"\n\n<?x?>", "there is a processing instruction on line 3."),
        (GOOD.replace(b"<disk", b"<disk xmlns='urn:x'"), "<{urn:x}disk> on line 1: it is in an XML namespace. Take"),
        (GOOD.replace(b"<disk", b"<disk xmlns:x='urn:x'"), "<disk> on line 1: it is in an XML namespace."),
        (GOOD.replace(b"name", b"xml:lang='a' name"), "<disk> on line 1: there is no attribute '{http"),
        (GOOD.replace(b"disk", b"x:disk"), "line 1 is not XML: Namespace prefix x"),
    ],
)
def test_no_document(data: bytes, said: str):
    assert refused(data).startswith(said)


def test_a_declared_encoding_that_is_right():
    assert parse_snapshot(b"<?xml version='1.0' encoding='utf-8'?>" + GOOD) == parse_snapshot(GOOD)
    assert parse_snapshot(b'<?xml version="1.0" encoding="US-ASCII"?>' + GOOD) == parse_snapshot(GOOD)


def test_no_entity_is_expanded():
    assert refused(BOMB).startswith("there is a document type declaration on line 1.")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_no_other_file_is_read(tmp_path: Path, scheme: str):
    (tmp_path / "secret").write_text("hunter2")
    document = (
        f"<!DOCTYPE d [<!ENTITY x SYSTEM '{scheme}{tmp_path}/secret'>]>"
        "<domainblocksnapshot><name>&x;</name><disk name='sda'/></domainblocksnapshot>"
    )
    assert "hunter2" not in refused(document.encode())
    for encoding in ("utf-16", "utf-7", "utf-32"):
        declared = f"<?xml version='1.0' encoding='{encoding}'?>{document}"
        assert "hunter2" not in refused(declared.encode(encoding))


def test_a_hidden_declaration_is_not_even_found_if_its_encoding_were(monkeypatch: pytest.MonkeyPatch):
    """Two guards against other encodings; this is the second one alone."""
    monkeypatch.setattr(element, "_DECLARED", re.compile(rb"(?!)()"))
    declared = b"<?xml version='1.0' encoding='utf-7'?>"
    assert "is not XML" in refused(declared + b"+ADw-!DOCTYPE d [<!ENTITY x 'a'>]>" + GOOD.replace(b"sda", b"&x;"))


def padded(unit: bytes, count: int) -> bytes:
    return GOOD.replace(b"<disk", unit * count + b"<disk")


def test_size_lines_and_elements_have_limits_that_can_be_reached():
    own = len(GOOD)
    assert parse_snapshot(padded(b" ", BYTES_MAX - own)) == parse_snapshot(GOOD)
    assert refused(padded(b" ", BYTES_MAX - own + 1)) == (
        f"the document has {BYTES_MAX + 1} bytes; a <domainblocksnapshot> has at most {BYTES_MAX}."
    )
    assert parse_snapshot(padded(b"\n", LINES_MAX - 1)) == parse_snapshot(GOOD)
    assert refused(padded(b"\n", LINES_MAX)) == f"the document has more than {LINES_MAX} lines."
    assert parse_snapshot(padded(b"<!---->", ELEMENTS_MAX - 2)) == parse_snapshot(GOOD)
    assert refused(padded(b"<!---->", ELEMENTS_MAX - 1)) == (
        f"the document has more than {ELEMENTS_MAX} elements and comments."
    )


def test_the_last_line_is_still_counted_right():
    bad = padded(b"\n", LINES_MAX - 1).replace(b"name", b"nam")
    assert refused(bad).startswith(f"<disk> on line {LINES_MAX}: there is no attribute 'nam' here.")


def test_control_characters_of_the_document_reach_no_terminal():
    for text in (
        "<!-- \u009b2J",
        "<a\u009b2J/>",
        "<a b='\u009b2J'/>",
        "<domainblocksnapshot \u009b='1'/>",
        "\u009b2J",
        "<a>&\u009b;</a>",
    ):
        assert "\u009b" not in refused(text.encode())
    assert refused(f"<{'a' * 5000}/>".encode()).startswith(f"<{'a' * 117}...> on line 1: ")


# Each of the shapes that have been expensive for one XML parser or another, as large as a document may be.
WORST = {
    "bomb": BOMB,
    "deep": b"<a>" * 80_000,
    "open": b"<" * 250_000,
    "elements": b"<domainblocksnapshot>" + b"<a/>" * 60_000 + b"</domainblocksnapshot>",
    "disks": padded(b"<disk name='a'><!----></disk>", 2_000),
    "children": b"<domainblocksnapshot><disk name='a'>" + b"<fleece/>" * 4_000 + b"</disk></domainblocksnapshot>",
    "attributes": b"<a " + b" ".join(b'a%x=""' % n for n in range(26_000)) + b"/>",
    "namespaces": b"<a " + b" ".join(b'xmlns:a%x="q"' % n for n in range(15_000)) + b"/>",
    "inherited": b"".join(b'<a xmlns:a%x="q">' % n for n in range(200)) + b"<b/>" * 40_000 + b"</a>" * 200,
    "instructions": b"<?a?>" * 50_000 + b"<a/>",
    "references": b"<a>" + b"&lt;" * 60_000 + b"</a>",
    "text": b"<a>" + b"<!---->x" * 30_000 + b"</a>",
    "name": b"<" + b"a" * 260_000 + b"/>",
    "declaration": b"<?xml " + b"encoding = " * 20_000,
    "digits": b'<domainblockexport type="nbd"><address type="ip" host="h" port="' + b"1" * 250_000 + b'"/>',
}
MEASURE = """
import re, sys, time
from pathlib import Path
from pullback.documents.reading import parse_export, parse_snapshot
from pullback.errors import UsageError

def peak():
    # Not getrusage: its maximum begins with that of the process which started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

data = Path(sys.argv[1]).read_bytes()
before = peak()
start = time.process_time()
for parse in (parse_export, parse_snapshot):
    try:
        parse(data)
        print("taken", end=" ")
    except UsageError:
        pass
print(time.process_time() - start, peak() - before)
"""


@pytest.mark.parametrize("shape", WORST)
def test_the_worst_documents_take_little(tmp_path: Path, shape: str):
    """In a process of its own: libxml2's memory is seen by no Python tool, and a hang could not be ended."""
    assert len(WORST[shape]) <= BYTES_MAX + 100
    (tmp_path / "document").write_bytes(WORST[shape])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "document")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    seconds, kib = done.stdout.split()
    assert float(seconds) < 3
    assert int(kib) < 64 * 1024


def test_the_command_line_does_not_load_lxml():
    code = "import sys, pullback.cli.main; sys.exit('lxml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_any_root_can_be_asked_for():
    assert load(b"<x/>", "x").tag == "x"
