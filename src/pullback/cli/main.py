# SPDX-License-Identifier: Apache-2.0
"""The command ``pullback``: its commands put together, and every end turned into an exit code."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import pullback
from pullback.cli.interrupts import EXIT_INTERRUPTED, Interrupted
from pullback.cli.reporter import Reporter, settle_standard_streams, silence
from pullback.errors import PullbackError, RestoreError, UsageError

#: What typer raises for a wrong command line.  It gives out only this one of its subclasses, and the package that
#: defines it differs between the versions we take.
_WrongCommandLine: type[Exception] = typer.BadParameter.__bases__[0]

#: Each command: its module, the function or the group there, and a class for what typer cannot parse by itself.  Only
#: the one that is asked for is imported and built; all of them take longer than many a command.
_COMMANDS: dict[str, tuple[str, str, str | None]] = {
    "init": ("backups", "init", None),
    "backup": ("backups", "backup", "BackupCommand"),
    "list": ("backups", "list_backups", None),
    "restore": ("restoring", "restore", None),
    "serve": ("serving", "serve", None),
    "files": ("files", "files", None),
    "boot": ("booting", "boot", None),
    "recover": ("domains", "recover", None),
    "show": ("verifying", "show", None),
    "verify": ("verifying", "verify", None),
    "forget": ("repositories", "forget", None),
    "prune": ("repositories", "prune", None),
    "check": ("repositories", "check", None),
    "copy": ("repositories", "copy", None),
    "unlock": ("repositories", "unlock", None),
    "domain": ("domains", "app", None),
    "checkpoint": ("checkpoints", "app", None),
    "snapshot": ("snapshots", "app", None),
    "export": ("exports", "app", None),
    "key": ("repositories", "app", None),
}


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pullback {pullback.__version__}", flush=True)
        raise typer.Exit


def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    """Take part in every command."""
    if context.invoked_subcommand is None:
        raise UsageError("no command was given", todo="See pullback --help.")


@functools.cache
def command_line(only: str | None = None) -> Any:
    """The command line as click runs it: with all commands, or with one of them."""
    app = typer.Typer(
        name="pullback",
        help="Pull-mode incremental backup for QEMU virtual machines, into restic repositories.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(root)
    for name in _COMMANDS if only is None else [only]:
        where, what, parser = _COMMANDS[name]
        module = importlib.import_module(f"pullback.cli.{where}")
        found = getattr(module, what)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name, cls=getattr(module, parser) if parser else None)(found)
    return typer.main.get_command(app)


def _run(arguments: Sequence[str]) -> None:
    """Carry out a command line.  typer's own way to do so prints errors and ends the process itself."""
    _refuse_empty_words(arguments)
    command = command_line(arguments[0] if arguments and arguments[0] in _COMMANDS else None)
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
    return UsageError(" ".join(error.format_message().split()).rstrip(".?"), todo=f"See {where} --help.")


def _interrupted(error: BaseException) -> str:
    """A restore says what it left; everything else takes back what it began."""
    cause = error.__cause__
    if isinstance(cause, RestoreError) and cause.todo:
        return f"interrupted. {cause.means} {cause.todo}"
    return "interrupted; what was begun was taken back."


def main() -> None:
    """Run the command line; ends the process with a documented exit code, never with a traceback."""
    # A large disk's changes are hundreds of thousands of values that hold no cycles: to look for some among them so
    # often took a fifth of their planning.
    gc.set_threshold(50_000, 20, 20)
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
