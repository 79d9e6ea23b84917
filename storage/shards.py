"""Writing one shard, sample by sample, and checking a whole one by itself.

A shard is a Zarr v3 group (docs/format.md). Features and pictures go to the disk as they come, so that the memory a
writer needs is one sample's, not the shard's (755 MB at the full grid in float16). The group's zarr.json comes last and
carries `content_sha256`, over its own attributes and the digests of all other files: a shard proves itself whole
even without its ledger record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from storage import layout, zarr3
from storage.durable import canonical_json, sha256_bytes, sha256_file
from storage.errors import DamageError
from storage.ledger import FileDigest, Quarantined, ShardRecord, quarantine_list, read_quarantine

ATTRIBUTE = "handstill"
"""Our key in the attributes of a shard's group."""


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says about itself in the attributes of its group."""

    input_hash: str
    dataset: str
    role: str
    samples_in: int
    quarantined: tuple[Quarantined, ...]
    provenance: Mapping[str, Any]

    def document(self, rows: int) -> dict[str, Any]:
        return {
            "format_version": layout.FORMAT_VERSION,
            "input_hash": self.input_hash,
            "dataset": self.dataset,
            "role": self.role,
            "samples_in": self.samples_in,
            "rows": rows,
            "quarantined": quarantine_list(self.quarantined),
            "provenance": dict(self.provenance),
        }


class _HashedFile:
    """A new file whose size, sha256 and crc32c are known when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("xb")
        self._sha256 = hashlib.sha256()
        self.bytes = 0
        self.crc32c = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.bytes += len(data)
        self.crc32c = zarr3.extend_crc32c(self.crc32c, data)

    def close(self) -> FileDigest:
        self._file.close()
        return FileDigest(self.bytes, self._sha256.hexdigest())


class ShardWriter:
    """Writes a shard into a folder that is not yet published; use as a context manager.

    The first sample decides the shapes; a later one that differs is our own mistake (AssertionError).
    """

    def __init__(self, folder: Path, feature_dimension: str = "channel") -> None:
        """feature_dimension: what the last dimension of `teacher/features` is called (storage/codecs.py)."""
        folder.mkdir()
        self.folder = folder
        self.rows = 0
        self._columns: dict[str, list[NDArray[Any]]] = {}
        self._sample_ids: list[bytes] = []
        self._lengths: list[list[int]] = []
        self._crcs: list[list[int]] = []
        self._files: dict[str, FileDigest] = {}
        self._streams: dict[str, _HashedFile] = {}
        self._feature_record: NDArray[Any] | None = None
        self._feature_dimensions = (*layout.BY_PATH[layout.FEATURES].dimensions[:-1], feature_dimension)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for stream in self._streams.values():
            stream.close()

    def append(self, sample_id: str, values: Mapping[str, NDArray[Any]], pictures: Sequence[bytes]) -> None:
        """Add one sample.

        `values`: by array path (storage/layout.py), a sample's entry: (k, ...) where there is one a view, features
        already encoded. `pictures`: the k encoded pictures.
        """
        features = values[layout.FEATURES]
        assert len(features) == len(pictures)
        if not self.rows:
            self._open_streams(features)
        for path, value in values.items():
            if path != layout.FEATURES:
                self._add(path, value)
        for record in features:
            assert self._feature_record is not None
            assert (record.shape, record.dtype) == (self._feature_record.shape, self._feature_record.dtype)
            data = zarr3.little_endian(record)
            self._streams[layout.FEATURES].write(data + zarr3.crc32c_bytes(data))
        for picture in pictures:
            self._streams[layout.PICTURE_BYTES].write(picture)
        self._lengths.append([len(picture) for picture in pictures])
        self._crcs.append([zarr3.crc32c(picture) for picture in pictures])
        self._sample_ids.append(sample_id.encode())
        self.rows += 1

    def finish(self, header: ShardHeader) -> ShardRecord:
        """Write the rest, the group's own document last; returns the shard's record. The folder is not yet durable."""
        assert header.samples_in == self.rows + len(header.quarantined), header.input_hash
        if self.rows:
            self._finish_features()
            self._finish_pictures()
            for path, column in self._columns.items():
                self._write_array(path, np.stack(column))
            for group in layout.GROUPS:
                self._write(f"{group}/{zarr3.METADATA_NAME}", zarr3.group_document({}))
        attributes = header.document(self.rows)
        attributes["content_sha256"] = content_sha256(attributes, self._files)
        self._write(zarr3.METADATA_NAME, zarr3.group_document({ATTRIBUTE: attributes}))
        return _record(header, self.rows, self._files)

    def _open_streams(self, features: NDArray[Any]) -> None:
        self._feature_record = features[0]
        for path, dimensions in ((layout.FEATURES, features.ndim + 1), (layout.PICTURE_BYTES, 1)):
            (self.folder / path).mkdir(parents=True)
            self._streams[path] = _HashedFile(self.folder / path / zarr3.chunk_name(dimensions))

    def _add(self, path: str, value: NDArray[Any]) -> None:
        entry = layout.BY_PATH[path]
        assert path not in layout.WRITERS_OWN, path
        assert value.dtype.name in entry.dtypes, (path, value.dtype)
        assert value.ndim == len(entry.dimensions) - 1, (path, value.shape)
        column = self._columns.setdefault(path, [])
        assert len(column) == self.rows, f"{path} is not given for every sample"
        assert not column or column[0].shape == value.shape, (path, value.shape)
        column.append(value)

    def _finish_features(self) -> None:
        record = self._feature_record
        assert record is not None
        n_views = len(self._lengths[0])
        stream = self._streams.pop(layout.FEATURES)
        stream.write(zarr3.index_bytes(record.nbytes, self.rows * n_views))
        shape = (self.rows, n_views, *record.shape)
        self._describe(layout.FEATURES, shape, record.dtype, stream.close(), record_shape=(1, 1, *record.shape))

    def _finish_pictures(self) -> None:
        stream = self._streams.pop(layout.PICTURE_BYTES)
        length = stream.bytes
        stream.write(stream.crc32c.to_bytes(zarr3.CRC_BYTES, "little"))
        self._describe(layout.PICTURE_BYTES, (length,), np.dtype(np.uint8), stream.close())
        lengths = np.array(self._lengths, dtype=np.int64)
        self._write_array(layout.PICTURE_OFFSET, (np.cumsum(lengths.ravel()) - lengths.ravel()).reshape(lengths.shape))
        self._write_array(layout.PICTURE_LENGTH, lengths)
        self._write_array(layout.PICTURE_CRC32C, np.array(self._crcs, dtype=np.uint32))
        self._write_array(layout.SAMPLE_ID, padded_ids(self._sample_ids))

    def _write_array(self, path: str, values: NDArray[Any]) -> None:
        data = zarr3.little_endian(values)
        name = f"{path}/{zarr3.chunk_name(values.ndim)}"
        self._describe(path, values.shape, values.dtype, self._write(name, data + zarr3.crc32c_bytes(data)))

    def _describe(
        self,
        path: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        chunk: FileDigest,
        record_shape: tuple[int, ...] | None = None,
    ) -> None:
        """Note the digest of an array's chunk and write its zarr.json."""
        dimensions = self._feature_dimensions if path == layout.FEATURES else layout.BY_PATH[path].dimensions
        metadata = zarr3.ArrayMetadata(shape, dtype, dimensions, record_shape)
        self._files[f"{path}/{metadata.chunk_name}"] = chunk
        self._write(f"{path}/{zarr3.METADATA_NAME}", array_document(path, metadata))

    def _write(self, name: str, data: bytes) -> FileDigest:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)
        self._files[name] = FileDigest(len(data), sha256_bytes(data))
        return self._files[name]


def array_document(path: str, metadata: zarr3.ArrayMetadata) -> bytes:
    """zarr.json of one of our arrays."""
    entry = layout.BY_PATH[path]
    return zarr3.array_document(metadata, {"unit": entry.unit, "frame": layout.FRAME, "about": entry.about})


def padded_ids(sample_ids: Sequence[bytes]) -> NDArray[np.uint8]:
    """Ids as rows of bytes (n, longest), zeros after the end: a type that every Zarr tool knows."""
    longest = max(map(len, sample_ids))
    return np.frombuffer(b"".join(name.ljust(longest, b"\0") for name in sample_ids), np.uint8).reshape(-1, longest)


def unpadded_ids(rows: NDArray[np.uint8]) -> list[str]:
    """The ids that `padded_ids` wrote."""
    return [bytes(row).rstrip(b"\0").decode() for row in rows]


def content_sha256(attributes: Mapping[str, Any], files: Mapping[str, FileDigest]) -> str:
    """Digest of a shard's header and of all its files but the group's own zarr.json."""
    listed = {name: [digest.bytes, digest.sha256] for name, digest in files.items() if name != zarr3.METADATA_NAME}
    header = {key: value for key, value in attributes.items() if key != "content_sha256"}
    return sha256_bytes(canonical_json({"attributes": header, "files": listed}))


def hash_files(shard: Path) -> dict[str, FileDigest]:
    """Digests of every file under a shard's folder, read in full."""
    paths = sorted(path for path in shard.rglob("*") if not path.is_dir())
    return {path.relative_to(shard).as_posix(): FileDigest(path.stat().st_size, sha256_file(path)) for path in paths}


def record_from_disk(shard: Path, files: Mapping[str, FileDigest] | None = None) -> ShardRecord:
    """The record of a published shard, from its own bytes; DamageError unless it proves itself whole.

    files: the digests of its files, where the caller has just read them.
    """
    document_path = shard / zarr3.METADATA_NAME
    try:
        document = document_path.read_bytes()
        attributes = json.loads(document)["attributes"][ATTRIBUTE]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamageError(
            f"{document_path} is damaged ({error}); run `handstill run` to make the shard again"
        ) from error
    files = hash_files(shard) if files is None else files
    whole = attributes.get("content_sha256") == content_sha256(attributes, files)
    if not whole or zarr3.group_document({ATTRIBUTE: attributes}) != document:
        raise DamageError(f"{shard} is damaged: its bytes are not those it was finished with; run `handstill run`")
    header = ShardHeader(
        input_hash=attributes["input_hash"],
        dataset=attributes["dataset"],
        role=attributes["role"],
        samples_in=attributes["samples_in"],
        quarantined=read_quarantine(attributes["quarantined"]),
        provenance=attributes["provenance"],
    )
    return _record(header, attributes["rows"], files)


def _record(header: ShardHeader, rows: int, files: Mapping[str, FileDigest]) -> ShardRecord:
    return ShardRecord(
        input_hash=header.input_hash,
        dataset=header.dataset,
        role=header.role,
        samples_in=header.samples_in,
        rows=rows,
        quarantined=header.quarantined,
        provenance=header.provenance,
        files=dict(files),
    )
