# SPDX-License-Identifier: Apache-2.0
"""Sockets of others: what cannot be looked at is refused, and what is elsewhere is left alone."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

import pytest

from pullback.engine.listening import dead_socket, keep_to_owner
from pullback.errors import UsageError


def test_a_place_that_cannot_be_looked_at_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"cannot listen at .*/file/nbd: Not a directory.*Nothing was touched") as told:
        dead_socket(tmp_path / "file" / "nbd")
    assert told.value.exit_code == 2
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_a_socket_that_is_not_seen_from_here_is_left_to_qemu(tmp_path: Path) -> None:
    """QEMU may run in another mount namespace; what is seen is made its owner's alone."""
    keep_to_owner(str(tmp_path / "elsewhere"), encrypted=False)
    assert list(tmp_path.iterdir()) == []
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / "nbd"))
        keep_to_owner(str(tmp_path / "nbd"), encrypted=False)
    assert (tmp_path / "nbd").stat().st_mode & 0o777 == 0o600
