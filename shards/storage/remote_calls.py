"""Calls to a server that may fail: tried again with growing, uneven pauses, then an error a person can act on."""

from __future__ import annotations

import errno
import os
import random
import re
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from shards.errors import StoreError, UsageError

R = TypeVar("R")

ATTEMPTS = 8
FIRST_PAUSE = 0.25
"""Seconds before the second attempt; each later pause is twice as long, a random part of its second half left out."""

# Exceptions of the libraries behind fsspec that are no OSErrors. They are looked up in what has been imported, because
# a program that uses one server needs not have the libraries of the others.
_LIBRARY_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
)
_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "ProfileNotFound",
)
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_ABSENT = (404, 410)
"""Statuses with which a web server says that there is no such object."""
_SIGNED = re.compile(r"\?[^\s\"']*")


class RemoteError(StoreError):
    """A server does not answer as it should, after every attempt."""


class ShortAnswerError(OSError):
    """A server sent fewer or more bytes than it was asked for."""


def retried(call: Callable[[], R], what: str) -> R:
    """Return the result of a call, tried up to `ATTEMPTS` times.

    Args:
        call: May be made again after it has failed.
        what: For messages: what is done to which object, such as ``reading s3://bucket/store/zarr.json``.

    Raises:
        FileNotFoundError: If the object is not there.
        FileExistsError: If it was to be created and is there.
        UsageError: If the bucket is not there, or the server refuses these credentials.
        RemoteError: If the last attempt fails too.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except _transient() as raised:
            error = _behind(raised)
            _raise_if_final(error, what)
            if attempt == ATTEMPTS:
                reason = f"{type(error).__name__}: {without_secrets(str(error))}".removesuffix(": ")
                raise RemoteError(
                    f"{what} failed {ATTEMPTS} times, the last time with {reason}; the server is unreachable or "
                    "faulty: see whether it runs, then run the same command again"
                ) from error
        pause = FIRST_PAUSE * 2 ** (attempt - 1)
        # Uneven, so that many workers that failed together do not come back together.
        time.sleep(pause * random.uniform(0.5, 1.0))
    raise AssertionError("the last attempt returns or raises")


def without_secrets(text: str) -> str:
    """Return a message without what signs a request."""
    for name in _SECRETS:
        secret = os.environ.get(name, "")
        if len(secret) >= 4:
            text = text.replace(secret, "***")
    return " ".join(_SIGNED.sub("?***", text).split())


def _transient() -> tuple[type[Exception], ...]:
    """Return the errors that a call may raise although the next one succeeds."""
    loaded = (getattr(sys.modules[module], name) for module, name in _LIBRARY_ERRORS if module in sys.modules)
    return (OSError, *loaded)


def _behind(error: Exception) -> Exception:
    """Return what a server did; fsspec calls every object of a web server missing that it could not ask for."""
    cause = error.__cause__
    absent = not isinstance(cause, _transient()) or _code(cause) or _status(cause) in _ABSENT
    return (
        cause
        if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and not absent
        else error
    )


def _status(error: BaseException | None) -> object:
    """Return the status of a server's answer, if the error tells it: of aiohttp's errors, of gcsfs'."""
    return getattr(error, "status", None) or getattr(error, "code", None)


def _raise_if_final(error: Exception, what: str) -> None:
    """Raise what no further attempt would change."""
    code, status = _code(error), _status(error)
    if code == "NoSuchBucket":
        raise UsageError(
            f"{what} is impossible: the bucket does not exist; create it or correct the URL"
        ) from error
    if code == "PreconditionFailed" or isinstance(error, FileExistsError):
        raise FileExistsError(errno.EEXIST, what) from error
    if isinstance(error, FileNotFoundError):
        raise FileNotFoundError(errno.ENOENT, what) from error
    if isinstance(error, PermissionError) or status in (401, 403):
        raise UsageError(
            f"{what} is refused: {without_secrets(str(error))}; correct the credentials in the environment"
        ) from error
    if type(error).__name__ in _NO_CREDENTIALS:
        raise UsageError(
            f"{what} needs credentials, and there are none ({without_secrets(str(error))}); "
            "set them in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error


def _code(error: BaseException | None) -> str:
    """Return the S3 code of an error; "" if it has none."""
    for found in (error, getattr(error, "__cause__", None)):
        response = getattr(found, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""
