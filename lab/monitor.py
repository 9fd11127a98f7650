# SPDX-License-Identifier: Apache-2.0
"""A QMP client of a few lines: blocking, one command at a time, events kept aside (QEMU's docs/interop/qmp-spec)."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.processes import LabError, LabTimeout


class QmpError(LabError):
    """QEMU answered a command with an error; ``error_class`` and ``desc`` are its own words."""

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"{command}: {error_class}: {desc}")
        self.error_class = error_class
        self.desc = desc


class MonitorClosed(LabError):
    """The connection ended: QEMU is gone."""


class Monitor:
    """One connection to a QMP socket; ``events`` holds the last thousand events, oldest first."""

    def __init__(self, path: Path, timeout: float = 10.0) -> None:
        self.events: deque[dict[str, Any]] = deque(maxlen=1000)
        self._buffer = b""
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(str(path))
            if "QMP" not in self._message(time.monotonic() + timeout):
                raise LabError(f"{path} is not a QMP socket")
            self.command("qmp_capabilities", timeout=timeout)
        except BaseException:
            self._socket.close()
            raise

    def command(self, name: str, arguments: Mapping[str, object] | None = None, timeout: float = 60.0) -> Any:
        """Run one command and return its result.

        Raises QmpError for QEMU's own error, MonitorClosed when QEMU went away, LabTimeout after ``timeout``
        seconds (the outcome is then unknown and the connection is of no more use).
        """
        request = {"execute": name, "arguments": dict(arguments or {})}
        deadline = time.monotonic() + timeout
        with self._lock:
            try:
                self._socket.sendall(json.dumps(request).encode() + b"\n")
            except OSError as error:
                raise MonitorClosed(f"{name}: {error}") from error
            while True:
                message = self._message(deadline)
                if "return" in message:
                    return message["return"]
                if "error" in message:
                    raise QmpError(name, message["error"]["class"], message["error"]["desc"])

    def wait_event(self, name: str, timeout: float = 10.0, **data: object) -> dict[str, Any]:
        """Return the data of the oldest kept event of this name whose data holds ``data``, and forget that event."""
        deadline = time.monotonic() + timeout
        with self._lock:
            while True:
                for event in self.events:
                    found: dict[str, Any] = event.get("data", {})
                    if event["event"] == name and data.items() <= found.items():
                        self.events.remove(event)
                        return found
                self._message(deadline)

    def close(self) -> None:
        self._socket.close()

    def _message(self, deadline: float) -> dict[str, Any]:
        """Read one message; an event is kept as well as returned."""
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise LabTimeout("no answer on the monitor within the time limit")
            self._socket.settimeout(left)
            try:
                more = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError as error:
                raise MonitorClosed(f"the monitor broke: {error}") from error
            if not more:
                raise MonitorClosed("the monitor was closed: QEMU is gone")
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.events.append(message)
        return message
