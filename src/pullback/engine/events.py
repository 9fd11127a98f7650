# SPDX-License-Identifier: Apache-2.0
"""What long work tells while it runs; the command line shows these, ``--json`` prints them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Event:
    """One thing worth telling; ``event`` is its name in ``--json`` output."""

    event: ClassVar[str] = ""

    def to_json(self) -> dict[str, Any]:
        return {"event": self.event, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Note(Event):
    """A sentence for the user that is neither progress nor an error."""

    event: ClassVar[str] = "note"
    message: str


@dataclass(frozen=True, slots=True)
class DiskPlanned(Event):
    """How a disk will be backed up, and for a full one why."""

    event: ClassVar[str] = "disk"
    disk: str
    mode: str
    reason: str
    virtual_size: int


@dataclass(frozen=True, slots=True)
class Frozen(Event):
    """The disks are frozen: what the domain writes from now on is not in this backup.

    ``paused_ms`` is for how many milliseconds the domain stood still.
    """

    event: ClassVar[str] = "frozen"
    time: str
    checkpoint: str | None
    paused_ms: float


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """Bytes ``done`` of ``total`` of the current work."""

    event: ClassVar[str] = "progress"
    work: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class ServedExport:
    """A disk of a backup that NBD clients can read at ``uri``; ``name`` is the export's, ``size`` is bytes."""

    name: str
    disk: str
    size: int
    uri: str


@dataclass(frozen=True, slots=True)
class Serving(Event):
    """A backup's disks are served from now on."""

    event: ClassVar[str] = "serving"
    backup: str
    exports: tuple[ServedExport, ...]


@dataclass(frozen=True, slots=True)
class Overlays(Event):
    """The images of an instant restore can be used from now on; ``images`` are their paths."""

    event: ClassVar[str] = "overlays"
    backup: str
    images: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Booted(Event):
    """A backup runs as a domain: process ``pid``, with its monitor at ``qmp``.

    ``serial`` is the socket of its first serial port, empty where that is elsewhere; ``accel`` is kvm, tcg, or empty
    where the user said it; ``kept`` whether what it writes stays.
    """

    event: ClassVar[str] = "booted"
    backup: str
    images: tuple[str, ...]
    pid: int
    qmp: str
    serial: str
    accel: str
    kept: bool


@dataclass(frozen=True, slots=True)
class Streamed(Event):
    """The images of a booted backup hold everything and stand alone, after so many seconds."""

    event: ClassVar[str] = "streamed"
    backup: str
    images: tuple[str, ...]
    seconds: float


Emit = Callable[[Event], None]


def silent(event: Event) -> None:
    """An ``Emit`` for whoever wants to hear nothing."""
