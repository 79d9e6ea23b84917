"""Proving that a cache is what it was when it was written: every file, every byte, and nothing besides.

`quick_check` looks at names and sizes only (for `plan`); `verify_shard` and `verify_folder` read everything, and
`verify_joins` whether snapshots and shards are about the same samples. None changes anything. Memory is bounded by
what one snapshot and one array of labels take: pictures and features are read in pieces.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage import layout, zarr3
from storage.cache import CacheFolder
from storage.durable import is_partial, sha256_file
from storage.errors import DamageError, InputError
from storage.identity import CACHE_JSON
from storage.ledger import WITHDRAWN, ShardRecord, read_record, read_withdrawal
from storage.shards import array_document, record_from_disk, unpadded_ids
from storage.snapshots import HEAD_JSON, known_snapshots, read_head, read_snapshot, snapshot_digest, snapshot_path


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
    data = np.memmap(path, np.uint8, mode="r")
    if metadata.record_shape is None:
        return zarr3.crc32c(data[: -zarr3.CRC_BYTES]) == int.from_bytes(data[-zarr3.CRC_BYTES :].tobytes(), "little")
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
        if path.suffix == WITHDRAWN:
            damages += _withdrawal_damages(path)
            continue
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
            damages.append(Damage(path, f"has no ledger record ({cache.record_path(path.stem)})"))
    return damages


def _withdrawal_damages(note: Path) -> list[Damage]:
    """What an earlier `verify` found in a shard that nobody has made again since."""
    try:
        return [Damage(note, f"the shard's record was withdrawn: {why}") for why in read_withdrawal(note)]
    except DamageError as error:
        return [Damage(note, str(error))]


def _snapshot_damages(cache: CacheFolder) -> list[Damage]:
    damages = [
        damage
        for path in sorted(cache.snapshots_dir.glob("*.parquet"))
        for damage in _one_snapshot_damages(cache, path)
    ]
    for path in _entries(cache.snapshots_dir):
        if path.suffix not in (".parquet", ".json") or not path.with_suffix(".parquet").is_file():
            damages.append(Damage(path, "does not belong to a snapshot"))
    if known_snapshots(cache.root) and not (cache.root / HEAD_JSON).is_file():
        damages.append(Damage(cache.root / HEAD_JSON, "is gone: no snapshot is current"))
    try:
        for dataset, digest in read_head(cache.root).items():
            if not snapshot_path(cache.root, digest).is_file():
                named = f"is gone, and {HEAD_JSON} names it as the snapshot of {dataset}"
                damages.append(Damage(snapshot_path(cache.root, digest), named))
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


def verify_joins(cache: CacheFolder, known_damaged: Collection[str] = ()) -> Iterator[Damage]:
    """Whether every row that a current snapshot names is in its shard, under the sample's id.

    known_damaged: input hashes of shards that are not to be read. Damaged snapshots are `verify_folder`'s to tell.
    """
    try:
        snapshots = {
            name: read_snapshot(snapshot_path(cache.root, digest)) for name, digest in read_head(cache.root).items()
        }
    except (DamageError, InputError):
        return
    for dataset, table in snapshots.items():
        for input_hash, ids, rows in _rows_by_shard(table):
            record = cache.finished_record(input_hash)
            if record is None and not cache.shard_path(input_hash).exists():
                yield Damage(cache.shard_path(input_hash), f"is gone, and the snapshot of {dataset} names it")
            elif record is not None and input_hash not in known_damaged:
                yield from _join_damages(cache.shard_path(input_hash), ids, rows)


def _rows_by_shard(table: pa.Table) -> Iterator[tuple[str, pa.Array, NDArray[np.int32]]]:
    """(input hash, sample ids, their rows) for each shard of a snapshot."""
    cached = table.filter(pc.is_valid(table["row"])).select(["sample_id", "shard", "row"]).sort_by("shard")
    if not len(cached):
        return
    ids, rows = cached["sample_id"].combine_chunks(), cached["row"].to_numpy()
    names = pc.run_end_encode(cached["shard"].combine_chunks())
    start = 0
    for input_hash, end in zip(names.values.to_pylist(), names.run_ends.to_pylist(), strict=True):
        yield input_hash, ids.slice(start, end - start), rows[start:end]
        start = end


def _join_damages(shard: Path, ids: pa.Array, rows: NDArray[np.int32]) -> Iterator[Damage]:
    folder = shard / layout.SAMPLE_ID
    metadata = zarr3.parse_array((folder / zarr3.METADATA_NAME).read_bytes())
    data = (folder / metadata.chunk_name).read_bytes()[: -zarr3.CRC_BYTES]
    stored = unpadded_ids(zarr3.from_little_endian(data, metadata))
    for row, sample_id in zip(rows.tolist(), ids.to_pylist(), strict=True):
        found = stored[row] if row < len(stored) else "nothing"
        if found != sample_id:
            yield Damage(folder / metadata.chunk_name, f"row {row} is {found}, the snapshot has {sample_id} there")
            return  # one line a shard: what was swapped once was often swapped throughout
