# SPDX-License-Identifier: Apache-2.0
"""Where a repository is, in restic's notation, and the store that reaches it."""

from __future__ import annotations

import re
from pathlib import Path

from pullback.errors import RepositoryUnsupported, UsageError
from pullback.repository.local_store import LocalStore
from pullback.repository.store import Store

_SCHEME = re.compile(r"([a-z][a-z0-9+]*):")


def open_store(location: str) -> Store:
    """The store at `location`, in restic's notation.

    A path, `local:PATH`, or `s3:http://HOST:PORT/BUCKET/PREFIX` (https:// too, and plain `s3:HOST/BUCKET/PREFIX`,
    which is https).  Raises UsageError for an empty or malformed one, RepositoryUnsupported for another scheme.
    Nothing is contacted or created.
    """
    if not location:
        raise UsageError("No repository was named", todo="Name one with --repo or RESTIC_REPOSITORY.")
    scheme = _SCHEME.match(location)
    if scheme is None:
        return _local(location)
    rest = location[scheme.end() :]
    if scheme[1] == "local":
        return _local(rest)
    if scheme[1] == "s3":
        # Its library takes 40 ms to load: a local repository does not pay for that.
        from pullback.repository.object_store import open_s3

        return open_s3(location, rest)
    raise RepositoryUnsupported(
        f"Repositories of the kind {scheme[1]!r} are not supported",
        todo="Use a directory (PATH or local:PATH) or S3 (s3:https://HOST/BUCKET/PREFIX); "
        f"a directory whose name starts with '{scheme[0]}' is written local:{location}.",
    )


def is_local(location: str) -> bool:
    """Whether `location` is a directory here, in restic's notation."""
    scheme = _SCHEME.match(location)
    return scheme is None or scheme[1] == "local"


def _local(path: str) -> Store:
    if not path:
        raise UsageError("The repository's path is empty")
    return LocalStore(Path(path))
