# SPDX-License-Identifier: Apache-2.0
"""An initramfs for the laboratory's guest that holds the real qemu-guest-agent, with the libraries it was built for.

    .cache/lab/agent-packages/*.deb     downloaded once, never installed
    .cache/lab/agent-KEY/initramfs      the guest's own initramfs, and the agent with its parts after it

``python -m lab.agent`` builds it and prints where it is.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import tempfile
from pathlib import Path

from lab import guest
from lab.processes import LabError, run

PACKAGE = "qemu-guest-agent"
MODULE = "virtio_console"
PORT = "org.qemu.guest_agent.0"
LOADER = "lib64/ld-linux-x86-64.so.2"

START = f"""#!/bin/sh
for port in /sys/class/virtio-ports/*; do
    [ "$(cat "$port/name")" = {PORT} ] && device=/dev/${{port##*/}}
done
exec qemu-ga -m virtio-serial -p "$device" -t /run -f /run/agent.pid "$@"
"""


def initramfs() -> Path:
    """The guest's initramfs with the agent in it (``start-agent`` runs it); built if missing."""
    return _place() / "initramfs"


@functools.cache
def _place() -> Path:
    base = guest.initramfs()
    key = hashlib.sha256(f"{base.parent.name} {Path(__file__).read_text()}".encode()).hexdigest()[:16]
    target = guest.CACHE / f"agent-{key}"
    if not target.is_dir():
        with guest.locked("agent"):
            if not target.is_dir():
                _build(target, base)
    return target


def _build(target: Path, base: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="build-agent-", dir=guest.CACHE) as place:
        tree = Path(place) / "tree"
        for package in _packages():
            run(["dpkg-deb", "-x", package, tree])
        made = Path(place) / "made"
        made.mkdir()
        files = {"bin/start-agent": (START.encode(), 0o755), **_program_files(tree), **_module_files(Path(place))}
        whole = base.read_bytes()
        (made / "initramfs").write_bytes(whole + bytes(-len(whole) % 4) + guest._cpio(files))
        for old in guest.CACHE.glob("agent-????????????????"):
            shutil.rmtree(old)
        made.rename(target)


def _packages() -> list[Path]:
    """The agent's package and those of its libraries: at hand, or downloaded."""
    kept = guest.CACHE / "agent-packages"
    if not kept.is_dir():
        with tempfile.TemporaryDirectory(prefix="build-packages-", dir=guest.CACHE) as place:
            try:
                fresh = _download(Path(place) / "first")
            except LabError:  # no lists yet, or ones that name a package which the archive has replaced
                guest._update_package_lists()
                fresh = _download(Path(place) / "second")
            fresh.rename(kept)
    return sorted(kept.glob("*.deb"))


def _download(place: Path) -> Path:
    place.mkdir()
    # The download would otherwise run as a user who may not write here.
    run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *_names()], cwd=place, timeout=600)
    return place


def _names() -> list[str]:
    """The package and, by what each depends on, all packages of libraries that it needs."""
    known: dict[str, None] = {}
    new = [PACKAGE]
    while new:
        name = new.pop()
        if name not in known:
            known[name] = None
            about = run(["apt-cache", "show", "--no-all-versions", name]).decode()
            for line in re.findall(r"^(?:Pre-)?Depends: (.*)", about, re.MULTILINE):
                new += re.findall(r"(?:^|, )(lib[\w.+-]+)", line)
    return list(known)


def _program_files(tree: Path) -> dict[str, tuple[bytes, int]]:
    """The agent and what its own loader says it loads."""
    (program,) = tree.glob("usr/*bin/qemu-ga")
    (loader,) = tree.glob("**/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    places = [loader.parent, tree / "usr/lib/x86_64-linux-gnu"]
    path = ":".join(map(str, places))
    listed = run([loader, "--inhibit-cache", "--library-path", path, "--list", program]).decode()
    libraries = [Path(found) for found in re.findall(rf"=> ({re.escape(str(tree))}\S+)", listed)]
    files = {"bin/qemu-ga": (program.read_bytes(), 0o755), LOADER: (loader.read_bytes(), 0o755)}
    return files | {f"lib/x86_64-linux-gnu/{library.name}": (library.read_bytes(), 0o755) for library in libraries}


def _module_files(place: Path) -> dict[str, tuple[bytes, int]]:
    """The driver of the agent's port, as the guest's first program loads it."""
    tree = place / "kernel"
    run(["dpkg-deb", "-x", guest._package(), tree])
    (version,) = (found.name for found in (tree / "lib/modules").iterdir())
    run(["depmod", "-b", tree, version])
    shown = run(["modprobe", "-d", tree, "-S", version, "--show-depends", MODULE]).decode()
    paths = [Path(found) for found in re.findall(r"^insmod (\S+)", shown, re.MULTILINE)]
    order = "".join(f"{path.name}\n" for path in paths).encode()
    return {f"modules/{MODULE}.order": (order, 0o644)} | {
        f"modules/{path.name}": (path.read_bytes(), 0o644) for path in paths
    }


if __name__ == "__main__":
    print(_place())
