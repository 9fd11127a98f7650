# SPDX-License-Identifier: Apache-2.0
"""Pull-mode incremental backup for QEMU virtual machines.

The public API is what stands in ``__all__``, and :mod:`pullback.errors`; docs/api.md describes it.  A name is loaded
when it is first used, so that ``import pullback`` costs nothing; ``__init__.pyi`` tells type checkers the same.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "engine.backup": ("BackupRequest", "BackupResult", "run_backup"),
    "engine.domain": ("Changes", "Checkpoint", "Domain", "DomainAddress", "open_domain"),
    "engine.exporting": ("Export",),
    "engine.freezing": ("Snapshot",),
    "engine.restore": ("Restore", "RestoreRequest", "RestoreResult"),
    "nbd.address": ("TcpAddress", "UnixAddress", "parse_uri"),
    "nbd.blocking": ("NbdConnection",),
    "repository.location": ("open_store",),
    "repository.repository": ("Repository",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BackupRequest",
    "BackupResult",
    "Changes",
    "Checkpoint",
    "Domain",
    "DomainAddress",
    "Export",
    "NbdConnection",
    "Repository",
    "Restore",
    "RestoreRequest",
    "RestoreResult",
    "Snapshot",
    "TcpAddress",
    "UnixAddress",
    "open_domain",
    "open_store",
    "parse_uri",
    "run_backup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
