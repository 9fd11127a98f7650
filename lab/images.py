# SPDX-License-Identifier: Apache-2.0
"""Disk images: made, read and compared by QEMU's own tools, which makes them judges that are not ours."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.processes import LabError, run

CHUNK = 1 << 20


def create(
    path: Path,
    size: int,
    format: str = "qcow2",
    *,
    backing: Path | None = None,
    options: Mapping[str, object] | None = None,
) -> Path:
    """Make an image of ``size`` bytes and return its path; ``options`` are those of ``qemu-img create -o``."""
    argv: list[str | Path] = ["qemu-img", "create", "-q", "-f", format]
    for key, value in (options or {}).items():
        argv += ["-o", f"{key}={value}"]
    if backing is not None:
        argv += ["-b", backing, "-F", info(backing)["format"]]
    run([*argv, path, str(size)])
    return path


def info(path: Path) -> dict[str, Any]:
    """What ``qemu-img info`` says, also of an image in use."""
    answer: dict[str, Any] = json.loads(run(["qemu-img", "info", "-U", "--output=json", path]))
    return answer


def bitmaps(path: Path) -> dict[str, list[str]]:
    """The bitmaps stored in a qcow2 that nobody has open, each with its flags (``auto``, ``in-use``)."""
    data = info(path).get("format-specific", {}).get("data", {})
    return {bitmap["name"]: bitmap["flags"] for bitmap in data.get("bitmaps", [])}


@contextmanager
def _raw_copy(path: Path, format: str | None) -> Iterator[Path]:
    """A sparse raw copy of the content, removed afterwards; ``-U``: also while QEMU has the image open."""
    with tempfile.TemporaryDirectory(prefix="pb-raw-") as place:
        copy = Path(place) / "raw"
        source = ["-f", format] if format else []
        run(["qemu-img", "convert", "-U", *source, "-O", "raw", path, copy])
        yield copy


def raw_bytes(path: Path, format: str | None = None) -> bytes:
    """The whole content as the domain sees it; flush first if the image is in use.  For small disks."""
    with _raw_copy(path, format) as copy:
        return copy.read_bytes()


def raw_sha256(path: Path, format: str | None = None) -> str:
    """SHA-256 (hex) of the whole content as the domain sees it; flush first if the image is in use."""
    digest = hashlib.sha256()
    with _raw_copy(path, format) as copy, copy.open("rb") as raw:
        while chunk := raw.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def compare(a: Path, b: Path) -> bool:
    """Whether two images, whatever their formats, hold the same content and are of the same size.

    Not ``-s``: it also wants equal allocation, and a hole and written zeroes are the same content.
    """
    if info(a)["virtual-size"] != info(b)["virtual-size"]:
        return False
    done = subprocess.run(["qemu-img", "compare", "-q", "-U", a, b], capture_output=True, check=False)
    if done.returncode > 1:
        raise LabError(f"qemu-img compare: {done.stderr.decode(errors='replace').strip()}")
    return done.returncode == 0


def check(path: Path) -> None:
    """Raise LabError unless a qcow2 that nobody has open is without corruption and leaks."""
    run(["qemu-img", "check", "-q", path])


def make_ext4(path: Path, size: int, files: Mapping[str, bytes] | None = None, *, format: str = "qcow2") -> Path:
    """Make an image of ``size`` bytes holding an ext4 file system with ``files`` (path inside: content)."""
    with tempfile.TemporaryDirectory(prefix="pb-ext4-") as place:
        root = Path(place) / "root"
        root.mkdir()
        for name, content in (files or {}).items():
            target = root / name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        raw = Path(place) / "raw"
        with raw.open("wb") as empty:
            empty.truncate(size)
        # Nothing left for the kernel to initialise later: a mounted file system only writes what was asked of it.
        eager = "lazy_itable_init=0,lazy_journal_init=0"
        run(["mkfs.ext4", "-q", "-F", "-E", eager, "-d", root, raw])
        run(["qemu-img", "convert", "-f", "raw", "-O", format, raw, path])
    return path
