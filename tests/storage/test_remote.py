from __future__ import annotations

import gc
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import objects, remote
from storage.cache import HAND_MODEL, CacheFolder, open_cache
from storage.disk_cache import GETS_AT_ONCE
from storage.durable import sealed_json
from storage.errors import DamageError, InputError, WorkError
from storage.ledger import read_record, record_document
from storage.objects import ObjectStore
from storage.reading import CacheReader
from storage.snapshots import read_head
from storage.upload import upload_cache
from tests.object_store import BUCKET, SECRET, FolderServer, folder_server, s3_server
from tests.tiny_cache import write_tiny_cache

SHARDS = 4
ROOM = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_tiny_cache(tmp_path_factory.mktemp("made"), n=2 * SHARDS, views=2, samples_per_shard=2, channels=8)
    identity = CacheFolder(root).identity
    return CacheFolder.create(root.parent, identity, {HAND_MODEL: b"a hand model"}).root


@pytest.fixture
def server(folder: Path) -> Iterator[FolderServer]:
    with folder_server(folder.parent) as running:
        yield running


@pytest.fixture
def url(server: FolderServer, folder: Path) -> str:
    return f"s3://{BUCKET}/{folder.name}"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(objects, "ATTEMPTS", 2)
    monkeypatch.setattr(objects, "SILENCE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(remote, "ROOM_WAIT_S", 20.0)


def everything(reader: CacheReader) -> dict[str, Any]:
    rows = list(range(len(reader)))
    return reader.read(rows, [row % 2 for row in rows])


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def shard_bytes(folder: Path) -> int:
    return max(read_record(path).bytes for path in (folder / "ledger").glob("*.json"))


def on_disk(local: Path) -> int:
    total = 0
    for path in local.glob("*/*/shards"):
        for here, _, files in os.walk(path):
            for name in files:
                try:
                    total += 0 if name.endswith(".lock") else (Path(here) / name).stat().st_size
                except FileNotFoundError:  # evicted meanwhile
                    continue
    return total


def test_a_remote_cache_reads_like_the_local_one(tmp_path: Path, folder: Path, url: str) -> None:
    here = everything(open_cache(folder))
    (digest,) = read_head(folder).values()
    pinned = url, {"tiny": digest}
    for what in ((url,), (url, digest), pinned, (f"{url}/snapshots/{digest}.parquet",)):
        reader = open_cache(*what, local=tmp_path, limit_bytes=ROOM)
        assert reader.digests == {"tiny": digest}
        assert same(everything(reader), here)
    assert same(everything(pickle.loads(pickle.dumps(reader))), here)  # noqa: S301 - our own
    assert (reader.root / HAND_MODEL).read_bytes() == b"a hand model"
    assert reader.root.name == folder.name
    assert same(everything(open_cache(reader.root)), here)  # the copy is a cache


def test_the_second_reading_asks_the_store_for_nothing_but_head(
    tmp_path: Path, server: FolderServer, folder: Path, url: str
) -> None:
    everything(open_cache(url, local=tmp_path, limit_bytes=ROOM))
    whole = server.gets()
    assert whole == len([path for path in folder.rglob("*") if path.is_file()])
    assert 1 < server.most_at_once <= GETS_AT_ONCE
    everything(open_cache(url, local=tmp_path, limit_bytes=ROOM))
    assert server.gets() == whole + 1
    assert server.gets("HEAD.json") == 2


READER = """
import sys
from pathlib import Path
from storage.cache import open_cache
reader = open_cache(sys.argv[1], local=Path(sys.argv[2]), limit_bytes=int(sys.argv[3]))
print("ready", flush=True)
input()
rows = list(range(len(reader)))
for _ in range(int(sys.argv[4])):
    for row in rows:
        print(float(reader.read([row], [0])["teacher/betas"].sum()))
"""


def reader_process(url: str, local: Path, limit_bytes: int, rounds: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", READER, url, str(local), str(limit_bytes), str(rounds)]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_two_processes_share_one_folder_and_fetch_once(tmp_path: Path, server: FolderServer, url: str) -> None:
    processes = [reader_process(url, tmp_path, ROOM) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    answers = [process.communicate("\n", timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0] == answers[1] != ""
    assert {n for (method, path), n in server.seen.items() if method == "GET" and "/shards/" in path} == {1}


def test_two_processes_share_a_folder_that_is_too_small_for_either(tmp_path: Path, folder: Path, url: str) -> None:
    limit = 3 * shard_bytes(folder)
    processes = [reader_process(url, tmp_path, limit, rounds=1) for _ in range(2)]
    expected = [float(open_cache(folder).read([row], [0])["teacher/betas"].sum()) for row in range(2 * SHARDS)]
    watched = Watched(tmp_path)
    with watched:
        outputs = [process.communicate("\n", timeout=60)[0] for process in processes]
    assert [[float(line) for line in output.splitlines()[1:]] for output in outputs] == [expected, expected]
    assert 0 < watched.most <= limit


class Watched:
    """The most bytes that were on the disk at any moment that was looked at."""

    def __init__(self, local: Path) -> None:
        self.local, self.most, self._stop = local, 0, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            self.most = max(self.most, on_disk(self.local))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def test_the_disk_is_bounded_while_threads_read(
    tmp_path: Path, folder: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = int(2.5 * shard_bytes(folder))
    expected = everything(open_cache(folder))
    fetched, fetch = [], remote.RemoteCache._fetch
    monkeypatch.setattr(remote.RemoteCache, "_fetch", lambda *args: (fetched.append(0), fetch(*args)))
    watched = Watched(tmp_path)
    with watched, ThreadPoolExecutor(2) as pool:
        reader = open_cache(url, local=tmp_path, limit_bytes=limit)
        rows = [0, 2, 4, 6, 0, 2, 1, 7]
        for row, batch in zip(rows, pool.map(lambda row: reader.read([row], [row % 2]), rows), strict=True):
            assert np.array_equal(batch["pictures"][0], expected["pictures"][row])
            assert np.array_equal(batch["teacher/features"][0], expected["teacher/features"][row])
    assert len(fetched) > SHARDS  # some were evicted and fetched again
    assert limit // 2 < watched.most <= limit


def test_a_batch_that_does_not_fit_is_the_users_mistake(
    tmp_path: Path, folder: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ROOM_WAIT_S", 0.2)
    reader = open_cache(url, local=tmp_path, limit_bytes=2 * shard_bytes(folder))
    with pytest.raises(InputError, match=r"too small: .*Raise its limit \(train.disk_cache_gb\)"):
        reader.read([0, 2, 4], [0, 0, 0])
    gc.collect()
    assert reader.read([0, 2], [0, 0])["sample_id"].tolist() == ["tiny:000000#0", "tiny:000002#0"]
    with pytest.raises(InputError, match="too small"):
        open_cache(url, local=tmp_path / "tiny", limit_bytes=10).read([0], [0])


def test_readers_of_one_process_give_way_to_each_other(tmp_path: Path, folder: Path, url: str) -> None:
    limit = 2 * shard_bytes(folder)
    one, other = (open_cache(url, local=tmp_path, limit_bytes=limit) for _ in range(2))
    one.read([0, 2], [0, 0])
    assert other.read([4, 6], [0, 0])["sample_id"].tolist() == ["tiny:000004#0", "tiny:000006#0"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("wrong", ["500", "503", "truncate", "stall"])
def test_a_store_that_fails_now_and_then_is_asked_again(tmp_path: Path, folder: Path, wrong: str, method: str) -> None:
    def misbehave(m: str, path: str, count: int) -> str | None:
        return wrong if m == method and count == 0 and path.endswith("/c.0.0.0") else None

    with folder_server(folder.parent, misbehave):
        reader = open_cache(f"s3://{BUCKET}/{folder.name}", local=tmp_path, limit_bytes=ROOM)
        assert same(reader.read([0], [0]), open_cache(folder).read([0], [0]))


@pytest.mark.parametrize(
    ("wrong", "error", "why"),
    [
        ("500", WorkError, "2 attempts failed, the last with UNKNOWN, HTTP status 500"),
        ("503", WorkError, "HTTP status 503"),
        ("truncate", WorkError, "curlCode: 18"),
        ("stall", WorkError, "curlCode: 28"),
        ("403", InputError, "access was refused"),
    ],
)
def test_a_store_that_keeps_failing_is_named_and_no_secret_is(
    tmp_path: Path, folder: Path, wrong: str, error: type[Exception], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = f"s3://{BUCKET}/{folder.name}"
    with folder_server(
        folder.parent, lambda method, path, count: wrong if method == "GET" and "/shards/" in path else None
    ):
        reader = open_cache(url, local=tmp_path, limit_bytes=ROOM)
        with pytest.raises(error) as raised:
            reader.read([0], [0])
    assert why in str(raised.value)
    assert f"{url}/shards/" in str(raised.value)
    assert SECRET not in repr([raised.value, raised.value.__cause__, str(raised.getrepr(style="long"))]) + caplog.text
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("shards/{shard}.zarr/teacher/features/c.0.0.0.0.0", 7),
        ("shards/{shard}.zarr/zarr.json", 7),
        ("ledger/{shard}.json", 30),
        ("snapshots/{digest}.parquet", 100),
        ("snapshots/{digest}.json", 30),
        ("cache.json", 30),
        ("HEAD.json", 30),
        (HAND_MODEL, 3),
    ],
)
def test_harm_on_the_store_is_found_and_named(tmp_path: Path, folder: Path, name: str, at: int) -> None:
    """One byte flipped; then the object gone."""
    store = tmp_path / "store" / folder.name
    shutil.copytree(folder, store)
    reader = open_cache(folder)
    (digest,) = reader.digests.values()
    path = store / name.format(shard=reader.shard_path(0).stem, digest=digest)
    whole = path.read_bytes()
    url = f"s3://{BUCKET}/{folder.name}"
    where = f"{url}/{path.relative_to(store)}"
    with folder_server(store.parent):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DamageError) as raised:
            open_cache(url, local=tmp_path / "here", limit_bytes=ROOM).read([0], [0])
        assert where in str(raised.value)
        path.unlink()
        with pytest.raises((DamageError, InputError)) as raised:
            open_cache(url, local=tmp_path / "here", limit_bytes=ROOM).read([0], [0])
        assert where in str(raised.value) or path.name in ("cache.json", "HEAD.json", f"{digest}.json")
        path.write_bytes(whole)  # put right, it reads: nothing wrong stayed here
        mended = open_cache(url, local=tmp_path / "here", limit_bytes=ROOM).read([0], [0])
    assert same(mended, reader.read([0], [0]))


def test_a_damaged_copy_is_fetched_again(tmp_path: Path, folder: Path, url: str) -> None:
    reader = open_cache(url, local=tmp_path, limit_bytes=ROOM)
    expected = open_cache(folder).read([0], [0])
    reader.read([0], [0])
    small = reader.shard_path(0) / "teacher" / "cam" / "c.0.0.0"
    small.write_bytes(small.read_bytes()[:-1])
    assert same(open_cache(url, local=tmp_path, limit_bytes=ROOM).read([0], [0]), expected)
    large = reader.shard_path(0) / "teacher" / "features" / "c.0.0.0.0.0"
    data = bytearray(large.read_bytes())
    data[5] ^= 1
    large.write_bytes(bytes(data))
    with pytest.raises(DamageError, match=r"a copy of s3://.* is damaged.* Delete .* fetched again"):
        open_cache(url, local=tmp_path, limit_bytes=ROOM).read([0], [0])


def test_a_store_cannot_write_elsewhere(tmp_path: Path, folder: Path, url: str) -> None:
    reader = open_cache(folder)
    path = folder / "ledger" / f"{reader.shard_path(0).stem}.json"
    document = record_document(read_record(path))
    for name in ("../../../outside", "/outside", "a/../../outside", "a//b"):
        forged = document | {"files": {name: {"bytes": 1, "sha256": "0" * 64}}}
        local = tmp_path / str(abs(hash(name)))
        there = open_cache(url, local=local, limit_bytes=ROOM)
        (there.root / "ledger").mkdir()
        (there.root / "ledger" / path.name).write_bytes(sealed_json(forged))
        with pytest.raises(DamageError, match="which no cache has"):
            there.read([0], [0])


def test_what_is_not_there_is_the_users_mistake(tmp_path: Path, url: str) -> None:
    where = {"local": tmp_path, "limit_bytes": ROOM}
    with pytest.raises(InputError, match=rf"{url}x is not a cache"):
        open_cache(f"{url}x", **where)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no snapshot 0123"):
        open_cache(url, "0123", **where)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad", [f"s3://key:{SECRET}@bucket/cache", f"s3://bucket/cache?secret_key={SECRET}", "ftp://a/b", "s3://bucket"]
)
def test_a_url_with_more_than_a_place_is_refused_and_not_repeated(bad: str) -> None:
    with pytest.raises(InputError, match="credentials and options do not belong into it") as raised:
        open_cache(bad)
    assert SECRET not in str(raised.value)


def test_a_cache_is_put_in_order_and_again_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "SILENCE_TIMEOUT_S", 30.0)
    folder = write_tiny_cache(tmp_path, n=2, views=2, samples_per_shard=2, channels=8)
    parent = f"s3://{BUCKET}/growing/"
    written, write_file = list[str](), ObjectStore.write_file
    monkeypatch.setattr(
        ObjectStore, "write_file", lambda self, name, path: (written.append(name), write_file(self, name, path))
    )
    with s3_server():
        first = upload_cache(folder, parent)
        kinds = [name.split("/")[0] for name in written]
        assert list(dict.fromkeys(kinds)) == ["cache.json", "shards", "ledger", "snapshots", "HEAD.json"]
        assert kinds == sorted(kinds, key=list(dict.fromkeys(kinds)).index)
        assert (first.shards, first.objects) == (1, len([path for path in folder.rglob("*") if path.is_file()]))
        write_tiny_cache(tmp_path, n=2, views=2, samples_per_shard=2, channels=8, dataset="more")
        second = upload_cache(folder, parent)
        assert (second.shards, second.objects) == (1, first.objects - 1)  # all but cache.json, which stands there
        assert upload_cache(folder, parent).objects == 0
        reader = open_cache(first.url, local=tmp_path / "local", limit_bytes=ROOM)
        assert same(everything(reader), everything(open_cache(folder)))


def test_a_piece_at_a_time(tmp_path: Path, folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 1000)
    assert same(open_cache(url, local=tmp_path, limit_bytes=ROOM).read([0], [0]), open_cache(folder).read([0], [0]))
    assert ObjectStore(url).read_range("cache.json", 2, 5) == (folder / "cache.json").read_bytes()[2:7]


def test_waiting_for_room_ends_when_another_reader_is_done(tmp_path: Path, folder: Path, url: str) -> None:
    reader = open_cache(url, local=tmp_path, limit_bytes=shard_bytes(folder))
    other = remote.RemoteCache(url, remote.DiskCache(tmp_path, 10**9))
    path = reader.shard_path(0)
    hold = other.hold(path, other.record(path.stem))
    timer = threading.Timer(0.1, os.close, (hold,))
    timer.start()
    started = time.monotonic()
    assert reader.read([2], [0])["sample_id"].tolist() == ["tiny:000002#0"]
    assert time.monotonic() - started >= 0.05
    timer.join()
