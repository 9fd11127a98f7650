# SPDX-License-Identifier: Apache-2.0
"""QMP commands held against QEMU's own description of them (query-qmp-schema, qapi/introspect.json)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Json = Mapping[str, Any]

_JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "int": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
    "value": (str, int, float, bool, type(None), list, dict),
}


class SchemaError(AssertionError):
    """A command that QEMU would refuse for its form; the message begins with the place in its arguments."""


class Schema:
    """The answer to query-qmp-schema, asked about commands."""

    def __init__(self, entries: Iterable[Json]) -> None:
        self._entries = {entry["name"]: entry for entry in entries}

    def check(self, command: str, arguments: Json) -> None:
        """SchemaError unless QEMU takes a command with arguments of these names and types."""
        entry = self._entries.get(command)
        if entry is None or entry["meta-type"] != "command":
            raise SchemaError(f"{command}: no such command")
        self._value(entry["arg-type"], arguments, command)

    def _value(self, type_name: str, value: Any, place: str) -> None:
        entry = self._entries[type_name]
        match entry["meta-type"]:
            case "builtin":
                self._builtin(entry["json-type"], value, place)
            case "enum":
                if value not in [member["name"] for member in entry["members"]]:
                    raise SchemaError(f"{place}: {value!r} is not one of them")
            case "array":
                self._builtin("array", value, place)
                for number, item in enumerate(value):
                    self._value(entry["element-type"], item, f"{place}[{number}]")
            case "object":
                self._builtin("object", value, place)
                self._object(entry, value, place)
            case "alternate":
                self._alternate(entry, value, place)
            case other:
                raise SchemaError(f"{place}: a {other} is no type of a value")

    def _builtin(self, json_type: str, value: Any, place: str) -> None:
        allowed = _JSON_TYPES[json_type]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise SchemaError(f"{place}: {value!r} is not {json_type}")

    def _members(self, entry: Json, value: Json, place: str) -> dict[str, Json]:
        """All members that this very value may have, those of its variant included."""
        members = {member["name"]: member for member in entry["members"]}
        if "tag" in entry:
            chosen = value.get(entry["tag"])
            for variant in entry["variants"]:
                if variant["case"] == chosen:
                    members.update(self._members(self._entries[variant["type"]], value, place))
        return members

    def _object(self, entry: Json, value: Json, place: str) -> None:
        members = self._members(entry, value, place)
        for name, member in members.items():
            if name in value:
                self._value(member["type"], value[name], f"{place}.{name}")
            elif "default" not in member:
                raise SchemaError(f"{place}.{name}: missing")
        for name in value:
            if name not in members:
                raise SchemaError(f"{place}.{name}: no such member")

    def _alternate(self, entry: Json, value: Any, place: str) -> None:
        said = []
        for member in entry["members"]:
            try:
                return self._value(member["type"], value, place)
            except SchemaError as error:
                said.append(str(error))
        raise SchemaError(f"{place}: no alternative fits: {'; '.join(said)}")
