# SPDX-License-Identifier: Apache-2.0
"""What becomes of the jobs that fill the images of an instant restore."""

from __future__ import annotations

import json

import pytest

from pullback.model.facts import Facts, Node
from pullback.plan.instant import Act, backing_file, find_node, next_act, start_stream


@pytest.mark.parametrize(
    ("status", "has_backing", "was_seen", "act"),
    [
        (None, True, False, Act.START),
        (None, True, True, Act.GIVE_UP),
        (None, False, True, Act.WAIT),
        (None, False, False, Act.WAIT),
        ("running", True, True, Act.WAIT),
        ("aborting", True, True, Act.WAIT),
        ("pending", True, True, Act.FINALIZE),
        ("pending", True, False, Act.FINALIZE),
        ("concluded", True, True, Act.WAIT),
    ],
)
def test_what_is_done_next(status: str | None, has_backing: bool, was_seen: bool, act: Act) -> None:
    assert next_act(status, has_backing, was_seen) is act


def test_the_job_waits_for_a_flush_and_goes_by_itself() -> None:
    step = start_stream(3, "#block17")
    arguments = step.arguments
    assert step.execute == "block-stream"
    assert (arguments["auto-finalize"], arguments.get("auto-dismiss", True)) == (False, True)
    assert (arguments["job-id"], arguments["device"]) == ("instant-3", "#block17")
    assert len(arguments["filter-node-name"]) <= 31


def test_the_backing_file_names_socket_and_export_and_has_qemu_wait_for_the_server() -> None:
    # 1023 bytes is what a qcow2 header takes, 107 a socket's path.
    name = backing_file("/" + "s" * 106, "d" * 26)
    assert len(name) < 1023
    assert json.loads(name.removeprefix("json:")) == {
        "driver": "raw",
        "file": {
            "driver": "nbd",
            "server": {"type": "unix", "path": "/" + "s" * 106},
            "export": "d" * 26,
            "reconnect-delay": 3600,
            "open-timeout": 60,
        },
    }


def test_the_node_is_the_one_whose_file_is_the_image() -> None:
    nodes = {
        "file": Node("file", "file", 1, filename="/x/vda.qcow2"),
        "image": Node("image", "qcow2", 1, filename="whatever", children={"file": "file", "backing": "remote"}),
        "remote": Node("remote", "raw", 1, children={"file": "nbd"}),
        "nbd": Node("nbd", "nbd", 1, filename="nbd+unix:///vda"),
        "filter": Node("pb-stream-0", "copy-on-read", 1, children={"file": "image"}),
    }
    facts = Facts("web", "", (7, 2, 0), "running", (), nodes)
    assert find_node(facts, lambda path: path == "/x/vda.qcow2") == nodes["image"]
    assert find_node(facts, lambda path: path == "/x/vdb.qcow2") is None
