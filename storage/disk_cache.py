"""Shards of remote caches on this machine's disk: at most so many bytes, shared by threads and processes.

<folder>/
    budget.lock                 locked while room is made: one at a time counts and evicts
    pressure                    touched by whoever finds no room: other processes close what they do not need
    <16 hex of the URL>/<fingerprint>/
        cache.json, ledger/, ...    small, as on the store; never evicted
        shards/<hash>.zarr          a whole shard, under the name that it has on the store
        shards/<hash>.lock          locked shared while the shard is in use, exclusively while it is fetched or evicted;
                                    holds its size, and its time is that of its last use. Goes only with a copy that
                                    turned out damaged
        shards/.<hash>.zarr.<random>.partial    being fetched

The kernel drops a process's locks with it, so whatever dies leaves nothing that has to be waited for. The folder must
be on a local disk: locks on network disks cannot be relied on.
"""

from __future__ import annotations

import fcntl
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet, WeakValueDictionary

from storage.durable import partial_path, publish_directory, remove_tree

DEFAULT_LIMIT_BYTES = 64 << 30
GETS_AT_ONCE = 16
"""Requests that a process has under way for shards: a shard is some seventy objects, most of them small. An estimate
for a store that answers in tens of milliseconds; it has not been measured against one."""

GIVE_WAY_EVERY_S = 0.2


class NoRoomError(Exception):
    """Everything that is on the disk is in use."""


class Idle(Protocol):
    """Whoever keeps shards open that it may not need."""

    def release_idle(self) -> bool:
        """Give the longest unused ones up; False when there was nothing to give up."""
        ...


class DiskCache:
    """One folder of shards. Bytes under `shards/`, those being fetched among them, never exceed `limit_bytes`."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.holders: WeakSet[Idle] = WeakSet()
        """Readers of this process, asked to give way when there is no room."""
        self.gets = ThreadPoolExecutor(GETS_AT_ONCE, thread_name_prefix="get")
        self._sizes: dict[str, int] = {}
        threading.Thread(target=_give_way, args=(weakref.ref(self),), name="give way", daemon=True).start()

    def __reduce__(self) -> tuple[Any, ...]:
        return disk_cache, (self.folder, self.limit_bytes)

    def hold(self, shard: Path, size: int, fetch: Callable[[Path], None]) -> int:
        """A descriptor that keeps the shard at `shard` from being evicted until it is closed.

        Is the shard not there, `fetch` writes its `size` bytes into the folder that it is given, once, however many
        threads and processes ask. NoRoomError when they do not fit.
        """
        shard.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(shard.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if self._held(descriptor, shard, size, fetch):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _held(self, descriptor: int, shard: Path, size: int, fetch: Callable[[Path], None]) -> bool:
        """Whether the shard is there and this lock, now shared, keeps it; False: it has a new lock."""
        while True:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not _stands(descriptor, shard.with_suffix(".lock")):
                return False
            if shard.is_dir():
                os.utime(descriptor)
                return True
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (
                BlockingIOError
            ):  # somebody looks too, or fetches; who then waited here would wait until it is closed
                time.sleep(random.uniform(0.001, 0.01))
                continue
            if _stands(descriptor, shard.with_suffix(".lock")) and not shard.is_dir():
                self._fetch(shard, size, fetch, descriptor)

    def discard(self, shard: Path) -> None:
        """Take a copy that is damaged away, whoever else uses it: open maps stay what they are.

        Its lock goes too, which they hold: who comes next makes a new one.
        """
        with self._budget():
            doomed = partial_path(shard)
            try:
                shard.rename(doomed)
            except FileNotFoundError:
                return
            shard.with_suffix(".lock").unlink(missing_ok=True)
            remove_tree(doomed)

    def release_idle(self) -> bool:
        """Have this process's readers give up what they have open without need; False when they have nothing."""
        gave_way = [holder.release_idle() for holder in list(self.holders)]
        return any(gave_way)

    def ask_others(self) -> None:
        """Ask the other processes for the same."""
        self._pressure.touch()

    def under_pressure(self) -> float:
        """When somebody last found no room (seconds since the epoch; 0: never)."""
        try:
            return self._pressure.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def used_bytes(self) -> int:
        """Of all shards here and those being fetched."""
        return sum(entry.bytes for entry in self._entries())

    @property
    def _pressure(self) -> Path:
        return self.folder / "pressure"

    def _fetch(self, shard: Path, size: int, fetch: Callable[[Path], None], descriptor: int) -> None:
        for dead in _partials(shard):  # of a process that died: nobody else has the lock
            remove_tree(dead)
        partial = partial_path(shard)
        with self._budget():
            self._make_room(size)
            os.pwrite(descriptor, f"{size:020d}".encode(), 0)
            partial.mkdir()
        try:
            fetch(partial)
            publish_directory(partial, shard)
        except BaseException:
            remove_tree(partial)
            raise

    def _make_room(self, size: int) -> None:
        entries = self._entries()
        used = sum(entry.bytes for entry in entries)
        for entry in sorted(entries, key=lambda entry: entry.last_use):
            if used + size <= self.limit_bytes:
                return
            if _evict(entry.shard):
                used -= entry.bytes
        if used + size > self.limit_bytes:
            raise NoRoomError(f"{used} bytes of {self.limit_bytes} are in use and {size} more are wanted")

    def _entries(self) -> list[_Entry]:
        """Every shard that takes room."""
        found = []
        for folder in self.folder.glob("*/*/shards"):
            with os.scandir(folder) as listing:
                there = {_shard_name(item.name) for item in listing if not item.name.endswith(".lock")}
            found += [self._entry(folder / name) for name in there]
        return found

    def _entry(self, shard: Path) -> _Entry:
        lock = shard.with_suffix(".lock")
        size = self._sizes.get(str(lock))
        if size is None:
            size = self._sizes[str(lock)] = _noted_size(lock)
        return _Entry(shard, size, lock.stat().st_mtime)

    @contextmanager
    def _budget(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "budget.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class _Entry:
    shard: Path
    bytes: int
    last_use: float


def _noted_size(lock: Path) -> int:
    """What stands in a lock file. It is written before its shard gets a name; a machine that lost power may lose it."""
    try:
        return int(lock.read_bytes())
    except (FileNotFoundError, ValueError):
        size = sum(path.stat().st_size for path in lock.with_suffix(".zarr").rglob("*") if path.is_file())
        lock.write_bytes(f"{size:020d}".encode())
        return size


def _shard_name(name: str) -> str:
    """<hash>.zarr, from itself or from the name it has while it is fetched."""
    return name.removeprefix(".").split(".zarr", 1)[0] + ".zarr"


def _partials(shard: Path) -> list[Path]:
    return list(shard.parent.glob(f".{shard.name}.*.partial"))


def _evict(shard: Path) -> bool:
    """Remove a shard that nobody uses, or what a dead process left of it."""
    descriptor = os.open(shard.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        _remove(shard)
        return True
    finally:
        os.close(descriptor)


def _stands(descriptor: int, path: Path) -> bool:
    """Whether an open lock is still the one of that name."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _remove(shard: Path) -> None:
    """First its name, then its bytes: nobody finds half a shard."""
    if shard.is_dir():
        shard.rename(partial_path(shard))
    for partial in _partials(shard):
        remove_tree(partial)


def _give_way(cache: weakref.ref[DiskCache]) -> None:
    """Close what is idle when another process finds no room: a reader that rests may hold everything."""
    seen = time.time()
    while (disk := cache()) is not None:
        if (last := disk.under_pressure()) > seen:
            disk.release_idle()
            seen = last
        del disk
        time.sleep(GIVE_WAY_EVERY_S)


_HERE: WeakValueDictionary[tuple[Path, int], DiskCache] = WeakValueDictionary()
_HERE_LOCK = threading.Lock()


def disk_cache(folder: Path, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> DiskCache:
    """This process's cache in that folder: its readers share it, so that one gives way to another."""
    key = (folder.expanduser().resolve(), limit_bytes)
    with _HERE_LOCK:
        found = _HERE.get(key)
        if found is None:
            found = _HERE[key] = DiskCache(*key)
        return found


def default_folder() -> Path:
    """Where shards go when nobody says: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "handstill"
