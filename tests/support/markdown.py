# SPDX-License-Identifier: Apache-2.0
"""Reading the documentation's Markdown: sections, tables, code blocks."""

from __future__ import annotations

import re


def without_code(text: str) -> str:
    """The text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code_blocks(text: str, language: str = r"\w*") -> list[str]:
    """What stands in code blocks, of one language or of any."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def sections(text: str) -> dict[str, str]:
    """Headings, each with the text up to the next one of any level; code blocks are left out."""
    parts = re.split(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows in the text, without heads."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if re.match(r"^\|[-|]+\|$", line):
            found.pop()  # the line before was the head
        elif line.startswith("|"):
            found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def plain(cell: str) -> str:
    """A cell as it reads."""
    return cell.replace("`", "").replace("\\|", "|")


def named(cell: str) -> list[str]:
    """What a cell has in backticks."""
    return re.findall(r"`([^`]+)`", cell)
