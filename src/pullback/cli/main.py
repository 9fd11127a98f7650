# SPDX-License-Identifier: Apache-2.0
"""The command ``pullback``: its commands put together, and every end turned into an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import pullback
from pullback.cli import backups
from pullback.cli.interrupts import EXIT_INTERRUPTED, Interrupted
from pullback.cli.reporter import Reporter
from pullback.errors import PullbackError

app = typer.Typer(
    name="pullback",
    help="Pull-mode incremental backup for QEMU virtual machines, into restic repositories.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("init")(backups.init)
app.command("backup")(backups.backup)
app.command("list")(backups.list_backups)
app.command("restore")(backups.restore)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pullback {pullback.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    """Take part in every command."""


def main() -> None:
    """Run the command line; ends the process with a documented exit code, never with a traceback."""
    json_wanted = "--json" in sys.argv
    try:
        app()
    except PullbackError as error:
        Reporter(json_wanted).error(error)
        sys.exit(error.exit_code)
    except (Interrupted, KeyboardInterrupt):
        print("pullback: interrupted; what was begun was taken back", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has enough; Python would complain once more at the final flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("PULLBACK_TRACEBACK"):
            raise
        print(
            f"pullback: a defect of pullback: {type(error).__name__}: {error}. No backup or image was completed."
            " Run it again with PULLBACK_TRACEBACK=1 to see where, and report it.",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
