# SPDX-License-Identifier: Apache-2.0
"""From untrusted bytes to elements: what is dangerous or not understood is refused, with the element and its line.

    bytes ─► size, UTF-8, no DTD ─► libxml2 ─► no instructions, no namespaces, not too many ─► Element

Without a DTD there are no entities but XML's own five, so there is nothing to expand and nothing to fetch.  That is
looked for in the bytes before libxml2 sees them, which is safe only because no encoding but UTF-8 is taken.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TypeVar

from lxml import etree

from pullback.documents.checks import Check, printable, quoted
from pullback.errors import UsageError

T = TypeVar("T")

#: Documents are written by hand or by a backup program, for some dozens of disks; these are far above that.
BYTES_MAX = 256 * 1024
ELEMENTS_MAX = 4096
#: lxml counts lines no further than this.
LINES_MAX = 65535

_DECLARED = re.compile(rb"<\?xml\s[^>]*?encoding\s*=\s*[\"']([^\"']*)[\"']")
_SPACE = " \t\r\n"


class Element:
    """One element, asked by whoever knows what may stand in it; every error names it and its line."""

    __slots__ = ("_node",)

    def __init__(self, node: etree._Element) -> None:
        self._node = node

    @property
    def tag(self) -> str:
        return str(self._node.tag)

    def error(self, sentence: str, todo: str = "") -> UsageError:
        """The error that says ``sentence`` (no full stop) of this element."""
        return UsageError(f"<{_shown(self.tag)}> on line {self._node.sourceline}: {sentence}", todo=todo)

    def only(self, attributes: Collection[str] = (), once: Collection[str] = (), many: Collection[str] = ()) -> None:
        """Refuse all attributes and children but these, a second child out of ``once``, and text."""
        for name in map(str, self._node.attrib):
            if name not in attributes:
                raise self.error(f"there is no attribute {quoted(name)} here", _takes("attributes", attributes))
        seen = set()
        for child in self.children():
            if child.tag not in once and child.tag not in many:
                todo = _takes(f"elements in <{self.tag}>", [f"<{name}>" for name in (*once, *many)])
                raise child.error(f"it cannot stand in <{self.tag}>", todo)
            if child.tag in once and child.tag in seen:
                raise child.error(f"it stands in <{self.tag}> a second time")
            seen.add(child.tag)
        if self._own_text().strip(_SPACE):
            raise self.error(f"it holds text: {quoted(self._own_text().strip(_SPACE))}")

    def children(self, tag: str | None = None) -> list[Element]:
        """The elements in it, in their order; comments are passed over."""
        found = [Element(node) for node in self._node if isinstance(node.tag, str)]
        return [child for child in found if tag is None or child.tag == tag]

    def child(self, tag: str) -> Element | None:
        return next(iter(self.children(tag)), None)

    def has(self, name: str) -> bool:
        return name in self._node.attrib

    def required(self, name: str, check: Check[T]) -> T:
        """The value of an attribute that must be there."""
        value = self._node.get(name)
        if value is None:
            raise self.error(f"the attribute {name} is missing")
        return self._checked(f"{name} ", str(value), check)

    def optional(self, name: str, check: Check[T], default: T) -> T:
        """The value of an attribute, ``default`` where it is not there."""
        return self.required(name, check) if self.has(name) else default

    def text(self, check: Check[T]) -> T:
        """What an element says that has nothing in it but text; space around it does not count."""
        for name in map(str, self._node.attrib):
            raise self.error(f"there is no attribute {quoted(name)} here", _takes("attributes", ()))
        for child in self.children():
            raise child.error(f"it cannot stand in <{self.tag}>", "Only text can.")
        return self._checked("", self._own_text().strip(_SPACE), check)

    def _own_text(self) -> str:
        return "".join((self._node.text or "", *(node.tail or "" for node in self._node)))

    def _checked(self, what: str, value: str, check: Check[T]) -> T:
        try:
            return check(value)
        except ValueError as error:
            raise self.error(f"{what}{quoted(value)} {error}") from None


def load(data: bytes, root: str) -> Element:
    """The root element of a document that must be called ``root``; UsageError for everything that is not one."""
    if len(data) > BYTES_MAX:
        raise UsageError(f"the document has {len(data)} bytes; a <{root}> has at most {BYTES_MAX}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"the document is not UTF-8: byte {error.start} cannot stand there") from error
    utf8 = text.encode()
    declared = _DECLARED.match(utf8)
    if declared and declared[1].lower() not in (b"utf-8", b"us-ascii"):
        raise UsageError(
            f"the document says that its encoding is {quoted(declared[1].decode())}", todo="Write it in UTF-8."
        )
    if text.count("\n") >= LINES_MAX:
        raise UsageError(f"the document has more than {LINES_MAX} lines")
    if "<!DOCTYPE" in text:
        line = text[: text.index("<!DOCTYPE")].count("\n") + 1
        raise UsageError(f"there is a document type declaration on line {line}", todo="Take the <!DOCTYPE …> out.")
    node = _parse(utf8)
    _refuse_the_unusual(node)
    if node.tag != root:
        raise Element(node).error(f"a document of another kind: expected is <{root}>")
    return Element(node)


def _parse(utf8: bytes) -> etree._Element:
    # The encoding is given, so that no declaration leads libxml2 to another one than was looked at.
    parser = etree.XMLParser(
        encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, recover=False
    )
    try:
        return etree.fromstring(utf8, parser)
    except etree.XMLSyntaxError as error:
        # libxml2 adds the place to its message; the message may quote the document.
        said = " ".join((error.msg or "it ends early").partition(", line ")[0].split())
        raise UsageError(f"line {error.lineno or 1} is not XML: {_shown(said)}") from error


def _refuse_the_unusual(root: etree._Element) -> None:
    around = (*root.itersiblings(preceding=True), *root.itersiblings())
    for count, node in enumerate((*around, *root.iter()), 1):
        if isinstance(node, etree._ProcessingInstruction):
            raise UsageError(f"there is a processing instruction on line {node.sourceline}", todo="Take it out.")
        if count > ELEMENTS_MAX:
            raise UsageError(f"the document has more than {ELEMENTS_MAX} elements and comments")
        if node.nsmap:
            raise Element(node).error("it is in an XML namespace", "Take xmlns and the prefixes out.")


def _shown(text: str) -> str:
    """Text of the document, or with such text in it, in a form that can stand in an error message."""
    shown = "".join(character if printable(character) else "?" for character in text)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."


def _takes(what: str, names: Collection[str]) -> str:
    return f"Known {what}: {', '.join(names)}." if names else f"There are no {what} here."
