"""Reading a cache by id or by position: batches of decoded numpy arrays from whichever shards hold the samples.

Every row's stored id is compared with the snapshot's, and what does not fit stops the reader.
"""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage import layout
from storage.codecs import Codec, open_codec
from storage.encodings import PICTURE_SIZE_PX, decode_picture
from storage.errors import DamageError, InputError
from storage.identity import read_description
from storage.ledger import read_record, read_withdrawal, withdrawal_path
from storage.shard_file import ShardFile
from storage.snapshots import HEAD_JSON, known_snapshots, read_head, read_info, read_snapshot, snapshot_path

PICTURES = "pictures"
"""The key of decoded pictures in what a reader returns."""

OPEN_SHARDS = 512
"""At most so many shards are kept open by a reader, two mapped files and about 3 MB each at 512 samples of 3 views.
Opening one takes 3 ms."""

_FILES_WANTED = 16384
_READERS = 8
"""A process may read so many data sets at once before they run out of open files."""

Batch = dict[str, NDArray[Any]]


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

    def __init__(self, root: Path, digests: Mapping[str, str], open_shards: int | None = None) -> None:
        self.root = root
        self.digests = dict(digests)
        """Data set -> digest of the snapshot that is read."""
        self._open_limit = open_shards or shards_to_keep_open()
        self.identity: dict[str, Any] = read_description(root)["identity"]
        self.codec: Codec = open_codec(root, self.identity["features"])
        """What decodes the stored features."""
        table = pa.concat_tables([read_snapshot(snapshot_path(root, digest)) for digest in self.digests.values()])
        cached = pc.is_valid(table["row"])
        self.samples_in = len(table)
        """Samples of the snapshots, those that were left out included."""
        self.snapshot_rows: NDArray[np.int64] = np.flatnonzero(cached.to_numpy(zero_copy_only=False))
        """Where each position stands among them: for whoever must answer in the data set's own order."""
        self._rows = table.filter(cached).select(["sample_id", "dataset", "shard", "row"])
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
    def shards(self) -> NDArray[np.int32]:
        """Which shard each sample is in, counted from 0, in order of position."""
        return self._shard_of

    def shard_path(self, position: int) -> Path:
        """Folder of the shard that a sample is in."""
        return self.root / "shards" / f"{self._shard_names[self._shard_of[position]]}.zarr"

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
        """(h, w, C) of a view's features, decoded."""
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

    def read(
        self,
        rows: Sequence[int],
        views: Sequence[int],
        keys: Collection[str] | None = None,
        *,
        decoded: bool = True,
    ) -> Batch:
        """A batch: entry b is view `views[b]` of the sample at position `rows[b]`.

        keys: only these entries (`sample_id` always comes); None: every entry that all touched shards have.
        decoded: False leaves features as stored, a quarter of the bytes or far less: `teacher/features` (B,h,w,c) and,
        for int8, `teacher/features_scale` (B,h,w); whoever has a GPU decodes there, with the constants of `codec`.
        Shapes: `pictures` (B,256,256,3) uint8, `teacher/features` (B,h,w,C) float32, others (B, ...), `sample_id` (B,).
        """
        assert len(rows) == len(views)
        places = [(self._shard(int(row)), int(self._row_of[row])) for row in rows]
        self._check_ids(rows, places)
        wanted = self._keys(places, keys)
        batch: Batch = {layout.SAMPLE_ID: np.array([shard.sample_ids[row] for shard, row in places])}
        for name in wanted:
            if name == layout.FEATURES:
                batch |= _features(places, views) if decoded else _features_as_stored(places, views)
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
        shard = self._open_shard(self.shard_path(position))
        with self._lock:
            shard = self._open.setdefault(index, shard)
            while len(self._open) > self._open_limit:
                self._open.popitem(last=False)  # its maps close when the last batch that uses them is done
        return shard

    def _open_shard(self, path: Path) -> ShardFile:
        ledger = self.root / "ledger" / f"{path.stem}.json"
        try:
            record = read_record(ledger)
        except FileNotFoundError as error:
            why = "; ".join(read_withdrawal(withdrawal_path(ledger))) or "the shard was withdrawn or cleaned"
            raise DamageError(f"{ledger} is gone: {why}; run `handstill run`") from error
        return ShardFile(path, record, self.codec)


def shards_to_keep_open() -> int:
    """How many shards a reader may keep open, after raising this process's limit on open files where it is low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_WANTED if hard == resource.RLIM_INFINITY else min(_FILES_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    files = _FILES_WANTED if soft == resource.RLIM_INFINITY else soft
    return max(1, min(OPEN_SHARDS, files // (2 * _READERS)))


def _has_views(name: str) -> bool:
    return name == PICTURES or (name != layout.SAMPLE_ID and layout.per_view(name))


def _features(places: Sequence[tuple[ShardFile, int]], views: Sequence[int]) -> Batch:
    out = np.empty((len(places), *places[0][0].feature_shape), dtype=np.float32)
    for item, ((shard, row), view) in enumerate(zip(places, views, strict=True)):
        shard.features_into(row, view, out[item])
    return {layout.FEATURES: out}


def _features_as_stored(places: Sequence[tuple[ShardFile, int]], views: Sequence[int]) -> Batch:
    first = places[0][0]
    out = np.empty((len(places), *first.stored_shape), dtype=first.feature_dtype)
    for item, ((shard, row), view) in enumerate(zip(places, views, strict=True)):
        out[item] = shard.stored_features(row, view)
    if layout.FEATURES_SCALE not in first.small:
        return {layout.FEATURES: out}
    return {layout.FEATURES: out, layout.FEATURES_SCALE: _stacked(layout.FEATURES_SCALE, places, views)}


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
    return CacheReader(path, _current(path) if snapshot is None else snapshot)


def _current(root: Path) -> dict[str, str]:
    digests, known = read_head(root), known_snapshots(root)
    if not digests and known:
        raise DamageError(f"{root / HEAD_JSON} is gone; run `handstill run`, which writes it again")
    if not digests:
        raise InputError(f"{root} has no finished snapshot ({HEAD_JSON}); run `handstill run teach`")
    for digest in digests.values():
        if digest not in known:
            raise DamageError(f"{snapshot_path(root, digest)} is gone, which {HEAD_JSON} names; run `handstill run`")
    return digests
