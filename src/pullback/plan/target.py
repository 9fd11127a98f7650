# SPDX-License-Identifier: Apache-2.0
"""What becomes of the files where a restored image is to be: begun, gone on with, finished, or refused.

    DISK.FORMAT                 the image, once it is whole
    DISK.FORMAT.partial         the image until then
    DISK.FORMAT.partial.json    what of it is durable (``model.unfinished``)

A refusal changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pullback.errors import TargetExists
from pullback.model.unfinished import Unfinished

NOTHING_WRITTEN = "Nothing was written."


class EntryKind(Enum):
    """What lies under a name, links not followed."""

    NOTHING = "nothing"
    REGULAR = "a file"
    LINK = "a symbolic link"
    DIRECTORY = "a directory"
    OTHER = "no regular file"


@dataclass(frozen=True, slots=True)
class FileFacts:
    """One name: ``inode`` and ``modified`` (nanoseconds) of what lies there, and whether somebody has it open."""

    path: str
    kind: EntryKind = EntryKind.NOTHING
    inode: int = 0
    modified: int = 0
    in_use: bool = False


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """The three names of an image, and what the state file says where it is ours."""

    final: FileFacts
    partial: FileFacts
    state_file: FileFacts
    state: Unfinished | None


class Act(Enum):
    """What to do with one image."""

    BEGIN = "begin"
    GO_ON = "go on"
    #: It is whole; only the last steps of an earlier restore are missing.
    FINISH = "finish"


def choose_act(facts: TargetFacts, wanted: Unfinished, overwrite: bool) -> Act:
    """What to do with an image; TargetExists where it would take away what is not an unfinished image of this restore.

    ``overwrite`` lets it replace files and links, but nothing else, and no image that is in use.
    """
    for one in (facts.final, facts.partial, facts.state_file):
        if one.kind in (EntryKind.DIRECTORY, EntryKind.OTHER):
            raise TargetExists(
                f"{one.path} is {one.kind.value}", means=NOTHING_WRITTEN, todo="Name another directory with --to."
            )
    state = facts.state
    ours = state is not None and state.same_work(wanted)
    if ours and state is not None and _is_whole(facts.final, state):
        return Act.FINISH
    _check_final(facts.final, overwrite)
    if not overwrite:
        _check_unfinished(facts, ours)
    elif facts.partial.in_use:
        raise _in_use(facts.partial)
    goes_on = ours and state is not None and state.done and _is_its_image(facts.partial, state)
    return Act.GO_ON if goes_on else Act.BEGIN


def _is_whole(final: FileFacts, state: Unfinished) -> bool:
    """Whether this is the image that was about to get its name, and nobody has written to it since."""
    return (
        state.modified != 0
        and final.kind is EntryKind.REGULAR
        and (final.inode, final.modified) == (state.inode, state.modified)
    )


def _is_its_image(partial: FileFacts, state: Unfinished) -> bool:
    return partial.kind is EntryKind.REGULAR and partial.inode == state.inode


def _check_final(final: FileFacts, overwrite: bool) -> None:
    if final.kind is EntryKind.NOTHING:
        return
    if not overwrite:
        raise TargetExists(
            f"{final.path} exists already",
            means=NOTHING_WRITTEN,
            todo="Name another directory with --to, move the file away, or replace it with --overwrite.",
        )
    if final.in_use:
        raise _in_use(final)


def _in_use(file: FileFacts) -> TargetExists:
    return TargetExists(
        f"{file.path} is in use by another program",
        means=f"Replacing it would take it away from a running domain. {NOTHING_WRITTEN}",
        todo="Stop the domain, or name another directory with --to.",
    )


def _check_unfinished(facts: TargetFacts, ours: bool) -> None:
    """Refuse what lies under the names of an unfinished image, unless it is this restore's, or holds nothing yet."""
    state, partial = facts.state, facts.partial
    todo = "Name another directory with --to, or give it up with --overwrite."
    if state is None:
        foreign = [one.path for one in (partial, facts.state_file) if one.kind is not EntryKind.NOTHING]
        if foreign:
            raise TargetExists(
                f"{foreign[0]} exists, and is not known to be of an unfinished restore",
                means=NOTHING_WRITTEN,
                todo=todo,
            )
    elif partial.kind is EntryKind.NOTHING:
        return
    elif state.inode and not _is_its_image(partial, state):
        raise TargetExists(
            f"{partial.path} is not the file that the unfinished restore made", means=NOTHING_WRITTEN, todo=todo
        )
    elif not ours and state.done:
        raise TargetExists(
            f"{partial.path} is an unfinished restore of backup {state.backup[:8]}",
            means=NOTHING_WRITTEN,
            todo=f"Finish it with pullback restore {state.backup[:8]}, name another directory with --to, or give it up"
            " with --overwrite.",
        )
