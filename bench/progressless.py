# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.progressless ARGUMENTS`: the command of these arguments, which tells nothing on its way.

What it costs less than the command itself is the price of progress reporting.
"""

from __future__ import annotations

import sys

from pullback.cli.main import main
from pullback.engine import backup

if __name__ == "__main__":
    backup._PROGRESS_EVERY = 1e6
    sys.argv[0] = "pullback"
    main()
