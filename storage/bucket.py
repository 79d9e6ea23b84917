"""Objects of an S3 store that are listed, written, deleted, and written only if nobody else did: what a workdir needs.

boto3 does it, the store's own SDK: pyarrow, which reads caches (storage/objects.py), has neither conditional writes nor
the ETags that tell one version of an object from another. A write's object appears whole or not at all; what is read
is as long as the store said. Credentials come from the SDK's standard chain and are in no message.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from storage.durable import partial_path
from storage.errors import InputError
from storage.objects import CONNECT_TIMEOUT_S, SILENCE_TIMEOUT_S, parsed_url, region_and_endpoint, tried

T = TypeVar("T")

AT_ONCE = 16
"""Requests side by side, a process."""
WHOLE_BYTES = 64 << 20
"""Larger files are written in parts, which the store puts together when all are there."""
PIECE_BYTES = 1 << 20
PAGE = 1000
"""Names a listing's answer has, and objects that are deleted at once: the store's own limit."""

_REFUSALS = frozenset(
    {
        "AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch",
        "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "403", "401",
    }
)  # fmt: skip
_NOT_THERE = frozenset({"NoSuchKey", "404"})
_CONFLICTS = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})


class _CutShortError(Exception):
    """Fewer bytes came than the store said; asked again."""


@dataclass(frozen=True)
class Found:
    """An object as a listing has it."""

    etag: str
    """Differs where the bytes differ; nothing else is known of it."""
    bytes: int


class Bucket:
    """Everything under one s3:// URL. Thread-safe; cheap to make again from its URL."""

    def __init__(self, url: str) -> None:
        scheme, self._bucket, self._prefix = parsed_url(url)
        if scheme != "s3":
            raise InputError(
                f"{scheme}://{self._bucket}/{self._prefix}: only s3:// can be written to by a run; for Google's store "
                "give its S3 interface: s3:// with AWS_ENDPOINT_URL=https://storage.googleapis.com"
            )
        self.url = f"s3://{self._bucket}/{self._prefix}"

    @classmethod
    def whole(cls, name: str) -> Bucket:
        """All of a bucket."""
        bucket = cls(f"s3://{name}/all")
        bucket.url, bucket._prefix = f"s3://{name}", ""
        return bucket

    def below(self, folder: str = "") -> dict[str, Found]:
        """Every object whose name begins with `folder`, by its name below the URL."""
        return self._listed(folder, "")[0]

    def inside(self, folder: str) -> tuple[dict[str, Found], list[str]]:
        """The objects directly in a folder (which ends in /, or is the whole), and the names of the folders in it."""
        return self._listed(folder, "/")

    def read(self, name: str) -> tuple[bytes, str]:
        """(a whole object, its ETag). Raises FileNotFoundError, InputError or WorkError, as `storage.objects.tried`."""

        def get() -> tuple[bytes, str]:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(name))
            data: bytes = answer["Body"].read()
            if len(data) != answer["ContentLength"]:
                raise _CutShortError(f"{len(data)} of {answer['ContentLength']} bytes")
            return data, str(answer["ETag"])

        return self._tried("read", name, get)

    def fetch(self, name: str, path: Path, time_ns: Callable[[str], int] | None = None) -> str:
        """Copy an object to a file, which appears whole or not at all; its ETag. Errors as of `read`.

        time_ns: the file's time, from the ETag; else now.
        """

        def get() -> str:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(name))
            partial = partial_path(path)
            try:
                with partial.open("xb") as file:
                    for piece in answer["Body"].iter_chunks(PIECE_BYTES):
                        file.write(piece)
                    if file.tell() != answer["ContentLength"]:
                        raise _CutShortError(f"{file.tell()} of {answer['ContentLength']} bytes")
                if time_ns is not None:
                    os.utime(partial, ns=(time_ns(str(answer["ETag"])),) * 2)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            return str(answer["ETag"])

        path.parent.mkdir(parents=True, exist_ok=True)
        return self._tried("read", name, get)

    def look(self, name: str) -> Found:
        """What a listing says of one object. Errors as of `read`."""
        answer = self._head(name)
        return Found(str(answer["ETag"]), int(answer["ContentLength"]))

    def etag(self, name: str) -> str:
        """Of one object. Errors as of `read`."""
        return str(self._head(name)["ETag"])

    def age_s(self, name: str) -> float:
        """How long ago an object was written, by the store's own clock. Errors as of `read`."""
        answer = self._head(name)
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return float((now - answer["LastModified"]).total_seconds())

    def write(self, name: str, content: bytes | BinaryIO) -> str:
        """Put bytes, or what an open file holds, in an object's place; its ETag. Raises InputError or WorkError."""
        if not isinstance(content, bytes) and os.fstat(content.fileno()).st_size > WHOLE_BYTES:
            return self._write_in_parts(name, content)

        def put() -> str:
            data = content
            if not isinstance(data, bytes):
                data.seek(0)
                data = data.read()
            answer = self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=data)
            return str(answer["ETag"])

        return self._tried("write", name, put)

    def write_if(self, name: str, data: bytes, etag: str | None) -> str | None:
        """Put bytes where the object has this ETag, or is not there (None); its new ETag, or None: another was faster.

        None may also be our own write, whose answer was lost; whoever needs to know reads the object.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}

        def put() -> str | None:
            try:
                answer = self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=data, **condition)
            except Exception as error:
                if _code(error) in _CONFLICTS or (etag is not None and _code(error) in _NOT_THERE):
                    return None
                raise
            return str(answer["ETag"])

        return self._tried("write", name, put)

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there are none the worse. Raises InputError or WorkError."""
        keys = [self._key(name) for name in names]
        for start in range(0, len(keys), PAGE):
            some = [{"Key": key} for key in keys[start : start + PAGE]]

            def remove(some: list[dict[str, str]] = some) -> None:
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": some, "Quiet": True})
                if answer.get("Errors"):
                    raise _CutShortError(f"{len(answer['Errors'])} of {len(some)} objects are still there")

            self._tried("delete", keys[start].removeprefix(self._key("")), remove)

    def at_once(self, work: Callable[[str], T], names: Iterable[str]) -> list[T]:
        """What `work` says to each name, side by side."""
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="s3") as pool:
            return list(pool.map(work, names))

    def _head(self, name: str) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            found: dict[str, Any] = self._client.head_object(Bucket=self._bucket, Key=self._key(name))
            return found

        return self._tried("look at", name, look)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _listed(self, folder: str, delimiter: str) -> tuple[dict[str, Found], list[str]]:
        prefix = self._key(folder)
        found: dict[str, Found] = {}
        folders: list[str] = []
        more: dict[str, str] = {}
        while True:
            asked = {
                "Bucket": self._bucket,
                "Prefix": prefix,
                "MaxKeys": PAGE,
                **({"Delimiter": delimiter} if delimiter else {}),
                **more,
            }
            answer = self._tried("list", folder, lambda asked=asked: self._client.list_objects_v2(**asked))  # type: ignore[misc]
            cut = len(self._key(""))
            found |= {
                each["Key"][cut:]: Found(each["ETag"], each["Size"])
                for each in answer.get("Contents", ())
                if not each["Key"].endswith("/")  # some stores list a folder as an object of no bytes
            }
            folders += [each["Prefix"][cut:] for each in answer.get("CommonPrefixes", ())]
            if not answer.get("IsTruncated"):
                return found, folders
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    def _write_in_parts(self, name: str, file: BinaryIO) -> str:
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(
            multipart_threshold=WHOLE_BYTES, multipart_chunksize=WHOLE_BYTES // 4, max_concurrency=4
        )

        def put() -> None:
            with os.fdopen(os.dup(file.fileno()), "rb") as own:  # the SDK closes what it is given
                own.seek(0)
                self._client.upload_fileobj(own, self._bucket, self._key(name), Config=config)

        self._tried("write", name, put)
        return self.etag(name)

    def _tried(self, operation: str, name: str, attempt: Callable[[], T]) -> T:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        def ask() -> T:
            try:
                return attempt()
            except ClientError as error:
                if _code(error) in _NOT_THERE:
                    raise FileNotFoundError from None
                raise

        passing = (BotoCoreError, ClientError, HTTPClientError, Boto3Error, _CutShortError)
        return tried(f"{self.url}/{name}", operation, ask, passing, _reason)

    @property
    def _client(self) -> Any:
        environment = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))
        return _client(os.getpid(), environment)


@lru_cache(maxsize=4)
def _client(process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    """The process's client, which all threads share: making one means a quarter of a second's reading of SDK tables.

    It is made again in a forked process, and where the SDK's variables change. Credentials that the SDK itself renews
    it renews in place. Its own retries are off: `tried` does them, for every store alike.
    """
    import boto3
    from botocore.config import Config

    del process, environment  # they tell one client from another
    region, endpoint = region_and_endpoint()
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=SILENCE_TIMEOUT_S,
        retries={"total_max_attempts": 1},
        max_pool_connections=4 * AT_ONCE,  # several listings and pushes at once, each with its own threads
        # As pyarrow does: other stores than Amazon's have no host a bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    return boto3.session.Session(region_name=region or ("us-east-1" if endpoint else None)).client("s3", config=config)


def _answer(error: Exception) -> dict[str, Any]:
    """What the store answered; empty where it did not."""
    answer = getattr(error, "response", None)
    return answer if isinstance(answer, dict) else {}


def _code(error: Exception) -> str:
    """The store's word for what is wrong, or the SDK's."""
    said = _answer(error).get("Error", {}).get("Code")
    return str(said) if said else type(error).__name__


def _reason(error: Exception) -> tuple[str, bool]:
    """What to say of an SDK's error, and whether the store refused access. Its text may name more than we want told."""
    status = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    code = _code(error)
    told = str(error) if isinstance(error, _CutShortError) else code
    refused = code in _REFUSALS or status in (401, 403)
    return (f"{told}, HTTP status {status}" if status and str(status) != told else told), refused
