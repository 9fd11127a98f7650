# SPDX-License-Identifier: Apache-2.0
"""The cache of chunks: one load however many ask, never more than its capacity, and failures told to all."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from lab.processes import wait_for
from pullback.engine.chunk_cache import ChunkCache
from pullback.errors import Damaged
from pullback.repository.blob import BlobId, BlobKind, PackId

MIB = 1 << 20


def name(number: int) -> BlobId:
    return BlobId(number.to_bytes(32, "big"))


class Source:
    """A repository of blobs of 1 MiB, all in one pack; it counts loads, can be held up, and can be damaged."""

    def __init__(self) -> None:
        self.loads: list[tuple[str, int]] = []
        self.go = threading.Event()
        self.go.set()
        self.broken: set[int] = set()
        self.no_memory: set[int] = set()
        self.index = SimpleNamespace(lookup=lambda kind, blob: SimpleNamespace(pack_id=PackId(b"p" * 32)))

    def load_blob(self, kind: BlobKind, blob: BlobId) -> bytes:
        return self._load("one", blob)

    def load_blobs_of_pack(self, pack: PackId, blobs: Iterable[BlobId]) -> Iterator[tuple[BlobId, bytes]]:
        for blob in blobs:
            yield blob, self._load("pack", blob)

    def _load(self, how: str, blob: BlobId) -> bytes:
        number = int.from_bytes(blob, "big")
        self.loads.append((how, number))
        assert self.go.wait(30)
        if number in self.broken:
            raise Damaged(f"blob {number}")
        if number in self.no_memory:
            self.no_memory.remove(number)
            raise MemoryError
        return bytes([number % 256]) * MIB


@pytest.fixture
def source() -> Source:
    return Source()


def cache_of(source: Any, capacity: int = 8 * MIB) -> ChunkCache:
    return ChunkCache(source, capacity, 2)


def asked(cache: ChunkCache, number: int) -> Future[bytes]:
    """A chunk asked for by a thread that a test need not wait for."""
    answer: Future[bytes] = Future()

    def ask() -> None:
        try:
            answer.set_result(cache.get(name(number)))
        except MemoryError as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer


def test_what_was_used_last_stays(source: Source) -> None:
    cache = cache_of(source, 3 * MIB)
    for number in (1, 2, 3, 1, 4, 1):
        assert cache.get(name(number)) == bytes([number]) * MIB
    assert source.loads == [("one", number) for number in (1, 2, 3, 4)]
    cache.get(name(2))
    assert source.loads[-1] == ("one", 2)
    assert cache.bytes_loaded == 5 * MIB
    cache.close()


def test_many_ask_and_one_loads(source: Source) -> None:
    cache = cache_of(source)
    source.go.clear()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(cache.get, name(5)) for _ in range(8)]
        wait_for(lambda: source.loads, "the first load")
        source.go.set()
        assert {bytes(one.result()) for one in asked} == {b"\5" * MIB}
    assert source.loads == [("one", 5)]
    cache.close()


def test_a_failure_is_told_to_all_and_not_kept(source: Source) -> None:
    cache = cache_of(source)
    source.broken.add(5)
    for _ in range(2):
        with pytest.raises(Damaged):
            cache.get(name(5))
    source.broken.clear()
    assert cache.get(name(5)) == b"\5" * MIB
    cache.close()


def test_who_waits_for_one_that_fails_by_itself_tries_again(source: Source) -> None:
    """What is wrong with one thread is not what is wrong with the chunk."""
    cache = cache_of(source)
    source.no_memory.add(5)
    source.go.clear()
    answers = [asked(cache, 5), asked(cache, 5)]
    wait_for(lambda: source.loads, "the first load")
    source.go.set()
    failed = [answer.exception(10) for answer in answers]
    assert sorted(map(type, failed), key=str) == [MemoryError, type(None)]
    assert cache.get(name(5)) == b"\5" * MIB
    assert source.loads == [("one", 5)] * 2
    cache.close()


def test_what_was_fetched_together_is_there_but_for_what_is_broken(source: Source) -> None:
    cache = cache_of(source)
    source.broken.add(2)
    cache.fetch([name(number) for number in (1, 2, 3)])
    assert source.loads == [("pack", 1), ("pack", 2)]
    assert cache.get(name(1)) and cache.get(name(3))
    with pytest.raises(Damaged):
        cache.get(name(2))
    assert source.loads[2:] == [("one", 3), ("one", 2)]
    cache.close()


def test_who_comes_after_what_is_loaded_ahead_waits_for_it(source: Source) -> None:
    cache = cache_of(source)
    source.go.clear()
    ahead = [(name(number), MIB) for number in range(1, 9)]
    cache.fetch_ahead(ahead)
    cache.fetch_ahead(ahead)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(cache.get, name(2))
        wait_for(lambda: len(source.loads) == 2, "two threads that load")
        assert not asked.done()
        source.go.set()
        assert asked.result() == b"\2" * MIB
    cache.close()
    # Two threads, 2 MiB each; what they had no time for was left out, and nothing was loaded twice.
    assert sorted(source.loads) == [("pack", number) for number in (1, 2, 3, 4)]


def test_nothing_is_loaded_ahead_after_the_end(source: Source) -> None:
    cache = cache_of(source)
    cache.close()
    cache.fetch_ahead([(name(number), MIB) for number in range(1, 9)])
    assert not source.loads
    assert cache.get(name(1)) == b"\1" * MIB


def test_what_was_about_to_be_loaded_ahead_at_the_end_is_nobody_s(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(source)
    claim = cache._claim

    def end_first(blobs: Iterable[BlobId]) -> list[BlobId]:
        cache.close()
        return claim(blobs)

    monkeypatch.setattr(cache, "_claim", end_first)
    cache.fetch_ahead([(name(number), MIB) for number in (1, 2)])
    assert not source.loads
    assert asked(cache, 1).result(10) == b"\1" * MIB


def test_what_no_thread_can_be_started_for_is_loaded_by_who_asks(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(source)
    source.go.clear()
    cache.fetch_ahead([(name(number), MIB) for number in (1, 2)])
    wait_for(lambda: source.loads, "the first load")
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
        cache.fetch_ahead([(name(number), MIB) for number in (3, 4)])
    answer = asked(cache, 3)
    source.go.set()
    assert answer.result(10) == b"\3" * MIB
    cache.close()
    assert sorted(source.loads) == [("one", 3), ("pack", 1), ("pack", 2)]
