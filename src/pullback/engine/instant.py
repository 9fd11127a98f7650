# SPDX-License-Identifier: Apache-2.0
"""Instant restore: images that a domain may use at once, while the backup is served and copied into them.

What is written into the images is in them alone, so nothing of it depends on us.  Whatever ends us, the same command
goes on: the images' headers say where they look for the backup, and it is served there again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pullback.engine.events import Emit, Event, Overlays, Serving
from pullback.engine.listing import manifest_of
from pullback.engine.overlays import Overlay, OverlayPlace
from pullback.engine.serving import Serve, ServeRequest
from pullback.engine.streaming import Streaming
from pullback.engine.targets import claimed
from pullback.errors import RestoreError
from pullback.model.manifest import Manifest
from pullback.nbd.address import UnixAddress
from pullback.plan.restore import choose_disks
from pullback.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class InstantRequest:
    """What to restore where; ``domain`` is the QMP socket of the domain that runs on the images, or will.

    Without it a storage daemon fills them, and no domain may use them meanwhile.
    """

    backup: str
    to: Path
    disks: tuple[str, ...] = ()
    domain: str = ""
    lock_retry: float = 0.0


@dataclass(frozen=True, slots=True)
class InstantResult:
    """Which images stand alone now, and after how many seconds."""

    backup: str
    manifest: Manifest
    images: tuple[str, ...]
    seconds: float


class Instant:
    """One instant restore; :meth:`stop` ends it early, and is to be called in the event loop of :meth:`run`."""

    def __init__(self, request: InstantRequest, open_repository: Callable[[], Repository], emit: Emit) -> None:
        self._request = request
        self._open = open_repository
        self._emit = emit
        self._stopping = asyncio.Event()
        self._ready = asyncio.Event()

    def stop(self) -> None:
        """End soon, with a RestoreError that says how to go on."""
        self._stopping.set()
        self._ready.set()

    async def run(self) -> InstantResult:
        """Make the images, serve the backup, and return once every image stands alone.

        UsageError, BackupNotFound, Damaged, TargetExists: nothing was changed.  RestoreError and RepositoryError
        later: the images are as they were, need the backup to be served, and the same work goes on.
        """
        begin = time.monotonic()
        request = self._request
        repository = await asyncio.to_thread(self._open)
        backup, manifest = await asyncio.to_thread(find_backup, repository, request.backup, request.disks)
        with claimed(request.to, (), False):
            place = OverlayPlace(request.to, backup)
            overlays = place.overlays(manifest.disks, request.disks)
            await asyncio.to_thread(place.prepare, overlays)
            await self._fill(repository, backup, place, overlays)
            await asyncio.to_thread(place.finish, overlays)
        return InstantResult(backup, manifest, tuple(str(one.path) for one in overlays), time.monotonic() - begin)

    async def _fill(
        self, repository: Repository, backup: str, place: OverlayPlace, overlays: Sequence[Overlay]
    ) -> None:
        targets = tuple(one.target for one in overlays)
        request = ServeRequest(backup, targets, UnixAddress(place.socket), lock_retry=self._request.lock_retry)
        serve = Serve(request, lambda: repository, self._hear)
        serving = asyncio.create_task(serve.run())
        streaming = asyncio.create_task(self._stream(backup, place, overlays))
        try:
            await asyncio.wait({serving, streaming}, return_when=asyncio.FIRST_COMPLETED)
            if not streaming.done():
                self.stop()  # the server ended first: it has the reason
                await asyncio.wait({streaming})
                serving.result()
        finally:
            await asyncio.wait({streaming})
            serve.stop()
            await asyncio.gather(serving, return_exceptions=True)
        if not streaming.result():
            raise RestoreError(
                "the instant restore was interrupted",
                means="A domain that runs on its images waits for what they do not hold yet.",
                todo="Run the same command again: it goes on.",
            )

    async def _stream(self, backup: str, place: OverlayPlace, overlays: Sequence[Overlay]) -> bool:
        await self._ready.wait()
        if self._stopping.is_set():
            return False
        self._emit(Overlays(backup, tuple(str(one.path) for one in overlays)))
        streaming = Streaming(overlays, self._stopping, self._emit)
        if self._request.domain:
            return await streaming.in_domain(self._request.domain)
        return await streaming.in_daemon(place.work)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Serving):
            self._ready.set()
        else:
            self._emit(event)


def find_backup(repository: Repository, name: str, disks: Sequence[str]) -> tuple[str, Manifest]:
    """The id and the manifest of a backup; UsageError where it holds no such disk."""
    snapshot = repository.find(name)
    manifest = manifest_of(repository, snapshot)
    choose_disks(manifest, disks)
    return snapshot.id, manifest
