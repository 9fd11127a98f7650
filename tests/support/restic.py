# SPDX-License-Identifier: Apache-2.0
"""The real restic, run on a repository of ours: the judge of what we write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PASSWORD = "correct horse"

needs_restic = pytest.mark.skipif(shutil.which("restic") is None, reason="restic is not installed")


class Restic:
    """Runs restic on one repository, without a cache and with a time limit."""

    def __init__(self, repository: Path | str, password: str = PASSWORD) -> None:
        self.repository = str(repository)
        self.password = password

    def environment(self) -> dict[str, str]:
        """What restic needs to know, with nothing of the caller's own repository in it."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RESTIC_")}
        return clean | {"RESTIC_REPOSITORY": self.repository, "RESTIC_PASSWORD": self.password}

    def attempt(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[bytes]:
        """Run it, whatever comes of it; `extra` are environment variables."""
        command = ["restic", "--no-cache", *arguments]
        return subprocess.run(command, env=self.environment() | extra, capture_output=True, timeout=120, check=False)

    def run(self, *arguments: str, **extra: str) -> bytes:
        """Run it and return its output; fails the test with what restic said."""
        done = self.attempt(*arguments, **extra)
        text = f"{done.stdout.decode(errors='replace')}\n{done.stderr.decode(errors='replace')}"
        assert done.returncode == 0, f"restic {' '.join(arguments)} gave {done.returncode}:\n{text}"
        return done.stdout

    def json(self, *arguments: str) -> Any:
        """Run it with --json and parse what it says."""
        return json.loads(self.run(*arguments, "--json"))

    def check(self) -> None:
        """Everything in the repository, read and verified."""
        said = self.run("check", "--read-data").decode()
        assert "no errors were found" in said
