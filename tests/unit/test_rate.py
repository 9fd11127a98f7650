# SPDX-License-Identifier: Apache-2.0
"""``--limit-rate``, on a clock of our own: exact in sum and over short times, with threads that wake up late."""

from __future__ import annotations

import bisect
import heapq
import itertools
import os
import random
import threading
from pathlib import Path

import pytest

from pullback.cli.config import DomainOptions
from pullback.cli.options import rate_of
from pullback.engine.cores import cores, quota_cores
from pullback.engine.rate import CREDIT, LEAST, Bucket, Rate, piece_size
from pullback.engine.reading import IN_FLIGHT, REQUEST
from pullback.errors import UsageError
from pullback.repository.blob import BlobKind
from pullback.repository.crypto import Key
from pullback.repository.pack import PackBuilder

MIB = 1 << 20
RATES = [LEAST, 300_000, 5 * MIB, 50 * MIB, 1 << 30]


def moved(rate: int, threads: int, late: float, total: int) -> list[tuple[float, int]]:
    """When which bytes moved, of ``threads`` that each ask for the next piece up to ``late`` seconds late."""
    chance, bucket, piece = random.Random(f"{rate} {threads}"), Bucket(rate, 0.0), piece_size(rate, MIB)
    ready, done, left = [(0.0, thread) for thread in range(threads)], [], total
    while left > 0:
        now, thread = heapq.heappop(ready)
        length = min(left, chance.choice([piece, piece, piece // 2, piece // 4]))
        wait = bucket.grant(now, length)
        at = now + wait + (chance.uniform(0, late) if wait else 0)
        done.append((at, length))
        heapq.heappush(ready, (at, thread))
        left -= length
    return sorted(done)


def most_within(done: list[tuple[float, int]], seconds: float) -> int:
    """The most bytes that moved in any so many seconds."""
    times = [at for at, _ in done]
    sums = [0, *itertools.accumulate(length for _, length in done)]
    return max(sums[bisect.bisect_left(times, at + seconds)] - sums[number] for number, at in enumerate(times))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_the_sum_is_exact_and_no_short_time_sees_a_burst(rate: int, threads: int) -> None:
    late = 0.02
    done = moved(rate, threads, late, total=10 * rate)
    assert 10 - CREDIT <= done[-1][0] <= 10.1, "10 seconds' worth took 10 seconds"
    for seconds in (0.1, 1.0, 3.0):
        # Kept from before, the piece itself, and pieces that were paid for but moved late.
        burst = rate * (CREDIT + late) + piece_size(rate, MIB)
        assert most_within(done, seconds) <= rate * seconds + burst
    assert most_within(done, 1.0) <= 1.15 * rate
    assert most_within(moved(rate, threads, 0.0, 10 * rate), 1.0) <= 1.1 * rate


def test_what_was_not_used_for_long_is_gone() -> None:
    bucket = Bucket(1000, 0.0)
    assert bucket.grant(100.0, 100) == pytest.approx(0.1 - CREDIT)
    assert bucket.grant(100.0, 100) == pytest.approx(0.2 - CREDIT)


@pytest.mark.parametrize("rate", RATES)
def test_pieces_are_powers_of_two_worth_50_ms(rate: int) -> None:
    piece = piece_size(rate, MIB)
    assert piece & (piece - 1) == 0
    assert 4096 <= piece <= MIB
    assert piece in (4096, MIB) or rate * 0.025 < piece <= rate * 0.05
    assert piece_size(rate, 4096) == 4096


def test_no_limit_waits_for_nothing_and_changes_no_piece() -> None:
    rate = Rate()
    rate.take(1 << 50)
    assert rate.piece(MIB) == MIB


def test_stopping_wakes_whoever_waits() -> None:
    rate = Rate(LEAST)
    waiting = threading.Thread(target=rate.take, args=(LEAST * 3600,))
    waiting.start()
    rate.stop()
    waiting.join(timeout=30)
    assert not waiting.is_alive()
    rate.take(LEAST * 3600)


@pytest.mark.parametrize("text", ["1", "63K", "fast", "-1M", "50MB", ""])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"too small|is no size"):
        rate_of(text, DomainOptions())


def test_the_option_goes_before_the_configuration() -> None:
    told = DomainOptions(limit_rate="50M")
    assert rate_of(None, DomainOptions()) == 0
    assert rate_of(None, told) == 50 * MIB
    assert rate_of("64k", told) == LEAST
    assert rate_of("0", told) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", None), ("50000 100000", 1), ("150000 100000", 2), ("200000 100000", 2), ("", None), ("x 1", None)],
)
def test_a_quota_is_so_many_cores(text: str, expected: int | None) -> None:
    assert quota_cores(text) == expected


def test_what_a_thread_holds_is_documented() -> None:
    holds = IN_FLIGHT * REQUEST + sum(len(PackBuilder(Key.generate(), kind)._buffer) for kind in BlobKind)
    text = (Path(__file__).parents[2] / "docs/performance.md").read_text(encoding="utf-8")
    assert holds == 36 * MIB
    assert f"{holds // MIB} MiB |" in text
    assert f"{3 * holds // MIB + 80} MiB with three threads" in text


def test_cores_are_those_that_we_may_use() -> None:
    before = os.sched_getaffinity(0)
    assert 1 <= cores() <= len(before)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)
