# SPDX-License-Identifier: Apache-2.0
"""A repository in S3 or its kin, through obstore.

Object stores show an object whole or not at all, and durable once the request is answered.  obstore tries a request
again, with growing pauses, when the store cannot be reached, breaks off or answers 5xx: for minutes once it has
answered at all, but only for seconds before, when it is rather the location that is wrong.  A request that was carried
out without our knowing is harmless to repeat: the same bytes get the same name.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from pullback.errors import Damaged, UsageError
from pullback.repository.interruption import answer_to
from pullback.repository.object_failures import error_code, explain, was_answered
from pullback.repository.store import ID_NAME, Bytes, FileKind, buffers, describe, relative_path

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig
    from obstore.store import ObjectStore as AnyStore

T = TypeVar("T")

# Its pause is a random time between the first and BASE times the last one: with its default base of 2 they do not
# grow, and ten tries are over after two seconds.
_BASE = 3
_FIRST_PAUSE = timedelta(milliseconds=200)
_LONGEST_PAUSE = timedelta(seconds=10)
_PATIENCE = timedelta(minutes=3)
_TRIES = 200
_TRIES_AT_FIRST = 3
_CONNECT_TIMEOUT = timedelta(seconds=5)
_REQUEST_TIMEOUT = timedelta(minutes=2)
_DEFAULT_REGION = "us-east-1"
_AWS_HOST = re.compile(r"s3[.-](?P<region>[a-z]+(?:-[a-z]+)+-\d+)\.amazonaws\.com(?:\.cn)?")


class ObjectStore:
    """A Store in an obstore store (S3; in tests also its memory and directory stores).

    `at_first` is the same one with less patience, for use until it has answered.
    """

    shows_late = True

    def __init__(self, store: AnyStore, location: str, at_first: AnyStore | None = None) -> None:
        self._patient = store
        self._at_first = at_first
        self.location = location

    @property
    def _store(self) -> AnyStore:
        return self._at_first or self._patient

    def _answer(self, request: Callable[[AnyStore], T]) -> T:
        """What the store answers; it is not waited for when the process is asked to end."""
        store = self._store
        return answer_to(lambda: request(store), self.location, BaseError, OSError)

    def _size(self, path: str) -> int:
        return self._answer(lambda store: int(obstore.head(store, path)["size"]))

    def create(self) -> None:
        """Nothing: there are no directories to make, and buckets are the administrator's."""

    def save(self, kind: FileKind, name: str, data: Bytes | Sequence[Bytes]) -> None:
        """Store an object in one request; on an error it may be there, whole, or not."""
        pieces = buffers(data)
        whole = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
        with self._told("write to"):
            path = relative_path(kind, name)
            self._answer(lambda store: obstore.put(store, path, whole, use_multipart=False))

    def load(self, kind: FileKind, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Read a part of an object; raises Damaged if it is missing or ends early."""
        path = relative_path(kind, name)
        with self._told("read from"):
            try:
                if offset == 0 and length is None:
                    return self._answer(lambda store: obstore.get(store, path).bytes().to_bytes())
                size = None if length is not None else self._size(path)
                wanted = length if size is None else size - offset
                assert wanted is not None
                if wanted == 0:
                    return b""
                content = self._range(path, offset, wanted)
            except FileNotFoundError as error:
                if error_code(error) == "NoSuchBucket":
                    raise
                raise Damaged(f"The repository's file {describe(kind, name)} is missing") from None
        if len(content) != wanted:
            raise Damaged(
                f"The repository's file {describe(kind, name)} is too short:"
                f" {len(content)} of {wanted} bytes at {offset}"
            )
        return content

    def _range(self, path: str, offset: int, length: int) -> bytes:
        try:
            return self._answer(lambda store: obstore.get_range(store, path, start=offset, length=length).to_bytes())
        except FileNotFoundError:
            raise
        except BaseError:
            # A range beyond the end is an error of its own in every kind of store; only the size tells it apart.
            if offset + length > self._size(path):
                return b""
            raise

    def list(self, kind: FileKind) -> Iterator[tuple[str, int]]:
        """Names and sizes; skips what is not a repository file."""
        if kind is FileKind.CONFIG:
            found = [("config", 0)] if self.exists(kind, "config") else []
        else:
            with self._told("list"):
                objects = self._answer(lambda store: _listing(store, f"{kind.value}/"))
            found = [(name, size) for name, size in objects if ID_NAME.fullmatch(name)]
        yield from found

    def exists(self, kind: FileKind, name: str) -> bool:
        """Whether the object is there."""
        with self._told("look into"):
            try:
                self._size(relative_path(kind, name))
            except (BaseError, FileNotFoundError) as error:
                if not was_answered(error):
                    raise
                # An answer to HEAD has no body, so it cannot say why: no such object, no such bucket, a wrong key?
                return self._readable(relative_path(kind, name))
            return True

    def _readable(self, path: str) -> bool:
        try:
            self._answer(lambda store: obstore.get(store, path))
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise
            return False
        return True

    def remove(self, kind: FileKind, name: str) -> None:
        """Delete an object; one that is gone is no error."""
        with self._told("remove from"):
            try:
                path = relative_path(kind, name)
                self._answer(lambda store: obstore.delete(store, path))
            except FileNotFoundError:
                pass

    @contextmanager
    def _told(self, verb: str) -> Iterator[None]:
        """Turn obstore's errors into sentences."""
        try:
            yield
        except (BaseError, OSError) as error:
            raise explain(error, verb, self.location) from error
        self._at_first = None


def _listing(store: AnyStore, prefix: str) -> list[tuple[str, int]]:
    return [
        (str(one["path"]).rpartition("/")[2], int(one["size"])) for page in obstore.list(store, prefix) for one in page
    ]


def open_s3(location: str, rest: str) -> ObjectStore:
    """The store for `s3:REST`; nothing is contacted.

    Credentials are those of the AWS variables, else of the shared credentials file, else from where obstore looks
    (web identity, container, instance).  Raises UsageError for half a location, or a file that cannot be used.
    """
    address = rest if rest.startswith(("http://", "https://")) else "https://" + rest.removeprefix("//")
    parts = urlsplit(address)
    bucket, _, prefix = parts.path.strip("/").partition("/")
    if not parts.hostname or not bucket:
        raise UsageError(f"{location!r} does not name a bucket", todo="Write s3:https://HOST[:PORT]/BUCKET/PREFIX.")
    region = _region(parts.hostname)
    host = parts.netloc
    if host == "s3.amazonaws.com" and region != _DEFAULT_REGION:
        host = f"s3.{region}.amazonaws.com"  # the general name knows the buckets of one region only
    options = _account() | {
        "endpoint": f"{parts.scheme}://{host}",
        "region": region,
        "virtual_hosted_style_request": False,
    }
    if os.environ.get("AWS_ENDPOINT_URL_S3"):
        # obstore would prefer it to the location, and write to another place than it was told.
        options["aws_endpoint_url_s3"] = options["endpoint"]

    def store(tries: int, patience: timedelta) -> S3Store:
        retry: RetryConfig = {
            "max_retries": tries,
            "retry_timeout": patience,
            "backoff": {"init_backoff": _FIRST_PAUSE, "max_backoff": _LONGEST_PAUSE, "base": _BASE},
        }
        client = _client(parts.scheme == "http")
        return S3Store(bucket, prefix=prefix or None, client_options=client, retry_config=retry, **options)

    try:
        return ObjectStore(store(_TRIES, _PATIENCE), location, store(_TRIES_AT_FIRST, _PATIENCE))
    except BaseError as error:
        raise explain(error, "open", location) from error


def _region(host: str) -> str:
    told = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION")
    named = _AWS_HOST.fullmatch(host)
    return told or (named["region"] if named else _DEFAULT_REGION)


def _client(http: bool) -> ClientConfig:
    client: ClientConfig = {"allow_http": http, "timeout": _REQUEST_TIMEOUT, "connect_timeout": _CONNECT_TIMEOUT}
    if authority := os.environ.get("RESTIC_CACERT"):
        try:
            client["root_certificate"] = Path(authority).read_bytes()
        except OSError as error:
            raise UsageError(
                f"The file {authority} that RESTIC_CACERT names cannot be read: {error.strerror}"
            ) from error
    return client


def _account() -> dict[str, Any]:
    """Keys of the shared credentials file, where there are none in the environment: obstore does not look there."""
    profile = os.environ.get("AWS_PROFILE")
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    named = os.environ.get("AWS_SHARED_CREDENTIALS_FILE")
    path = Path(named) if named else Path.home() / ".aws" / "credentials"
    found = configparser.ConfigParser(interpolation=None)
    try:
        found.read_string(path.read_text())
        section = found[profile or "default"]
        keys = {"access_key_id": section["aws_access_key_id"], "secret_access_key": section["aws_secret_access_key"]}
    except (OSError, KeyError, configparser.Error, UnicodeDecodeError) as error:
        if profile or named:
            raise UsageError(
                f"The profile {profile or 'default'!r} of {path} has no usable keys: {type(error).__name__}",
                todo="Check AWS_PROFILE and AWS_SHARED_CREDENTIALS_FILE, or set AWS_ACCESS_KEY_ID.",
            ) from error
        return {}
    token = section.get("aws_session_token")
    return keys | ({"session_token": token} if token else {})
