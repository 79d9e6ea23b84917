"""Caches that are whole and wrong: content changed as a bug or a forger would, every checksum right afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage import layout, zarr3
from storage.cache import CacheFolder
from storage.ledger import write_record
from storage.shards import ATTRIBUTE, content_sha256, hash_files, record_from_disk

Arrays = dict[str, NDArray[Any]]


def forge(shard: Path, change: Callable[[Arrays], None]) -> None:
    """Change a shard's arrays (by path, writable, shapes kept) and write chunks, checksums, digests, record to fit."""
    arrays = read_arrays(shard)
    change(arrays)
    write_arrays(shard, arrays)


def read_arrays(shard: Path) -> Arrays:
    """All arrays of a shard, as stored."""
    return {entry.path: _read(shard / entry.path) for entry in layout.ENTRIES if (shard / entry.path).is_dir()}


def _metadata(folder: Path) -> zarr3.ArrayMetadata:
    return zarr3.parse_array((folder / zarr3.METADATA_NAME).read_bytes())


def _read(folder: Path) -> NDArray[Any]:
    metadata = _metadata(folder)
    data = (folder / metadata.chunk_name).read_bytes()
    if metadata.record_shape is None:
        return zarr3.from_little_endian(data[: -zarr3.CRC_BYTES], metadata).copy()
    stride = metadata.record_bytes + zarr3.CRC_BYTES
    records = np.frombuffer(data[: metadata.n_records * stride], np.uint8).reshape(metadata.n_records, stride)
    body = np.ascontiguousarray(records[:, : metadata.record_bytes])
    return body.view(metadata.dtype).reshape(metadata.shape).copy()


def write_arrays(shard: Path, arrays: Arrays) -> None:
    """Write arrays into a shard that has them, in place, and record it anew."""
    for path, values in arrays.items():
        metadata = _metadata(shard / path)
        assert (values.shape, values.dtype) == (metadata.shape, metadata.dtype)
        (shard / path / metadata.chunk_name).write_bytes(_chunk(values, metadata))
    document = json.loads((shard / zarr3.METADATA_NAME).read_bytes())
    attributes = document["attributes"][ATTRIBUTE]
    attributes["content_sha256"] = content_sha256(attributes, hash_files(shard))
    (shard / zarr3.METADATA_NAME).write_bytes(zarr3.group_document({ATTRIBUTE: attributes}))
    write_record(CacheFolder(shard.parent.parent).record_path(shard.stem), record_from_disk(shard))


def _chunk(values: NDArray[Any], metadata: zarr3.ArrayMetadata) -> bytes:
    if metadata.record_shape is None:
        data = zarr3.little_endian(values)
        return data + zarr3.crc32c_bytes(data)
    records = [record.tobytes() for record in values.reshape(metadata.n_records, -1)]
    body = b"".join(record + zarr3.crc32c_bytes(record) for record in records)
    return body + zarr3.index_bytes(metadata.record_bytes, metadata.n_records)


def exchange(arrays: Arrays, paths: list[str], one: int = 0, other: int = 1) -> None:
    """Let two rows of a shard change places in these arrays."""
    for path in paths:
        arrays[path][[one, other]] = arrays[path][[other, one]]


def exchange_between(one: Path, other: Path, paths: list[str]) -> None:
    """Let the first rows of two shards change places in these arrays."""
    left, right = read_arrays(one), read_arrays(other)
    for path in paths:
        left[path][0], right[path][0] = right[path][0].copy(), left[path][0].copy()
    write_arrays(one, left)
    write_arrays(other, right)
