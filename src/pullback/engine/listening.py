# SPDX-License-Identifier: Apache-2.0
"""Where an NBD server may listen, QEMU's or ours: what lies there must not be lost, and who may connect.

QEMU unlinks whatever lies at the path of its socket before it binds, also an image; and its umask says who may connect.
"""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from pullback.errors import Refused, UsageError
from pullback.nbd.address import Address, UnixAddress

#: A unix socket's path has at most this many bytes (unix(7)).
_LONGEST_PATH = 107
#: What QEMU's tls-creds-x509 loads for a server.
_CERTIFICATES = ("server-cert.pem", "server-key.pem", "ca-cert.pem")
_KINDS = {stat.S_IFREG: "a file", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link", stat.S_IFIFO: "a fifo"}


def check_address(address: Address, tls: str | None, insecure: bool) -> None:
    """UsageError for an address that is unsafe or impossible, and for certificates that are not there."""
    if isinstance(address, UnixAddress):
        path = address.path.encode(errors="surrogateescape")
        if not address.path.startswith("/") or len(path) > _LONGEST_PATH or b"\0" in path:
            raise UsageError(f"the socket {address.path} is not an absolute path of at most {_LONGEST_PATH} bytes")
    elif tls is None and not insecure:
        raise UsageError(
            f"an export on TCP ({address}) without TLS lets everybody on the way read the disks",
            todo="Give certificates with --tls DIR, or say --insecure.",
        )
    missing = [name for name in _CERTIFICATES if tls is not None and not os.path.isfile(Path(tls) / name)]  # noqa: PTH113
    if missing:
        raise UsageError(
            f"{tls} holds no {', '.join(missing)}", todo="It needs ca-cert.pem, server-cert.pem and server-key.pem."
        )


def dead_socket(path: Path) -> bool:
    """Whether a socket that nobody listens at lies there: it may go.  False where nothing is.

    UsageError for anything else, a link too; nothing is touched.
    """
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISSOCK(mode):
            raise _in_the_way(path, f"it is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, no socket, and would be lost")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # of a listener that is busy we would have to wait for our turn
            probe.connect(str(path))
    except FileNotFoundError:
        return False
    except ConnectionRefusedError:
        return True
    except BlockingIOError:
        pass
    except OSError as error:
        raise _in_the_way(path, error.strerror or str(error)) from error
    raise _in_the_way(path, "it is in use, another program listens there")


def _in_the_way(path: Path, why: str) -> UsageError:
    return UsageError(
        f"cannot listen at {path}: {why}", means="Nothing was touched.", todo="Name a path where nothing lies yet."
    )


def keep_to_owner(path: str, *, encrypted: bool) -> None:
    """Take the right to connect to a socket that QEMU made from all but its owner.

    It may be another user's, and then stays as QEMU's umask made it.  Refused if that lets everybody on this host
    connect, by mode and directories, and nothing asks them for a certificate.
    """
    try:
        # What is at the path now may be somebody else's link.
        handle = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # QEMU sees other files than we do
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISSOCK(mode):
            os.chmod(f"/proc/self/fd/{handle}", 0o600)  # noqa: PTH101
    except PermissionError as error:
        if mode & stat.S_IWOTH and not encrypted and _open_to_all(Path(path).parent):
            raise Refused(
                f"everybody on this host could connect to {path}: QEMU makes its socket so, and is another user",
                means="Nothing was exported.",
                todo="Name a socket in a directory that keeps others out, or run QEMU with another umask.",
            ) from error
    finally:
        os.close(handle)


def _open_to_all(directory: Path) -> bool:
    return all(place.stat().st_mode & stat.S_IXOTH for place in (directory, *directory.parents))
