# SPDX-License-Identifier: Apache-2.0
"""--dry-run tells what --trace then shows and changes nothing; the XML documents do what the options do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lxml import etree

from lab.qemu import BareQemu
from tests.support.api import Api, by_nbdcopy, difference, dirty_map, scribble, state_of
from tests.support.dying import changes_something
from tests.support.product import MIB, Stage, references

Start = Callable[..., BareQemu]
SIZE = 2 * MIB


def _plain(command: str, arguments: Any) -> str:
    """A command without what is new each time: ids, work directories, times."""
    text = json.dumps([command, arguments], sort_keys=True)
    text = re.sub(r"\b[bsw][0-9a-f]{8}\b", "ID", text)
    text = re.sub(r"pullback-work-[0-9a-f]+", "WORK", text)
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", "TIME", text)


def _told(events: list[dict[str, Any]], kind: str, name: str) -> list[str]:
    commands = [(event[name], event["arguments"]) for event in events if event["event"] == kind and event[name]]
    # What a job is waited for with is no part of a plan.
    waited = {"job-dismiss"}
    return [_plain(*one) for one in commands if changes_something(one[0]) and one[0] not in waited]


def test_a_dry_run_tells_what_is_then_sent(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", SIZE), stage.disk("vdb", SIZE)], running=True)
    api = Api(stage, qemu)
    scratch = ("--scratch", stage.scratch)
    api.snapshot("before", "--checkpoint", "one")
    api.do("snapshot", "delete", "before")
    for words in (
        ("snapshot", "create", "s", "--checkpoint", "two", *scratch),
        ("export", "start", "--snapshot", "s", "--since", "one", "--socket", lab_dir / "nbd"),
        ("export", "stop"),
        ("snapshot", "delete", "s"),
        ("checkpoint", "delete", "one"),
        ("recover", ""),
    ):
        before = state_of(qemu)
        dry = api.attempt(*words, "--dry-run", "--json")
        assert dry.code == 0, dry.out
        assert difference(state_of(qemu), before) == []
        assert list(stage.scratch.rglob("*")) == []
        done = api.attempt(*words, "--trace", "--json")
        assert done.code == 0, done.out
        told, sent = _told(dry.events, "command", "execute"), _told(done.events, "trace", "command")
        assert told == sent, words
        assert bool(told) == (words[0] != "recover")
    assert api.clean() == []


def test_documents(lab_dir: Path, bare_qemu: Start) -> None:
    stage = Stage(lab_dir)
    qemu = bare_qemu([stage.disk("vda", SIZE), stage.disk("vdb", SIZE)], running=True)
    api = Api(stage, qemu)
    qemu.device_write("vda", 0, SIZE, 0x11)
    api.snapshot("before", "--checkpoint", "one")
    api.do("snapshot", "delete", "before")
    scribble(qemu, "vda", {3})
    state = references(qemu)
    snapshot = lab_dir / "snapshot.xml"
    snapshot.write_text(
        "<domainblocksnapshot><name>s</name><checkpoint>two</checkpoint>"
        f"<disk name='vda'><fleece file='{stage.scratch}/of-vda'/></disk></domainblocksnapshot>"
    )
    made = api.do("snapshot", "create", "--xml", snapshot)
    assert (made["name"], made["checkpoint"], made["disks"]) == ("s", "two", ["vda"])
    export = lab_dir / "export.xml"
    export.write_text(
        f"<domainblockexport type='nbd'><address type='unix' path='{lab_dir}/nbd'/>"
        "<disk name='vda' snapshot='s' exportname='it'><checkpoint name='one'/></disk></domainblockexport>"
    )
    (one,) = api.do("export", "start", "--xml", export)["exports"]
    scribble(qemu, "vda", {3, 4})
    assert by_nbdcopy(one["uri"]) == state["vda"]
    assert dirty_map(one["uri"], "one") == {3}
    shown = etree.fromstring(api.attempt("domain", "show", "--xml").out.encode())
    assert {disk.get("name") for disk in shown.iter("disk")} == {"vda", "vdb"}
    (frozen,) = shown.iter("domainblocksnapshot")
    assert [frozen.findtext(tag) for tag in ("name", "checkpoint")] == ["s", "two"]
    assert [disk.get("name") for disk in frozen.iter("disk")] == ["vda"]
    (offered,) = shown.iter("domainblockexport")
    assert offered.find("address").get("path") == f"{lab_dir}/nbd"
    (shared,) = offered.iter("disk")
    assert [shared.get(key) for key in ("name", "exportname", "snapshot", "readonly")] == ["vda", "it", "s", "yes"]
    assert shared.get("checkpoint") == "one"
    api.do("snapshot", "delete", "s")
    assert api.clean() == []
