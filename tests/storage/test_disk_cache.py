from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.disk_cache import DiskCache, NoRoomError, default_folder, disk_cache
from storage.durable import partial_path

SHARD = 100


def shard(folder: Path, name: str) -> Path:
    return folder / "url" / "cache" / "shards" / f"{name}.zarr"


def writer(calls: list[str], name: str) -> Callable[[Path], None]:
    def fetch(partial: Path) -> None:
        calls.append(name)
        (partial / "bytes").write_bytes(name[:1].encode() * SHARD)

    return fetch


def use(disk: DiskCache, name: str, calls: list[str]) -> int:
    return disk.hold(shard(disk.folder, name), SHARD, writer(calls, name))


def there(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "url" / "cache" / "shards").glob("*.zarr")}


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    disk, calls = DiskCache(tmp_path, 3 * SHARD), list[str]()
    for when, name in enumerate(["a", "b", "c", "a", "d"]):
        hold = use(disk, name, calls)
        os.utime(hold, (when, when))  # a clock that ticks between uses
        os.close(hold)
    assert calls == ["a", "b", "c", "d"]
    assert there(tmp_path) == {"a", "c", "d"}
    assert disk.used_bytes() == 3 * SHARD


def test_what_is_held_stays(tmp_path: Path) -> None:
    disk, calls = DiskCache(tmp_path, 2 * SHARD), list[str]()
    holds = [use(disk, "a", calls), use(disk, "b", calls)]
    with pytest.raises(NoRoomError, match="200 bytes of 200 are in use and 100 more are wanted"):
        use(disk, "c", calls)
    assert there(tmp_path) == {"a", "b"}
    os.close(holds[1])
    os.close(use(disk, "c", calls))
    assert there(tmp_path) == {"a", "c"}
    os.close(holds[0])


def test_many_who_ask_fetch_once(tmp_path: Path) -> None:
    calls: list[str] = []
    start = threading.Barrier(8)

    def ask(_: int) -> None:
        start.wait()
        os.close(use(DiskCache(tmp_path, 9 * SHARD), "a", calls))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert calls == ["a"]


def test_who_waits_for_a_fetch_does_not_wait_until_the_shard_is_closed(tmp_path: Path) -> None:
    """All look before any fetches; the first keeps the shard, as a reader does."""
    calls: list[str] = []
    start = threading.Barrier(8)

    def ask(_: int) -> int:
        disk = DiskCache(tmp_path, 9 * SHARD)
        start.wait()
        return disk.hold(shard(tmp_path, "a"), SHARD, slow)

    def slow(partial: Path) -> None:
        time.sleep(0.2)
        writer(calls, "a")(partial)

    pool = ThreadPoolExecutor(8)
    asked = [pool.submit(ask, number) for number in range(8)]
    try:
        holds = [each.result(timeout=20) for each in asked]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    assert calls == ["a"]
    for hold in holds:
        os.close(hold)


def test_a_fetch_that_failed_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    disk, calls = DiskCache(tmp_path, SHARD), list[str]()

    def fails(partial: Path) -> None:
        (partial / "half").write_bytes(b"x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        disk.hold(shard(tmp_path, "a"), SHARD, fails)
    assert [path.name for path in shard(tmp_path, "a").parent.iterdir()] == ["a.lock"]
    os.close(use(disk, "a", calls))
    assert calls == ["a"]


def test_what_a_dead_process_left_is_counted_and_goes_first(tmp_path: Path) -> None:
    disk, calls = DiskCache(tmp_path, 2 * SHARD), list[str]()
    dead = partial_path(shard(tmp_path, "dead"))
    dead.mkdir(parents=True)
    shard(tmp_path, "dead").with_suffix(".lock").write_bytes(b"100")
    os.utime(shard(tmp_path, "dead").with_suffix(".lock"), (0, 0))
    assert disk.used_bytes() == SHARD
    for name in ("a", "b"):
        os.close(use(disk, name, calls))
    assert there(tmp_path) == {"a", "b"}
    assert not dead.exists()


def test_a_shard_whose_size_was_not_noted_is_measured(tmp_path: Path) -> None:
    disk, calls = DiskCache(tmp_path, 2 * SHARD), list[str]()
    os.close(use(disk, "a", calls))
    shard(tmp_path, "a").with_suffix(".lock").write_bytes(b"")
    assert DiskCache(tmp_path, SHARD).used_bytes() == SHARD


def test_a_process_has_one_a_folder_and_it_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = disk_cache(tmp_path / "here", 5)
    assert disk_cache(tmp_path / "x" / ".." / "here", 5) is disk
    assert pickle.loads(pickle.dumps(disk)) is disk  # noqa: S301 - our own
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "handstill"
