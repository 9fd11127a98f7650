# SPDX-License-Identifier: Apache-2.0
"""``python -m demo``: exits with 0, with 1 and a line that says what is wrong, or with 130 when interrupted."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from demo import interrupts
from demo.interrupts import Interrupted
from demo.narration import DemoFailed, Narrator
from demo.story import Story
from lab.processes import LabError


def _run(narrator: Narrator) -> None:
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pb-demo-")))
        try:
            Story(place, narrator, stack).tell()
        finally:
            interrupts.ignore()  # cleaning up is short, and must not be left half done


def main() -> int:
    """Run the demo; its exit code."""
    interrupts.watch()
    narrator = Narrator()
    try:
        _run(narrator)
    except Interrupted:
        print(f"demo: interrupted in {narrator.title}; nothing is left behind", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough; Python would complain once more at the final flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (DemoFailed, LabError, OSError) as error:
        print(f"demo: FAILED in {narrator.title}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
