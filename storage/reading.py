"""Reading a cache fast, by id or by position, with every byte checked the first time it is touched.

Standard Zarr does not force zarr-python's path on a reader: a record of features is a slice of a memory map, found
through the shard's own index, and its crc32c is checked once in a process. Small arrays are read whole. Every shard's
metadata is checked against its ledger record before any of it is believed, and every row's stored id against the
snapshot's: what does not fit stops the reader.
"""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage import layout, zarr3
from storage.durable import sha256_bytes
from storage.encodings import PICTURE_SIZE_PX, decode_features, decode_picture
from storage.errors import DamageError, InputError
from storage.identity import read_description
from storage.ledger import ShardRecord, read_record
from storage.shards import unpadded_ids
from storage.snapshots import HEAD_JSON, read_head, read_info, read_snapshot, snapshot_path

PICTURES = "pictures"
"""The key of decoded pictures in what a reader returns."""

OPEN_SHARDS = 256
"""Shards kept open: two mapped files and about 3 MB of small arrays each at 512 samples of 3 views."""

Batch = dict[str, NDArray[Any]]


class ShardFile:
    """One published shard, open for reading."""

    def __init__(self, path: Path, record: ShardRecord) -> None:
        self.path = path
        self._record = record
        self.entries = tuple(entry.path for entry in layout.ENTRIES if self._has(entry.path))
        self._metadata = {name: self._read_metadata(name) for name in self.entries}
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

    def _read(self, name: str) -> bytes:
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise self.damaged(name, f"it cannot be read ({error.strerror})") from error
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
                mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:
            raise self.damaged(name, f"it cannot be mapped ({error})") from error
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
    def feature_shape(self) -> tuple[int, ...]:
        """(h, w, c) of a record."""
        return self._metadata[layout.FEATURES].shape[2:]

    def features_into(self, row: int, view: int, out: NDArray[np.float32]) -> None:
        """Decode the features (h,w,c) of one view into `out`."""
        metadata = self._metadata[layout.FEATURES]
        index = row * self.n_views + view
        record = self._features[index]
        if not self._features_checked[index]:
            stored_crc = int.from_bytes(record[metadata.record_bytes :].tobytes(), "little")
            if zarr3.crc32c(record[: metadata.record_bytes]) != stored_crc:
                where = f"the crc32c of row {row}, view {view} does not match"
                raise self.damaged(f"{layout.FEATURES}/{metadata.chunk_name}", where)
            self._features_checked[index] = True
        values = record[: metadata.record_bytes].view(metadata.dtype.newbyteorder("<")).reshape(self.feature_shape)
        scale = self.small.get(layout.FEATURES_SCALE)
        decode_features(values, None if scale is None else scale[row, view], out)

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


_STACKED = tuple(
    entry.path
    for entry in layout.ENTRIES
    if entry.path not in layout.WRITERS_OWN and entry.path not in (layout.FEATURES, layout.FEATURES_SCALE)
)


class CacheReader:
    """The samples of one or more snapshots of a cache, in the snapshots' order. Thread-safe; pickles as its paths.

    Keys of what it returns: `sample_id`; `pictures` uint8 RGB; `teacher/features` float32; and every other array of
    storage/layout.py by its path (`teacher/cam`, `labels/keypoints_2d`, `views/affine`, ...).
    """

    def __init__(self, root: Path, digests: Mapping[str, str], open_shards: int = OPEN_SHARDS) -> None:
        self.root = root
        self.digests = dict(digests)
        """Data set -> digest of the snapshot that is read."""
        self._open_limit = open_shards
        self.identity: dict[str, Any] = read_description(root)["identity"]
        table = pa.concat_tables([read_snapshot(snapshot_path(root, digest)) for digest in self.digests.values()])
        self._rows = table.filter(pc.is_valid(table["row"])).select(["sample_id", "dataset", "shard", "row"])
        shards = self._rows["shard"].combine_chunks().dictionary_encode()
        self._shard_names: list[str] = shards.dictionary.to_pylist()
        self._shard_of: NDArray[np.int32] = shards.indices.to_numpy()
        self._row_of: NDArray[np.int32] = self._rows["row"].to_numpy()
        self._positions: dict[str, int] | None = None
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheReader, (self.root, self.digests, self._open_limit)

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def ids(self) -> list[str]:
        """Sample ids, in order of position."""
        ids: list[str] = self._rows["sample_id"].to_pylist()
        return ids

    @property
    def datasets(self) -> list[str]:
        """The data set of each sample, in order of position."""
        names: list[str] = self._rows["dataset"].to_pylist()
        return names

    @property
    def n_views(self) -> int:
        """Views a sample."""
        return self._shard(0).n_views

    @property
    def grid(self) -> str:
        """full | 8x8-paper | 8x6-geometric."""
        return str(self.identity["features"]["grid"])

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """(h, w, c) of a view's features."""
        return self._shard(0).feature_shape

    def position(self, sample_id: str) -> int:
        """Position of a sample; KeyError when it is not cached."""
        if self._positions is None:
            self._positions = {name: position for position, name in enumerate(self.ids)}
        return self._positions[sample_id]

    def __getitem__(self, key: int | str) -> dict[str, Any]:
        """One sample with all its views, decoded: entries (k, ...), or (...) where there is one a sample."""
        position = self.position(key) if isinstance(key, str) else range(len(self))[key]
        n_views = self.n_views
        batch = self.read([position] * n_views, list(range(n_views)))
        single = {name: values if _has_views(name) else values[0] for name, values in batch.items()}
        return single | {layout.SAMPLE_ID: str(batch[layout.SAMPLE_ID][0])}

    def read(self, rows: Sequence[int], views: Sequence[int], keys: Collection[str] | None = None) -> Batch:
        """A batch: entry b is view `views[b]` of the sample at position `rows[b]`.

        keys: only these entries (`sample_id` always comes); None: every entry that all touched shards have.
        Shapes: `pictures` (B,256,256,3) uint8, `teacher/features` (B,h,w,c) float32, others (B, ...), `sample_id` (B,).
        """
        assert len(rows) == len(views)
        places = [(self._shard(int(row)), int(self._row_of[row])) for row in rows]
        self._check_ids(rows, places)
        wanted = self._keys(places, keys)
        batch: Batch = {layout.SAMPLE_ID: np.array([shard.sample_ids[row] for shard, row in places])}
        for name in wanted:
            if name == layout.FEATURES:
                batch[name] = _features(places, views)
            elif name == PICTURES:
                batch[name] = _pictures(places, views)
            else:
                batch[name] = _stacked(name, places, views)
        return batch

    def picture_bytes(self, row: int, view: int) -> bytes:
        """The encoded picture of one view, checked."""
        return self._shard(row).picture_bytes(int(self._row_of[row]), view)

    def _keys(self, places: Sequence[tuple[ShardFile, int]], keys: Collection[str] | None) -> list[str]:
        shards = {id(shard): shard for shard, _ in places}.values()
        present = [name for name in _STACKED if all(name in shard.small for shard in shards)]
        known = [PICTURES, layout.FEATURES, *present]
        if keys is None:
            return known
        unknown = set(keys) - set(known) - {layout.SAMPLE_ID}
        if unknown:
            raise KeyError(f"{sorted(unknown)} not in {self.root}; it holds {known}")
        return [name for name in known if name in keys]

    def _check_ids(self, rows: Sequence[int], places: Sequence[tuple[ShardFile, int]]) -> None:
        expected = self._rows["sample_id"].take(pa.array(rows, pa.int64())).to_pylist()
        for (shard, row), sample_id in zip(places, expected, strict=True):
            if row >= len(shard.sample_ids) or shard.sample_ids[row] != sample_id:
                raise shard.damaged(layout.SAMPLE_ID, f"row {row} is not {sample_id}, as the snapshot says")

    def _shard(self, position: int) -> ShardFile:
        index = int(self._shard_of[position])
        with self._lock:
            shard = self._open.get(index)
            if shard is not None:
                self._open.move_to_end(index)
                return shard
        shard = self._open_shard(self._shard_names[index])
        with self._lock:
            shard = self._open.setdefault(index, shard)
            while len(self._open) > self._open_limit:
                self._open.popitem(last=False)  # its maps close when the last batch that uses them is done
        return shard

    def _open_shard(self, input_hash: str) -> ShardFile:
        ledger = self.root / "ledger" / f"{input_hash}.json"
        try:
            record = read_record(ledger)
        except FileNotFoundError as error:
            raise DamageError(f"{ledger} is gone: the shard was withdrawn or cleaned; run `handstill run`") from error
        return ShardFile(self.root / "shards" / f"{input_hash}.zarr", record)


def _has_views(name: str) -> bool:
    return name == PICTURES or (name != layout.SAMPLE_ID and layout.per_view(name))


def _features(places: Sequence[tuple[ShardFile, int]], views: Sequence[int]) -> NDArray[np.float32]:
    out = np.empty((len(places), *places[0][0].feature_shape), dtype=np.float32)
    for item, ((shard, row), view) in enumerate(zip(places, views, strict=True)):
        shard.features_into(row, view, out[item])
    return out


def _pictures(places: Sequence[tuple[ShardFile, int]], views: Sequence[int]) -> NDArray[np.uint8]:
    out = np.empty((len(places), PICTURE_SIZE_PX, PICTURE_SIZE_PX, 3), dtype=np.uint8)
    for item, ((shard, row), view) in enumerate(zip(places, views, strict=True)):
        out[item] = decode_picture(shard.picture_bytes(row, view))
    return out


def _stacked(name: str, places: Sequence[tuple[ShardFile, int]], views: Sequence[int]) -> NDArray[Any]:
    if layout.per_view(name):
        return np.stack([shard.small[name][row, view] for (shard, row), view in zip(places, views, strict=True)])
    return np.stack([shard.small[name][row] for shard, row in places])


def open_cache(path: Path | str, snapshot: str | Mapping[str, str] | None = None) -> CacheReader:
    """Open a cache for reading.

    path: a cache folder, or one of its snapshots (`<folder>/snapshots/<digest>.parquet`). snapshot: a digest, or
    data set -> digest; None: the folder's current snapshots (HEAD.json). InputError when there is nothing to read.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        return CacheReader(path.parent.parent, {read_info(path).dataset: path.stem})
    read_description(path)
    if isinstance(snapshot, str):
        return CacheReader(path, {read_info(snapshot_path(path, snapshot)).dataset: snapshot})
    digests = read_head(path) if snapshot is None else snapshot
    if not digests:
        raise InputError(f"{path} has no finished snapshot ({HEAD_JSON}); run `handstill run teach`")
    return CacheReader(path, digests)
