"""The few parts of Zarr v3 that a shard needs, byte for byte: metadata documents, chunks, and the index of a shard.

Written here and not through zarr-python because a shard's bytes are part of its identity (zarr-python's order of inner
chunks and its metadata may change with its version), because it holds a whole shard in memory where we append one
record, and because it re-reads the index for each inner chunk (FACTS: 53 records/s). Tests read everything back with
zarr-python. Specification: zarr-specs v3.0 core, codecs bytes, crc32c 1.0, sharding_indexed 1.0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from storage.durable import canonical_json

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
"""Of an inner chunk in a shard's index: uint64 offset, uint64 length."""

_NAME = "zarr.json"
METADATA_NAME = _NAME


def crc32c(data: bytes | NDArray[Any]) -> int:
    """CRC-32C (Castagnoli) of bytes, or of a contiguous read-only array without copying it."""
    return cast(int, google_crc32c.value(data))


def crc32c_bytes(data: bytes) -> bytes:
    """The four bytes that Zarr's crc32c codec appends."""
    return crc32c(data).to_bytes(CRC_BYTES, "little")


def extend_crc32c(crc: int, data: bytes) -> int:
    """The CRC of what `crc` stands for followed by `data`."""
    return cast(int, google_crc32c.extend(crc, data))


def chunk_name(dimensions: int) -> str:
    """File name of the one chunk of an array (`default` key encoding with separator `.`: one file, no folders)."""
    return "c" + ".0" * dimensions


@dataclass(frozen=True)
class ArrayMetadata:
    """What we need of an array's zarr.json."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    dimensions: tuple[str, ...]
    record_shape: tuple[int, ...] | None
    """Shape of an inner chunk when the array is sharded, else None: then one chunk holds it all."""

    @property
    def chunk_name(self) -> str:
        return chunk_name(len(self.shape))

    @property
    def n_records(self) -> int:
        assert self.record_shape is not None
        return math.prod(length // part for length, part in zip(self.shape, self.record_shape, strict=True))

    @property
    def record_bytes(self) -> int:
        """Bytes of one record, without its crc32c."""
        assert self.record_shape is not None
        return math.prod(self.record_shape) * self.dtype.itemsize


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """zarr.json of a group."""
    return canonical_json({"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)})


def array_document(metadata: ArrayMetadata, attributes: Mapping[str, Any]) -> bytes:
    """zarr.json of an array that is one chunk; records of a sharded one carry a crc32c each."""
    codecs: list[dict[str, Any]] = [_bytes_codec(metadata.dtype), {"name": "crc32c"}]
    if metadata.record_shape is not None:
        inner = {
            "chunk_shape": list(metadata.record_shape),
            "codecs": codecs,
            "index_codecs": [_bytes_codec(np.dtype(np.uint64)), {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": inner}]
    return canonical_json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(metadata.shape),
            "data_type": metadata.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(metadata.shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": _fill_value(metadata.dtype),
            "codecs": codecs,
            "attributes": dict(attributes),
            "dimension_names": list(metadata.dimensions),
            "storage_transformers": [],
        }
    )


def _bytes_codec(dtype: np.dtype[Any]) -> dict[str, Any]:
    if dtype.itemsize == 1:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}


def _fill_value(dtype: np.dtype[Any]) -> bool | float | int:
    if dtype.kind == "b":
        return False
    return 0.0 if dtype.kind == "f" else 0


@lru_cache(maxsize=1024)  # all full shards of a cache share their arrays' documents
def parse_array(document: bytes) -> ArrayMetadata:
    """Read an array's zarr.json; ValueError unless it is exactly what `array_document` writes."""
    fields = json.loads(document)
    codec = fields["codecs"][0]
    inner = codec["configuration"]["chunk_shape"] if codec["name"] == "sharding_indexed" else None
    metadata = ArrayMetadata(
        shape=tuple(fields["shape"]),
        dtype=np.dtype(fields["data_type"]),
        dimensions=tuple(fields["dimension_names"]),
        record_shape=None if inner is None else tuple(inner),
    )
    if array_document(metadata, fields["attributes"]) != document:
        raise ValueError("is not an array document of this format")
    return metadata


def little_endian(values: NDArray[Any]) -> bytes:
    """The array's bytes in C order, little-endian whatever the machine."""
    return np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def from_little_endian(data: bytes | memoryview, metadata: ArrayMetadata) -> NDArray[Any]:
    """Read-only array over the bytes of a whole chunk (without its crc32c)."""
    return np.frombuffer(data, dtype=metadata.dtype.newbyteorder("<")).reshape(metadata.shape)


def index_bytes(record_bytes: int, n_records: int) -> bytes:
    """The index of a shard whose records, each with its crc32c, stand one after the other from the start."""
    stride = record_bytes + CRC_BYTES
    index = np.empty((n_records, 2), dtype="<u8")
    index[:, 0] = np.arange(n_records, dtype=np.uint64) * np.uint64(stride)
    index[:, 1] = stride
    data = index.tobytes()
    return data + crc32c_bytes(data)
