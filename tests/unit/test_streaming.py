# SPDX-License-Identifier: Apache-2.0
"""What the user is told when QEMU does not fill an image of an instant restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from pullback.engine.overlays import Overlay
from pullback.engine.streaming import _execute
from pullback.errors import CommandFailed, RestoreError
from pullback.plan.instant import start_stream


class Refusing:
    """A QEMU that refuses every command."""

    async def execute(self, command: str, arguments: Any) -> Any:
        raise CommandFailed(command, "GenericError", "Node 'disk' is busy: block device is in use by block job: commit")


async def test_a_qemu_that_refuses_to_fill_an_image_is_told_in_its_words(tmp_path: Path) -> None:
    one = Overlay(0, "vda", 1 << 20, tmp_path / "vda.qcow2", tmp_path / "ours.qcow2")
    with pytest.raises(RestoreError) as told:
        await _execute(cast(Any, Refusing()), one, start_stream(0, "disk"))
    assert told.value.exit_code == 9
    assert "cannot pull the rest of vda: Node 'disk' is busy: block device is in use by block job: commit." in str(
        told.value
    )
    assert "the rest it can read only while the backup is served" in str(told.value)
    assert "run the same command again" in str(told.value)
