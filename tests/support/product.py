# SPDX-License-Identifier: Apache-2.0
"""The whole product on one stage: a repository, a scratch directory, domains, and judges of what comes out.

Contents are judged by QEMU's own tools: ``reference`` is what qemu-img reads beside QEMU after a flush through the
device, ``content`` what it reads out of a restored image.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import images
from lab.disks import DiskSpec
from lab.monitor import QmpError
from lab.processes import run, wait_for
from lab.qemu import BareQemu, Qemu
from pullback.engine.backup import BackupRequest, BackupResult, run_backup
from pullback.engine.domain import DomainAddress
from pullback.engine.events import Event, silent
from pullback.engine.listing import list_stored
from pullback.engine.restore import Restore, RestoreRequest, RestoreResult
from tests.support.backups import new_repository, open_repository
from tests.support.restic import PASSWORD, Restic

KIB = 1 << 10
MIB = 1 << 20


@dataclass(frozen=True)
class Done:
    """A command that ended: exit code, and what it said."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """What ``--json`` printed."""
        return [json.loads(line) for line in self.out.splitlines()]

    def event(self, name: str) -> dict[str, Any]:
        """The last event of this name."""
        return [event for event in self.events if event["event"] == name][-1]


class Stage:
    """A place with a repository ``repo`` and an empty ``scratch``; everything lives below ``place``."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.repo = place / "repo"
        self.scratch = place / "scratch"
        self.scratch.mkdir()
        new_repository(self.repo)
        self.restic = Restic(self.repo)
        self._restores = 0

    def disk(self, id: str = "vda", size: int = 8 * MIB, format: str = "qcow2", **more: Any) -> DiskSpec:
        """A new empty image, as a disk."""
        path = images.create(self.place / f"{id}.{format}", size, format, options=more.pop("options", None))
        return DiskSpec(path, id, format, **more)

    # -- through the API ------------------------------------------------------------------------------------------

    def request(self, qemu: Qemu, **more: Any) -> BackupRequest:
        """A backup of this domain with this stage's scratch."""
        known: dict[str, Any] = {"domain": DomainAddress(str(qemu.qmp_path)), "scratch": str(self.scratch)}
        return BackupRequest(**{**known, **more})

    def backup(
        self, qemu: Qemu, emit: Callable[[Event], None] = silent, repo: Path | None = None, **more: Any
    ) -> BackupResult:
        """Back the domain up, in this process."""
        where = repo or self.repo
        return asyncio.run(run_backup(self.request(qemu, **more), lambda: open_repository(where), emit))

    def restore(self, backup: str, to: Path | None = None, repo: Path | None = None, **more: Any) -> RestoreResult:
        """Restore into a new directory, or ``to``."""
        self._restores += 1
        where = to or self.place / f"restored-{self._restores}"
        opener = lambda: open_repository(repo or self.repo)  # noqa: E731
        return Restore(RestoreRequest(backup, where, **more), opener, silent).run()

    def contents(self, backup: str, repo: Path | None = None) -> dict[str, bytes]:
        """What the disks of a backup hold, by restoring it."""
        return {disk.target: images.raw_bytes(Path(disk.path)) for disk in self.restore(backup, repo=repo).disks}

    def listed(self, repo: Path | None = None) -> list[str]:
        """The ids of all backups, oldest first."""
        return [one.id for one in list_stored(open_repository(repo or self.repo))]

    # -- as a command ---------------------------------------------------------------------------------------------

    def environment(self, **more: str) -> dict[str, str]:
        """What the command needs to know of the repository, and nothing of whoever runs the tests."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("RESTIC_", "PULLBACK_CONFIG"))}
        known = {"RESTIC_REPOSITORY": str(self.repo), "RESTIC_PASSWORD": PASSWORD, "XDG_CONFIG_HOME": str(self.place)}
        return clean | known | more

    def command(self, *arguments: str | Path) -> list[str]:
        """The command line of ``pullback``."""
        return [sys.executable, "-m", "pullback.cli.main", *map(str, arguments)]

    def cli(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        unset: Sequence[str] = (),
        timeout: float = 60,
    ) -> Done:
        """Run ``pullback`` to its end."""
        environment = {key: value for key, value in self.environment(**(env or {})).items() if key not in unset}
        done = subprocess.run(
            [*prefix, *self.command(*arguments)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert "a defect of pullback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def cli_backup(self, qemu: Qemu, *arguments: str | Path, **more: Any) -> Done:
        """Run ``pullback backup`` on the domain."""
        return self.cli("backup", f"qmp:{qemu.qmp_path}", "--scratch", self.scratch, *arguments, **more)

    @contextmanager
    def running(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
        """``pullback`` while it runs; killed at the block's end if it still does."""
        process = subprocess.Popen(
            self.command(*arguments),
            env=self.environment(**(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


# -- judges -------------------------------------------------------------------------------------------------------


def reference(qemu: BareQemu, disk: str = "vda") -> bytes:
    """What the disk holds now, by qemu-img."""
    qemu.device_flush(disk)
    spec = qemu.disk(disk)
    return images.raw_bytes(spec.path, spec.format)


def references(qemu: BareQemu) -> dict[str, bytes]:
    """What every disk holds now."""
    return {disk.id: reference(qemu, disk.id) for disk in qemu.disks}


def same(left: Mapping[str, bytes], right: Mapping[str, bytes]) -> None:
    """Fail, saying where, unless all disks hold the same."""
    assert sorted(left) == sorted(right)
    for target, data in left.items():
        other = right[target]
        assert len(data) == len(other), f"{target}: {len(data)} and {len(other)} bytes"
        if data != other:
            first = next(i for i, (a, b) in enumerate(zip(data, other, strict=True)) if a != b)
            raise AssertionError(f"{target} differs from byte {first}: {data[first]:#x} and {other[first]:#x}")


def chain(qemu: Qemu, disk: str = "vda") -> dict[str, bool]:
    """The names of our bitmaps of a disk, and whether each records."""
    return {name: bitmap["recording"] for name, bitmap in qemu.bitmaps(disk).items() if name.startswith("pullback-")}


def leftovers(qemu: Qemu, *places: Path) -> list[str]:
    """Everything of a backup that is still in QEMU's block layer, and every file below ``places``."""
    found = [f"node {node['node-name']}" for node in qemu.qmp("query-named-block-nodes", flat=True)]
    found = [node for node in found if node.startswith("node pb-")]
    found += [f"export {export['id']}" for export in qemu.qmp("query-block-exports")]
    found += [f"job {job['id']} {job['status']}" for job in qemu.qmp("query-jobs")]
    found += [
        f"disk {block['device'] or block.get('qdev')} on {block['inserted']['node-name']}"
        for block in qemu.qmp("query-block")
        if block.get("inserted", {}).get("node-name", "").startswith("pb-")
    ]
    found += [str(path) for place in places for path in place.rglob("*")]
    return found + server_left(qemu)


def server_left(qemu: Qemu) -> list[str]:
    """Whether QEMU's one NBD server runs: if so it cannot be started again."""
    try:
        qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(qemu.directory / "probe")}})
    except QmpError as error:
        # Any other error (a socket it may not make) came after QEMU saw that none was running.
        return [f"NBD server: {error}"] if "already running" in str(error) else []
    qemu.qmp("nbd-server-stop")
    return []


def run_state(qemu: Qemu) -> str:
    """QEMU's word for whether the domain runs."""
    return str(qemu.qmp("query-status")["status"])


# -- a backup that something happens to ---------------------------------------------------------------------------


def forked(work: Callable[[], int], timeout: float = 60) -> int:
    """Run ``work`` in a forked child; give back its exit code, or minus the signal that ended it.

    LabTimeout, and its end, when it takes longer than ``timeout`` seconds.

    A fork starts in milliseconds with everything imported, so that dying at each of a hundred points is affordable.
    """
    child = os.fork()
    if child == 0:
        code = 99
        try:
            # pytest's own handlers and captures are of no use here.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = work()
        finally:
            os._exit(code)

    def ended() -> tuple[int] | None:
        pid, status = os.waitpid(child, os.WNOHANG)
        return (os.waitstatus_to_exitcode(status),) if pid else None

    try:
        return wait_for(ended, "the forked child's end", timeout)[0]
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


@contextmanager
def mounted_tmpfs(place: Path, size: str) -> Iterator[Path]:
    """A small file system of its own at ``place``; needs root."""
    place.mkdir(exist_ok=True)
    run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0777", "tmpfs", str(place)])
    try:
        yield place
    finally:
        run(["umount", "-l", str(place)])
