# SPDX-License-Identifier: Apache-2.0
"""The images of an instant restore: qcow2 overlays whose backing file is a backup that we serve.

DIR/vda.qcow2                     the image, which a domain may use at once
DIR/.instant-0123456789ab/        of backup 0123456789ab…, until all its images stand alone
    vda.qcow2                     the same file: by this an image is known to be ours
    nbd                           where the backup is served, which the images' headers name
DIR/.booted-0123456789ab          of a backup that was booted: which files its images are, once they stand alone
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from pullback.engine.targets import sync_directory
from pullback.errors import RestoreError, TargetExists, UsageError
from pullback.model.manifest import DiskEntry
from pullback.plan.instant import RECONNECT, backing_file
from pullback.plan.target import NOTHING_WRITTEN
from pullback.qemu.image_tool import create_image

_WORK, _DONE, _BOOTED = ".instant-", ".done", ".booted-"
#: Bytes in a unix socket's path, without the final zero (unix(7)).
_LONGEST_SOCKET = 107
#: The socket, beside that of the server, at which a storage daemon is asked to flush; no name there is longer.
FLUSH = "flush"


@dataclass(frozen=True, slots=True)
class Overlay:
    """One image: disk ``target``, the ``number``-th of its backup, of ``size`` bytes; ``ours`` is its other name."""

    number: int
    target: str
    size: int
    path: Path
    ours: Path

    def is_file(self, path: str) -> bool:
        """Whether ``path`` is this image."""
        try:
            return self.path.samefile(path)
        except OSError:
            return False

    @property
    def stands_alone(self) -> bool:
        """Whether its header names no backing file any more (qcow2 specification, bytes 8 to 15).

        RestoreError where it cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                return int.from_bytes(file.read(16)[8:], "big") == 0
        except OSError as error:
            raise RestoreError(
                f"cannot read {self.path}: {error.strerror}",
                means="Without its image nothing can be copied; the backup is whole.",
                todo="Where the directory was removed or moved, restore to a new one.",
            ) from error


class OverlayPlace:
    """The directory of the images of one backup; its caller holds the directory's lock.

    For ``reconnect`` seconds a domain's requests wait for the backup to be served.
    """

    def __init__(self, directory: Path, backup: str, reconnect: int = RECONNECT) -> None:
        self._directory = directory.resolve()
        self._reconnect = reconnect
        self.work = self._directory / f"{_WORK}{backup[:12]}"
        self._booted = self._directory / f"{_BOOTED}{backup[:12]}"
        self.socket = str(self.work / "nbd")

    def overlays(self, disks: Sequence[DiskEntry], wanted: Sequence[str]) -> tuple[Overlay, ...]:
        """The images of the disks that are wanted (all, if none is named), and of those that were begun."""
        every = (
            Overlay(
                number,
                disk.target,
                disk.virtual_size,
                self._directory / f"{disk.target}.qcow2",
                self.work / f"{disk.target}.qcow2",
            )
            for number, disk in enumerate(disks)
        )
        return tuple(one for one in every if not wanted or one.target in wanted or one.ours.exists())

    def prepare(self, overlays: Sequence[Overlay]) -> None:
        """Make those images that are not there yet, all of them or none.

        TargetExists where something else lies, UsageError for a path that is too long, RestoreError where they cannot
        be made; nothing was changed.
        """
        if len(os.fsencode(self.work / FLUSH)) > _LONGEST_SOCKET:
            raise UsageError(
                f"the path of {self._directory} is too long for a socket in it",
                means=NOTHING_WRITTEN,
                todo="Name a directory with a shorter path.",
            )
        for one in overlays:
            self._check(one)
        try:
            self._sweep()
            with ExitStack() as unmake:
                unmake.callback(self._leave)
                self.work.mkdir(mode=0o700, exist_ok=True)
                for one in overlays:
                    self._make(one, unmake)
                sync_directory(self._directory)
                unmake.pop_all()
        except OSError as error:
            raise RestoreError(
                f"cannot make the images in {self._directory}: {error.strerror}",
                means=f"{NOTHING_WRITTEN} The directory has to take hard links and unix sockets.",
                todo="Name another directory with --to.",
            ) from error

    def _check(self, one: Overlay) -> None:
        if not os.path.lexists(one.path) or (one.ours.exists() and one.is_file(str(one.ours))):
            return
        other = next(
            (place for place in self._directory.glob(f"{_WORK}*/{one.ours.name}") if one.is_file(str(place))), None
        )
        if other is not None and other.parent.suffix != _DONE:
            backup = other.parent.name.removeprefix(_WORK)
            raise TargetExists(
                f"{one.path} is an unfinished instant restore of backup {backup[:8]}",
                means=NOTHING_WRITTEN,
                todo=f"Finish it with pullback restore {backup[:8]} --instant, or name another directory with --to.",
            )
        raise TargetExists(
            f"{one.path} exists already",
            means=NOTHING_WRITTEN,
            todo="Name another directory with --to, or move the file away.",
        )

    def _make(self, one: Overlay, unmake: ExitStack) -> None:
        if not one.ours.exists():
            new = one.ours.with_suffix(".new")
            new.unlink(missing_ok=True)
            unmake.callback(new.unlink, missing_ok=True)
            create_image(new, "qcow2", one.size, backing_file(self.socket, one.target, self._reconnect))
            _sync(new)
            new.rename(one.ours)
            unmake.callback(one.ours.unlink)
            sync_directory(self.work)
        if not one.path.exists():
            os.link(one.ours, one.path)
            unmake.callback(one.path.unlink)

    def were_booted(self, overlays: Sequence[Overlay]) -> bool:
        """Whether these are images of a boot before, and stand alone."""
        try:
            files = json.loads(self._booted.read_bytes())
            return all(files.get(one.path.name) == one.path.stat().st_ino and one.stands_alone for one in overlays)
        except (OSError, RestoreError, ValueError, AttributeError):
            return False

    def remember(self, overlays: Sequence[Overlay]) -> None:
        """Note which files the images are, so that they can be booted again; RestoreError where that cannot be kept."""
        try:
            self._booted.write_text(json.dumps({one.path.name: one.path.stat().st_ino for one in overlays}))
        except OSError as error:
            raise RestoreError(
                f"cannot write {self._booted}: {error.strerror}", means="The images are whole."
            ) from error

    def finish(self, overlays: Sequence[Overlay]) -> None:
        """Let go of images that stand alone; from here on they are as any other image."""
        try:
            for one in overlays:
                _sync(one.path)
            self.work.rename(self.work.with_name(self.work.name + _DONE))
            sync_directory(self._directory)
            self._sweep()
        except OSError as error:
            raise RestoreError(
                f"cannot let go of the images in {self._directory}: {error.strerror}",
                means="They are whole.",
                todo="Run the same command again.",
            ) from error

    def _sweep(self) -> None:
        """Remove what a restore that was finished left."""
        for done in self._directory.glob(f"{_WORK}*{_DONE}"):
            for path in done.iterdir():
                path.unlink()
            done.rmdir()

    def _leave(self) -> None:
        """Remove the directory if nothing came into it."""
        with suppress(OSError):
            self.work.rmdir()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
