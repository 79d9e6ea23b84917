"""Reading a cache that lies on an object store: small files are copied when they are needed, shards whole, on demand.

The copy under `local` has the layout of a cache (storage/cache.py) and is read by the same reader; only how a shard
comes to be open differs. Every byte is checked before it gets its name here: sealed JSON by its seal, snapshots by
their sidecar, attachments by cache.json, shards file by file against the sha256 of their ledger record.

Memory: GETS_AT_ONCE pieces of PIECE_BYTES (128 MiB) while shards are fetched, whatever their size. Disk: at most
`limit_bytes` of shards (storage/disk_cache.py), besides snapshots and records, some 20 KB a shard that was opened.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from storage.codecs import Codec
from storage.disk_cache import DEFAULT_LIMIT_BYTES, DiskCache, NoRoomError, default_folder, disk_cache
from storage.durable import parse_sealed_json, sha256_bytes, sha256_file, write_bytes_atomic
from storage.errors import DamageError, InputError
from storage.identity import CACHE_JSON
from storage.ledger import FileDigest, ShardRecord, read_record
from storage.objects import ObjectStore
from storage.reading import CacheReader
from storage.shard_file import ShardFile
from storage.snapshots import HEAD_JSON

log = logging.getLogger("handstill")

PIECE_BYTES = 8 << 20
"""Larger files are fetched in pieces of this size, side by side: one stream of an object store is slow."""
ROOM_WAIT_S = 60.0
"""How long a read waits for room that others are using before it gives up."""

_AGAIN = 2
"""So often a file whose bytes are not those of the record is fetched before the store's object counts as damaged."""


class RemoteCache:
    """One cache on a store and its copy on this machine."""

    def __init__(self, url: str, disk: DiskCache) -> None:
        self.store = ObjectStore(url)
        self.disk = disk
        self.url = self.store.url
        self.root = disk.folder / sha256_bytes(self.url.encode())[:16] / self.url.rpartition("/")[2]

    def copy_description(self) -> None:
        """cache.json and the attachments that it lists."""
        missing = InputError(
            f"{self.url} is not a cache: it has no {CACHE_JSON}. Give the URL of one that `handstill run teach` made."
        )
        document = parse_sealed_json(self._copied(CACHE_JSON, self._sealed, missing), f"{self.url}/{CACHE_JSON}")
        if document["fingerprint"] != self.root.name:
            raise DamageError(f"{self.url}/{CACHE_JSON} was moved: its folder must be named {document['fingerprint']}")
        for name, digest in document["attachments"].items():
            self._copied(name, self._digested(FileDigest(**digest)), self._gone(name))

    def copy_snapshot(self, digest: str) -> str:
        """A snapshot and its sidecar; the data set that it is of."""
        missing = InputError(f"no snapshot {digest} in {self.url}; run `handstill run teach`, or name another")
        name = f"snapshots/{digest}.json"
        sidecar = parse_sealed_json(self._copied(name, self._sealed, missing), f"{self.url}/{name}")
        name = f"snapshots/{digest}.parquet"
        self._copied(name, self._digested(FileDigest(sidecar["bytes"], sidecar["sha256"])), self._gone(name))
        return str(sidecar["dataset"])

    def current(self) -> dict[str, str]:
        """The store's HEAD.json as it is now: data set -> digest."""
        try:
            data = self.store.read(HEAD_JSON)
        except FileNotFoundError:
            raise InputError(f"{self.url} has no finished snapshot ({HEAD_JSON}); run `handstill run teach`") from None
        digests: dict[str, str] = parse_sealed_json(data, f"{self.url}/{HEAD_JSON}")["snapshots"]
        write_bytes_atomic(self.root / HEAD_JSON, data)
        return digests

    def record(self, input_hash: str) -> ShardRecord:
        """The ledger record of a shard."""
        name = f"ledger/{input_hash}.json"
        self._copied(name, self._sealed, self._gone(name, "the shard was withdrawn or cleaned"))
        return read_record(self.root / name)

    def hold(self, shard: Path, record: ShardRecord) -> int:
        """Have a shard here, and keep it from being evicted until the descriptor is closed. NoRoomError."""
        return self.disk.hold(shard, record.bytes, lambda partial: self._fetch(record, partial))

    def _copied(self, name: str, check: Callable[[str, bytes], None], missing: Exception) -> bytes:
        """A small file's bytes, from here or else from the store. What is here was checked before it got its name."""
        path = self._here(self.root, name)
        if path.is_file():
            return path.read_bytes()
        try:
            data = self.store.read(name)
        except FileNotFoundError:
            raise missing from None
        check(name, data)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(path, data)
        return data

    def _sealed(self, name: str, data: bytes) -> None:
        parse_sealed_json(data, f"{self.url}/{name}")

    def _digested(self, digest: FileDigest) -> Callable[[str, bytes], None]:
        def check(name: str, data: bytes) -> None:
            if sha256_bytes(data) != digest.sha256:
                raise self._damaged(name)

        return check

    def _fetch(self, record: ShardRecord, partial: Path) -> None:
        """All files of a shard into `partial`, side by side, each checked against the record."""
        for name in record.files:
            self._here(partial, name).parent.mkdir(parents=True, exist_ok=True)
        shard = f"shards/{record.input_hash}.zarr"
        by_size = sorted(record.files.items(), key=lambda item: -item[1].bytes)
        pieces: list[tuple[str, list[Future[None]]]] = []
        try:
            for name, digest in by_size:
                pieces.append((name, self._submit(shard, name, digest, partial)))
            for name, parts in pieces:
                self._check(shard, name, record.files[name], partial, parts)
        finally:
            for part in (part for _, parts in pieces for part in parts):
                part.cancel()
            _settle([part for _, parts in pieces for part in parts])

    def _submit(self, shard: str, name: str, digest: FileDigest, partial: Path) -> list[Future[None]]:
        target = partial / name
        with target.open("xb") as file:
            file.truncate(digest.bytes)
        starts = range(0, max(digest.bytes, 1), PIECE_BYTES)
        return [
            self.disk.gets.submit(self._piece, f"{shard}/{name}", target, start, min(PIECE_BYTES, digest.bytes - start))
            for start in starts
        ]

    def _piece(self, name: str, target: Path, start: int, length: int) -> None:
        data = self.store.read_range(name, start, length)
        with target.open("r+b") as file:
            file.seek(start)
            file.write(data)

    def _check(self, shard: str, name: str, digest: FileDigest, partial: Path, parts: list[Future[None]]) -> None:
        for attempt in range(_AGAIN):
            try:
                for part in parts:
                    part.result()
            except FileNotFoundError:
                raise self._gone(f"{shard}/{name}", "its ledger record stands") from None
            if sha256_file(partial / name) == digest.sha256:
                return
            if attempt + 1 < _AGAIN:
                (partial / name).unlink()
                parts[:] = self._submit(shard, name, digest, partial)
        raise self._damaged(f"{shard}/{name}")

    def _here(self, folder: Path, name: str) -> Path:
        """Where a file of that name belongs; what a store says must not lead out of the folder."""
        if not name or name.startswith("/") or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise DamageError(f"{self.url} names a file {name!r}, which no cache has; put the cache there again")
        return folder / name

    def _damaged(self, name: str) -> DamageError:
        return DamageError(
            f"{self.url}/{name} is damaged: its bytes are not those of its record. Run `handstill verify` where the "
            "cache was made and put the shard or file onto the store again."
        )

    def _gone(self, name: str, why: str = "cache.json or a sidecar names it") -> DamageError:
        return DamageError(f"{self.url}/{name} is gone ({why}); put the cache onto the store again")


def _settle(parts: list[Future[None]]) -> None:
    """Wait for what is still being written: the folder it is written into is about to be removed or published."""
    for part in parts:
        if not part.cancelled():
            part.exception()


class _HeldShard(ShardFile):
    """An open shard that is not evicted while it is open."""

    def __init__(self, path: Path, record: ShardRecord, codec: Codec, hold: int, url: str) -> None:
        self._url = url
        super().__init__(path, record, codec)
        weakref.finalize(self, os.close, hold)

    def damaged(self, name: str, what: str) -> DamageError:
        return DamageError(
            f"{self.path / name}, a copy of {self._url}/shards/{self.path.name}/{name}, is damaged: {what}. "
            f"Delete {self.path} and {self.path.with_suffix('.lock')}; it will be fetched again."
        )


class RemoteReader(CacheReader):
    """A `CacheReader` whose shards are fetched when they are first needed."""

    def __init__(self, url: str, digests: Mapping[str, str], disk: DiskCache, open_shards: int | None = None) -> None:
        self._remote = RemoteCache(url, disk)
        self._remote.copy_description()
        for digest in digests.values():
            self._remote.copy_snapshot(digest)
        super().__init__(self._remote.root, digests, open_shards)
        disk.holders.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteReader, (self._remote.url, self.digests, self._remote.disk, self._open_limit)

    def prefetch(self, shard: int) -> None:
        """Fetch a shard, by its number in `shards`, unless it is here. Where there is no room for it, nothing happens:
        whoever reads it will wait for room."""
        path = self.root / "shards" / f"{self._shard_names[shard]}.zarr"
        record = self._remote.record(path.stem)
        while True:
            try:
                os.close(self._remote.hold(path, record))
                return
            except NoRoomError as error:
                if not self._remote.disk.release_idle():
                    log.info("%s is not fetched ahead: %s", path.name, error)
                    return

    def release_idle(self) -> bool:
        """Close the half of the open shards that was not used for longest, so that they may be evicted."""
        with self._lock:
            before = len(self._open)
            for _ in range((before + 1) // 2):
                self._open.popitem(last=False)
            return before > 0

    def _open_shard(self, path: Path) -> ShardFile:
        record = self._remote.record(path.stem)
        try:
            return self._opened(path, record)
        except DamageError as error:  # of the copy: what is fetched was checked
            log.warning("%s", error)
            self._remote.disk.discard(path)
            return self._opened(path, record)

    def _opened(self, path: Path, record: ShardRecord) -> ShardFile:
        hold = self._wait_for_room(path, record)
        try:
            return _HeldShard(path, record, self.codec, hold, self._remote.url)
        except BaseException:
            os.close(hold)
            raise

    def _wait_for_room(self, path: Path, record: ShardRecord) -> int:
        disk, deadline = self._remote.disk, float("inf")
        while True:
            try:
                return self._remote.hold(path, record)
            except NoRoomError as error:
                if record.bytes <= disk.limit_bytes and disk.release_idle():
                    continue
                deadline = min(deadline, time.monotonic() + ROOM_WAIT_S)
                if record.bytes > disk.limit_bytes or time.monotonic() >= deadline:
                    raise InputError(
                        f"the disk cache {disk.folder} is too small: {error}. Raise its limit (train.disk_cache_gb), "
                        "or lower train.window_shards: two windows a data set should fit"
                    ) from None
                disk.ask_others()
                time.sleep(0.05)


def open_remote(
    url: str, snapshot: str | Mapping[str, str] | None, local: Path | None, limit_bytes: int | None
) -> RemoteReader:
    """What `storage.reading.open_cache` does for a URL."""
    disk = disk_cache(local or default_folder(), limit_bytes or DEFAULT_LIMIT_BYTES)
    if url.endswith(".parquet"):
        url, _, name = url.rpartition("/snapshots/")
        snapshot = name.removesuffix(".parquet")
    cache = RemoteCache(url, disk)
    cache.copy_description()
    if snapshot is None:
        snapshot = cache.current()
    elif isinstance(snapshot, str):
        snapshot = {cache.copy_snapshot(snapshot): snapshot}
    return RemoteReader(url, snapshot, disk)
