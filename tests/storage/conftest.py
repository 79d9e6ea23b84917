"""An S3 server that misbehaves as a test asks, emptied before each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from storage import objects
from storage.bucket import Bucket
from tests.object_store import S3Server, misbehaving_server


@pytest.fixture(scope="module")
def _server() -> Iterator[S3Server]:
    with misbehaving_server() as server:
        yield server


@pytest.fixture
def server(_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.01)
    _server.misbehave()
    bucket = Bucket("s3://hands/work")
    bucket.delete(bucket.below())
    yield _server
    _server.misbehave()
