"""Proving that a cache is what it was when it was written: every file, every byte, and nothing besides.

`quick_check` looks at names and sizes only (for `plan`); `verify_shard` and `verify_folder` read everything. Neither
changes anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storage import layout, zarr3
from storage.cache import CacheFolder
from storage.durable import is_partial, sha256_file
from storage.errors import DamageError, InputError
from storage.identity import CACHE_JSON
from storage.ledger import ShardRecord, read_record
from storage.shards import array_document, record_from_disk
from storage.snapshots import HEAD_JSON, read_head, read_snapshot, snapshot_digest, snapshot_path


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


LOOKS_AT_ONCE = 8
"""Threads that ask for files' sizes. They wait for the disk, or for a server: names that no cache has were looked at in
4.6 s by 8 threads and in 15.4 s by one (435,000 files); with names in memory it is 1.25 s and 1.1 s."""


def quick_check(cache: CacheFolder, record: ShardRecord) -> list[Damage]:
    """Whether the shard's files are all there with their sizes. Finds deletions and truncations, not flipped bytes."""
    shard = cache.shard_path(record.input_hash)
    try:
        folder = os.open(shard, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return [Damage(shard, "is gone")]
    found = []
    try:
        for name, digest in record.files.items():
            try:
                size = os.stat(name, dir_fd=folder).st_size
            except (FileNotFoundError, NotADirectoryError):
                found.append(Damage(shard / name, "is gone"))
                continue
            if size != digest.bytes:
                found.append(Damage(shard / name, f"has {size} bytes, not {digest.bytes}"))
    finally:
        os.close(folder)
    return found


def damaged_shards(cache: CacheFolder, records: Iterable[ShardRecord]) -> frozenset[str]:
    """Input hashes of the shards that `quick_check` finds damaged."""
    with ThreadPoolExecutor(LOOKS_AT_ONCE, thread_name_prefix="look") as pool:

        def look(record: ShardRecord) -> str | None:
            return record.input_hash if quick_check(cache, record) else None

        return frozenset(found for found in pool.map(look, records) if found is not None)


def verify_shard(cache: CacheFolder, record: ShardRecord) -> list[Damage]:
    """Read one shard in full: digests against the ledger, checksums inside the arrays, shapes against the schema."""
    shard = cache.shard_path(record.input_hash)
    damages = [*_wrong_files(shard, record), *_extra_files(shard, record)]
    if damages:
        return damages
    try:
        if record_from_disk(shard, record.files) != record:
            damages.append(Damage(cache.record_path(record.input_hash), "differs from what the shard says of itself"))
    except DamageError as error:
        damages.append(Damage(shard, str(error)))
    damages += [damage for entry in layout.ENTRIES for damage in _array_damages(shard, entry, record)]
    return damages


def _wrong_files(shard: Path, record: ShardRecord) -> Iterator[Damage]:
    for name, digest in record.files.items():
        path = shard / name
        if not path.is_file():
            yield Damage(path, "is gone")
        elif path.stat().st_size != digest.bytes:
            yield Damage(path, f"has {path.stat().st_size} bytes, not {digest.bytes}")
        elif sha256_file(path) != digest.sha256:
            yield Damage(path, "has other bytes than were written")


def _extra_files(shard: Path, record: ShardRecord) -> Iterator[Damage]:
    wanted = {shard / name for name in record.files}
    folders = {parent for path in wanted for parent in path.parents}
    for path in sorted(shard.rglob("*")):
        if path not in wanted and path not in folders:
            yield Damage(path, "does not belong to the shard")


def _array_damages(shard: Path, entry: layout.Entry, record: ShardRecord) -> Iterator[Damage]:
    """Whether one array is what the format says, which proves the writer and not only the disk."""
    name = f"{entry.path}/{zarr3.METADATA_NAME}"
    if name not in record.files:
        if record.rows and not entry.optional:
            yield Damage(shard / name, "is missing from the shard")
        return
    document = (shard / name).read_bytes()
    metadata = zarr3.parse_array(document)
    if array_document(entry.path, metadata) != document or metadata.dtype.name not in entry.dtypes:
        yield Damage(shard / name, "does not describe this array as the format does")
    elif entry.dimensions[0] == "sample" and metadata.shape[0] != record.rows:
        yield Damage(shard / name, f"has {metadata.shape[0]} samples, not {record.rows}")
    elif not _checksums_match(shard / entry.path / metadata.chunk_name, metadata):
        yield Damage(shard / entry.path / metadata.chunk_name, "a crc32c inside does not match")


def _checksums_match(path: Path, metadata: zarr3.ArrayMetadata) -> bool:
    data = path.read_bytes() if metadata.record_shape is None else np.memmap(path, np.uint8, mode="r")
    if isinstance(data, bytes):
        return zarr3.crc32c_bytes(data[: -zarr3.CRC_BYTES]) == data[-zarr3.CRC_BYTES :]
    size = metadata.record_bytes
    end = metadata.n_records * (size + zarr3.CRC_BYTES)
    if data[end:].tobytes() != zarr3.index_bytes(size, metadata.n_records):
        return False
    records = data[:end].reshape(metadata.n_records, size + zarr3.CRC_BYTES)
    stored = np.ascontiguousarray(records[:, size:]).view("<u4")[:, 0]
    return all(zarr3.crc32c(record[:size]) == crc for record, crc in zip(records, stored, strict=True))


def verify_folder(cache: CacheFolder, *, ignore: Collection[str] = ()) -> list[Damage]:
    """Everything but the insides of shards: cache.json, attachments, ledger, snapshots, HEAD.json, stray files.

    Partial names are no damage: a run may be at work, and the next one sweeps what a dead one left.
    ignore: names at the top of the folder that belong to someone else.
    """
    root = cache.root
    damages = [*_description_damages(cache), *_ledger_damages(cache), *_snapshot_damages(cache)]
    attachments = _attachments(cache)
    known = {CACHE_JSON, HEAD_JSON, "shards", "ledger", "snapshots", *attachments, *ignore}
    damages += [Damage(path, "does not belong to the cache") for path in _entries(root) if path.name not in known]
    return damages


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if not is_partial(path)]


def _attachments(cache: CacheFolder) -> Mapping[str, object]:
    try:
        listed: Mapping[str, object] = cache.description()["attachments"]
        return listed
    except (DamageError, InputError):
        return {}


def _description_damages(cache: CacheFolder) -> list[Damage]:
    try:
        cache.description()
        return [Damage(path, "is gone or has other bytes than were written") for path in cache.damaged_attachments()]
    except (DamageError, InputError) as error:
        return [Damage(cache.root / CACHE_JSON, str(error))]


def _ledger_damages(cache: CacheFolder) -> list[Damage]:
    damages = []
    for path in _entries(cache.ledger_dir):
        if path.suffix != ".json":
            damages.append(Damage(path, "does not belong to the ledger"))
            continue
        try:
            read_record(path)
        except DamageError as error:
            damages.append(Damage(path, str(error)))
    recorded = cache.finished().keys()
    for path in _entries(cache.shards_dir):
        if path.suffix != ".zarr" or path.stem not in recorded:
            damages.append(Damage(path, "has no ledger record"))
    return damages


def _snapshot_damages(cache: CacheFolder) -> list[Damage]:
    damages = [
        damage
        for path in sorted(cache.snapshots_dir.glob("*.parquet"))
        for damage in _one_snapshot_damages(cache, path)
    ]
    for path in _entries(cache.snapshots_dir):
        if path.suffix not in (".parquet", ".json") or not path.with_suffix(".parquet").is_file():
            damages.append(Damage(path, "does not belong to a snapshot"))
    try:
        for dataset, digest in read_head(cache.root).items():
            if not snapshot_path(cache.root, digest).is_file():
                damages.append(Damage(cache.root / HEAD_JSON, f"names a snapshot of {dataset} that is gone ({digest})"))
    except DamageError as error:
        damages.append(Damage(cache.root / HEAD_JSON, str(error)))
    return damages


def _one_snapshot_damages(cache: CacheFolder, path: Path) -> list[Damage]:
    try:
        table = read_snapshot(path)
    except (DamageError, InputError, json.JSONDecodeError) as error:
        return [Damage(path, str(error))]
    if snapshot_digest(cache.fingerprint, table) != path.stem:
        return [Damage(path, "its content does not give its name")]
    return []
