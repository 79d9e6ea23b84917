"""One published shard, open for reading, with every byte checked the first time it is touched.

Standard Zarr does not force zarr-python's path on a reader: a record of features is a slice of a memory map, found
through the shard's own index, and its crc32c is checked once while the shard is open. Small arrays are read whole.
Every array's metadata is checked against the shard's ledger record before any of it is believed.

A record is one view of one sample: record = row * n_views + view.
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
from storage.durable import of_this_format, sha256_bytes
from storage.errors import DamageError, WorkError
from storage.ledger import FileDigest, ShardRecord
from storage.shards import unpadded_ids


class ShardFile:
    """One published shard, open for reading."""

    def __init__(self, path: Path, record: ShardRecord, codec: Codec) -> None:
        """codec: of the shard's cache (`CacheFolder.codec`)."""
        self.path = path
        self._codec = codec
        self._record = record
        self.entries = tuple(entry.path for entry in layout.ENTRIES if self._has(entry.path))
        for entry in layout.ENTRIES:
            if not entry.optional:
                self._listed(f"{entry.path}/{zarr3.METADATA_NAME}")
        self._metadata = {name: self._read_metadata(name) for name in self.entries}
        features = self._metadata[layout.FEATURES]
        self.n_views: int = features.shape[1]
        self.record_bytes = features.record_bytes
        self.stride = features.record_bytes + zarr3.CRC_BYTES
        """From the start of a record of features to the next: its bytes, then their crc32c."""
        self._feature_map = self._map(layout.FEATURES)
        self.features = self._records()
        """All records, mapped; whoever takes one looks at `features_checked` first."""
        self.features_checked = bytearray(features.n_records)
        self._picture_map = self._map(layout.PICTURE_BYTES)
        self._pictures_checked = bytearray(features.n_records)
        streamed = (layout.FEATURES, layout.PICTURE_BYTES)
        self.small: dict[str, NDArray[Any]] = {name: self._whole(name) for name in self.entries if name not in streamed}
        self.by_record = {
            name: values.reshape(-1, *values.shape[2:]) for name, values in self.small.items() if layout.per_view(name)
        }
        """Of `small`, what there is once a view, with one leading axis: record = row * n_views + view."""
        scales = self.small.get(layout.FEATURES_SCALE)
        self.scales: memoryview | None = None if scales is None else scales.reshape(-1).view(np.uint8).data
        """The bytes of all scales, a record's beside the next's."""
        with of_this_format(str(path / layout.SAMPLE_ID)):
            self.sample_ids = unpadded_ids(self.small[layout.SAMPLE_ID])
        self._check_places()

    def _has(self, name: str) -> bool:
        return f"{name}/{zarr3.METADATA_NAME}" in self._record.files

    def _listed(self, name: str) -> FileDigest:
        """What the ledger says of one of the shard's files."""
        found = self._record.files.get(name)
        if found is None:
            raise self.damaged(name, "the ledger does not list it")
        return found

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
        if len(data) != self._listed(name).bytes:
            raise self.damaged(name, f"it has {len(data)} bytes, not {self._listed(name).bytes}")
        return data

    def _read_metadata(self, array: str) -> zarr3.ArrayMetadata:
        name = f"{array}/{zarr3.METADATA_NAME}"
        data = self._read(name)
        if sha256_bytes(data) != self._listed(name).sha256:
            raise self.damaged(name, "its bytes are not those of the ledger")
        with of_this_format(str(self.path / name)):
            return self._checked(array, zarr3.parse_array(data))

    def _checked(self, array: str, metadata: zarr3.ArrayMetadata) -> zarr3.ArrayMetadata:
        """The metadata, once it is of the kind that this array has, over the rows that the ledger names."""
        entry = layout.BY_PATH[array]
        rows = metadata.shape[:1] == (self._record.rows,) or entry.dimensions[0] != "sample"
        leading = metadata.dimensions[:2] == entry.dimensions[:2]  # the last one's name follows the encoding
        named = leading and len(metadata.dimensions) == len(metadata.shape) == len(entry.dimensions)
        if metadata.dtype.name not in entry.dtypes or not named or not rows:
            raise self.damaged(array, f"it is {metadata.dtype.name} {metadata.shape} {metadata.dimensions}")
        return metadata

    def _whole(self, array: str) -> NDArray[Any]:
        metadata = self._metadata[array]
        name = f"{array}/{metadata.chunk_name}"
        data = self._read(name)
        body = data[: -zarr3.CRC_BYTES]
        if zarr3.crc32c_bytes(body) != data[-zarr3.CRC_BYTES :]:
            raise self.damaged(name, "its crc32c does not match")
        with of_this_format(str(self.path / name)):
            return zarr3.from_little_endian(body, metadata)

    def _map(self, array: str) -> mmap.mmap:
        """The bytes of an array's chunk file, mapped read-only.

        The kernel is told that they are read at random: its own reading ahead, 8 MB around each 80 kB on some disks,
        would read a whole shard for one record. `will_need` says what is really read next.
        """
        name = f"{array}/{self._metadata[array].chunk_name}"
        try:
            with (self.path / name).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped.madvise(mmap.MADV_RANDOM)
        except OSError as error:
            raise self._unreadable(name, error) from error
        except ValueError as error:  # an empty file
            raise self.damaged(name, "it is empty") from error
        if len(mapped) != self._listed(name).bytes:
            raise self.damaged(name, f"it has {len(mapped)} bytes, not {self._listed(name).bytes}")
        return mapped

    def _records(self) -> memoryview:
        """The mapped records, each with its crc32c, after checking that the index says just that."""
        metadata = self._metadata[layout.FEATURES]
        data = memoryview(self._feature_map)
        body = metadata.n_records * self.stride
        ends = body + metadata.n_records * zarr3.INDEX_ENTRY_BYTES + zarr3.CRC_BYTES
        if len(data) != ends or data[body:].tobytes() != zarr3.index_bytes(metadata.record_bytes, metadata.n_records):
            raise self.damaged(f"{layout.FEATURES}/{metadata.chunk_name}", "its index does not match")
        return data[:body]

    def _check_places(self) -> None:
        """Every array has as many views, and every picture lies inside the pictures' bytes."""
        odd = [name for name, values in self.small.items() if layout.per_view(name) and values.shape[1] != self.n_views]
        if odd:
            raise self.damaged(odd[0], f"it has {self.small[odd[0]].shape[1]} views a sample, not {self.n_views}")
        starts, lengths = self.small[layout.PICTURE_OFFSET], self.small[layout.PICTURE_LENGTH]
        whole = len(self._picture_map)
        if ((starts < 0) | (lengths < 0) | (starts > whole) | (lengths > whole - starts)).any():
            raise self.damaged(layout.PICTURE_OFFSET, "a picture lies outside of the pictures' bytes")

    def will_need(self, record: int) -> None:
        """Begin to fetch a record's features from the disk, if they were not read before, and do not wait for them."""
        if not self.features_checked[record]:
            _fetch(self._feature_map, record * self.stride, self.stride)

    def will_need_picture(self, record: int) -> None:
        """The same for its picture."""
        if not self._pictures_checked[record]:
            _fetch(self._picture_map, *self._picture_place(record))

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

    def check_features(self, record: int) -> None:
        """Compare a record with its crc32c, and remember that it was right."""
        start, end = record * self.stride, (record + 1) * self.stride
        values = np.frombuffer(self.features[start : start + self.record_bytes], np.uint8)  # crc32c takes no memoryview
        if zarr3.crc32c(values) != int.from_bytes(self.features[start + self.record_bytes : end], "little"):
            row, view = divmod(record, self.n_views)
            where = f"the crc32c of row {row}, view {view} does not match"
            raise self.damaged(f"{layout.FEATURES}/{self._metadata[layout.FEATURES].chunk_name}", where)
        self.features_checked[record] = True

    def stored_features(self, record: int) -> NDArray[Any]:
        """The features (h,w,c) of one record as stored: a read-only piece of the memory map, checked once."""
        if not self.features_checked[record]:
            self.check_features(record)
        start = record * self.stride
        dtype = self.feature_dtype.newbyteorder("<")
        return np.frombuffer(self.features[start : start + self.record_bytes], dtype).reshape(self.stored_shape)

    def features_into(self, record: int, out: NDArray[np.float32]) -> None:
        """Decode the features (h,w,C) of one record into `out`."""
        scale = self.by_record.get(layout.FEATURES_SCALE)
        self._codec.decode(self.stored_features(record), None if scale is None else scale[record], out)

    def forget_pages(self) -> None:
        """Give back the memory of what was read through the maps; what is wanted again is read from the file again.

        For whoever reads a shard once from end to end: a process keeps what it touched of a map until the map is gone.
        """
        for mapped in (self._feature_map, self._picture_map):
            mapped.madvise(mmap.MADV_DONTNEED)

    def picture_bytes(self, record: int) -> bytes:
        """One encoded picture, checked once."""
        start, length = self._picture_place(record)
        data = self._picture_map[start : start + length]
        if not self._pictures_checked[record]:
            if zarr3.crc32c(data) != self.by_record[layout.PICTURE_CRC32C][record]:
                row, view = divmod(record, self.n_views)
                name = f"{layout.PICTURE_BYTES}/{self._metadata[layout.PICTURE_BYTES].chunk_name}"
                raise self.damaged(name, f"the crc32c of the picture of row {row}, view {view} does not match")
            self._pictures_checked[record] = True
        return data

    def _picture_place(self, record: int) -> tuple[int, int]:
        """Where a picture starts, and its length, in bytes."""
        return int(self.by_record[layout.PICTURE_OFFSET][record]), int(self.by_record[layout.PICTURE_LENGTH][record])


def _fetch(mapped: mmap.mmap, start: int, length: int) -> None:
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    mapped.madvise(mmap.MADV_WILLNEED, first, start + length - first)
