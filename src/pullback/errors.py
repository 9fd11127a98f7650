# SPDX-License-Identifier: Apache-2.0
"""Every exception pullback raises, each with its exit code.

    PullbackError                       1
    ├── UsageError                      2   bad command line, configuration or name
    ├── DomainError                     4   the domain cannot be talked to, or a command failed there
    │   ├── DomainUnreachable           4   no socket, not a QMP socket, monitor in use, QEMU gone
    │   ├── DomainBusy                  4   another pullback, or another program's job, holds it
    │   └── CommandFailed               4   QEMU answered a command with an error
    ├── Refused                         5   going on could harm the domain or give a wrong backup
    ├── SnapshotBroken                  6   the frozen view is gone (scratch full or too slow)
    ├── TransferError                   7   an NBD peer failed
    │   ├── NbdRefused                  7   the peer answered a request with an error number
    │   ├── NbdProtocolError            7   the peer broke the protocol
    │   └── NbdDisconnected             7   the peer went away
    ├── ProofFailed                    16   what was stored is not what was frozen
    ├── FilesError                     17   the file systems in a backup cannot be read
    ├── RestoreError                    9   the target of a restore cannot take it
    │   └── TargetExists                9
    └── RepositoryError                14   the repository's store failed
        ├── Damaged                     8   stored bytes are not what was written
        │   └── DamageFound            15   verify or check went to its end and found damage
        ├── RepositoryMissing          10   (10, 11 and 12 are restic's numbers for the same things)
        ├── RepositoryLocked           11
        ├── WrongPassword              12
        ├── BackupNotFound             13
        ├── RepositoryExists           14
        └── RepositoryUnsupported      14

Codes 0 (done), 1 (a defect of pullback) and 130 (interrupted) have no class of their own.  The table is
docs/exit-codes.md; a test holds the two together.
"""

from __future__ import annotations

from typing import ClassVar


class PullbackError(Exception):
    """What went wrong, what it means for the backups, and what to do about it.

    ``what`` is one sentence without a final full stop.  ``means`` and ``todo`` are whole sentences; a class may
    carry defaults for them.
    """

    exit_code: ClassVar[int] = 1
    means: str = ""
    todo: str = ""

    def __init__(self, what: str, *, means: str | None = None, todo: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        if means is not None:
            self.means = means
        if todo is not None:
            self.todo = todo

    def __str__(self) -> str:
        return " ".join(part for part in (self.what + ".", self.means, self.todo) if part)


class UsageError(PullbackError):
    """The request itself is wrong; nothing was touched."""

    exit_code = 2


class DomainError(PullbackError):
    """The domain could not be talked to, or a command failed there."""

    exit_code = 4


class DomainUnreachable(DomainError):
    """There is no QMP server to talk to, or it went away."""


class DomainBusy(DomainError):
    """Something else holds what this operation needs; trying again later may work."""


class CommandFailed(DomainError):
    """QEMU answered a command with an error; ``error_class`` and ``desc`` are QEMU's own words."""

    def __init__(
        self, command: str, error_class: str, desc: str, *, means: str | None = None, todo: str | None = None
    ) -> None:
        super().__init__(f"QEMU refused {command}: {desc}", means=means, todo=todo)
        self.command = command
        self.error_class = error_class
        self.desc = desc


class Refused(PullbackError):
    """Going on could harm the domain or give a wrong backup; nothing was touched."""

    exit_code = 5


class SnapshotBroken(PullbackError):
    """The frozen view was lost before it was read; the domain itself lost nothing."""

    exit_code = 6
    means = "The domain kept running and lost no write; no backup was stored and the earlier ones are untouched."
    todo = "Make room where the scratch is, or name another directory with --scratch, and run it again."

    @classmethod
    def of_disk(cls, target: str) -> SnapshotBroken:
        """The frozen view of one disk cannot be read any more."""
        return cls(
            f"the frozen view of {target} was lost: old data could not be saved to the scratch (it is full, failing or"
            " too slow)"
        )


class TransferError(PullbackError):
    """An NBD peer failed; nothing read so far was committed."""

    exit_code = 7


class NbdRefused(TransferError):
    """The peer answered a request with an error; ``errno`` is the NBD (Linux) error number."""

    def __init__(self, what: str, errno: int) -> None:
        super().__init__(what)
        self.errno = errno


class NbdProtocolError(TransferError):
    """The peer sent something the NBD protocol does not allow; the connection is of no more use."""


class NbdDisconnected(TransferError):
    """The peer closed the connection, or it never came up."""


class ProofFailed(PullbackError):
    """A backup was read back and is not what was frozen; it was not stored.

    ``lied`` are the targets of disks whose dirty bitmaps did not record writes.
    """

    exit_code = 16

    def __init__(
        self, what: str, *, means: str | None = None, todo: str | None = None, lied: tuple[str, ...] = ()
    ) -> None:
        super().__init__(what, means=means, todo=todo)
        self.lied = lied


class FilesError(PullbackError):
    """The file systems in a backup cannot be read, by libguestfs or at all; the backup is untouched."""

    exit_code = 17


class RestoreError(PullbackError):
    """The target of a restore cannot take it; what was there before is untouched."""

    exit_code = 9

    @classmethod
    def no_space(cls) -> RestoreError:
        """What it means when the images' file system is full."""
        return cls(
            "there is no space left for the images", todo="Make room, and run the same command again: it goes on."
        )


class TargetExists(RestoreError):
    """The target holds files that a restore would overwrite."""


class RepositoryError(PullbackError):
    """The store of a repository failed."""

    exit_code = 14


class Damaged(RepositoryError):
    """Stored bytes are not what was written: MAC, hash or length do not match."""

    exit_code = 8


class DamageFound(Damaged):
    """A search for damage went to its end and found some; what it found was told."""

    exit_code = 15


class RepositoryMissing(RepositoryError):
    """There is no repository at this location."""

    exit_code = 10


class RepositoryLocked(RepositoryError):
    """Another program holds a lock that excludes this operation."""

    exit_code = 11


class WrongPassword(RepositoryError):
    """No key of the repository opens with this password."""

    exit_code = 12


class BackupNotFound(RepositoryError):
    """No backup, or more than one, goes by this name."""

    exit_code = 13


class RepositoryExists(RepositoryError):
    """There is a repository at this location already."""


class RepositoryUnsupported(RepositoryError):
    """The repository has a format version that pullback does not write, or not know."""
