"""Objects on a store (s3://, gs://), read and written through pyarrow: whole answers or an error that names the object.

Credentials come from the standard chain of the store's own SDK (environment, profile, instance) and are in no message:
of an SDK's error only its code is repeated.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from storage.errors import InputError, WorkError

T = TypeVar("T")
log = logging.getLogger("handstill")

SCHEMES = ("s3", "gs")
ATTEMPTS = 8
"""Of each request. With the waits between them an outage of about a minute is sat out."""
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 30.0
"""A request whose server sends nothing for so long has failed."""
WRITE_SIZE_BYTES = 8 << 20
"""Files are read in pieces of this size when they are put onto a store."""

_URL = re.compile(r"(s3|gs)://([a-z0-9][a-z0-9._-]+)/([^?#\\]*[^?#\\/])/?")
_CODE = re.compile(r"AWS Error ([A-Z0-9_]+)|Status\(([A-Z_]+)")
_HTTP = re.compile(r"HTTP status (\d{3})")
_CURL = re.compile(r"curlCode: \d+, [A-Za-z' ]+")
_REFUSALS = frozenset(
    {
        "ACCESS_DENIED", "EXPIRED_TOKEN", "INVALID_ACCESS_KEY_ID", "INVALID_CLIENT_TOKEN_ID",
        "MISSING_AUTHENTICATION_TOKEN", "PERMISSION_DENIED", "SIGNATURE_DOES_NOT_MATCH", "UNAUTHENTICATED",
        "UNRECOGNIZED_CLIENT",
    }
)  # fmt: skip


def is_url(path: object) -> bool:
    """Whether a path names a place on an object store."""
    return isinstance(path, str) and "://" in path


class ObjectStore:
    """Everything under one URL. Thread-safe; cheap to make again from its URL."""

    def __init__(self, url: str) -> None:
        scheme, bucket, prefix = parsed_url(url)
        self.url = f"{scheme}://{bucket}/{prefix}"
        self._prefix = f"{bucket}/{prefix}"
        self._fs = _s3(bucket) if scheme == "s3" else _gcs()

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self.url,)

    def read(self, name: str) -> bytes:
        """A whole object; FileNotFoundError, InputError (access refused) or WorkError (it cannot be had)."""
        return self._tried("read", name, lambda: self._piece(name, 0, None))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start` on; errors as of `read`."""
        return self._tried("read", name, lambda: self._piece(name, start, length))

    def write_file(self, name: str, path: Path) -> None:
        """Put a file's bytes; the object appears whole or not at all. Errors as of `read`."""

        def put() -> None:
            with path.open("rb") as file, self._fs.open_output_stream(f"{self._prefix}/{name}") as stream:
                shutil.copyfileobj(file, stream, WRITE_SIZE_BYTES)

        self._tried("write", name, put)

    def _piece(self, name: str, start: int, length: int | None) -> bytes:
        with self._fs.open_input_file(f"{self._prefix}/{name}") as file:
            wanted = file.size() - start if length is None else length
            data: bytes = file.read_at(wanted, start)
        if len(data) != wanted:
            raise OSError(f"{len(data)} of {wanted} bytes came")
        return data

    def _tried(self, operation: str, name: str, attempt: Callable[[], T]) -> T:
        return tried(f"{self.url}/{name}", operation, attempt, OSError, _reason)


Error = TypeVar("Error", bound=Exception)


def tried(
    what: str,
    operation: str,
    attempt: Callable[[], T],
    errors: type[Error] | tuple[type[Error], ...],
    reason: Callable[[Error], tuple[str, bool]],
) -> T:
    """The answer of one request, which is repeated where it fails, with growing waits.

    what: the object, for messages. errors: those that may pass. reason: (what to say of one, whether the store refused
    access). Raises FileNotFoundError (as it comes), InputError (access refused) or WorkError (it does not answer).
    """
    wait_s = FIRST_WAIT_S
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except FileNotFoundError:
            raise FileNotFoundError(f"{what} is not there") from None
        except errors as error:
            why, refused = reason(error)
            if refused:
                raise InputError(
                    f"{what}: access was refused ({why}); give this process credentials that may {operation} it, "
                    "in the environment or in the profile that the store's SDK reads"
                ) from None
            if number == ATTEMPTS:
                raise WorkError(
                    f"{what}: {operation}: {ATTEMPTS} attempts failed, the last with {why}; "
                    "run again when the store answers"
                ) from None
            if number == ATTEMPTS // 2:
                log.warning("%s: %s: %d attempts failed, the last with %s", what, operation, number, why)
        time.sleep(wait_s * random.uniform(0.5, 1.0))  # so that many readers do not come back all at once
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)
    raise AssertionError("unreachable")


def parsed_url(url: str) -> tuple[str, str, str]:
    """(scheme, bucket, prefix) of a URL; InputError where it is none."""
    found = _URL.fullmatch(url)
    if found is None:  # the URL is not repeated: it may hold a key
        raise InputError(
            "an object store's URL was found that is not one of s3://bucket/path or gs://bucket/path; credentials "
            "and options do not belong into it: set AWS_ENDPOINT_URL and the standard variables of its SDK"
        )
    scheme, bucket, prefix = found.groups()
    return scheme, bucket, prefix


def region_and_endpoint() -> tuple[str | None, str | None]:
    """What the SDK's variables name; None where they do not."""
    said = os.environ.get
    return said("AWS_REGION") or said("AWS_DEFAULT_REGION"), said("AWS_ENDPOINT_URL_S3") or said("AWS_ENDPOINT_URL")


def _reason(error: OSError) -> tuple[str, bool]:
    """What to say of an SDK's error, and whether the store refused access."""
    text = str(error)
    code, http, curl = _CODE.search(text), _HTTP.search(text), _CURL.search(text)
    named = (code.group(1) or code.group(2)) if code else None
    parts = [named, http and http.group(0), curl and curl.group(0)]
    if not any(parts):
        parts = [text if re.fullmatch(r"\d+ of \d+ bytes came", text) else type(error).__name__]
    refused = named in _REFUSALS or (http is not None and http.group(1) in ("401", "403"))
    return ", ".join(part for part in parts if part), refused


def _s3(bucket: str) -> fs.FileSystem:
    """pyarrow does not read AWS_ENDPOINT_URL (25.0), and its SDK does not ask where a bucket lies."""
    options: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "request_timeout": SILENCE_TIMEOUT_S,
        "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=1),  # `_tried` does it, for every store alike
    }
    region, endpoint = region_and_endpoint()
    if endpoint:
        scheme, found, host = endpoint.rstrip("/").partition("://")
        options |= {"scheme": scheme, "endpoint_override": host} if found else {"endpoint_override": scheme}
        return fs.S3FileSystem(region=region or "us-east-1", **options)
    try:
        return fs.S3FileSystem(region=region or fs.resolve_s3_region(bucket), **options)
    except OSError as error:
        raise InputError(
            f"s3://{bucket}: its region cannot be found ({_reason(error)[0]}); set AWS_REGION, or AWS_ENDPOINT_URL for "
            "a store that is not Amazon's"
        ) from None


def _gcs() -> fs.FileSystem:
    return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=SILENCE_TIMEOUT_S))
