# SPDX-License-Identifier: Apache-2.0
"""The files of a restore: claimed, made, gone on with after an interruption, and named when they are whole.

What lies there decides what becomes of it (``plan.target``).  The state beside an image says only what was flushed
before it was written, so it may be behind the image, never ahead of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from pullback.errors import RestoreError, TargetExists, UsageError
from pullback.model.extents import Span, complement, merged
from pullback.model.unfinished import Unfinished, parse_unfinished
from pullback.plan.files import printable
from pullback.plan.restore import Place
from pullback.plan.target import NOTHING_WRITTEN, Act, EntryKind, FileFacts, TargetFacts, choose_act
from pullback.qemu.image_tool import create_image, give_back_unused

#: Seconds that QEMU's tools, whose restore was killed, have to write out what they hold.
_LET_GO = 60.0
#: No state of ours is larger: 32,000 spans at most.
_MAX_STATE = 4 << 20
#: ``struct flock`` (fcntl(2)): type, whence, start, length (0: to the end), pid.
_FLOCK = "hhqqi"


class Target:
    """One image on its way: what it is, where it is, and what of it is durable."""

    def __init__(self, directory: Path, wanted: Unfinished) -> None:
        self.final = directory / f"{wanted.disk}.{wanted.format}"
        self.partial = self.final.with_name(f"{self.final.name}.partial")
        self.state_file = self.final.with_name(f"{self.final.name}.partial.json")
        self.name = wanted.disk
        self.state = wanted
        self.act = Act.BEGIN
        self._fresh: list[Span] = []

    # -- before ---------------------------------------------------------------------------------------------------

    def look(self, overwrite: bool) -> None:
        """Decide what to do with it; TargetExists where it may not be touched."""
        names = (self.final, self.partial, self.state_file)
        final, partial, beside = (_facts(path) for path in names)
        state = _read_state(self.state_file) if beside.kind is EntryKind.REGULAR else None
        if state is not None and state.same_work(self.state):
            # The tools of a restore that was killed end by themselves.
            partial = _let_go(self.partial, partial)
        self.act = choose_act(TargetFacts(final, partial, beside, state), self.state, overwrite)
        if self.act is not Act.BEGIN and state is not None:
            self.state = state

    @property
    def place(self) -> Path:
        """Where the image is now."""
        return self.final if self.act is Act.FINISH else self.partial

    @property
    def missing(self) -> tuple[Span, ...]:
        """The ranges that were not written though all is done: lost in the backup."""
        return tuple(complement(self.state.done, self.state.virtual_size))

    @property
    def allocated(self) -> int:
        """Bytes of the file system that the unfinished image holds already."""
        with suppress(FileNotFoundError):
            return self.partial.lstat().st_blocks * 512
        return 0

    def prepare(self) -> bool:
        """Make the image, or check the one that is there; whether it could be gone on with."""
        if self.act is Act.GO_ON:
            if give_back_unused(self.partial, self.state.format):
                return True
            self.act = Act.BEGIN
        if self.act is Act.BEGIN:
            self.state = self.state.started()
            # The state first: an image without one is taken for somebody else's.
            self._save_state()
            self._unlink_old()
            create_image(self.partial, self.state.format, self.state.virtual_size)
            self.state = replace(self.state, inode=self.partial.stat().st_ino)
            self._save_state()
            return False
        return True

    def _unlink_old(self) -> None:
        try:
            self.partial.unlink(missing_ok=True)
        except OSError as error:
            what = f"cannot replace {self.partial}, left by an earlier restore: {error.strerror}"
            raise RestoreError(what) from error

    # -- meanwhile ------------------------------------------------------------------------------------------------

    def written(self, spans: Iterable[Span]) -> None:
        """Remember ranges that were written, or are zero; the caller holds the lock of the work."""
        self._fresh += spans

    @property
    def has_fresh(self) -> bool:
        """Whether anything was written since ``take_fresh``."""
        return bool(self._fresh)

    def take_fresh(self) -> list[Span]:
        """What was written since the last time; the caller holds the lock of the work."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def durable(self, spans: Iterable[Span]) -> None:
        """Keep in the state file that these ranges were flushed."""
        self.state = replace(self.state, done=tuple(merged(sorted([*self.state.done, *spans]))))
        self._save_state()

    def undo(self, wrong: Sequence[Span]) -> None:
        """Keep in the state file that these ranges are to be written again."""
        left = []
        for span in self.state.done:
            at = span.offset
            for bad in wrong:
                if bad.offset < span.end and bad.end > at:
                    left.append(Span(at, max(bad.offset - at, 0)))
                    at = min(max(at, bad.end), span.end)
            left.append(Span(at, span.end - at))
        self.state = replace(self.state, done=tuple(merged(left)))
        self._save_state()

    def _save_state(self) -> None:
        new = self.state_file.with_name(f"{self.state_file.name}.new")
        try:
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(self.state.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.state_file)
            sync_directory(self.state_file.parent)
        except OSError as error:
            with suppress(OSError):
                new.unlink()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RestoreError.no_space() from error
            raise RestoreError(
                f"cannot write {self.state_file}: {error.strerror}", todo="Name another directory with --to."
            ) from error

    # -- after ----------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Make the whole image durable, and let what is read of it from here on come from the disk.

        RestoreError when it was gone on with and is not sound.
        """
        if self.act is Act.GO_ON and not give_back_unused(self.partial, self.state.format):
            raise RestoreError(
                f"{self.partial} was gone on with, and is damaged",
                todo="Remove it, and run the same command again: it begins anew. Look after the disk it is on.",
            )
        handle = os.open(self.partial, os.O_RDONLY)
        try:
            os.fsync(handle)
            with suppress(OSError):  # a wish, not all file systems know it
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)

    def check_unused(self) -> None:
        """TargetExists if the image to be replaced is in use: a domain was started on it during the restore."""
        if self.act is not Act.FINISH and _facts(self.final).in_use:
            raise TargetExists(
                f"{self.final} is in use by another program",
                means=f"Replacing it would take it away from a running domain; the restored image is {self.partial}.",
                todo="Stop the domain, and run the same command again to finish the restore.",
            )

    def publish(self, overwrite: bool) -> None:
        """Give the whole image its name."""
        if self.act is Act.FINISH:
            return
        found = self.partial.stat()
        self.state = replace(self.state, inode=found.st_ino, modified=found.st_mtime_ns)
        self._save_state()
        if overwrite:
            self.partial.replace(self.final)
            return
        try:
            # Unlike a rename, a link replaces nothing that came meanwhile.
            os.link(self.partial, self.final)
        except FileExistsError:
            raise TargetExists(
                f"{self.final} was made by somebody else meanwhile",
                means=f"It was left as it is; the restored image is {self.partial}.",
                todo="Move one of them away, and run the restore again.",
            ) from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            self.partial.rename(self.final)  # a file system without links

    def forget(self) -> None:
        """Remove the names of the unfinished image; the state file last."""
        self.partial.unlink(missing_ok=True)
        self.state_file.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove an image that nobody could go on with."""
        with suppress(OSError):
            self.forget()

    @property
    def worth_keeping(self) -> bool:
        """Whether a later restore could go on from here."""
        return self.act is not Act.BEGIN or bool(self.state.done)


@contextmanager
def claimed(directory: Path, wanted: Sequence[Unfinished], overwrite: bool) -> Iterator[list[Target]]:
    """The images of a restore into ``directory``, which is ours alone meanwhile; looked at, not touched.

    UsageError, RestoreError, TargetExists; then nothing has changed.  A directory that was made and got nothing is
    removed.
    """
    _check_name(directory)
    made = _missing(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        _remove(made)
        raise RestoreError(
            f"cannot restore into {directory}: {error.strerror}",
            means="Nothing was written.",
            todo="Name another directory with --to.",
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TargetExists(f"another restore is writing into {directory}", means=NOTHING_WRITTEN) from error
        targets = [Target(directory, one) for one in wanted]
        for target in targets:
            target.look(overwrite)
        yield targets
    finally:
        _remove(made)
        os.close(handle)


def _check_name(directory: Path) -> None:
    """UsageError for a path that QEMU cannot be told: its commands are JSON."""
    try:
        str(directory.resolve()).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the path of {printable(str(directory))} is not UTF-8, and QEMU takes no other",
            means=NOTHING_WRITTEN,
            todo="Name another directory with --to.",
        ) from error


def publish(directory: Path, targets: Sequence[Target], overwrite: bool) -> None:
    """Give all images their names; RestoreError, and running the restore again finishes it.

    TargetExists, with no image replaced, where a domain has opened an old one meanwhile.
    """
    for target in targets:
        target.check_unused()
    try:
        for target in targets:
            target.publish(overwrite)
        sync_directory(directory)
        # While there is a state file the images that have their names can be told from others.
        for target in targets:
            target.partial.unlink(missing_ok=True)
        for target in targets:
            target.forget()
        sync_directory(directory)
    except OSError as error:
        raise RestoreError(
            f"cannot store the images in {directory}: {error.strerror}", todo="Run the restore again to finish it."
        ) from error


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_room(directory: Path) -> int:
    """Bytes that may still be written to the file system of ``directory``, or of what is above it."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def spans_by_target(places: Iterable[Place]) -> dict[str, list[Span]]:
    """The ranges of each disk."""
    found: dict[str, list[Span]] = {}
    for place in places:
        found.setdefault(place.target, []).append(Span(place.offset, place.length))
    return found


def _missing(directory: Path) -> list[Path]:
    """The directories that would be made, the innermost first."""
    found = []
    for place in (directory, *directory.parents):
        if os.path.lexists(place):
            break
        found.append(place)
    return found


def _remove(directories: Iterable[Path]) -> None:
    with suppress(OSError):
        for place in directories:
            place.rmdir()


def _facts(path: Path) -> FileFacts:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return FileFacts(str(path))
    except OSError as error:
        raise RestoreError(f"cannot look at {path}: {error.strerror}", means=NOTHING_WRITTEN) from error
    kinds: list[tuple[Callable[[int], bool], EntryKind]] = [
        (stat.S_ISREG, EntryKind.REGULAR),
        (stat.S_ISLNK, EntryKind.LINK),
        (stat.S_ISDIR, EntryKind.DIRECTORY),
    ]
    kind = next((kind for test, kind in kinds if test(found.st_mode)), EntryKind.OTHER)
    in_use = kind is EntryKind.REGULAR and _in_use(path)
    return FileFacts(str(path), kind, found.st_ino, found.st_mtime_ns, in_use)


def _in_use(path: Path) -> bool:
    """Whether somebody holds a lock on any byte of the file, as QEMU does on its images; RestoreError if we cannot ask.

    Asked without taking the lock, which would need the right to write (fcntl(2), F_GETLK).
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        # It may be the image of a running domain whose QEMU is another user.
        raise RestoreError(
            f"cannot tell whether {path} is in use: {error.strerror}",
            todo="Move it away once no domain needs it, or name another directory with --to.",
        ) from error
    try:
        found = fcntl.fcntl(handle, fcntl.F_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return False  # where there are no locks, nobody holds one
    finally:
        os.close(handle)
    return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)


def _let_go(path: Path, facts: FileFacts) -> FileFacts:
    deadline = time.monotonic() + _LET_GO
    while facts.in_use:
        if time.monotonic() > deadline:
            raise TargetExists(f"{path} is in use by another program", means=NOTHING_WRITTEN)
        time.sleep(0.02)
        facts = _facts(path)
    return facts


def _read_state(path: Path) -> Unfinished | None:
    try:
        with path.open("rb") as file:
            return parse_unfinished(file.read(_MAX_STATE))
    except OSError as error:
        raise RestoreError(f"cannot read {path}: {error.strerror}", means=NOTHING_WRITTEN) from error
