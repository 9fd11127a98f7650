# SPDX-License-Identifier: Apache-2.0
"""Instant restore: images that are usable at once, while QEMU pulls their content out of a served backup.

    no job ──start──► running ──► pending ──flush──finalize──► no job, and the image stands alone

QEMU takes the backing file out of the header before it has written its own tables out (seen on 7.2.22).  So the job
waits once all is copied, and is only finalized after a flush: a QEMU that is killed then loses nothing.

The job dismisses itself: one that has concluded holds a filter without a child, and QEMU dies when it is asked for its
nodes (seen on 7.2.22).  So of one that failed there is no word, it is just gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum

from pullback.model.facts import Facts, Node
from pullback.plan.command import Step

#: Seconds for which a domain's requests wait for a server that was killed, and for which opening an image does.
RECONNECT, OPEN = 3600, 60


class Act(Enum):
    """What to do about one image that does not stand alone yet."""

    START = "start"
    FINALIZE = "finalize"
    GIVE_UP = "give up"
    WAIT = "wait"


def backing_file(socket: str, export: str, reconnect: int = RECONNECT) -> str:
    """The backing file of an image whose backup is served at ``socket``: QEMU looks for the server again and again."""
    server = {"type": "unix", "path": socket}
    remote = {"driver": "nbd", "server": server, "export": export, "reconnect-delay": reconnect, "open-timeout": OPEN}
    return "json:" + json.dumps({"driver": "raw", "file": remote})


def job_id(number: int) -> str:
    """The id of the job that fills image ``number``."""
    return f"instant-{number}"


def find_node(facts: Facts, is_image: Callable[[str], bool]) -> Node | None:
    """The node that has the image open; ``is_image`` tells whether a path is the image's."""
    for node in facts.nodes.values():
        file = facts.nodes.get(node.children.get("file", ""))
        if node.driver == "qcow2" and file is not None and is_image(file.filename):
            return node
    return None


def next_act(status: str | None, has_backing: bool, was_seen: bool) -> Act:
    """What to do, from the status of the image's job (None without one) and whether QEMU still reads the backup.

    ``was_seen`` says that this QEMU had such a job before.
    """
    if status == "pending":
        return Act.FINALIZE
    if status is not None or not has_backing:
        return Act.WAIT
    return Act.GIVE_UP if was_seen else Act.START


def start_stream(number: int, node: str) -> Step:
    """Have QEMU copy what the image does not hold yet; its filter has a name by which backups look through it."""
    return Step(
        "block-stream",
        {
            "job-id": job_id(number),
            "device": node,
            "filter-node-name": f"pb-stream-{number}",
            "auto-finalize": False,
        },
        "pull the rest of the backup into the image",
    )


def flush_node(node: str) -> Step:
    """Have a domain's QEMU write out what it holds of an image."""
    return Step(
        "human-monitor-command", {"command-line": f'qemu-io {node} "flush"'}, "all that was copied is to be durable"
    )


def finalize(number: int) -> Step:
    """Take the backing file out of the image."""
    return Step("job-finalize", {"id": job_id(number)}, "the image holds everything: it stands alone from here on")
