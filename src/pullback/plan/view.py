# SPDX-License-Identifier: Apache-2.0
"""A frozen view that any reader may believe, on a QEMU whose own may not be (``method.FROZEN_VIEW_EXACT``).

    view (quorum, fifo) ─┬─► align (blkdebug: 64 KiB at a time) ──► access (snapshot-access)
                         └─► deny  (blkdebug: every read fails) ──► void   (null, of unknown content)

Reads go through ``align``, in units that QEMU answers right; when that fails, because the snapshot broke, ``deny``
fails too.  Of block status quorum makes zero only what all children call zero, and ``void`` calls nothing so: a reader
is told that all is data, which is right, if not thin.
"""

from __future__ import annotations

from pullback.model.snapshots import VIEW_ROLES, Names
from pullback.plan.command import Plan, Step
from pullback.plan.method import SAVED_UNIT

_EACCES = 13


def open_view(names: Names, target: str, size: int) -> Plan:
    """Put a view that can be believed on the frozen view of one disk."""
    view, align, deny, void = (names.node(role) for role in VIEW_ROLES)
    why = f"so that readers of the frozen {target} get what was frozen"
    denial = {"event": "none", "iotype": "read", "errno": _EACCES}
    nodes = (
        {
            "driver": "blkdebug",
            "node-name": align,
            "image": names.node("access"),
            "align": SAVED_UNIT,
            "max-transfer": SAVED_UNIT,
        },
        {"driver": "null-co", "node-name": void, "size": size, "read-zeroes": False},
        {"driver": "blkdebug", "node-name": deny, "image": void, "inject-error": [denial]},
        {
            "driver": "quorum",
            "node-name": view,
            "children": [align, deny],
            "vote-threshold": 1,
            "read-pattern": "fifo",
        },
    )
    return Plan(tuple(Step("blockdev-add", node, why) for node in nodes))
