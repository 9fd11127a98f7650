# SPDX-License-Identifier: Apache-2.0
"""Creating and removing checkpoints: transactions over the dirty bitmaps of all disks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pullback.model.chain import Chain, Edge, bitmap_name
from pullback.model.units import BITMAP_GRANULARITY
from pullback.plan.command import Plan, Step, transaction

_Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NodeChain:
    """The chain of one disk, and the node its bitmaps are on."""

    node: str
    chain: Chain


def _add(node: str, name: str, recording: bool, granularity: int = BITMAP_GRANULARITY) -> _Json:
    return {
        "type": "block-dirty-bitmap-add",
        "data": {
            "node": node,
            "name": name,
            "granularity": granularity,
            "persistent": True,
            "disabled": not recording,
        },
    }


def _on(action: str, node: str, name: str) -> _Json:
    return {"type": f"block-dirty-bitmap-{action}", "data": {"node": node, "name": name}}


def _merge(node: str, target: str, sources: Sequence[str]) -> _Json:
    return {
        "type": "block-dirty-bitmap-merge",
        "data": {"node": node, "target": target, "bitmaps": list(sources)},
    }


def recording_actions(disks: Sequence[NodeChain], checkpoint: str) -> list[_Json]:
    """What adds the bitmaps of a new checkpoint, recording."""
    return [_add(disk.node, bitmap_name(checkpoint, disk.chain.last), recording=True) for disk in disks]


def stop_actions(disks: Sequence[NodeChain]) -> list[_Json]:
    """What stops the bitmaps that record now."""
    return [
        _on("disable", disk.node, edge.name) for disk in disks for edge in disk.chain.edges if edge.bitmap.recording
    ]


def start_recording(disks: Sequence[NodeChain], checkpoint: str) -> Step:
    """Add the bitmaps of a new checkpoint; from here on two record, so no write is missed.  Before the freeze."""
    return transaction(
        (_add(disk.node, bitmap_name(checkpoint, disk.chain.last), recording=True) for disk in disks),
        f"start recording changes after checkpoint {checkpoint}",
    )


def stop_recording(disks: Sequence[NodeChain]) -> Plan:
    """Stop the bitmaps of the checkpoints before the new one.  After the freeze: what they hold is exact or a hair
    too large, never too small.

    Unusable ones that record are stopped too: of two chains on one disk none could ever be used again.
    """
    actions = [
        _on("disable", disk.node, bitmap.name)
        for disk in disks
        for bitmap in (*(edge.bitmap for edge in disk.chain.edges), *(bitmap for bitmap, _ in disk.chain.broken))
        if bitmap.recording and not bitmap.inconsistent
    ]
    return Plan((transaction(actions, "the previous checkpoint stops recording"),)) if actions else Plan()


def _groups(chain: Chain, remove: Collection[str]) -> list[list[Edge]]:
    """The edges, grouped by the point that each will belong to; edges before the first kept point belong to none."""
    groups: list[list[Edge]] = [[]]
    for edge in chain.edges:
        if edge.checkpoint in remove:
            groups[-1].append(edge)
        else:
            groups.append([edge])
    return groups


def _remove_from(disk: NodeChain, remove: Collection[str]) -> list[_Json]:
    first, *kept = _groups(disk.chain, remove)
    actions: list[_Json] = []
    parent: str | None = None
    for group in kept:
        head, tail = group[0], group[1:]
        actions += _rebuilt(disk.node, head, tail, parent)
        parent = head.checkpoint
    actions += [_on("remove", disk.node, edge.name) for edge in first]
    return actions


def _rebuilt(node: str, head: Edge, tail: Sequence[Edge], parent: str | None) -> list[_Json]:
    """Make the bitmap of ``head`` cover ``tail`` too and carry its new parent in its name; drop what it replaces."""
    name = bitmap_name(head.checkpoint, parent)
    recording = tail[-1].bitmap.recording if tail else head.bitmap.recording
    actions: list[_Json] = []
    dropped = list(tail)
    if name != head.name:
        actions.append(_add(node, name, recording, head.bitmap.granularity))
        dropped.insert(0, head)
    elif recording and not head.bitmap.recording:
        actions.append(_on("enable", node, name))
    if dropped:
        actions.append(_merge(node, name, [edge.name for edge in dropped]))
        actions += [_on("remove", node, edge.name) for edge in dropped]
    return actions


def remove_checkpoints(disks: Sequence[tuple[NodeChain, Collection[str]]]) -> Plan:
    """Take checkpoints out of the chains of several disks, of each disk its own, in one transaction.

    What is known since every remaining checkpoint stays exactly what it was:

        remove the first    drop its bitmap, the next one becomes the first (its name loses the parent)
        remove a middle N   the bitmap of N is merged into its parent's, the child gets the parent's name
        remove the last     its bitmap is merged into its parent's, which records again

    A bitmap cannot be renamed: a new one is added, the old one merged into it and removed.
    """
    actions = [action for disk, remove in disks for action in _remove_from(disk, remove)]
    if not actions:
        return Plan()
    names = ", ".join(sorted({point for disk, remove in disks for point in disk.chain.points if point in remove}))
    why = f"merge checkpoint {names} away on all disks at once" if names else "what came before the chain is lost"
    return Plan((transaction(actions, why),))


def remove_broken(disks: Sequence[NodeChain]) -> Plan:
    """Remove bitmaps of ours that QEMU marked inconsistent: nothing can be learnt from them any more."""
    actions = [
        _on("remove", disk.node, bitmap.name)
        for disk in disks
        for bitmap, _ in disk.chain.broken
        if bitmap.inconsistent
    ]
    return Plan((transaction(actions, "remove bitmaps that QEMU could not store"),)) if actions else Plan()
