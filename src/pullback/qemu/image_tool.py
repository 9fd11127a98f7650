# SPDX-License-Identifier: Apache-2.0
"""qemu-img, for images that are to be restored to."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pullback.errors import RestoreError
from pullback.qemu.storage_daemon import qemu_program


def create_image(path: Path, image_format: str, size: int, backing: str | None = None) -> None:
    """Make an image of ``size`` bytes that only its owner may read; RestoreError with qemu-img's words.

    ``backing`` is the URL or path of the raw disk below it, which need not be there yet.
    """
    # Unsafe (-u) is about the backing file, which is not looked at: it is served later.
    below = [] if backing is None else ["-u", "-F", "raw", "-b", backing]
    done = _qemu_img("create", "-q", "-f", image_format, *below, str(path.absolute()), str(size))
    if done.returncode != 0:
        raise RestoreError(f"qemu-img cannot create {path}: {done.stderr.decode(errors='replace').strip()}")
    # A disk holds what its domain kept to itself.
    path.chmod(0o600)


def give_back_unused(path: Path, image_format: str) -> bool:
    """Give back the clusters of an image that were taken and are not used; whether the image is sound (``check -r``).

    A killed QEMU leaves some, and 7.2 now and then when it goes on with an image that ends within a cluster.
    """
    if image_format == "raw":
        return True
    return _qemu_img("check", "-q", "-f", "qcow2", "-r", "leaks", str(path.absolute())).returncode == 0


def _qemu_img(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run qemu-img; a path has to be absolute, else QEMU takes ``a:b/c`` for an address."""
    argv = [qemu_program("qemu-img"), *arguments]
    return subprocess.run(argv, capture_output=True, check=False, stdin=subprocess.DEVNULL)
