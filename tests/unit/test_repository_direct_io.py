# SPDX-License-Identifier: Apache-2.0
"""A file's bytes: past the page cache where that can be, and the same bytes wherever it cannot."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from pullback.repository.direct_io import read_part, write_all

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


def read(path: Path, offset: int, length: int) -> bytes:
    handle = os.open(path, os.O_RDONLY)
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    try:
        return bytes(read_part(handle, offset, length))
    finally:
        assert fcntl.fcntl(handle, fcntl.F_GETFL) == flags
        os.close(handle)


class Reads:
    """os.preadv, and what it brought from the page cache at hand, past it, and in the ordinary way.

    ``cached`` bytes of the file are at hand; ``most`` bytes come with a call; ``refuse`` is what reading past it meets.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cached: int = 0, most: int = 1 << 40, refuse: int = 0) -> None:
        self.at_hand, self.direct, self.ordinary = 0, 0, 0
        real = os.preadv

        def preadv(handle: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
            place = buffers[0][:most]
            if flags & os.RWF_NOWAIT:
                if offset >= cached:
                    raise BlockingIOError
                self.at_hand += (done := real(handle, [place[: cached - offset]], offset))
            elif fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
                if refuse:
                    raise OSError(refuse, os.strerror(refuse))
                self.direct += (done := real(handle, [place], offset))
            else:
                self.ordinary += (done := real(handle, [place], offset))
            return done

        monkeypatch.setattr(os, "preadv", preadv)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    (tmp_path / "large").write_bytes(os.urandom(3 * MIB + 777))
    return tmp_path / "large"


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 3 * MIB + 777),
        (0, 3 * MIB),
        (1, MIB),
        (4095, MIB + 2),
        (4096, 2 * MIB),
        (MIB + 13, 2 * MIB),
        (5, 5),
        (2 * MIB, MIB - 1),
    ],
)
@pytest.mark.parametrize("cached", [0, 1, 4096, MIB + 4097, 4 * MIB])
@pytest.mark.parametrize("most", [4096, 512 << 10, 1 << 40])
def test_any_part_is_read(
    large: Path, monkeypatch: pytest.MonkeyPatch, offset: int, length: int, cached: int, most: int
) -> None:
    whole = large.read_bytes()
    Reads(monkeypatch, cached, most)
    assert read(large, offset, length) == whole[offset : offset + length]


def test_what_is_at_hand_comes_from_the_page_cache_and_the_rest_from_the_disk(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch, cached=MIB)
    read(large, 0, 3 * MIB)
    assert (reads.at_hand, reads.direct, reads.ordinary) == (MIB, 2 * MIB, 0)


def test_a_whole_file_that_is_at_hand_is_read_from_there(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch, cached=4 * MIB)
    read(large, 0, 3 * MIB + 777)
    assert (reads.at_hand, reads.direct) == (3 * MIB + 777, 0)


def test_small_parts_are_read_in_the_ordinary_way(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    read(large, 0, MIB - 1)
    assert (reads.at_hand, reads.direct, reads.ordinary) == (0, 0, 0)


@pytest.mark.parametrize("offset", [0, 4095, 2 * MIB, 3 * MIB + 776, 3 * MIB + 777, 9 * MIB])
@pytest.mark.parametrize("length", [100_000, 2 * MIB])
def test_where_the_file_ends_there_is_less(large: Path, offset: int, length: int) -> None:
    assert read(large, offset, length) == large.read_bytes()[offset : offset + length]


def test_a_file_system_that_refuses_to_read_past_the_page_cache(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch, refuse=errno.EINVAL)
    assert read(large, 7, 2 * MIB) == large.read_bytes()[7 : 7 + 2 * MIB]
    assert reads.ordinary == 2 * MIB + 7


def test_a_broken_disk_is_one(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Reads(monkeypatch, refuse=errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        read(large, 0, 2 * MIB)
