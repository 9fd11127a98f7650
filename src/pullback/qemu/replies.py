# SPDX-License-Identifier: Apache-2.0
"""QEMU's replies, read with their types: whatever answers on the socket, what is not as it should be is an error.

The schema (query-qmp-schema) has these members in every QEMU from 7.0 on; what is optional there has a default here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pullback.errors import DomainError

_T = TypeVar("_T")


def senseless(what: str) -> DomainError:
    """The error for a reply that cannot be what QEMU says."""
    return DomainError(
        f"What QEMU answered makes no sense: {what}",
        means="Nothing was done because of it.",
        todo="Is it QEMU that listens there? If it is, run it again; what is there then is looked at anew.",
    )


class Reply:
    """One JSON object of a reply; ``where`` is what it is called in errors.  Everything raises DomainError."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise senseless(f"{where} is not an object")
        self._value = value
        self._where = where

    def _get(self, key: str, kind: type[_T], default: _T | None) -> _T:
        value = self._value.get(key, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise senseless(f"{key} of {self._where} is not {kind.__name__}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text, in Unicode."""
        value = self._get(key, str, default)
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise senseless(f"{key} of {self._where} is not Unicode")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A number that is not negative, of 63 bits at most."""
        value = self._get(key, int, default)
        if not 0 <= value < 1 << 63:
            raise senseless(f"{key} of {self._where} is out of range")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        return self._get(key, bool, default)

    def member(self, key: str) -> Reply:
        """An object inside; one that is not there is empty."""
        return Reply(self._value.get(key, {}), f"{key} of {self._where}")

    def members(self, key: str) -> list[Reply]:
        """A list of objects inside; one that is not there is empty."""
        return replies(self._value.get(key, []), f"{key} of {self._where}")


def replies(value: Any, where: str) -> list[Reply]:
    """A list of objects."""
    if not isinstance(value, list):
        raise senseless(f"{where} is not a list")
    return [Reply(item, f"{where}[{number}]") for number, item in enumerate(value)]
