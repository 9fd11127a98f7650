# SPDX-License-Identifier: Apache-2.0
"""A served disk, whatever its chunks: every range reads as the model says, and what is called a hole is one."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pullback.engine.chunk_cache import ChunkCache
from pullback.engine.served_disk import ServedDisk
from pullback.engine.serving import served_disks
from pullback.errors import RepositoryError
from tests.support.backups import new_repository, open_repository
from tests.support.serving import Model, random_model, store_models

KIB = 1 << 10
SEGMENT = 256 * KIB
#: Aligned ones as ours, and any as other programs cut them.
LENGTHS = (4 * KIB, 16 * KIB, 64 * KIB, 1, 511, 4097, 70001)

quick = settings(max_examples=25)


@contextmanager
def served(models: dict[str, Model], capacity: int) -> Iterator[tuple[dict[str, ServedDisk], ChunkCache]]:
    """The disks of a backup that was stored by one process and is served by another."""

    def told(target: str, offset: int, length: int, error: RepositoryError) -> None:
        raise AssertionError(f"{target} {offset} {length} {error}")

    with tempfile.TemporaryDirectory() as place:
        new_repository(Path(place) / "repo")
        backup = store_models(open_repository(Path(place) / "repo"), models, segment=SEGMENT)
        repository = open_repository(Path(place) / "repo")
        cache = ChunkCache(repository, capacity, 2)
        try:
            yield served_disks(repository, cache, repository.find(backup), (), told)[1], cache
        finally:
            cache.close()


def some_model(seed: int, size: int) -> Model:
    return random_model(random.Random(seed), size, SEGMENT, LENGTHS)


@quick
@given(st.integers(0, 1 << 30), st.integers(1, 3 * SEGMENT + 777), st.sampled_from([0, 100 * KIB, 1 << 30]))
def test_every_range_is_the_models(seed: int, size: int, capacity: int) -> None:
    models = {"vda": some_model(seed, size), "vdb": some_model(seed + 1, 1 + size // 2)}
    rng = random.Random(seed)
    with served(models, capacity) as (disks, cache):
        for target, model in models.items():
            data, disk = model.data, disks[target]
            assert disk.size == len(data)
            for _ in range(30):
                offset = rng.randrange(len(data))
                length = rng.choice([1, 512, 4096, len(data)])
                length = min(length, len(data) - offset)
                assert bytes(disk.read(offset, length)) == data[offset : offset + length]
            # Forward in small steps, as what is read ahead for.
            for offset in range(0, len(data), 30001):
                length = min(30001, len(data) - offset)
                assert bytes(disk.read(offset, length)) == data[offset : offset + length]
        assert sum(len(chunk) for chunk in cache._chunks.values()) == cache._held <= capacity


@quick
@given(st.integers(0, 1 << 30), st.integers(1, 3 * SEGMENT + 777))
def test_holes_are_zero_and_nothing_is_loaded_to_tell(seed: int, size: int) -> None:
    models = {"vda": some_model(seed, size)}
    model = models["vda"]
    rng = random.Random(seed)
    data = model.data
    with served(models, 1 << 20) as (disks, cache):
        for begin, length in [(0, size), *((at := rng.randrange(size), rng.randint(1, size - at)) for _ in range(20))]:
            told: list[tuple[int, int]] = []
            offset, end = begin, begin + length
            while offset < end:
                found = disks["vda"].extents(offset, end - offset)
                assert found and all(count > 0 for count, _ in found)
                assert all(first[1] != second[1] for first, second in pairwise(found))
                told += found
                offset += sum(count for count, _ in found)
            assert offset == end
            offset = begin
            for count, flags in told:
                assert flags in (0, 3)
                if flags:
                    assert not any(data[offset : offset + count])
                offset += count
            if begin == 0 and length == size:
                assert sum(count for count, flags in told if flags) == sum(
                    length for _, length, hole in holes_by_length(model) if hole
                )
        assert cache.bytes_loaded == 0


def holes_by_length(model: Model) -> list[tuple[int, int, bool]]:
    """Chunks that must be told as holes: zero, and short or of a multiple of 4 KiB; others may count as data."""
    return [
        (0, len(chunk), not any(chunk) and (len(chunk) <= 64 * KIB or len(chunk) % (4 * KIB) == 0))
        for chunk in model.chunks
    ]


def test_a_disk_without_bytes() -> None:
    with served({"vda": Model(())}, 0) as (disks, _):
        assert disks["vda"].size == 0


def test_many_threads_read_what_the_model_says_and_each_chunk_is_loaded_once() -> None:
    model = random_model(random.Random(7), 12 * SEGMENT, SEGMENT, (16 * KIB, 64 * KIB))
    data = model.data
    with served({"vda": model}, 1 << 30) as (disks, cache):

        def reader(seed: int) -> int:
            rng = random.Random(seed)
            for _ in range(200):
                offset = rng.randrange(len(data) - 1)
                length = min(rng.choice([512, 4096, 200 * KIB]), len(data) - offset)
                assert bytes(disks["vda"].read(offset, length)) == data[offset : offset + length]
            for offset in range(0, len(data), 40 * KIB):
                length = min(40 * KIB, len(data) - offset)
                assert bytes(disks["vda"].read(offset, length)) == data[offset : offset + length]
            return seed

        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(reader, range(8))) == list(range(8))
        assert cache.bytes_loaded == sum(len(chunk) for chunk in {chunk for chunk in model.chunks if any(chunk)})


def test_readers_that_go_forward_are_read_ahead_for_and_others_are_not() -> None:
    rng = random.Random(3)
    model = Model(tuple(rng.randbytes(SEGMENT) for _ in range(96)))
    with served({"vda": model}, 1 << 30) as (disks, cache):
        scattered = rng.sample(range(0, 96, 3), 32)
        for place in scattered:
            disks["vda"].read(place * SEGMENT + 512, 512)
        cache.close()
        assert cache.bytes_loaded == len(scattered) * SEGMENT
    for step in (64 * KIB, 4 * SEGMENT):
        with served({"vda": model}, 1 << 30) as (disks, cache):
            for offset in range(0, 12 * SEGMENT, step):
                disks["vda"].read(offset, step)
            cache.close()
            assert cache.bytes_loaded > 16 * SEGMENT
