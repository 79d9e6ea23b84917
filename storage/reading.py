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
from storage.objects import is_url
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
Indices = Sequence[int] | NDArray[np.int64]
Place = tuple[ShardFile, int, int]
"""Shard, row, record (`storage.shard_file`)."""

_ALWAYS = (PICTURES, layout.FEATURES)
"""Every shard with rows has them."""

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
        self._by_shard: NDArray[np.int64] = np.argsort(self._shard_of, kind="stable")
        self._shard_sorted: NDArray[np.int32] = self._shard_of[self._by_shard]
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

    def prefetch(self, shard: int) -> None:
        """Bring a shard, by its number in `shards`, near. Nothing to do here: it is on this disk."""

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
        rows: Indices,
        views: Indices,
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
        at = np.asarray(rows, np.int64)
        indices, inside = self._shard_of[at].tolist(), self._row_of[at]
        opened = {index: self._shard_at(index) for index in set(indices)}
        shards = [opened[index] for index in indices]
        records = (inside * shards[0].n_views + np.asarray(views, np.int64)).tolist() if shards else []
        places: list[Place] = list(zip(shards, inside.tolist(), records, strict=True))
        wanted = self._keys(opened.values(), keys)
        batch: Batch = {layout.SAMPLE_ID: np.array([shard.sample_ids[row] for shard, row, _ in places])}
        for name in wanted:
            if name == layout.FEATURES:
                batch |= _features(places) if decoded else _features_as_stored(places)
            elif name == PICTURES:
                batch[name] = _pictures(places)
            else:
                batch[name] = _stacked(name, places)
        return batch

    def picture_bytes(self, row: int, view: int) -> bytes:
        """The encoded picture of one view, checked."""
        shard = self._shard(row)
        return shard.picture_bytes(int(self._row_of[row]) * shard.n_views + view)

    def _keys(self, shards: Collection[ShardFile], keys: Collection[str] | None) -> list[str]:
        asked = _ALWAYS + _STACKED if keys is None else keys
        present = [name for name in asked if name in _ALWAYS or all(name in shard.small for shard in shards)]
        if keys is None:
            return present
        unknown = set(keys) - set(present) - {layout.SAMPLE_ID}
        if unknown:
            raise KeyError(f"{sorted(unknown)} not in {self.root}; it holds {self._keys(shards, None)}")
        return [name for name in present if name in _ALWAYS or name in _STACKED]

    def _check_ids(self, index: int, shard: ShardFile) -> None:
        """The snapshot and a shard that was just opened agree on who stands in every row that the snapshot names."""
        first, last = np.searchsorted(self._shard_sorted, [index, index + 1])
        positions = self._by_shard[first:last]
        expected = self._rows["sample_id"].take(pa.array(positions)).to_pylist()
        found = shard.sample_ids
        for row, sample_id in zip(self._row_of[positions].tolist(), expected, strict=True):
            if row >= len(found) or found[row] != sample_id:
                raise shard.damaged(layout.SAMPLE_ID, f"row {row} is not {sample_id}, as the snapshot says")

    def _shard(self, position: int) -> ShardFile:
        return self._shard_at(int(self._shard_of[position]))

    def _shard_at(self, index: int) -> ShardFile:
        with self._lock:
            shard = self._open.get(index)
            if shard is not None:
                self._open.move_to_end(index)
                return shard
        shard = self._open_shard(self.root / "shards" / f"{self._shard_names[index]}.zarr")
        self._check_ids(index, shard)
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


def _features(places: Sequence[Place]) -> Batch:
    out = np.empty((len(places), *places[0][0].feature_shape), dtype=np.float32)
    if not all(shard.features_checked[record] for shard, _, record in places):
        _fetch_ahead(places)
    for item, (shard, _, record) in enumerate(places):
        shard.features_into(record, out[item])
    return {layout.FEATURES: out}


def _features_as_stored(places: Sequence[Place]) -> Batch:
    first = places[0][0]
    out = np.empty((len(places), *first.stored_shape), dtype=first.feature_dtype)
    # Slices of memoryviews cost half of numpy's: at 80 kB a record, numpy's are a quarter of the copy itself.
    target, size, stride, at, asked = _bytes_of(out), first.record_bytes, first.stride, 0, False
    for shard, _, record in places:
        if not shard.features_checked[record]:
            if not asked:
                _fetch_ahead(places)
                asked = True
            shard.check_features(record)
        start = record * stride
        target[at : at + size] = shard.features[start : start + size]
        at += size
    if first.scales is None:
        return {layout.FEATURES: out}
    scales = np.empty((len(places), *first.stored_shape[:2]), np.float32)
    target, size, at = _bytes_of(scales), scales[0].nbytes, 0
    for shard, _, record in places:
        assert shard.scales is not None
        target[at : at + size] = shard.scales[record * size : (record + 1) * size]
        at += size
    return {layout.FEATURES: out, layout.FEATURES_SCALE: scales}


def _fetch_ahead(places: Sequence[Place]) -> None:
    """Ask for what was never read before the first of it is needed: a disk then has many reads to choose from."""
    for shard, _, record in places:
        shard.will_need(record)


def _bytes_of(values: NDArray[Any]) -> memoryview:
    return values.reshape(-1).view(np.uint8).data


def _pictures(places: Sequence[Place]) -> NDArray[np.uint8]:
    out = np.empty((len(places), PICTURE_SIZE_PX, PICTURE_SIZE_PX, 3), dtype=np.uint8)
    for shard, _, record in places:
        shard.will_need_picture(record)
    for item, (shard, _, record) in enumerate(places):
        out[item] = decode_picture(shard.picture_bytes(record))
    return out


def _stacked(name: str, places: Sequence[Place]) -> NDArray[Any]:
    if layout.per_view(name):
        return np.array([shard.by_record[name][record] for shard, _, record in places])
    return np.array([shard.small[name][row] for shard, row, _ in places])


def open_cache(
    path: Path | str,
    snapshot: str | Mapping[str, str] | None = None,
    *,
    local: Path | None = None,
    limit_bytes: int | None = None,
) -> CacheReader:
    """Open a cache for reading.

    path: a cache folder or its URL on an object store (s3://, gs://), or one of its snapshots
    (`<folder>/snapshots/<digest>.parquet`). snapshot: a digest, or data set -> digest; None: the current snapshots
    (HEAD.json). local, limit_bytes: where shards of a remote cache are kept, and how many bytes of them (64 GiB in the
    user's cache folder unless said). InputError when there is nothing to read.
    """
    if is_url(path):
        from storage.remote import open_remote  # it builds on this module

        return open_remote(str(path), snapshot, local, limit_bytes)
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
