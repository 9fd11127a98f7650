# SPDX-License-Identifier: Apache-2.0
"""A real qemu-storage-daemon on images, spoken to as the engine does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab.monitor import Monitor
from lab.processes import Process, wait_for
from pullback.model.facts import DISK_NODE


class RealDaemon:
    """``qmp_path`` is for whoever is tested; ``qmp`` talks over a monitor of its own.  A context manager."""

    def __init__(self, directory: Path, images: Mapping[str, Path] | None = None) -> None:
        self.qmp_path = directory / "qmp"
        self._own_path = directory / "own"
        self._log = directory / "daemon.log"
        self._pidfile = directory / "pid"
        self._images = images or {}

    def _argv(self) -> list[str]:
        argv = ["qemu-storage-daemon", "--pidfile", str(self._pidfile)]
        for number, path in enumerate((self.qmp_path, self._own_path)):
            argv += ["--chardev", f"socket,id=qmp{number},path={path},server=on,wait=off"]
            argv += ["--monitor", f"chardev=qmp{number}"]
        for target, path in self._images.items():
            file = {"driver": "file", "filename": str(path), "discard": "unmap"}
            image = {"driver": "qcow2", "node-name": f"{DISK_NODE}{target}", "discard": "unmap", "file": file}
            argv += ["--blockdev", json.dumps(image)]
        return argv

    def __enter__(self) -> Self:
        self._process = Process(self._argv(), self._log)
        try:
            wait_for(lambda: self._pidfile.exists() or not self._process.running(), "the storage daemon")
            self._monitor = Monitor(self._own_path)
        except BaseException:
            self._process.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._monitor.close()
        self._process.end()

    def qmp(self, command: str, **arguments: object) -> Any:
        """Run a QMP command; keyword arguments are written with ``_`` for ``-``."""
        return self._monitor.command(command, {key.replace("_", "-"): value for key, value in arguments.items()})
