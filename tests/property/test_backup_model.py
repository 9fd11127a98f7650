# SPDX-License-Identifier: Apache-2.0
"""Random lives of a domain against a model of bytes: every backup holds what the disks held at its freezing instant.

PULLBACK_TEST_SECONDS sets for how long (20 s by default), PULLBACK_TEST_SEED the first life's seed: with one set, that
life is lived to its end.  A failure prints its own.  ``make soak`` sets both.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.domain_model import Start
from tests.support.random_life import RandomLife

SECONDS = float(os.environ.get("PULLBACK_TEST_SECONDS") or 20)
SEED = int(os.environ.get("PULLBACK_TEST_SEED") or 0)
STEPS = 60


@pytest.mark.timeout(int(SECONDS * 4) + 120)
def test_random_lives(lab_dir: Path, bare_qemu: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pullback.engine.backup.DEFAULT_BASE", str(lab_dir / "sockets"))
    (lab_dir / "sockets").mkdir()
    end = time.monotonic() + SECONDS
    seed = SEED or random.randrange(1, 1 << 32)
    done: Counter[str] = Counter()
    while not done["lives"] or time.monotonic() < end:
        print(f"life {seed}", flush=True)
        live(lab_dir / str(seed), bare_qemu, seed, done, float("inf") if SEED else end)
        seed += 1
    print(", ".join(f"{count} {what}" for what, count in done.most_common()))


def live(place: Path, start: Start, seed: int, done: Counter[str], end: float) -> None:
    """One life, to its end or until it is time."""
    place.mkdir()
    life = RandomLife(place, start, seed)
    try:
        for _ in range(STEPS):
            life.step()
            if time.monotonic() > end:
                break
        life.end()
    except BaseException:
        print(*life.model.log, f"to live it again: make soak SEED={seed} SECONDS=1", sep="\n")
        life.model.close()
        raise
    done += Counter({"lives": 1}) + life.done
    shutil.rmtree(place)
