# SPDX-License-Identifier: Apache-2.0
"""What went wrong with an object store, in a sentence: from S3's error code, or from why no answer came.

obstore tells both only in the text of its exceptions: the first line says what a person may read, with the answer's
body in it, and what follows holds the causes.
"""

from __future__ import annotations

import re

from pullback.errors import PullbackError, RepositoryError, RepositoryMissing

_UNTOUCHED = "Backups stored earlier are untouched."
_BUSY = "Run it again later; see whether the store is well."
_KEYS = "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in the shared credentials file."
_REGION = "Set AWS_DEFAULT_REGION to its region; for AWS, write s3:s3.REGION.amazonaws.com/BUCKET."
_TOKEN = "Get new credentials, set AWS_SESSION_TOKEN and both keys, and run it again."

# S3's error codes (API reference, "Error responses"): the reason, and what to do about it.
_CODES = {
    "InvalidAccessKeyId": ("the store does not know this access key", _KEYS),
    "SignatureDoesNotMatch": ("the secret key does not fit the access key", _KEYS),
    "ExpiredToken": ("the session token has expired", _TOKEN),
    "TokenRefreshRequired": ("the session token has expired", _TOKEN),
    "InvalidToken": ("the session token is not valid", _TOKEN),
    "RequestTimeTooSkewed": ("this machine's clock and the store's differ too much", "Set the clock right."),
    "AccessDenied": (
        "permission is denied",
        "Check the keys, and that their account may list the bucket and read, write and delete its objects.",
    ),
    "PermanentRedirect": ("the bucket is in another region", _REGION),
    "AuthorizationHeaderMalformed": ("the bucket is in another region", _REGION),
    "IllegalLocationConstraintException": ("the bucket is in another region", _REGION),
    "QuotaExceeded": ("the store's quota is used up", "Raise the quota, or forget and prune old backups."),
    "SlowDown": ("the store is overloaded and kept asking to slow down", _BUSY),
    "ServiceUnavailable": ("the store is out of service, and stayed so", _BUSY),
    "InternalError": ("the store failed inside, time and again", _BUSY),
}
# What the causes hold when no answer came.
_CAUSES = (
    ("dns error", "its host name cannot be resolved", "Check the host in the location, and the name service."),
    (
        "UnknownIssuer",
        "no authority that is trusted here signed its certificate",
        "Name a file with the authority's certificate in RESTIC_CACERT.",
    ),
    ("InvalidContentType", "what answers there does not speak TLS", "Check host and port, or write s3:http://…"),
    ("invalid peer certificate", "its certificate is not valid", "Check the host in the location and the certificate."),
    ("ConnectionRefused", "nothing listens there", "Check host and port in the location, and that the store runs."),
    ("kind: Timeout", "it did not answer in time", _BUSY),
    ("TimedOut", "it did not answer in time", "Check the host in the location, and the network."),
    ("kind: Connect", "it cannot be reached", "Check the host in the location, and the network."),
    ("kind: Request", "the connection broke, time and again", _BUSY),
    ("kind: Interrupted", "the connection broke, time and again", _BUSY),
    ("BareRedirect", "the bucket is in another region", _REGION),
)
_NO_CREDENTIALS = ("169.254.169.254", "MissingSecretAccessKey", "MissingAccessKeyId", "Missing SecretAccessKey")


def error_code(error: Exception) -> str:
    """S3's error code, or an empty text if there is none: no answer came, or one without a body."""
    found = re.search(r"<Code>(\w+)</Code>", str(error))
    return found[1] if found else ""


def was_answered(error: Exception) -> bool:
    """Whether the store answered, and this was the answer."""
    return isinstance(error, FileNotFoundError) or "status code" in str(error)


def explain(error: Exception, verb: str, location: str) -> PullbackError:
    """The error to raise for one of obstore's; `verb` is what could not be done (`write to`)."""
    text, code = str(error), error_code(error)
    if code == "NoSuchBucket":
        return RepositoryMissing(
            f"There is no bucket of this name: {location}",
            means="Nothing was read or written.",
            todo="Check the location; a bucket is made by whoever manages the store.",
        )
    if any(sign in text for sign in _NO_CREDENTIALS):
        return _no_credentials(location)
    reason, todo = _reason(text, code)
    return RepositoryError(f"Cannot {verb} the repository {location}: {reason}", means=_UNTOUCHED, todo=todo)


def _reason(text: str, code: str) -> tuple[str, str | None]:
    if code in _CODES:
        return _CODES[code]
    status = re.search(r"status code: (\d{3} ?[A-Za-z ]*)", text)
    if status is not None:
        if status[1].startswith(("401", "403")):
            return _CODES["AccessDenied"]
        return f"the store answered {status[1].strip()}{f' ({code})' if code else ''}", _BUSY
    for sign, reason, todo in _CAUSES:
        if sign in text:
            return reason, todo
    return (text.strip().splitlines() or [""])[0] or "for an unknown reason", None


def _no_credentials(location: str) -> RepositoryError:
    """There is nothing to sign a request with."""
    return RepositoryError(
        f"There are no credentials for the repository {location}",
        means=_UNTOUCHED,
        todo="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE with a shared credentials file.",
    )
