# SPDX-License-Identifier: Apache-2.0
"""What every command on a domain does around its own work: find it, open it, dry or traced, interruptible."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from pullback.cli import options as opt
from pullback.cli.config import find_domain
from pullback.cli.interrupts import run_interruptible
from pullback.cli.reporter import Reporter

if TYPE_CHECKING:
    from pullback.cli.config import DomainOptions
    from pullback.engine.domain import Domain

T = TypeVar("T")


class OnDomain:
    """The domain that a command line names, and how the command is to talk and work."""

    def __init__(
        self,
        domain: str,
        config: str | None,
        *,
        json: bool,
        trace: bool = False,
        dry_run: bool = False,
        agent: str | None = None,
        name: str | None = None,
    ) -> None:
        self.options: DomainOptions = find_domain(domain, opt.load_config(config))
        self.reporter = Reporter(json)
        self.dry_run = dry_run
        self._trace = trace
        self._agent = agent
        self._name = name

    def run(self, work: Callable[[Domain], Awaitable[T]]) -> T:
        """Do ``work`` in a session with the domain."""

        async def session() -> T:
            from pullback.engine.domain import open_domain

            address = opt.domain_address(self.options, self._name, self._agent)
            tell = self.reporter.plan if self.dry_run else None
            trace = self.reporter.trace if self._trace else None
            async with open_domain(address, tell=tell, trace=trace) as domain:
                return await work(domain)

        return run_interruptible(session())
