# SPDX-License-Identifier: Apache-2.0
"""pullback, restic and borg as a case runs them: each with a repository and a cache below the case's own place."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench.harness import Bench, BenchError, Run, started, timed

PASSWORD = "correct horse battery staple"
OURS = str(Path(sys.executable).with_name("pullback"))


def prepared(command: list[str], env: Mapping[str, str] | None = None) -> None:
    """Run something that is not measured."""
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}")


class Rival:
    """A program with a repository; ``reset`` makes an empty one, and what follows is measured."""

    name: str
    make: list[str]

    def __init__(self, bench: Bench, purpose: str = "") -> None:
        if shutil.which(self.make[0]) is None:
            raise BenchError(f"{self.make[0]} is not installed; make bench does that")
        self._bench = bench
        self.repository = bench.place / f"{self.name}{purpose}"
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("RESTIC_", "PULLBACK_"))}
        self.env |= self.variables(str(self.repository), str(bench.place / f"{self.name}{purpose}-cache"))

    def variables(self, repository: str, cache: str) -> dict[str, str]:
        """What the program wants to know."""
        return {
            "RESTIC_REPOSITORY": repository,
            "RESTIC_PASSWORD": PASSWORD,
            "RESTIC_CACHE_DIR": cache,
            "PULLBACK_CACHE_DIR": cache,
            "PULLBACK_CONFIG": os.devnull,
        }

    def reset(self) -> None:
        """An empty repository, and no cache."""
        for path in (self.repository, self.repository.with_name(self.repository.name + "-cache")):
            self._bench.fresh(path.name)
        prepared(self.make, self.env)

    def run(self, *arguments: str | Path, qemu: int = 0) -> Run:
        """Measure a command."""
        return timed([self.make[0], *arguments], env=self.env, qemu=qemu, cwd=self._bench.place)


class Pullback(Rival):
    """Ours."""

    name, make = "pullback", [OURS, "init"]


class Restic(Rival):
    """restic, with its own default for compression."""

    name, make = "restic", ["restic", "init", "--repository-version", "2"]


class Borg(Rival):
    """borg, with what its manual says for disk images."""

    name, make = "borg", ["borg", "init", "--encryption", "repokey-blake2"]

    def variables(self, repository: str, cache: str) -> dict[str, str]:
        return {"BORG_REPO": repository, "BORG_PASSPHRASE": PASSWORD, "BORG_BASE_DIR": cache}

    def create(self, raw: Path) -> Run:
        """Back up an image."""
        options = ["--compression", "zstd,1", "--chunker-params", "fixed,1048576", "--sparse"]
        return self.run("create", *options, "::one", raw)


@contextmanager
def served(image: Path, format: str, *options: str) -> Iterator[tuple[str, int]]:
    """A qemu-nbd on an image: its URI, and its process."""
    path, pid = image.with_name("nbd"), image.with_name("nbd.pid")
    pid.unlink(missing_ok=True)
    command = ["qemu-nbd", "-t", "-e", "16", "-f", format, "-k", str(path), f"--pid-file={pid}", *options, str(image)]
    with started(command, lambda: pid.exists() and bool(pid.read_text().strip())) as process:
        yield f"nbd+unix:///?socket={path}", process.pid


class Proxy:
    """Between pullback and QEMU's monitor: ``first`` is when the first command came, by time.perf_counter()."""

    def __init__(self, path: Path, qmp: Path) -> None:
        self.path, self._qmp = path, qmp
        self.first = 0.0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(self._qmp))
                self.first = 0.0
                threading.Thread(target=self._pump, args=(client, server, self._note), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, lambda: None), daemon=True).start()

    def _note(self) -> None:
        self.first = self.first or time.perf_counter()

    @staticmethod
    def _pump(source: socket.socket, to: socket.socket, note: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                note()
                to.sendall(data)
        with contextlib.suppress(OSError):
            to.shutdown(socket.SHUT_WR)
