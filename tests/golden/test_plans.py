# SPDX-License-Identifier: Apache-2.0
"""Planned QMP, compared with files that people read, and with QEMU's own description of its commands."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lab.disks import DiskSpec
from lab.qemu import BareQemu, short_directory
from tests.golden.daemon import RealDaemon
from tests.golden.plans import NEWER, as_json, daemon_plans, plans
from tests.golden.replay import DATA, check_golden, observed
from tests.golden.schema import Schema, SchemaError

PLANS = plans()
every = pytest.mark.parametrize("name", PLANS)


@pytest.fixture(scope="module")
def schema() -> Schema:
    """What the QEMU that is installed says it takes."""
    with BareQemu() as qemu:
        return Schema(qemu.qmp("query-qmp-schema"))


@pytest.fixture(scope="module")
def daemon_schema() -> Iterator[Schema]:
    """What the storage daemon that is installed says it takes."""
    place = short_directory()
    try:
        with RealDaemon(place) as daemon:
            yield Schema(daemon.qmp("query-qmp-schema"))
    finally:
        shutil.rmtree(place)


@every
def test_the_plan_is_what_it_was(name: str) -> None:
    # Planned now: a mutant (make mutants) is switched on long after this module was imported.
    check_golden(f"plans/{name}", as_json(plans()[name]))


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in (DATA / "plans").glob("*.json")} == set(PLANS)


@every
def test_qemu_knows_every_command_and_argument(name: str, schema: Schema) -> None:
    _check(schema, name)


@pytest.mark.parametrize("name", daemon_plans(observed("idle")))
def test_a_storage_daemon_knows_them_too(name: str, daemon_schema: Schema) -> None:
    _check(daemon_schema, name)


def _check(schema: Schema, name: str) -> None:
    for step in PLANS[name].commands():
        try:
            schema.check(step.execute, dict(step.arguments))
        except SchemaError as error:
            # QEMU 10.1 brought it; whoever has that holds the plan to it.
            assert name in NEWER, error
            assert "on-cbw-error: no such member" in str(error)


def command(kind: str) -> dict[str, Any]:
    """A planned command of this driver or name, to be spoilt."""
    for plan in PLANS.values():
        for step in plan.commands():
            if kind in (step.execute, step.arguments.get("driver")):
                return {"execute": step.execute, "arguments": copy.deepcopy(dict(step.arguments))}
    raise LookupError(kind)


def _action(arguments: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = arguments["actions"][0]["data"]
    return data


@pytest.mark.parametrize(
    ("kind", "spoil", "said"),
    [
        ("qom-set", lambda a: a.update(propery="drive"), "qom-set.propery: no such member"),
        ("qom-set", lambda a: a.pop("path"), "qom-set.path: missing"),
        ("block-export-add", lambda a: a.update(writable="yes"), "writable: 'yes' is not boolean"),
        ("block-export-add", lambda a: a.update(type="nfs"), "block-export-add.type: 'nfs' is not one of them"),
        ("block-export-add", lambda a: a.pop("node-name"), "block-export-add.node-name: missing"),
        ("block-export-add", lambda a: a.update(bitmaps="B"), "block-export-add.bitmaps: 'B' is not array"),
        ("block-export-add", lambda a: a.update(bitmaps=[1]), "block-export-add.bitmaps[0]: no alternative fits"),
        ("block-export-add", lambda a: a.update({"num-queues": 1}), "num-queues: no such member"),
        ("copy-before-write", lambda a: a.update({"on-cbw-error": "shrug"}), "on-cbw-error: 'shrug' is not one of"),
        ("copy-before-write", lambda a: a.update({"cbw-timeout": True}), "cbw-timeout: True is not int"),
        ("copy-before-write", lambda a: a.update(file=None), "blockdev-add.file: no alternative fits"),
        ("snapshot-access", lambda a: a.pop("file"), "blockdev-add.file: missing"),
        ("snapshot-access", lambda a: a.update(target="x"), "blockdev-add.target: no such member"),
        ("nbd-server-start", lambda a: a["addr"]["data"].pop("path"), "nbd-server-start.addr.data.path: missing"),
        ("transaction", lambda a: a["actions"].append({"type": "x"}), "type: 'x' is not one of them"),
        ("transaction", lambda a: _action(a).update(granularity="64k"), "granularity: '64k' is not int"),
        ("transaction", lambda a: _action(a).pop("node"), "transaction.actions[0].data.node: missing"),
        ("transaction", lambda a: a.update(actions={}), "transaction.actions: {} is not array"),
        ("blockdev-create", lambda a: a["options"].pop("filename"), "blockdev-create.options.filename: missing"),
    ],
)
def test_the_check_can_fail(kind: str, spoil: Callable[[Any], Any], said: str, schema: Schema) -> None:
    made = command(kind)
    schema.check(made["execute"], made["arguments"])
    spoil(made["arguments"])
    with pytest.raises(SchemaError) as caught:
        schema.check(made["execute"], made["arguments"])
    assert said in str(caught.value)


def test_an_unknown_command_is_noticed(schema: Schema) -> None:
    for name in ("blockdev-delete", "STOP", "BlockdevDriver"):
        with pytest.raises(SchemaError, match="no such command"):
            schema.check(name, {})


def test_disk_specs_of_the_lab_are_no_part_of_this() -> None:
    """The captures hold no path of the machine they were made on."""
    for path in DATA.rglob("*.json"):
        text = path.read_text()
        assert "/tmp/" not in text.replace("/var/tmp/", ""), path.name
        assert DiskSpec.__name__ not in text
