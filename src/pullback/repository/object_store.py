# SPDX-License-Identifier: Apache-2.0
"""A repository in S3 or its kin, through obstore.

Object stores show an object whole or not at all, and durable once the request is answered; each request is retried
by obstore (10 times within 3 minutes by default).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from pullback.errors import Damaged, RepositoryError, UsageError
from pullback.repository.store import ID_NAME, Bytes, FileKind, buffers, describe, relative_path

if TYPE_CHECKING:
    from obstore.store import ObjectStore as AnyStore

_TRIES = 8
_PATIENCE = timedelta(minutes=3)
_REQUEST_TIMEOUT = "120s"
_DEFAULT_REGION = "us-east-1"


class ObjectStore:
    """A Store in an obstore store (S3; in tests also its memory and directory stores)."""

    def __init__(self, store: AnyStore, location: str) -> None:
        self._store = store
        self.location = location

    def create(self) -> None:
        """Nothing: there are no directories to make, and buckets are the administrator's."""

    def save(self, kind: FileKind, name: str, data: Bytes | Sequence[Bytes]) -> None:
        """Store an object in one request; on an error it may be there, whole, or not."""
        pieces = buffers(data)
        whole = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
        with self._told("write to"):
            obstore.put(self._store, relative_path(kind, name), whole, use_multipart=False)

    def load(self, kind: FileKind, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Read a part of an object; raises Damaged if it is missing or ends early."""
        path = relative_path(kind, name)
        with self._told("read from"):
            try:
                if offset == 0 and length is None:
                    return obstore.get(self._store, path).bytes().to_bytes()
                size = None if length is not None else int(obstore.head(self._store, path)["size"])
                wanted = length if size is None else size - offset
                assert wanted is not None
                if wanted == 0:
                    return b""
                content = self._range(path, offset, wanted)
            except FileNotFoundError:
                raise Damaged(f"The repository's file {describe(kind, name)} is missing") from None
        if len(content) != wanted:
            raise Damaged(
                f"The repository's file {describe(kind, name)} is too short:"
                f" {len(content)} of {wanted} bytes at {offset}"
            )
        return content

    def _range(self, path: str, offset: int, length: int) -> bytes:
        try:
            return obstore.get_range(self._store, path, start=offset, length=length).to_bytes()
        except FileNotFoundError:
            raise
        except BaseError:
            # A range beyond the end is an error of its own in every kind of store; only the size tells it apart.
            size = int(obstore.head(self._store, path)["size"])
            if offset + length > size:
                return b""
            raise

    def list(self, kind: FileKind) -> Iterator[tuple[str, int]]:
        """Names and sizes; skips what is not a repository file."""
        if kind is FileKind.CONFIG:
            found = [("config", 0)] if self.exists(kind, "config") else []
        else:
            with self._told("list"):
                pages = obstore.list(self._store, f"{kind.value}/")
                objects = [(str(one["path"]).rpartition("/")[2], int(one["size"])) for page in pages for one in page]
            found = [(name, size) for name, size in objects if ID_NAME.fullmatch(name)]
        yield from found

    def exists(self, kind: FileKind, name: str) -> bool:
        """Whether the object is there."""
        with self._told("look into"):
            try:
                obstore.head(self._store, relative_path(kind, name))
            except FileNotFoundError:
                return False
            return True

    def remove(self, kind: FileKind, name: str) -> None:
        """Delete an object; one that is gone is no error."""
        with self._told("remove from"):
            try:
                obstore.delete(self._store, relative_path(kind, name))
            except FileNotFoundError:
                pass

    @contextmanager
    def _told(self, verb: str) -> Iterator[None]:
        """Turn obstore's errors into sentences."""
        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise RepositoryError(
                f"Cannot {verb} the repository {self.location}: permission is denied",
                todo="Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what that account may do.",
            ) from error
        except (BaseError, OSError) as error:
            raise RepositoryError(
                f"Cannot {verb} the repository {self.location}: {_first_line(error)}",
                means="Backups stored earlier are untouched.",
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def open_s3(location: str, rest: str) -> ObjectStore:
    """The store for `s3:REST`; credentials come from the AWS variables or, failing those, from where obstore looks."""
    address = rest if rest.startswith(("http://", "https://")) else "https://" + rest.removeprefix("//")
    parts = urlsplit(address)
    bucket, _, prefix = parts.path.strip("/").partition("/")
    if not parts.hostname or not bucket:
        raise UsageError(f"{location!r} does not name a bucket", todo="Write s3:https://HOST[:PORT]/BUCKET/PREFIX.")
    store = S3Store(
        bucket,
        prefix=prefix or None,
        endpoint=f"{parts.scheme}://{parts.netloc}",
        region=os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or _DEFAULT_REGION,
        virtual_hosted_style_request=False,
        client_options={"allow_http": parts.scheme == "http", "timeout": _REQUEST_TIMEOUT},
        retry_config={"max_retries": _TRIES, "retry_timeout": _PATIENCE},
    )
    return ObjectStore(store, location)
