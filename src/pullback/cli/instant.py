# SPDX-License-Identifier: Apache-2.0
"""``restore --instant``: images that a domain may use at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pullback.cli.config import Config, find_domain
from pullback.cli.interrupts import run_interruptible
from pullback.cli.reporter import Reporter
from pullback.errors import UsageError
from pullback.model.units import human_seconds

if TYPE_CHECKING:
    from pullback.engine.events import Event
    from pullback.repository.repository import Repository


def qmp_socket(domain: str | None, config: Config) -> str:
    """The QMP socket of the domain that is to run on the images; empty without one."""
    if domain is None:
        return ""
    if not (socket := find_domain(domain, config).qmp):
        raise UsageError(
            f"{domain} is a stopped domain", todo="Name a QMP socket, or leave --domain out while no domain runs."
        )
    return socket


def check_options(given: dict[str, bool], instant: bool, domain: str | None) -> None:
    """UsageError for options that do not go together with ``--instant``, or need it."""
    if not instant and domain is not None:
        raise UsageError("--domain belongs to --instant")
    if instant and (wrong := [name for name, is_given in given.items() if is_given]):
        raise UsageError(f"--instant cannot be had with {wrong[0]}", todo="Its images are qcow2, and all new.")


def restore_instantly(
    backup: str,
    to: Path,
    disks: tuple[str, ...],
    domain: str,
    lock_retry: float,
    opener: Callable[[], Repository],
    json: bool,
) -> None:
    """Make the images, say when a domain may use them, and fill them."""
    from pullback.engine.events import Overlays
    from pullback.engine.instant import Instant, InstantRequest

    reporter = Reporter(json)

    def tell(event: Event) -> None:
        if isinstance(event, Overlays):
            reporter.answer(event.to_json(), event.images)
        else:
            reporter.emit(event)

    work = Instant(InstantRequest(backup, to, disks, domain, lock_retry), opener, tell)
    with reporter.working():
        result = run_interruptible(work.run(), stop=work.stop)
    value = {"event": "streamed", "backup": result.backup, "images": list(result.images)}
    done = f"restored backup {result.backup[:8]} of {result.manifest.domain} in {human_seconds(result.seconds)}"
    reporter.answer({**value, "seconds": round(result.seconds, 3)}, [f"{done}; the images stand alone"])
