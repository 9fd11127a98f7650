# SPDX-License-Identifier: Apache-2.0
"""The command ``pullback``: its commands put together, and every end turned into an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import pullback
from pullback.cli import (
    backups,
    booting,
    checkpoints,
    domains,
    exports,
    files,
    repositories,
    restoring,
    serving,
    snapshots,
    verifying,
)
from pullback.cli.interrupts import EXIT_INTERRUPTED, Interrupted
from pullback.cli.reporter import Reporter, settle_standard_streams, silence
from pullback.errors import PullbackError, RestoreError, UsageError

#: What typer raises for a wrong command line.  It gives out only this one of its subclasses, and the package that
#: defines it differs between the versions we take.
_WrongCommandLine: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="pullback",
    help="Pull-mode incremental backup for QEMU virtual machines, into restic repositories.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("init")(backups.init)
app.command("backup", cls=backups.BackupCommand)(backups.backup)
app.command("list")(backups.list_backups)
app.command("restore")(restoring.restore)
app.command("serve")(serving.serve)
app.command("files")(files.files)
app.command("boot")(booting.boot)
app.command("recover")(domains.recover)
app.command("show")(verifying.show)
app.command("verify")(verifying.verify)
app.command("forget")(repositories.forget)
app.command("prune")(repositories.prune)
app.command("check")(repositories.check)
app.command("copy")(repositories.copy)
app.command("unlock")(repositories.unlock)
for _name, _group in (
    ("domain", domains.app),
    ("checkpoint", checkpoints.app),
    ("snapshot", snapshots.app),
    ("export", exports.app),
    ("key", repositories.app),
):
    app.add_typer(_group, name=_name)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pullback {pullback.__version__}", flush=True)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    """Take part in every command."""
    if context.invoked_subcommand is None:
        raise UsageError("no command was given", todo="See pullback --help.")


def _run(arguments: Sequence[str]) -> None:
    """Carry out a command line.  typer's own way to do so prints errors and ends the process itself."""
    _refuse_empty_words(arguments)
    command = typer.main.get_command(app)
    try:
        with command.make_context("pullback", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit:
        return
    except _WrongCommandLine as error:
        raise _usage_error(error) from error


def _refuse_empty_words(arguments: Sequence[str]) -> None:
    """No option or argument of any command means something when it is empty: a script's variable was not set."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        if word == "--":  # what follows is another program's
            return
        name, equals, value = word.partition("=")
        if not word.strip() or (word.startswith("--") and equals and not value.strip()):
            option = name if equals else before if before.startswith("-") else ""
            raise UsageError(
                f"{option} is followed by an empty text" if option else "an argument is an empty text",
                todo="Leave it out, or say what is meant.",
            )


def _usage_error(error: Any) -> UsageError:
    where = error.ctx.command_path if error.ctx is not None else "pullback"
    return UsageError(" ".join(error.format_message().split()).rstrip("."), todo=f"See {where} --help.")


def _interrupted(error: BaseException) -> str:
    """A restore says what it left; everything else takes back what it began."""
    cause = error.__cause__
    if isinstance(cause, RestoreError) and cause.todo:
        return f"interrupted. {cause.means} {cause.todo}"
    return "interrupted; what was begun was taken back."


def main() -> None:
    """Run the command line; ends the process with a documented exit code, never with a traceback."""
    settle_standard_streams()
    reporter = Reporter("--json" in sys.argv)
    try:
        _run(sys.argv[1:])
    except PullbackError as error:
        reporter.error(str(error), error.exit_code)
        sys.exit(error.exit_code)
    except (Interrupted, KeyboardInterrupt, EOFError) as error:
        reporter.error(_interrupted(error), EXIT_INTERRUPTED)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the help has enough of it.  What a command prints goes through the Reporter, which knows.
        silence(sys.stdout)
        sys.exit(0)
    except Exception as error:
        if os.environ.get("PULLBACK_TRACEBACK"):
            raise
        reporter.error(
            f"a defect of pullback: {type(error).__name__}: {error}. Every backup that pullback list shows is whole."
            " Run it again with PULLBACK_TRACEBACK=1 to see where, and report it.",
            1,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
