# SPDX-License-Identifier: Apache-2.0
"""Writing a file's bytes: past the page cache where that can be, and the same bytes wherever it cannot."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from pullback.repository.file_writing import write_all

MIB = 1 << 20


def aligned(size: int) -> memoryview:
    """So many bytes in whole pages."""
    pages = mmap.mmap(-1, size)
    pages.write(os.urandom(size))
    return memoryview(pages)[:size]


class Watched:
    """os.writev, and how many bytes of each call went past the page cache; ``most`` bytes a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 1 << 40, refuse: int = 0) -> None:
        self.direct: list[int] = []
        self.cached: list[int] = []
        real = os.writev

        def writev(handle: int, pieces: Sequence[memoryview]) -> int:
            direct = bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT)
            if direct and refuse:
                raise OSError(refuse, os.strerror(refuse))
            done = real(handle, [pieces[0][:most]] if len(pieces) == 1 else pieces)
            (self.direct if direct else self.cached).append(done)
            return done

        monkeypatch.setattr(os, "writev", writev)


def written(path: Path, *pieces: memoryview) -> bytes:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    try:
        write_all(handle, list(pieces))
    finally:
        assert fcntl.fcntl(handle, fcntl.F_GETFL) == flags
        os.close(handle)
    return path.read_bytes()


@pytest.mark.parametrize("size", [MIB, MIB + 1, MIB + 4095, 3 * MIB + 4096, 16 * MIB + 12345])
def test_large_files_go_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    watched, data = Watched(monkeypatch), aligned(size)
    assert written(tmp_path / "file", data) == data
    assert sum(watched.direct) == size // 4096 * 4096
    assert sum(watched.cached) == size % 4096


@pytest.mark.parametrize("size", [0, 1, 4096, MIB - 1])
def test_small_ones_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    watched, data = Watched(monkeypatch), memoryview(os.urandom(size))
    assert written(tmp_path / "file", data) == data
    assert not watched.direct


def test_nor_do_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, one, other = Watched(monkeypatch), aligned(MIB), aligned(MIB + 1)
    assert written(tmp_path / "file", one, other) == bytes(one) + bytes(other)
    assert not watched.direct


@pytest.mark.parametrize("most", [4096, 512 << 10])
def test_writes_that_end_early_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    watched, data = Watched(monkeypatch, most), aligned(MIB + 777)
    assert written(tmp_path / "file", data) == data
    assert watched.direct


def test_memory_that_is_not_aligned(tmp_path: Path) -> None:
    data = aligned(2 * MIB + 1)[1:]
    assert written(tmp_path / "file", data) == data


def test_a_file_system_that_refuses_at_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, data = Watched(monkeypatch, refuse=errno.EINVAL), aligned(MIB)
    assert written(tmp_path / "file", data) == data
    assert watched.cached == [MIB]


def test_a_file_system_that_knows_no_such_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, data, real = Watched(monkeypatch), aligned(MIB), fcntl.fcntl

    def refused(handle: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refused)
    assert written(tmp_path / "file", data) == data
    assert watched.cached == [MIB]


def test_a_full_disk_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Watched(monkeypatch, refuse=errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "file", aligned(MIB))
