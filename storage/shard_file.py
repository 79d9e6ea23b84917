"""One published shard, open for reading, with every byte checked the first time it is touched.

Standard Zarr does not force zarr-python's path on a reader: a record of features is a slice of a memory map, found
through the shard's own index, and its crc32c is checked once while the shard is open. Small arrays are read whole.
Every array's metadata is checked against the shard's ledger record before any of it is believed.
"""

from __future__ import annotations

import errno
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage import layout, zarr3
from storage.codecs import Codec
from storage.durable import sha256_bytes
from storage.errors import DamageError, WorkError
from storage.ledger import ShardRecord
from storage.shards import unpadded_ids


class ShardFile:
    """One published shard, open for reading."""

    def __init__(self, path: Path, record: ShardRecord, codec: Codec) -> None:
        """codec: of the shard's cache (`CacheFolder.codec`)."""
        self.path = path
        self._codec = codec
        self._record = record
        self.entries = tuple(entry.path for entry in layout.ENTRIES if self._has(entry.path))
        self._metadata = {name: self._read_metadata(name) for name in self.entries}
        self._maps: list[mmap.mmap] = []
        self._features = self._map_features()
        self._features_checked = np.zeros(self._metadata[layout.FEATURES].n_records, dtype=np.bool_)
        self._pictures = self._map(layout.PICTURE_BYTES)
        self._pictures_checked = np.zeros(self._features_checked.shape, dtype=np.bool_)
        streamed = (layout.FEATURES, layout.PICTURE_BYTES)
        self.small: dict[str, NDArray[Any]] = {name: self._whole(name) for name in self.entries if name not in streamed}
        self.sample_ids = unpadded_ids(self.small[layout.SAMPLE_ID])
        self.n_views: int = self._metadata[layout.FEATURES].shape[1]

    def _has(self, name: str) -> bool:
        return f"{name}/{zarr3.METADATA_NAME}" in self._record.files

    def damaged(self, name: str, what: str) -> DamageError:
        return DamageError(
            f"{self.path / name} is damaged: {what}. Run `handstill verify`, which withdraws damaged shards, "
            "then `handstill run`, which makes them again."
        )

    def _unreadable(self, name: str, error: OSError) -> Exception:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return WorkError(f"{self.path / name}: too many open files; raise the limit (ulimit -n)")
        return self.damaged(name, f"it cannot be read ({error.strerror})")

    def _read(self, name: str) -> bytes:
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise self._unreadable(name, error) from error
        if len(data) != self._record.files[name].bytes:
            raise self.damaged(name, f"it has {len(data)} bytes, not {self._record.files[name].bytes}")
        return data

    def _read_metadata(self, array: str) -> zarr3.ArrayMetadata:
        name = f"{array}/{zarr3.METADATA_NAME}"
        data = self._read(name)
        if sha256_bytes(data) != self._record.files[name].sha256:
            raise self.damaged(name, "its bytes are not those of the ledger")
        return zarr3.parse_array(data)

    def _whole(self, array: str) -> NDArray[Any]:
        metadata = self._metadata[array]
        name = f"{array}/{metadata.chunk_name}"
        data = self._read(name)
        body = data[: -zarr3.CRC_BYTES]
        if zarr3.crc32c_bytes(body) != data[-zarr3.CRC_BYTES :]:
            raise self.damaged(name, "its crc32c does not match")
        return zarr3.from_little_endian(body, metadata)

    def _map(self, array: str) -> NDArray[np.uint8]:
        """The bytes of an array's chunk file, mapped read-only."""
        name = f"{array}/{self._metadata[array].chunk_name}"
        try:
            with (self.path / name).open("rb") as file:
                self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                mapped = np.frombuffer(self._maps[-1], np.uint8)
        except OSError as error:
            raise self._unreadable(name, error) from error
        except ValueError as error:  # an empty file
            raise self.damaged(name, "it is empty") from error
        if len(mapped) != self._record.files[name].bytes:
            raise self.damaged(name, f"it has {len(mapped)} bytes, not {self._record.files[name].bytes}")
        return mapped

    def _map_features(self) -> NDArray[np.uint8]:
        """The mapped records (sample * view, bytes with crc32c), after checking that the index says just that."""
        metadata = self._metadata[layout.FEATURES]
        data = self._map(layout.FEATURES)
        stride = metadata.record_bytes + zarr3.CRC_BYTES
        index = zarr3.index_bytes(metadata.record_bytes, metadata.n_records)
        body = metadata.n_records * stride
        if data[body:].tobytes() != index:
            raise self.damaged(f"{layout.FEATURES}/{metadata.chunk_name}", "its index does not match")
        return data[:body].reshape(metadata.n_records, stride)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """(h, w, c) of a record."""
        return self._metadata[layout.FEATURES].shape[2:]

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """(h, w, C) of a record, decoded."""
        *grid, stored = self.stored_shape
        return (*grid, self._codec.channels(stored))

    @property
    def feature_dtype(self) -> np.dtype[Any]:
        """As stored: float16, int8 or uint8."""
        return self._metadata[layout.FEATURES].dtype

    def stored_features(self, row: int, view: int) -> NDArray[Any]:
        """The features (h,w,c) of one view as stored: a read-only piece of the memory map, checked once."""
        metadata = self._metadata[layout.FEATURES]
        index = row * self.n_views + view
        record = self._features[index]
        if not self._features_checked[index]:
            stored_crc = int.from_bytes(record[metadata.record_bytes :].tobytes(), "little")
            if zarr3.crc32c(record[: metadata.record_bytes]) != stored_crc:
                where = f"the crc32c of row {row}, view {view} does not match"
                raise self.damaged(f"{layout.FEATURES}/{metadata.chunk_name}", where)
            self._features_checked[index] = True
        values: NDArray[Any] = record[: metadata.record_bytes].view(metadata.dtype.newbyteorder("<"))
        return values.reshape(self.stored_shape)

    def features_into(self, row: int, view: int, out: NDArray[np.float32]) -> None:
        """Decode the features (h,w,C) of one view into `out`."""
        scale = self.small.get(layout.FEATURES_SCALE)
        self._codec.decode(self.stored_features(row, view), None if scale is None else scale[row, view], out)

    def forget_pages(self) -> None:
        """Give back the memory of what was read through the maps; what is wanted again is read from the file again.

        For whoever reads a shard once from end to end: a process keeps what it touched of a map until the map is gone.
        """
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def picture_bytes(self, row: int, view: int) -> bytes:
        """One encoded picture."""
        start = int(self.small[layout.PICTURE_OFFSET][row, view])
        data = self._pictures[start : start + int(self.small[layout.PICTURE_LENGTH][row, view])].tobytes()
        index = row * self.n_views + view
        if not self._pictures_checked[index]:
            if zarr3.crc32c(data) != self.small[layout.PICTURE_CRC32C][row, view]:
                name = f"{layout.PICTURE_BYTES}/{self._metadata[layout.PICTURE_BYTES].chunk_name}"
                raise self.damaged(name, f"the crc32c of the picture of row {row}, view {view} does not match")
            self._pictures_checked[index] = True
        return data
