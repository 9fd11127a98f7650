# SPDX-License-Identifier: Apache-2.0
"""The cases: every module here has a list CASES; how one is added stands in bench/harness.py."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from bench.harness import Case


def all_cases() -> list[Case]:
    """All cases, by number."""
    return sorted(_found(), key=lambda case: (int(case.number), case.name))


def _found() -> Iterator[Case]:
    for module in pkgutil.iter_modules(__path__):
        yield from importlib.import_module(f"{__name__}.{module.name}").CASES
