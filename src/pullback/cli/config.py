# SPDX-License-Identifier: Apache-2.0
"""The TOML configuration file: names for domains, and a repository.

[repository]
location = "/srv/backup"            as --repo
password-file = "/etc/pullback/pw"  as --password-file; or password-command

[domain.web]
qmp = "/run/qemu/web.qmp"           the QMP socket; or images = "vda=/srv/web.qcow2", as disk:…
name = "web-server"                 in the repository; default: the table's name
disks = ["vda", "vdb"]              default: all
scratch = "/var/tmp"                as --scratch
agent = "/run/qemu/web.agent"       the guest agent's socket, as --agent
limit-rate = "50M"                  as --limit-rate
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pullback.cli.passwords import RepositoryOptions
from pullback.errors import UsageError


@dataclass(frozen=True, slots=True)
class DomainOptions:
    """How to reach a domain and what its backups are called; empty where nothing is said."""

    qmp: str = ""
    images: str = ""
    name: str = ""
    disks: tuple[str, ...] = ()
    scratch: str | None = None
    agent: str = ""
    limit_rate: str = ""


@dataclass(frozen=True, slots=True)
class Config:
    """What the configuration file says."""

    path: str = ""
    repository: RepositoryOptions = field(default_factory=RepositoryOptions)
    domains: dict[str, DomainOptions] = field(default_factory=dict)


def _places() -> list[Path]:
    home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return [Path(home) / "pullback" / "config.toml", Path("/etc/pullback/config.toml")]


def load_config(path: str | None) -> Config:
    """The configuration in ``path``, PULLBACK_CONFIG or the usual places; empty when there is none.

    UsageError for a file that is named and cannot be read, and for whatever is wrong in it.
    """
    # A usual place may be another user's home, which we may not even look into.
    named = path or os.environ.get("PULLBACK_CONFIG")
    candidates = [Path(named)] if named else [place for place in _places() if os.access(place, os.F_OK)]
    if not candidates:
        return Config()
    import tomllib

    try:
        with candidates[0].open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"cannot read the configuration {candidates[0]}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration {candidates[0]} is not TOML: {error}") from error
    return _Tables(str(candidates[0])).config(document)


class _Tables:
    """Checks a decoded document; every error names file and key."""

    def __init__(self, path: str) -> None:
        self._path = path

    def config(self, document: dict[str, Any]) -> Config:
        self._only(document, ("repository", "domain"), "")
        repository = self._table(document.get("repository", {}), "repository")
        self._only(repository, ("location", "password-file", "password-command"), "repository.")
        domains = self._table(document.get("domain", {}), "domain")
        return Config(
            self._path,
            RepositoryOptions(
                self._text(repository, "repository.", "location"),
                self._text(repository, "repository.", "password-file"),
                self._text(repository, "repository.", "password-command"),
            ),
            {name: self._domain(name, self._table(table, f"domain.{name}")) for name, table in domains.items()},
        )

    def _domain(self, name: str, table: dict[str, Any]) -> DomainOptions:
        where = f"domain.{name}."
        self._only(table, ("qmp", "images", "name", "disks", "scratch", "agent", "limit-rate"), where)
        qmp, images = self._text(table, where, "qmp") or "", self._text(table, where, "images") or ""
        if bool(qmp) == bool(images):
            raise self._wrong(f"{where}qmp is missing" if not qmp else f"{where}qmp and images cannot both be given")
        disks = table.get("disks", [])
        if not isinstance(disks, list) or not all(isinstance(disk, str) for disk in disks):
            raise self._wrong(f"{where}disks is not a list of names")
        return DomainOptions(
            qmp,
            images,
            self._text(table, where, "name") or name,
            tuple(disks),
            self._text(table, where, "scratch"),
            self._text(table, where, "agent") or "",
            self._text(table, where, "limit-rate") or "",
        )

    def _wrong(self, what: str) -> UsageError:
        return UsageError(f"in the configuration {self._path}, {what}")

    def _only(self, table: dict[str, Any], known: tuple[str, ...], where: str) -> None:
        for key in table:
            if key not in known:
                raise self._wrong(f"{where}{key} is not known (there are {', '.join(known)})")

    def _table(self, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(f"{where} is not a table")
        return value

    def _text(self, table: dict[str, Any], where: str, key: str) -> str | None:
        value = table.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(f"{where}{key} is not a text")
        return value


def find_domain(spec: str, config: Config) -> DomainOptions:
    """The domain that ``DOMAIN`` on the command line means: qmp:PATH, disk:IMAGES, or a name from the configuration."""
    kind, colon, path = spec.partition(":")
    if colon and kind in ("qmp", "disk"):
        if not path:
            raise UsageError(f"{kind}: is followed by no path", todo=f"Write {kind}:/path.")
        return DomainOptions(qmp=path) if kind == "qmp" else DomainOptions(images=path)
    if spec in config.domains:
        return config.domains[spec]
    there = (
        f"It names {', '.join(config.domains)}." if config.domains else "There is no configuration file that names any."
    )
    raise UsageError(f"{spec!r} is neither qmp:PATH, nor disk:PATH, nor a domain of the configuration", todo=there)
