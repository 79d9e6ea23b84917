from __future__ import annotations

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from storage import layout
from storage.cache import CacheFolder, open_cache
from storage.config import FeatureEncoding, FeatureGrid
from storage.encodings import decode_picture
from storage.errors import DamageError, InputError
from storage.reading import shards_to_keep_open
from storage.snapshots import read_head, write_head
from tests.tiny_cache import write_tiny_cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_cache(tmp_path, n=12, views=3, quarantined=1, truth_vertices=20)


@pytest.mark.parametrize("encoding", ["float16", "int8", "pca12-int8", "codes4"])
@pytest.mark.parametrize("grid", ["full", "8x8-paper", "8x6-geometric"])
def test_reader_agrees_with_zarr_python(tmp_path: Path, grid: FeatureGrid, encoding: FeatureEncoding) -> None:
    reader = open_cache(write_tiny_cache(tmp_path, n=9, views=2, grid=grid, encoding=encoding, samples_per_shard=4))
    rows, views = [0, 8, 3, 5], [1, 0, 1, 0]
    batch = reader.read(rows, views)
    for item, (row, view) in enumerate(zip(rows, views, strict=True)):
        shard: Any = zarr.open_group(shard_of(reader.root, batch["sample_id"][item]), mode="r")
        at = [bytes(name).rstrip(b"\0").decode() for name in shard["sample_id"][:]].index(batch["sample_id"][item])
        scale = shard[layout.FEATURES_SCALE][at, view] if encoding == "int8" else None
        features = np.empty(reader.feature_shape, np.float32)
        reader.codec.decode(shard[layout.FEATURES][at, view], scale, features)
        np.testing.assert_array_equal(batch[layout.FEATURES][item], features)
        assert shard[layout.FEATURES].metadata.dimension_names[-1] == reader.codec.dimension
        start, length = (shard[f"pictures/{name}"][at, view] for name in ("offset", "length"))
        data = shard["pictures/bytes"][start : start + length].tobytes()
        np.testing.assert_array_equal(batch["pictures"][item], decode_picture(data))
        assert reader.picture_bytes(row, view) == data
        for name in batch.keys() - {"sample_id", "pictures", layout.FEATURES}:
            stored = shard[name][at, view] if layout.per_view(name) else shard[name][at]
            np.testing.assert_array_equal(batch[name][item], stored)


def shard_of(root: Path, sample_id: str) -> Path:
    for shard in (root / "shards").iterdir():
        ids: Any = zarr.open_array(shard / "sample_id", mode="r")[:]
        if sample_id.encode() in [bytes(row).rstrip(b"\0") for row in ids]:
            return shard
    raise KeyError(sample_id)


def test_rows_by_position_and_by_id_are_the_same(root: Path) -> None:
    reader = open_cache(root)
    assert len(reader) == len(reader.ids) == 12
    assert reader.ids[1] == "tiny:000002#0"  # 000001 is quarantined
    by_position, by_id = reader[1], reader["tiny:000002#0"]
    assert by_position["sample_id"] == by_id["sample_id"] == "tiny:000002#0"
    for name, values in by_position.items():
        np.testing.assert_array_equal(values, by_id[name])
    assert by_position["pictures"].shape == (3, 256, 256, 3)
    assert by_position["teacher/features"].shape == (3, *reader.feature_shape)
    assert by_position["labels/truth_vertices"].shape == (20, 3)
    assert reader[-1]["sample_id"] == reader.ids[-1]
    with pytest.raises(IndexError):
        reader[12]
    with pytest.raises(KeyError):
        reader["tiny:000001#0"]


def test_only_what_is_asked_for_is_read(root: Path) -> None:
    batch = open_cache(root).read([0, 1], [0, 2], keys=["labels/betas", "pictures"])
    assert batch.keys() == {"sample_id", "labels/betas", "pictures"}
    with pytest.raises(KeyError, match="labels/bets"):
        open_cache(root).read([0], [0], keys=["labels/bets"])


@pytest.mark.parametrize("encoding", ["float16", "int8", "pca12-int8", "codes4"])
def test_features_as_stored_decode_to_the_same(tmp_path: Path, encoding: FeatureEncoding) -> None:
    reader = open_cache(write_tiny_cache(tmp_path, n=4, encoding=encoding))
    stored = reader.read([0, 3], [2, 1], [layout.FEATURES], decoded=False)
    kinds = {"float16": "float16", "int8": "int8", "pca12-int8": "int8", "codes4": "uint8"}
    assert stored[layout.FEATURES].dtype.name == kinds[encoding]
    values = np.empty((2, *reader.feature_shape), np.float32)
    reader.codec.decode(stored[layout.FEATURES], stored.get(layout.FEATURES_SCALE), values)
    np.testing.assert_allclose(values, reader.read([0, 3], [2, 1])[layout.FEATURES], rtol=1e-6, atol=1e-6)


def test_a_fitted_cache_gives_the_teachers_channels(tmp_path: Path) -> None:
    reader = open_cache(write_tiny_cache(tmp_path, n=4, encoding="codes4", channels=32))
    assert reader.feature_shape == reader[0]["teacher/features"].shape[1:] == (8, 8, 32)
    assert reader.read([0], [0], [layout.FEATURES], decoded=False)[layout.FEATURES].shape == (1, 8, 8, 4)


def test_pickled_and_threaded_readers_give_the_same(root: Path) -> None:
    reader = pickle.loads(pickle.dumps(open_cache(root)))  # noqa: S301  made here
    reader._open_limit = 1  # every thread drops the others' shard
    rows = np.random.default_rng(0).integers(0, 12, (50, 4))
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda some: reader.read(list(some), [0, 1, 2, 0]), rows))
    calm = open_cache(root)
    for some, batch in zip(rows, batches, strict=True):
        for name, values in calm.read(list(some), [0, 1, 2, 0]).items():
            np.testing.assert_array_equal(batch[name], values)


def test_two_data_sets_and_pinned_snapshots(tmp_path: Path) -> None:
    root = write_tiny_cache(tmp_path, n=5, dataset="one")
    write_tiny_cache(tmp_path, n=4, dataset="two")
    digests = read_head(root)
    both = open_cache(root)
    assert both.datasets == ["one"] * 5 + ["two"] * 4
    assert open_cache(root, digests["two"]).ids == both.ids[5:]
    assert open_cache(root, {"one": digests["one"]}).ids == both.ids[:5]
    assert open_cache(root / "snapshots" / f"{digests['two']}.parquet").ids == both.ids[5:]
    write_head(root, {"one": digests["one"]})
    assert len(open_cache(root)) == 5
    assert len(open_cache(root, digests["two"])) == 4


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a cache"):
        open_cache(tmp_path)
    empty = CacheFolder.create(tmp_path, {"features": {"grid": "full"}})
    with pytest.raises(InputError, match="no finished snapshot"):
        open_cache(empty.root)
    with pytest.raises(InputError, match="no snapshot 0123"):
        open_cache(empty.root, "0123")
    moved = shutil.copytree(empty.root, tmp_path / "renamed")
    with pytest.raises(DamageError, match="moved"):
        open_cache(moved)


def test_a_row_of_another_sample_stops_the_reader(tmp_path: Path) -> None:
    """Two shards that changed places are found by the ids in them, before anything is returned."""
    root = write_tiny_cache(tmp_path, n=8, samples_per_shard=4)
    one, two = sorted((root / "shards").iterdir())
    ledger = [root / "ledger" / f"{shard.stem}.json" for shard in (one, two)]
    for left, right in ((one, two), ledger):
        left.rename(root / "aside")
        right.rename(left)
        (root / "aside").rename(right)
    with pytest.raises(DamageError, match="another shard"):
        open_cache(root).read([0], [0])


def test_a_withdrawn_shard_cannot_be_read(root: Path) -> None:
    cache = CacheFolder(root)
    for input_hash in cache.finished():
        cache.withdraw(input_hash)
    with pytest.raises(DamageError, match="withdrawn"):
        open_cache(root).read([0], [0])


def test_a_reader_raises_a_low_limit_on_open_files_and_stays_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 4096)]
    monkeypatch.setattr("resource.getrlimit", lambda which: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda which, wanted: limits.append(wanted))
    assert shards_to_keep_open() == 256
    assert limits[-1] == (4096, 4096)
