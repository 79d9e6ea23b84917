"""Putting a cache onto an object store, in the order that lets readers and another run go on meanwhile.

Same names as on disk. A shard's objects come before its ledger record, all records before the snapshots that name them,
HEAD.json last. What stands there already is left out, so that a second upload carries only what is new.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from storage.disk_cache import GETS_AT_ONCE
from storage.errors import InputError
from storage.identity import CACHE_JSON, read_description, sound_attachment
from storage.ledger import read_record
from storage.objects import ObjectStore
from storage.snapshots import HEAD_JSON, known_snapshots


@dataclass(frozen=True)
class Uploaded:
    """Where a cache is now and what it took."""

    url: str
    shards: int
    """Put there now; the others were there."""
    objects: int
    bytes: int


def upload_cache(folder: Path, parent: str) -> Uploaded:
    """Put the finished shards and snapshots of a cache under `parent` (s3://bucket/path, gs://bucket/path).

    Its URL is then `<parent>/<fingerprint>`. Raises InputError (no cache, access refused), DamageError (a record or an
    attachment is not as written) or WorkError (the store does not answer).
    """
    attachments = read_description(folder)["attachments"]
    if not (folder / HEAD_JSON).is_file():
        raise InputError(f"{folder} has no finished snapshot ({HEAD_JSON}); run `handstill run teach`")
    store = ObjectStore(f"{parent.rstrip('/')}/{folder.name}")
    with ThreadPoolExecutor(GETS_AT_ONCE, thread_name_prefix="put") as pool:
        put = _Putting(store, folder, pool)
        put.all([*(sound_attachment(folder / name).name for name in attachments), CACHE_JSON])
        shards = [put.shard(ledger.stem) for ledger in sorted((folder / "ledger").glob("*.json"))]
        digests = known_snapshots(folder)
        put.all([f"snapshots/{digest}.parquet" for digest in digests])
        put.all([f"snapshots/{digest}.json" for digest in digests])
        put.all([HEAD_JSON])
    return Uploaded(store.url, sum(shards), put.objects, put.bytes)


class _Putting:
    """One upload, and what it has put so far."""

    def __init__(self, store: ObjectStore, folder: Path, pool: ThreadPoolExecutor) -> None:
        self.store, self.folder, self._pool = store, folder, pool
        self.objects = 0
        self.bytes = 0

    def all(self, names: Iterable[str]) -> None:
        """These files, side by side, unless they stand there with these bytes."""
        self._write([name for name in names if not self._stands(name)])

    def shard(self, input_hash: str) -> bool:
        """One shard and then its record, unless this record stands there; whether there was anything to do."""
        name = f"ledger/{input_hash}.json"
        if self._stands(name):
            return False
        record = read_record(self.folder / name)
        self._write([f"shards/{input_hash}.zarr/{file}" for file in record.files])
        self._write([name])
        return True

    def _stands(self, name: str) -> bool:
        try:
            return self.store.read(name) == (self.folder / name).read_bytes()
        except FileNotFoundError:
            return False

    def _write(self, names: list[str]) -> None:
        list(self._pool.map(lambda name: self.store.write_file(name, self.folder / name), names))
        self.objects += len(names)
        self.bytes += sum((self.folder / name).stat().st_size for name in names)
