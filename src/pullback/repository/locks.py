# SPDX-License-Identifier: Apache-2.0
"""restic's locks, taken and honoured, so that both programs may work on one repository.

    shared      writers and readers, any number of them
    exclusive   whoever deletes (prune), alone

To take one: look for a lock in the way, write ours, look again; of two who did so at once at least one sees the other
and takes its own back.  Where a store may show late what was written, a moment is waited in between.  A backup goes on
in it (acquire with settle=False): it reads, and looks once more before it stores anything.

A lock is a promise to say every five minutes that one is alive: after 30 minutes of silence it counts for nothing.

restic probes a lock's owner on its own host by sending it SIGHUP (`restic unlock` does, for one).  A program that
holds a lock must therefore survive SIGHUP: see survive_restic_probe.
"""

from __future__ import annotations

import json
import os
import pwd
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self

from pullback.errors import Damaged, RepositoryError, RepositoryLocked
from pullback.repository.crypto import Key
from pullback.repository.damage import damaged
from pullback.repository.documents import load_document, save_document
from pullback.repository.store import FileKind, Store
from pullback.repository.tree import go_json, go_time, parse_time

STALE_AFTER = timedelta(minutes=30)
REFRESH_EVERY = 300.0
# Without a refresh for this long we must assume that others will soon take our lock for stale.
LOST_AFTER = 25 * 60.0
#: For stores that show late what was written.
SETTLE = 0.2
RETRY_EVERY = 1.0

_NOT_STORED = "This backup was not stored; those stored earlier are untouched."


@dataclass(frozen=True, slots=True)
class Account:
    """Who runs this process, and where."""

    hostname: str
    username: str
    uid: int
    gid: int


def current_account() -> Account:
    """The account of this process; a uid without a name is named by its number."""
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    return Account(socket.gethostname(), name, uid, os.getgid())


def survive_restic_probe() -> None:
    """Ignore SIGHUP, with which restic asks whether a lock's owner lives; call it in the main thread."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


@dataclass(frozen=True, slots=True)
class LockFile:
    """A lock as it stands in the repository."""

    time: datetime
    exclusive: bool
    hostname: str
    username: str
    pid: int
    uid: int
    gid: int

    def encode(self) -> bytes:
        """Its JSON."""
        fields: dict[str, Any] = {
            "time": go_time(self.time),
            "exclusive": self.exclusive,
            "hostname": self.hostname,
            "username": self.username,
            "pid": self.pid,
        }
        optional = {"uid": self.uid, "gid": self.gid}
        return go_json(fields | {name: value for name, value in optional.items() if value})

    @classmethod
    def decode(cls, document: bytes, name: str) -> LockFile:
        """The inverse of encode; raises Damaged."""
        try:
            fields = json.loads(document)
            numbers = [int(fields.get(field, 0)) for field in ("pid", "uid", "gid")]
            host, user = str(fields.get("hostname", "")), str(fields.get("username", ""))
            return cls(parse_time(fields["time"]), bool(fields.get("exclusive", False)), host, user, *numbers)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise damaged(FileKind.LOCKS, name, f"{type(error).__name__}: {error}") from None

    def owner_died(self, hostname: str) -> bool:
        """Whether it was taken on this host by a process that is no more."""
        return self.hostname == hostname and self.pid > 0 and not _alive(self.pid)

    def is_stale(self, now: datetime, hostname: str) -> bool:
        """Whether restic would call it stale: too old, or its process gone."""
        return now - self.time > STALE_AFTER or self.owner_died(hostname)

    def describe(self) -> str:
        """Who holds it, since when."""
        how = "exclusively " if self.exclusive else ""
        since = f"{self.time.astimezone(UTC):%Y-%m-%d %H:%M:%S UTC}"
        return f"{how}by process {self.pid} of {self.username} on {self.hostname}, since {since}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no process has a number that large
        return False
    except PermissionError:
        return True
    return True


def _now() -> float:
    # Goes on while the computer sleeps, as the clocks of others do; time.monotonic() does not.
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class RepositoryLock:
    """A lock on a repository; use it as a context manager, or call acquire and release.

    `retry` is how many seconds to wait for others, `waiting` is called with a sentence whenever the wait has a new
    reason, `acquired` once it is taken.  Raises RepositoryLocked, naming the holder, when the time is up.
    """

    def __init__(
        self,
        store: Store,
        key: Key,
        version: int,
        *,
        exclusive: bool = False,
        retry: float = 0.0,
        waiting: Callable[[str], None] | None = None,
        acquired: Callable[[], None] | None = None,
        refresh_every: float = REFRESH_EVERY,
    ) -> None:
        self._store = store
        self._key = key
        self._version = version
        self.exclusive = exclusive
        self._retry = retry
        self._waiting = waiting
        self._acquired = acquired
        self._refresh_every = refresh_every
        self._moment = SETTLE if store.shows_late else 0.0
        self._account = current_account()
        self._name: str | None = None
        self._confirmed = 0.0
        self._stamp = datetime.max.replace(tzinfo=UTC)
        self._lost: str | None = None
        self._given_up = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._settling = threading.Lock()
        self._removed = 0
        #: Until when to wait before the last look, by time.monotonic(), and the index files that were there.
        self._unsettled: tuple[float, frozenset[str]] | None = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether it was acquired and not released."""
        return self._name is not None

    def acquire(self, settle: bool = True) -> None:
        """Take the lock and keep it fresh; nothing of ours is left behind when this raises.

        Without ``settle`` nobody else was seen yet, and the repository may be read; ``check`` waits for the rest, and
        is to be called before anything is stored.
        """
        deadline, told = time.monotonic() + self._retry, None
        self._stop.clear()
        self._lost = None
        while (other := self._try(settle)) is not None:
            left = deadline - time.monotonic()
            if left <= 0 or self._given_up:
                raise self._refusal(other, means="Nothing was read or written.")
            # Not its time: who holds a lock long refreshes it every few minutes.
            holder = replace(other, time=datetime.min)
            if self._waiting and holder != told:
                told = holder
                self._waiting(f"Waiting for the repository, which is locked {other.describe()}")
            # Not in step with one who takes it again and again.
            self._stop.wait(min(RETRY_EVERY * random.uniform(0.5, 1.0), left))
        if self._acquired:
            self._acquired()
        self._thread = threading.Thread(target=self._keep_fresh, name="pullback-lock", daemon=True)
        self._thread.start()

    def give_up(self) -> None:
        """Make an acquire that waits fail now, from any thread."""
        self._given_up = True
        self._stop.set()

    def _refusal(self, other: LockFile, means: str) -> RepositoryLocked:
        return RepositoryLocked(
            f"The repository {self._store.location} is locked {other.describe()}",
            means=means,
            todo="Wait until that is done (--lock-retry waits for you). If that process is certainly gone,"
            " restic unlock removes its lock.",
        )

    def _settle(self) -> None:
        """Wait out the moment, and look again; the lock is lost if somebody is there now, or was.

        Whoever deletes what we may have read of replaces index files.
        """
        with self._settling:
            if self._unsettled is None:
                return
            until, index_files = self._unsettled
            self._stop.wait(max(0.0, until - time.monotonic()))
            if (other := self._in_the_way(but=self._name)) is not None:
                self._lost = "another program took one at the same time"
                raise self._refusal(other, means=_NOT_STORED)
            if not index_files <= self._index_files():
                self._lost = "another program deleted something just when it was taken"
            else:
                self._unsettled = None

    def _index_files(self) -> frozenset[str]:
        return frozenset(name for name, _ in self._store.list(FileKind.INDEX))

    def _try(self, settle: bool) -> LockFile | None:
        """Take the lock, or return the one in the way."""
        if (other := self._in_the_way()) is not None:
            return other
        name = self._write()
        until = time.monotonic() + self._moment
        settled = False
        try:
            if settle:
                self._stop.wait(self._moment)
            other = self._in_the_way(but=name)
            self._unsettled = None if settle else (until, self._index_files())
            settled = other is None
        finally:
            if not settled:
                self._store.remove(FileKind.LOCKS, name)
        if settled:
            self._name, self._confirmed = name, _now()
        return other

    def _write(self) -> str:
        who = self._account
        self._stamp = datetime.now(UTC)
        lock = LockFile(self._stamp, self.exclusive, who.hostname, who.username, os.getpid(), who.uid, who.gid)
        return save_document(self._store, self._key, self._version, FileKind.LOCKS, lock.encode())

    def _in_the_way(self, but: str | None = None) -> LockFile | None:
        for name, size in self._store.list(FileKind.LOCKS):
            if name == but or size == 0:
                continue  # restic passes over empty ones too: leftovers of a store that is not atomic
            try:
                lock = LockFile.decode(load_document(self._store, self._key, FileKind.LOCKS, name), name)
            except Damaged:
                if self._store.exists(FileKind.LOCKS, name):
                    raise
                continue
            if lock.owner_died(self._account.hostname):
                # What a killed process left would stop every later prune: restic itself removes it only on request.
                self._store.remove(FileKind.LOCKS, name)
                self._removed += 1
            elif (self.exclusive or lock.exclusive) and not lock.is_stale(datetime.now(UTC), self._account.hostname):
                return lock
        return None

    def _keep_fresh(self) -> None:
        pause = self._refresh_every
        while not self._stop.wait(pause):
            pause = self._refresh_every
            try:
                self._refresh()
            except RepositoryError as error:
                # Try again soon; check() tells when it has been too long.
                pause = min(self._refresh_every, 10.0)
                if _now() - self._confirmed > LOST_AFTER:
                    self._lost = f"it could not be refreshed ({error.what})"

    def _refresh(self) -> None:
        old = self._name
        if old is None or self._lost or self._lapsed():
            return
        if not self._store.exists(FileKind.LOCKS, old):
            self._lost = "another program removed it"
            return
        # The new one first: at no time is there none.
        self._name = self._write()
        self._confirmed = _now()
        self._store.remove(FileKind.LOCKS, old)

    def _lapsed(self) -> bool:
        """Whether others could take the lock for stale: refreshing it then would hide what they did meanwhile."""
        if self._lost is None and self.held and _now() - self._confirmed > STALE_AFTER.total_seconds():
            self._lost = "it was not refreshed in time"
        elif self._lost is None and self.held and datetime.now(UTC) - self._stamp > STALE_AFTER:
            # Who shares this clock, restic for one, may have deleted since what we rely on.
            self._lost = "the clock was set forward, by which it is too old to count"
        return self._lost is not None

    def check(self) -> None:
        """Raise RepositoryLocked if the lock was lost: others may have deleted what we rely on; settles it first."""
        self._settle()
        self._lapsed()
        if self._lost is not None:
            raise RepositoryLocked(
                f"The lock on the repository {self._store.location} was lost: {self._lost}",
                means=_NOT_STORED,
                todo="Run it again.",
            )

    def clear_dead(self) -> bool:
        """Remove locks whose owners, on this host, are no more; whether there was one.  Needs no lock."""
        self._removed = 0
        self._in_the_way()
        return self._removed > 0

    def release(self) -> None:
        """Stop refreshing and remove the lock; one that is gone already is no error."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        name, self._name = self._name, None
        if name is not None:
            self._store.remove(FileKind.LOCKS, name)
