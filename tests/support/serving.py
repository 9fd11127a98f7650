# SPDX-License-Identifier: Apache-2.0
"""``pullback serve`` while it runs, and backups of disks whose bytes are known."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pullback.model.units import KIB, SEGMENT
from pullback.repository.blob import BlobId, BlobKind
from pullback.repository.layout import BackupBuilder
from pullback.repository.repository import Repository
from pullback.repository.snapshots import Snapshot
from tests.support.product import Done, Stage

LIMIT = 60.0


@dataclass
class Server:
    """A server that listens; ``uris`` by disk."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    _begun: bytes = b""

    @property
    def events(self) -> list[dict[str, Any]]:
        """What it has told so far."""
        return [json.loads(line) for line in self.lines]

    @property
    def ready(self) -> dict[str, Any]:
        """The event that says it serves."""
        return next(event for event in self.events if event["event"] == "serving")

    @property
    def uris(self) -> dict[str, str]:
        """The URIs of the disks."""
        return {export["disk"]: export["uri"] for export in self.ready["exports"]}

    def read(self, event: str) -> bool:
        """Read what it tells until this event has come, or to its end; whether it came."""
        deadline = time.monotonic() + LIMIT
        while not any(one["event"] == event for one in self.events):
            if not self.read_more(deadline - time.monotonic()):
                return False
        return True

    def read_more(self, timeout: float = LIMIT) -> bool:
        """Read the next of what it tells; whether there was any before its end."""
        stdout = self.process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], max(timeout, 0))
        assert ready, f"nothing more came than {self.lines}"
        # Not readline(): a line that it has read besides would be hidden from select().
        if not (got := os.read(stdout.fileno(), 65536)):
            return False
        *whole, self._begun = (self._begun + got).split(b"\n")
        self.lines += [line.decode() + "\n" for line in whole]
        return True

    def end(self, number: signal.Signals = signal.SIGTERM) -> Done:
        """Send a signal, and wait for the end."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=LIMIT)
        self.lines += (self._begun.decode() + out).splitlines(keepends=True)
        return Done(self.process.returncode, "".join(self.lines), err)


@contextmanager
def serving(stage: Stage, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """``pullback serve`` with these arguments, once it listens; killed at the block's end if it still runs."""
    with stage.running("serve", *arguments, "--json", env=env) as process:
        server = Server(process)
        assert server.read("serving"), f"it ended: {server.lines} {process.communicate()}"
        yield server


# -- backups ------------------------------------------------------------------------------------------------------


def manifest(disks: Mapping[str, int], domain: str = "web", segment: int = SEGMENT) -> bytes:
    """A manifest of disks with these sizes."""
    return json.dumps(
        {
            "format": 1,
            "domain": domain,
            "uuid": "",
            "time": datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC).isoformat(),
            "consistency": "crash",
            "qemu": "7.2.0",
            "pullback": "0.1.0",
            "segment_size": segment,
            "disks": [
                {
                    "target": target,
                    "virtual_size": size,
                    "checkpoint": None,
                    "mode": "full",
                    "reason": "for a test",
                    "base": None,
                    "source_format": "raw",
                    "bytes_read": size,
                    "bytes_new": size,
                    "bytes_zero": 0,
                }
                for target, size in disks.items()
            ],
            "skipped": [],
        }
    ).encode()


@dataclass(frozen=True)
class Model:
    """A disk as it has to be read: extents of (length, data or None for zeroes), cut into chunks of these lengths."""

    chunks: tuple[bytes, ...]

    @property
    def data(self) -> bytes:
        """All of its bytes."""
        return b"".join(self.chunks)

    def holes(self) -> list[tuple[int, int, bool]]:
        """Runs of (offset, length, hole), as chunks tell it."""
        found: list[tuple[int, int, bool]] = []
        offset = 0
        for chunk in self.chunks:
            hole = not any(chunk)
            if found and found[-1][2] == hole:
                found[-1] = (found[-1][0], found[-1][1] + len(chunk), hole)
            else:
                found.append((offset, len(chunk), hole))
            offset += len(chunk)
        return found


def random_model(rng: random.Random, size: int, segment: int, lengths: Sequence[int]) -> Model:
    """A disk of chunks with lengths out of these, a third of them zero; no chunk crosses a segment's end."""
    chunks: list[bytes] = []
    offset = 0
    while offset < size:
        left = min(segment - offset % segment, size - offset)
        length = min(rng.choice(lengths), left)
        if rng.random() < 0.3:
            chunk = bytes(length)
        elif chunks and rng.random() < 0.1 and any(chunks[0]) and len(chunks[0]) <= left:
            chunk = chunks[0]
        else:
            chunk = rng.randbytes(length)
        chunks.append(chunk)
        offset += len(chunk)
    return Model(tuple(chunks))


def store_models(
    repository: Repository, models: Mapping[str, Model], *, segment: int = SEGMENT, domain: str = "web"
) -> str:
    """Store a backup of these disks, cut as they are; returns its id.  Takes the lock."""
    moment = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
    with repository.lock():
        with repository.new_writer() as writer:
            builder = BackupBuilder(repository, writer, domain, moment)
            for target, model in models.items():
                builder.add_disk(target)
                content: list[BlobId] = []
                number = held = 0
                for chunk in model.chunks:
                    content.append(writer.add(BlobKind.DATA, chunk))
                    held += len(chunk)
                    if held == segment:
                        builder.add_segment(target, number, held, content)
                        content, number, held = [], number + 1, 0
                if held:
                    builder.add_segment(target, number, held, content)
            sizes = {target: len(model.data) for target, model in models.items()}
            tree = builder.finish(manifest(sizes, domain, segment))
        repository.save_index()
        return repository.save_snapshot(Snapshot(moment, tree, (builder.path,), domain, tags=("pullback",)))


def random_disk(size: int, seed: int = 1, lengths: Sequence[int] = (64 * KIB, 256 * KIB)) -> Model:
    """A disk of random chunks and holes."""
    return random_model(random.Random(seed), size, SEGMENT, lengths)


def packs(repository: Path) -> list[Path]:
    """Its pack files, the largest first."""
    return sorted((repository / "data").glob("*/*"), key=lambda path: -path.stat().st_size)


def spoil(path: Path, offset: int) -> None:
    """Alter one byte of a file."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
        os.fsync(file.fileno())
    path.chmod(mode)
