# SPDX-License-Identifier: Apache-2.0
"""Opening the images of a stopped domain in a storage daemon: all of them, or none.

Opening a qcow2 image for writing marks its bitmaps as in use, and only closing it in order takes that back.  So all
images are tried read-only first, which touches nothing and is refused while another process writes to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pullback.model.facts import DISK_NODE, Facts
from pullback.plan.command import Plan, Step

_TRY_NODE = "try-"


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a stopped domain, and its format ("qcow2" or "raw")."""

    target: str
    path: str
    format: str


def _add(image: Image, node: str, why: str, *, read_only: bool) -> Step:
    options: dict[str, Any] = {
        "driver": image.format,
        "node-name": node,
        "read-only": read_only,
        "discard": "unmap",
        "file": {"driver": "file", "filename": image.path, "read-only": read_only, "discard": "unmap"},
    }
    return Step("blockdev-add", options, why)


def try_images(images: Sequence[Image]) -> Plan:
    """See whether all images can be opened, and that nobody else writes to them; nothing of them is changed."""
    names = [f"{_TRY_NODE}{number}" for number in range(len(images))]
    tries = [
        _add(image, name, f"see whether {image.target} can be opened", read_only=True)
        for image, name in zip(images, names, strict=True)
    ]
    return Plan((*tries, *(Step("blockdev-del", {"node-name": name}, "it can") for name in names)))


def open_images(images: Sequence[Image], *, read_only: bool = False) -> Plan:
    """Open all images under the names by which they are the domain's disks; for writing, unless ``read_only``."""
    return Plan(
        tuple(
            _add(image, f"{DISK_NODE}{image.target}", f"the disk {image.target}", read_only=read_only)
            for image in images
        )
    )


def as_if_writable(facts: Facts) -> Facts:
    """What would be seen of images that were opened read-only, had they been opened for writing."""
    roots = {device.root for device in facts.devices}
    nodes = {name: replace(node, read_only=False) if name in roots else node for name, node in facts.nodes.items()}
    return replace(facts, nodes=nodes)
