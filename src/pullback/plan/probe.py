# SPDX-License-Identifier: Apache-2.0
"""Finding out whether a frozen view can still be read: QEMU tells nobody that a snapshot broke.

A backup job from the view into nowhere reads its first cluster, and is so slow that it reads no second one.
"""

from __future__ import annotations

from pullback.model.facts import Facts
from pullback.model.snapshots import SnapshotPart
from pullback.plan.command import JobGone, Plan, Step


def start_probe(part: SnapshotPart) -> Plan:
    """Start reading the frozen view of one disk: the job ends with an error if it is broken, and advances if not."""
    assert part.access is not None
    nowhere = part.names.node("probe")
    return Plan(
        (
            Step(
                "blockdev-add",
                {"driver": "null-co", "node-name": nowhere, "size": part.access.virtual_size},
                "where what is read goes: nowhere",
            ),
            Step(
                "blockdev-backup",
                {
                    "job-id": part.names.id("probe"),
                    "device": part.access.name,
                    "target": nowhere,
                    "sync": "full",
                    "speed": 1,
                    "auto-dismiss": False,
                },
                f"read a little of the frozen {part.target}",
            ),
        )
    )


def clear_probe(facts: Facts, part: SnapshotPart) -> Plan:
    """Remove a probe of one disk that a client which died has left; empty when there is none."""
    job = next((job for job in facts.jobs if job.id == part.names.id("probe")), None)
    if job is not None:
        return end_probe(part, job.status == "concluded")
    node = part.names.node("probe")
    return Plan((Step("blockdev-del", {"node-name": node}, "nothing goes there"),) if node in facts.nodes else ())


def end_probe(part: SnapshotPart, concluded: bool) -> Plan:
    """Remove the job, which may still be at it, and its target."""
    job = part.names.id("probe")
    if concluded:
        end = Step("job-dismiss", {"id": job}, "it has told what there is to know")
    else:
        end = Step("job-cancel", {"id": job}, "it has told what there is to know", wait=JobGone(job))
    return Plan((end, Step("blockdev-del", {"node-name": part.names.node("probe")}, "nothing goes there any more")))
