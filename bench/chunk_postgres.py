# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL under pgbench in a file system on a disk: the changes of a real database.

The file system is an image of its own, mounted by a loop device.  Before each increment the database makes a
checkpoint and the file system is frozen; what differs then from the disk is written to the disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.chunk_loads import PAGE, Disk
from bench.chunk_strategies import BLOCK, MIB
from lab.processes import run
from pullback.nbd.address import UnixAddress
from pullback.nbd.blocking import NbdConnection

ACCOUNT = "postgres"
_SETTINGS = {
    "listen_addresses": "''",
    "fsync": "off",
    "shared_buffers": "256MB",
    "max_wal_size": "128MB",
    "min_wal_size": "32MB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
}


def programs() -> Path | None:
    """Where PostgreSQL's server is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    return found[-1].parent if found else None


def missing() -> str:
    """What is not here to run it; empty when all is."""
    if os.geteuid() != 0:
        return "it needs root, for a loop device"
    if programs() is None or not shutil.which("pgbench"):
        return "PostgreSQL is not installed (Debian: postgresql)"
    return "" if Path("/dev/loop-control").exists() else "there are no loop devices"


class Database:
    """A running database on a mounted file system of ``size`` bytes, below ``directory``."""

    def __init__(self, directory: Path, size: int) -> None:
        self.raw = directory / "postgres.raw"
        self._size = size
        self._mount = directory / "postgres"
        self._socket = directory / "socket"
        self._data = self._mount / "data"

    @contextmanager
    def running(self, scale: int) -> Iterator[None]:
        """With tables of ``scale`` times 100,000 accounts; ended and unmounted at the end."""
        with ExitStack() as stack:
            self._make_file_system(stack)
            self._as_postgres("initdb", "-D", str(self._data), "-A", "trust", "--no-sync")
            settings = " ".join(f"-c {name}={value}" for name, value in _SETTINGS.items())
            log = str(self._mount / "log")
            options = f"{settings} -c unix_socket_directories={self._socket}"
            stack.callback(self._as_postgres, "pg_ctl", "-D", str(self._data), "-m", "immediate", "stop")
            self._as_postgres("pg_ctl", "-D", str(self._data), "-l", log, "-w", "-o", options, "start")
            self._as_postgres("pgbench", "-h", str(self._socket), "-i", "-q", "-s", str(scale), "postgres")
            yield

    def _make_file_system(self, stack: ExitStack) -> None:
        for directory in (self._mount, self._socket):
            directory.mkdir()
        with self.raw.open("wb") as file:
            file.truncate(self._size)
        run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", self.raw])
        run(["mount", "-o", "loop,noatime", self.raw, self._mount])
        stack.callback(run, ["umount", self._mount])
        for directory in (self._mount, self._socket):
            shutil.chown(directory, ACCOUNT, ACCOUNT)

    def _as_postgres(self, program: str, *arguments: str) -> None:
        place = programs()
        assert place is not None
        account = ["setpriv", f"--reuid={ACCOUNT}", f"--regid={ACCOUNT}", "--init-groups"]
        run([*account, str(place / program), *arguments], cwd=self._mount, timeout=300)

    def work(self, transactions: int) -> None:
        """That many transactions, each on an account anywhere."""
        self._as_postgres("pgbench", "-h", str(self._socket), "-n", "-t", str(transactions), "postgres")

    def copy_to(self, disk: Disk, directory: Path) -> tuple[set[int], set[int], int]:
        """Make the disk hold what the file system holds.

        Returns the 64 KiB blocks that were written, those that are not zero now, and how many 4 KiB pages differed.
        """
        self._as_postgres("psql", "-q", "-h", str(self._socket), "-c", "checkpoint", "postgres")
        run(["fsfreeze", "-f", self._mount])
        try:
            return self._copy(disk, directory)
        finally:
            run(["fsfreeze", "-u", self._mount])

    def _copy(self, disk: Disk, directory: Path) -> tuple[set[int], set[int], int]:
        changed, full, pages = set[int](), set[int](), 0
        directory.mkdir(exist_ok=True)
        with (
            disk.opened(directory) as daemon,
            NbdConnection.connect(UnixAddress(daemon.socket), "vda") as connection,
            self.raw.open("rb") as raw,
        ):
            for offset in range(0, self._size, MIB):
                new, old = raw.read(MIB), connection.read(offset, MIB)
                for start in range(0, MIB, BLOCK):
                    if new.count(0, start, start + BLOCK) < BLOCK:
                        full.add((offset + start) // BLOCK)
                different = [
                    start
                    for start in range(0, MIB if new != old else 0, PAGE)
                    if new[start : start + PAGE] != old[start : start + PAGE]
                ]
                for start in different:
                    connection.submit_write(offset + start, new[start : start + PAGE])
                    changed.add((offset + start) // BLOCK)
                while connection.pending:
                    connection.wait()
                pages += len(different)
            connection.flush()
        return changed, full, pages
