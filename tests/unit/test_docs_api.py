# SPDX-License-Identifier: Apache-2.0
"""docs/api.md, held to the package: the same names, the same signatures, and an import that costs nothing."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pullback
from pullback import errors
from tests.support.markdown import named, rows, sections, without_code

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()

#: Of these the page describes what callers need, not everything there is.
IN_PART = {"Repository", "NbdConnection"}


def signature(function: Any) -> str:
    """A signature as the page writes it: without self, annotations without quotes."""
    parameters = inspect.signature(function)
    kept = [one for one in parameters.parameters.values() if one.name not in ("self", "cls")]
    text = str(parameters.replace(parameters=kept))
    return re.sub(r"(: |-> )'((?:[^'\\]|\\.)*)'", r"\1\2", text).replace('"', "")


def fields_of(cls: Any) -> Iterator[str]:
    for field in dataclasses.fields(cls):
        default = ""
        if field.default is not dataclasses.MISSING:
            default = f" = {field.default!r}"
        elif field.default_factory is not dataclasses.MISSING:
            default = " = <factory>"
        yield f"{field.name}: {field.type}{default}".replace('"', "'")


def members_of(cls: Any) -> Iterator[str]:
    for name, member in inspect.getmembers(cls):
        if name.startswith("_") or not (inspect.isroutine(member) or isinstance(member, property)):
            continue
        yield name if isinstance(member, property) else name + signature(member)


def real(name: str) -> set[str]:
    """What there is to say of a public name: its signature, or its fields and members."""
    thing = getattr(pullback, name)
    if not inspect.isclass(thing):
        return {name + signature(thing)}
    found = set(members_of(thing))
    if dataclasses.is_dataclass(thing):
        return found | set(fields_of(thing))
    return found | {name + signature(thing)}


def documented(text: str, name: str) -> set[str]:
    body = sections(text).get(name, "")
    in_tables = {named(row[0])[0].replace("\\|", "|") for row in rows(body)}
    return in_tables | set(re.findall(rf"^`({name}\(.*)`$", body, flags=re.MULTILINE))


def check_api(text: str) -> list[str]:
    problems = [f"{name} is not documented" for name in pullback.__all__ if name not in sections(text)]
    for name in pullback.__all__:
        says, is_so = documented(text, name), real(name)
        problems += [f"{name}: documented only: {one}" for one in sorted(says - is_so)]
        # The constructors of what others make are nobody's business.
        left = {one for one in is_so - says if not one.startswith(f"{name}(")}
        problems += [f"{name}: not documented: {one}" for one in sorted(left)] if name not in IN_PART else []
    return problems


def check_exceptions(text: str) -> list[str]:
    known = {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
    looks = re.compile(r"(?:\w+Error|Refused|Nbd(?:Refused|ProtocolError|Disconnected)|\w+(?:Busy|Unreachable|Failed))")
    return [f"there is no {name}" for name in named(without_code(text)) if looks.fullmatch(name) and name not in known]


def test_the_public_api_is_documented_with_its_signatures() -> None:
    assert len(pullback.__all__) > 15
    assert not check_api(PAGE)
    assert not check_exceptions(PAGE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| `stop_exports(exports: Collection[Export]) -> None` |", "| `stop_export(export: Export) -> None` |"),
        ("| `find_snapshot(name: str)", "| `find_snapshot(title: str)"),
        ("| `freeze: Freeze = 'no'` | as", "| `freeze: Freeze = 'try'` | as"),
        ("| `most: int` |", "| `least: int` |"),
        ("## parse_uri", "## read_uri"),
        ("`parse_uri(text: str) ->", "`parse_uri(uri: str) ->"),
        ("| `trim(offset: int, length: int) -> None` |", "| `drop(offset: int, length: int) -> None` |"),
        ("| `session` | property", "| `place` | property"),
    ],
)
def test_a_page_that_was_altered_is_seen(old: str, new: str) -> None:
    assert old in PAGE
    assert check_api(PAGE.replace(old, new, 1))


def test_an_exception_that_is_not_there_is_seen() -> None:
    assert check_exceptions(PAGE.replace("`DomainBusy`", "`DomainTooBusy`", 1))


def test_importing_the_package_loads_nothing_of_it() -> None:
    code = (
        "import sys, pullback; before = {*sys.modules}; pullback.open_domain;"
        "print(*(m for m in before if m.startswith(('pullback.', 'qemu', 'asyncio', 'typer', 'cryptography'))));"
        "print('qemu.qmp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "\nTrue\n"


def test_type_checkers_are_told_the_same() -> None:
    stub = Path(pullback.__file__).with_suffix(".pyi").read_text()
    told = set(re.findall(r"^from ([\w.]+) import (\w+) as \2$", stub, flags=re.MULTILINE))
    homes = {(f"pullback.{home}", name) for home, names in pullback._HOMES.items() for name in names}
    assert told == homes
    assert {name for _, name in told} == {*pullback.__all__}


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pullback.nonsense  # type: ignore[attr-defined]
    assert {*pullback.__all__} <= {*dir(pullback)}
