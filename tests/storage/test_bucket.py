"""Objects of a store that fails, and writes on conditions: one of many wins."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage import bucket as bucket_module
from storage import objects
from storage.bucket import Bucket
from storage.errors import InputError, WorkError
from tests.object_store import SECRET, WANTS_SEAWEEDFS, S3Server, real_server

URL = "s3://hands/work"


def test_objects_are_listed_read_and_deleted(server: S3Server | None, tmp_path: Path) -> None:
    bucket = Bucket(URL)
    etags = {name: bucket.write(name, name.encode()) for name in ("a/1", "a/b/2", "c")}
    assert {name: found.etag for name, found in bucket.below().items()} == etags
    assert [found.bytes for found in bucket.below("a/").values()] == [3, 5]
    files, folders = bucket.inside("a/")
    assert (list(files), folders) == (["a/1"], ["a/b/"])
    assert bucket.read("a/b/2") == (b"a/b/2", etags["a/b/2"])
    assert bucket.fetch("c", tmp_path / "x" / "c") == etags["c"]
    assert (tmp_path / "x" / "c").read_bytes() == b"c"
    bucket.delete(["a/1", "c", "never was"])
    assert list(bucket.below()) == ["a/b/2"]
    with pytest.raises(FileNotFoundError, match="s3://hands/work/c is not there"):
        bucket.read("c")
    with pytest.raises(InputError, match="only s3://"):
        Bucket("gs://hands/work")


def test_many_pages_are_one_listing(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_module, "PAGE", 3)
    bucket = Bucket(URL)
    names = [f"many/{number}" for number in range(8)]
    bucket.at_once(lambda name: bucket.write(name, b"x"), names)
    assert list(bucket.below("many/")) == names
    bucket.delete(names)
    assert bucket.below() == {}


def test_a_large_file_comes_whole(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_module, "WHOLE_BYTES", 24 << 20)  # parts of 6 MiB: a store takes none below 5
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * (100 << 10))
    with path.open("rb") as file:
        etag = Bucket(URL).write("large", file)
        assert not file.closed
    assert Bucket(URL).fetch("large", tmp_path / "back") == etag
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


@WANTS_SEAWEEDFS
def test_a_real_store_lists_and_honours_conditions(tmp_path: Path) -> None:
    (folder := tmp_path / "store").mkdir()
    with real_server(folder):
        test_objects_are_listed_read_and_deleted(None, tmp_path)
        test_of_many_writers_on_a_condition_one_wins(None)


def test_of_many_writers_on_a_condition_one_wins(server: S3Server | None) -> None:
    bucket = Bucket(URL)
    for etag in (None, bucket.write("held", b"before")):
        with ThreadPoolExecutor(16) as pool:
            name = "new" if etag is None else "held"
            won = list(pool.map(lambda number: bucket.write_if(name, b"%d" % number, etag), range(16)))  # noqa: B023
        winner = [number for number, found in enumerate(won) if found is not None]
        assert len(winner) == 1
        assert bucket.read(name) == (b"%d" % winner[0], won[winner[0]])
    assert bucket.write_if("gone", b"x", '"0"') is None
    assert "gone" not in bucket.below()


@pytest.mark.parametrize("how", ["500", "503", "truncate", "lost"])
def test_a_passing_fault_is_sat_out(server: S3Server, how: str, tmp_path: Path) -> None:
    bucket = Bucket(URL)
    content = bytes(range(256)) * 64
    if how != "truncate":
        server.misbehave(("PUT", "one", how, 2))
        bucket.write("one", content)
    else:
        bucket.write("one", content)
    server.misbehave(("GET", "one", how, 2))
    assert bucket.read("one")[0] == content
    server.misbehave(("GET", "one", how, 2))
    bucket.fetch("one", tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize(
    ("method", "operation", "told"),
    [("GET", "read", "500"), ("PUT", "write", "503")],
)
def test_a_lasting_fault_is_told_with_object_and_operation(
    server: S3Server, method: str, operation: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "ATTEMPTS", 3)
    bucket = Bucket(URL)
    bucket.write("one", b"1")
    server.misbehave((method, "one", told, 99))
    with pytest.raises(WorkError, match=rf"s3://hands/work/one: {operation}: 3 attempts failed.*{told}"):
        bucket.read("one") if method == "GET" else bucket.write("one", b"2")
    server.misbehave()
    assert bucket.read("one")[0] == b"1"


def test_a_store_that_says_nothing_or_is_away_is_told(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(objects, "ATTEMPTS", 2)
    monkeypatch.setattr(bucket_module, "SILENCE_TIMEOUT_S", 0.3)
    bucket_module._client.cache_clear()  # the fixture made one with the patience of a real run
    Bucket(URL).write("one", b"1")
    server.misbehave(("GET", "one", "stall", 2))
    with pytest.raises(WorkError, match="one: read: 2 attempts failed, the last with ReadTimeoutError"):
        Bucket(URL).read("one")
    server.misbehave()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with caplog.at_level(logging.DEBUG, "handstill"), pytest.raises(WorkError, match="EndpointConnectionError") as told:
        Bucket(URL).read("one")
    assert SECRET not in str(told.value) + caplog.text


def test_without_credentials_the_message_says_so(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(InputError, match=r"one: access was refused \(NoCredentialsError\)"):
        Bucket(URL).read("one")
