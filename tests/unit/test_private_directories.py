# SPDX-License-Identifier: Apache-2.0
"""Directories of a scratch and of a boot: where one cannot be had, it is said, and nothing stays behind."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from pullback.engine.throwaway import throwaway_directory
from pullback.engine.workdir import work_directory
from pullback.errors import UsageError
from pullback.qemu.monitor import Peer


def scratch(base: str) -> AbstractContextManager[Any]:
    return work_directory(base, Peer(os.getpid(), os.geteuid(), os.getegid()))


@pytest.mark.parametrize(("kind", "option"), [(scratch, "--scratch"), (throwaway_directory, "--work")])
def test_a_file_system_without_locks_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    handles: Callable[[], dict[int, str]],
    kind: Any,
    option: str,
) -> None:
    def without_locks(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", without_locks)
        before = handles().items()
        with pytest.raises(UsageError, match=f"cannot make a directory in .*: No locks available.*{option}"):
            kind(str(tmp_path)).__enter__()
        assert handles().items() <= before
    assert list(tmp_path.iterdir()) == []
    with kind(str(tmp_path)):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
