# SPDX-License-Identifier: Apache-2.0
"""The parts of the laboratory's guest: Debian's cloud kernel, unpacked, and an initramfs of busybox and its modules.

    .cache/lab/linux-image-*.deb        downloaded once, never installed
    .cache/lab/guest-KEY/vmlinuz        KEY stands for all inputs, so a change of any makes a new directory;
    .cache/lab/guest-KEY/initramfs      the directory appears whole, by one rename

``python -m lab.guest`` builds it and prints where it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lab.disks import KINDS
from lab.processes import LabError, run

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "lab"
INIT = Path(__file__).with_name("init.sh")
META_PACKAGE = "linux-image-cloud-amd64"
MODULES = tuple(sorted({module for kind in KINDS.values() for module in kind.modules or ()}))
"""What a guest may need; the kernel has the others, ext4 among them, built in."""


def kernel() -> Path:
    """The guest's kernel; built if missing."""
    return _guest() / "vmlinuz"


def initramfs() -> Path:
    """The guest's initramfs; built if missing."""
    return _guest() / "initramfs"


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lock among all processes that use this cache; the kernel lets it go when its holder dies."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def _guest() -> Path:
    busybox = _busybox()
    key = hashlib.sha256()
    for source in (Path(__file__), INIT, busybox):
        key.update(hashlib.sha256(source.read_bytes()).digest())
    key.update(repr(MODULES).encode())
    target = CACHE / f"guest-{key.hexdigest()[:16]}"
    if not target.is_dir():
        with locked("guest"):
            if not target.is_dir():
                _build(target, busybox)
    return target


def _busybox() -> Path:
    found = shutil.which("busybox")
    if found is None:
        raise LabError("busybox is not installed; scripts/setup installs what the laboratory needs")
    return Path(found).resolve()


def _build(target: Path, busybox: Path) -> None:
    """Make ``target``, and remove what it replaces and what a build that was killed left; call with the lock held."""
    for left in [*CACHE.glob("build-*"), *CACHE.glob("download-*")]:
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix="build-", dir=CACHE) as place:
        tree = Path(place) / "tree"
        run(["dpkg-deb", "-x", _package(), tree])
        made = Path(place) / "made"
        made.mkdir()
        (vmlinuz,) = (tree / "boot").glob("vmlinuz-*")
        shutil.move(vmlinuz, made / "vmlinuz")
        files = {"init": (INIT.read_bytes(), 0o755), **_busybox_files(busybox), **_module_files(tree)}
        (made / "initramfs").write_bytes(_cpio(files))
        for old in CACHE.glob("guest-*"):
            if old.is_dir():
                shutil.rmtree(old)
        made.rename(target)


def _package() -> Path:
    """The kernel's package file: the one at hand, or a downloaded one."""
    have = sorted(CACHE.glob("linux-image-*.deb"))
    if have:
        return have[-1]
    with tempfile.TemporaryDirectory(prefix="download-", dir=CACHE) as place:
        try:
            _download(Path(place))
        except LabError:
            _update_package_lists()
            _download(Path(place))
        (package,) = Path(place).glob("*.deb")
        return package.rename(CACHE / package.name)


def _download(place: Path) -> None:
    about = run(["apt-cache", "show", "--no-all-versions", META_PACKAGE]).decode()
    names = re.findall(r"^Depends:.*?(linux-image-\S+-cloud-amd64)", about, re.MULTILINE)
    if not names:
        raise LabError(f"{META_PACKAGE} names no kernel package")
    # The download would otherwise run as a user who may not write here.
    run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", names[0]], cwd=place, timeout=600)


def _update_package_lists() -> None:
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    deadline = time.monotonic() + 300
    while True:
        try:
            run([*sudo, "apt-get", "-q", "update"], timeout=600)
            return
        except LabError as error:
            # Soon after a boot others hold it, for minutes; apt can wait for dpkg's lock, not for this one.
            if "/lists/lock" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(5)


def _busybox_files(busybox: Path) -> dict[str, tuple[bytes, int]]:
    files = {"bin/busybox": (busybox.read_bytes(), 0o755)}
    for applet in run([busybox, "--list"]).decode().split():
        if applet != "busybox":
            files[f"bin/{applet}"] = (b"busybox", 0o120777)
    return files


def _module_files(tree: Path) -> dict[str, tuple[bytes, int]]:
    """The modules, and for each wanted one ``modules/NAME.order``: what to load, dependencies first."""
    (version,) = (place.name for place in (tree / "lib/modules").iterdir())
    run(["depmod", "-b", tree, version])
    files: dict[str, tuple[bytes, int]] = {}
    for module in MODULES:
        lines = run(["modprobe", "-d", tree, "-S", version, "--show-depends", module]).decode().splitlines()
        paths = [Path(line.split()[1]) for line in lines if line.startswith("insmod ")]
        files[f"modules/{module}.order"] = ("".join(f"{path.name}\n" for path in paths).encode(), 0o644)
        for path in paths:
            files[f"modules/{path.name}"] = (path.read_bytes(), 0o644)
    return files


def _cpio(files: dict[str, tuple[bytes, int]]) -> bytes:
    """Pack files into a cpio archive (newc, as the kernel's buffer-format.rst asks), with their directories."""
    places = {str(parent) for name in files for parent in Path(name).parents if str(parent) != "."}
    places |= {"dev", "proc", "sys", "run", "mnt", "tmp"}
    archive = bytearray()
    for place in sorted(places):
        archive += _cpio_entry(place, b"", 0o040755)
    for name, (content, mode) in files.items():
        archive += _cpio_entry(name, content, mode if mode & 0o170000 else mode | 0o100000)
    return bytes(archive + _cpio_entry("TRAILER!!!", b"", 0))


def _cpio_entry(name: str, content: bytes, mode: int) -> bytes:
    path = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device (2), special device (2), length of the name, check
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


if __name__ == "__main__":
    print(_guest())
