# SPDX-License-Identifier: Apache-2.0
"""What of a frozen disk is compared with its new backup before that counts as one, and what a difference means.

    size ─┬─► fetched spans (they changed) ───────────────────► all of them
          └─► the rest, in pieces of a chunk ──► some, drawn ──► these
                                             └─► all of them

Bytes of the disk throughout; spans are sorted and do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from pullback.errors import ProofFailed, Refused
from pullback.model.extents import Span, complement, merged
from pullback.model.facts import Disk, Facts
from pullback.model.units import CHUNK, SEGMENT
from pullback.plan.method import on_unsafe_iothread, version_text
from pullback.plan.push import choose_transport

#: How much of what did not change is compared: a sample, or all.
Prove = Literal["sample", "all"]

#: Unchanged chunks of a disk in a sample.  Of a bitmap that lost one in 200 it finds one with a chance of 99.4 %.
SAMPLE = 1024
#: Ranges that a message names.
_NAMED = 3

Blob = TypeVar("Blob", bound=bytes)
Pack = TypeVar("Pack", bound=bytes)


@dataclass(frozen=True, slots=True)
class Proof:
    """What of a disk is compared: all that ``changed``, and ``unchanged``, which is all or a part of the rest."""

    size: int
    changed: tuple[Span, ...]
    unchanged: tuple[Span, ...]

    @property
    def spans(self) -> list[Span]:
        """What has to stay protected until it was compared."""
        return merged(sorted(self.changed + self.unchanged))

    @property
    def proved(self) -> Proved:
        """How much that is."""
        changed = _total(self.changed)
        return Proved(changed, _total(self.unchanged), self.size - changed)


@dataclass(frozen=True, slots=True)
class Proved:
    """Bytes that were compared: what ``changed``, and the ``unchanged`` ones out of ``of_unchanged``."""

    changed: int = 0
    unchanged: int = 0
    of_unchanged: int = 0

    def __add__(self, other: Proved) -> Proved:
        return Proved(
            self.changed + other.changed, self.unchanged + other.unchanged, self.of_unchanged + other.of_unchanged
        )


class Claim(NamedTuple):
    """Bytes of a segment or disk that are to be compared."""

    offset: int
    length: int
    changed: bool

    @property
    def end(self) -> int:
        return self.offset + self.length


class Part(NamedTuple):
    """``length`` bytes at ``offset`` of the disk, which a blob holds from its byte ``start`` on."""

    offset: int
    start: int
    length: int
    changed: bool


class Difference(NamedTuple):
    """A range of disk ``target`` that a backup does not hold as it was frozen."""

    target: str
    span: Span
    changed: bool


def refuse_pushed(facts: Facts, disks: Sequence[Disk]) -> None:
    """Refused where disks have to be pushed: nothing can be read a second time then."""
    if choose_transport(facts, disks) == "pull":
        return
    unsafe = ", ".join(disk.target for disk in disks if on_unsafe_iothread(facts, disk))
    if unsafe:
        why = f"{unsafe} is on an I/O thread, and QEMU {version_text(facts)} can abort when an export of it is closed"
        todo = "Use QEMU 9.0 or newer, or leave --prove out: QEMU then pushes the disks."
    else:
        why = "another program uses QEMU's one NBD server"
        todo = "Try again when its exports have ended, or leave --prove out: QEMU then pushes the disks."
    raise Refused(
        f"a backup of domain {facts.name} cannot be proved, as the frozen disks cannot be read again: {why}",
        means="Nothing was touched.",
        todo=todo,
    )


def plan_proof(prove: Prove, fetch: Sequence[Span], size: int, draw: Callable[[int, int], Iterable[int]]) -> Proof:
    """What to compare of a disk of which ``fetch`` changed.

    ``draw(among, count)`` gives ``count`` different random numbers below ``among``; each is a piece of the rest.
    """
    rest = [*complement(fetch, size)]
    if prove == "sample":
        among = sum(_pieces(span) for span in rest)
        rest = merged(_chosen(rest, sorted(draw(among, min(SAMPLE, among)))))
    return Proof(size, tuple(fetch), tuple(rest))


def _total(spans: Iterable[Span]) -> int:
    return sum(span.length for span in spans)


def _pieces(span: Span) -> int:
    """Into how many pieces the multiples of a chunk cut a span."""
    return -(-span.end // CHUNK) - span.offset // CHUNK


def _chosen(spans: Iterable[Span], numbers: Iterable[int]) -> Iterator[Span]:
    """The pieces of these (ascending) numbers, counted over all spans."""
    position, before = iter(spans), 0
    span = next(position, Span(0, 0))
    for number in numbers:
        while number - before >= _pieces(span):
            before += _pieces(span)
            span = next(position)
        slot = span.offset // CHUNK + number - before
        start, end = max(span.offset, slot * CHUNK), min(span.end, (slot + 1) * CHUNK)
        yield Span(start, end - start)


def claims_by_segment(proof: Proof) -> Iterator[tuple[int, list[Claim]]]:
    """The numbers of the segments that have anything to compare, in order, each with that by the disk's offsets."""
    claims = sorted([Claim(*span, True) for span in proof.changed] + [Claim(*span, False) for span in proof.unchanged])
    number, inside = -1, list[Claim]()
    for claim in claims:
        offset = claim.offset
        while offset < claim.end:
            if offset // SEGMENT != number:
                if inside:
                    yield number, inside
                number, inside = offset // SEGMENT, []
            end = min(claim.end, (number + 1) * SEGMENT)
            inside.append(Claim(offset, end - offset, claim.changed))
            offset = end
    if inside:
        yield number, inside


def parts_by_pack(
    content: Iterable[tuple[Blob, int]], offset: int, claims: Sequence[Claim], pack_of: Callable[[Blob], Pack]
) -> Mapping[Pack, Mapping[Blob, list[Part]]]:
    """What the blobs of a segment at ``offset`` hold of the ``claims``, by pack and blob.

    ``content`` are its blobs with their lengths; another program may have cut them anywhere.
    """
    packs: dict[Pack, dict[Blob, list[Part]]] = {}
    known: dict[Blob, list[Part]] = {}
    at = 0
    for blob, length in content:
        while at < len(claims) and claims[at].end <= offset:
            at += 1
        for claim in _meeting(claims, at, offset + length):
            if blob not in known:
                known[blob] = packs.setdefault(pack_of(blob), {}).setdefault(blob, [])
            start, end = max(claim.offset, offset), min(claim.end, offset + length)
            known[blob].append(Part(start, start - offset, end - start, claim.changed))
        offset += length
    return packs


def _meeting(claims: Sequence[Claim], at: int, end: int) -> Iterator[Claim]:
    while at < len(claims) and claims[at].offset < end:
        yield claims[at]
        at += 1


def proof_failed(differences: Sequence[Difference], *, more: bool) -> ProofFailed:
    """The error for these ``differences``; there may be ``more`` that were not looked for."""
    what, means, todo = [], ["No backup was stored."], []
    lied: tuple[str, ...] = ()
    for changed in (False, True):
        found = [one for one in differences if one.changed == changed]
        if not found:
            continue
        targets = list(dict.fromkeys(one.target for one in found))
        where = "; ".join(f"{target} at bytes {_ranges(found, target, more)}" for target in targets)
        names = " and ".join(targets)
        if changed:
            what.append(f"{where}, which changed since the base or are read for the first time")
            means.append(f"What was read of {names} and stored is not what is read now: memory or storage alters data.")
            todo.append("Look into memory and storage of this machine, of the image and of the repository.")
        else:
            lied = tuple(targets)
            what.append(f"{where}, which did not change by the dirty bitmap")
            means.append(
                f"The dirty bitmap did not record writes: earlier incremental backups of {names} since its last full"
                " one may be wrong, too, although pullback verify finds no damage in them."
            )
            todo.append(
                "Run the backup with --full --prove; then forget the incremental backups since the last full one, or"
                " keep them knowing that they may be wrong."
            )
    return ProofFailed(
        f"the backup is not what was frozen: {'; and '.join(what)}",
        means=" ".join(means),
        todo=" ".join(todo),
        lied=lied,
    )


def chains_dropped(error: ProofFailed, left: Collection[str]) -> ProofFailed:
    """The same failure after the checkpoints of backups were removed from the disks whose bitmaps lied.

    ``left`` are the checkpoints there that users named.
    """
    disks = " and ".join(error.lied)
    means = f"{error.means} The checkpoints of {disks} that backups had made were removed: the next one reads it whole."
    todo = error.todo
    if left:
        todo += f" Do not trust changes since {', '.join(sorted(left))}, either, and delete what is not needed there."
    return ProofFailed(error.what, means=means, todo=todo, lied=error.lied)


def chains_stay(error: ProofFailed, why: str) -> ProofFailed:
    """The same failure where the checkpoints could not be removed."""
    means = f"{error.means} The checkpoints of {' and '.join(error.lied)} could not be removed ({why})"
    means += ", so that an incremental backup may still build on them."
    return ProofFailed(error.what, means=means, todo=error.todo, lied=error.lied)


def _ranges(differences: Iterable[Difference], target: str, more: bool) -> str:
    spans = merged(sorted(one.span for one in differences if one.target == target))
    named = ", ".join(f"{span.offset:,}-{span.end - 1:,}" for span in spans[:_NAMED])
    left = len(spans) - _NAMED
    if left <= 0:
        return named + (" and perhaps others" if more else "")
    return f"{named} and {'at least ' if more else ''}{left} more"
