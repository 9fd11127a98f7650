# SPDX-License-Identifier: Apache-2.0
"""restic judges every repository that a test leaves behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tests.support.restic import Restic

#: Repositories up to this are read whole; of larger ones only what their files say of each other is checked.
READ_WHOLE = 32 << 20
_DEEPEST = 3

_judged: set[tuple[str, frozenset[str]]] = set()


def places_of(fixtures: Mapping[str, object]) -> set[Path]:
    """The directories that a test worked in: fixtures that are one, or that have one as their ``place``."""
    found = [getattr(value, "place", value) for value in fixtures.values()]
    return {place for place in found if isinstance(place, Path) and place.is_dir()}


def repositories(places: Iterable[Path]) -> Iterator[Path]:
    """The repositories in these directories, a few levels down."""
    for place in places:
        for folder, inside, files in os.walk(place):
            if "config" in files and "keys" in inside:
                yield Path(folder)
                inside.clear()
            elif len(Path(folder).relative_to(place).parts) >= _DEEPEST:
                inside.clear()


def judge(place: Path) -> None:
    """Fail if restic finds anything wrong in a repository; what nobody refers to (of the dead) is allowed.

    A state that was judged already is not judged again.
    """
    files = {path.name: path.stat().st_size for path in place.rglob("*") if path.is_file() and "-tmp-" not in path.name}
    state = str(place), frozenset(files)
    if state not in _judged:
        whole = ["--read-data"] if sum(files.values()) <= READ_WHOLE else []
        # A lock is no business of a judge: the test may go on to release its own.
        done = Restic(place).attempt("check", "--no-lock", *whole)
        said = (done.stdout + done.stderr).decode(errors="replace")
        assert done.returncode == 0 and "no errors were found" in said, f"restic on {place}:\n{said}"
        _judged.add(state)


def judge_all(fixtures: Mapping[str, object]) -> None:
    """Judge every repository that a test with these fixtures made, where there is a restic."""
    if shutil.which("restic"):
        for place in set(repositories(places_of(fixtures))):
            judge(place)
