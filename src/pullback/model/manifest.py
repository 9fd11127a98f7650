# SPDX-License-Identifier: Apache-2.0
"""The manifest of a backup: what ``/DOMAIN/domain.json`` says, and how it is read back.

It comes out of a repository that others may have written to, so reading it trusts nothing: a wrong type or an
unknown format is Damaged or RepositoryUnsupported, with the place named.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pullback.errors import Damaged, RepositoryUnsupported

FORMAT = 1

Mode = Literal["full", "incremental"]


@dataclass(frozen=True, slots=True)
class BaseRef:
    """The backup that an incremental one builds on, and the checkpoint whose changes it read."""

    backup: str
    checkpoint: str


@dataclass(frozen=True, slots=True)
class DiskEntry:
    """One disk of a backup; sizes in bytes.

    ``checkpoint`` is the point from which later changes of this disk can be asked, None where it cannot be
    tracked.  ``reason`` says why a disk was read whole.  ``bytes_new`` are the bytes of chunks that the repository did
    not hold, before compression.
    """

    target: str
    virtual_size: int
    checkpoint: str | None
    mode: Mode
    reason: str
    base: BaseRef | None
    source_format: str
    bytes_read: int
    bytes_new: int
    bytes_zero: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup is: of which domain, of which instant, made how."""

    domain: str
    uuid: str
    time: datetime
    consistency: Literal["crash", "frozen"]
    qemu: str
    pullback: str
    segment_size: int
    disks: tuple[DiskEntry, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    definition: str | None = None

    def disk(self, target: str) -> DiskEntry | None:
        return next((disk for disk in self.disks if disk.target == target), None)

    def to_bytes(self) -> bytes:
        """The manifest as JSON, UTF-8, two spaces of indentation, a newline at the end."""
        document = asdict(self)
        document["time"] = self.time.astimezone(UTC).isoformat()
        document["skipped"] = [{"target": target, "reason": reason} for target, reason in self.skipped]
        return (json.dumps({"format": FORMAT, **document}, indent=2, ensure_ascii=False) + "\n").encode()


class _Reader:
    """Typed access to a decoded JSON object; every error names where."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise Damaged(f"{where} of the manifest is not an object")
        self._value = value
        self._where = where

    def get(self, key: str, kind: type, optional: bool = False) -> Any:
        value = self._value.get(key)
        if value is None and optional:
            return None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise Damaged(f"{self._where}.{key} of the manifest is not {kind.__name__}")
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise Damaged(f"{self._where}.{key} of the manifest is not Unicode")
        return value

    def size(self, key: str) -> int:
        value: int = self.get(key, int)
        if not 0 <= value < 1 << 63:
            raise Damaged(f"{self._where}.{key} of the manifest is out of range")
        return value

    def objects(self, key: str) -> list[_Reader]:
        return [_Reader(item, f"{self._where}.{key}[{n}]") for n, item in enumerate(self.get(key, list))]


def _read_disk(entry: _Reader) -> DiskEntry:
    mode = entry.get("mode", str)
    if mode not in ("full", "incremental"):
        raise Damaged(f"the manifest says mode {mode!r} of a disk")
    target: str = entry.get("target", str)
    if target in ("", ".", "..") or "/" in target or "\0" in target:
        # It becomes a file's name at restore.
        raise Damaged(f"the manifest calls a disk {target!r}")
    base = entry.get("base", dict, optional=True)
    base_reader = _Reader(base, "disks.base") if base is not None else None
    return DiskEntry(
        target=target,
        virtual_size=entry.size("virtual_size"),
        checkpoint=entry.get("checkpoint", str, optional=True),
        mode=mode,
        reason=entry.get("reason", str),
        base=BaseRef(base_reader.get("backup", str), base_reader.get("checkpoint", str)) if base_reader else None,
        source_format=entry.get("source_format", str),
        bytes_read=entry.size("bytes_read"),
        bytes_new=entry.size("bytes_new"),
        bytes_zero=entry.size("bytes_zero"),
    )


def _read_time(top: _Reader) -> datetime:
    """In UTC, which a time without a zone is taken for."""
    try:
        time = datetime.fromisoformat(top.get("time", str))
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except (ValueError, OverflowError) as error:  # the year 1 in one zone is none in another
        raise Damaged("the time in the manifest is not a time") from error


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in ``data``; Damaged when it is none, RepositoryUnsupported when its format is newer."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged("the manifest is not JSON") from error
    top = _Reader(document, "top")
    version = top.get("format", int)
    if version != FORMAT:
        raise RepositoryUnsupported(
            f"the manifest has format {version}, this pullback knows {FORMAT}", todo="Use a newer pullback."
        )
    consistency = top.get("consistency", str)
    if consistency not in ("crash", "frozen"):
        raise Damaged(f"the manifest says consistency {consistency!r}")
    disks = tuple(_read_disk(entry) for entry in top.objects("disks"))
    if len({disk.target for disk in disks}) != len(disks):
        raise Damaged("the manifest names a disk twice")
    return Manifest(
        domain=top.get("domain", str),
        uuid=top.get("uuid", str),
        time=_read_time(top),
        consistency=consistency,
        qemu=top.get("qemu", str),
        pullback=top.get("pullback", str),
        segment_size=top.size("segment_size"),
        disks=disks,
        skipped=tuple((item.get("target", str), item.get("reason", str)) for item in top.objects("skipped")),
        definition=top.get("definition", str, optional=True),
    )
