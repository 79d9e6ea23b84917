"""A shard is plain Zarr: everything written is read back here by zarr-python, warnings being errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from storage import layout
from storage.cache import CacheFolder
from storage.config import FeatureEncoding
from storage.encodings import decode_picture
from storage.errors import DamageError
from storage.shards import record_from_disk
from storage.verification import verify_shard
from tests.tiny_cache import write_tiny_cache


def only_shard(root: Path) -> Path:
    (shard,) = (root / "shards").iterdir()
    return shard


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return only_shard(write_tiny_cache(tmp_path, n=5, views=2, truth_vertices=30, quarantined=1))


def test_zarr_python_sees_the_documented_tree(shard: Path) -> None:
    group = zarr.open_group(shard, mode="r")
    arrays = {name: array for name, array in group.members(max_depth=None) if isinstance(array, zarr.Array)}
    assert arrays.keys() == {entry.path for entry in layout.ENTRIES}
    for entry in layout.ENTRIES:
        array = arrays[entry.path]
        assert array.metadata.dimension_names == entry.dimensions  # type: ignore[union-attr]
        assert array.dtype.name in entry.dtypes
        assert array.attrs["unit"] == entry.unit
        if entry.dimensions[0] == "sample":
            assert array.shape[0] == 5
    attributes: Any = group.attrs["handstill"]
    assert (attributes["samples_in"], attributes["rows"], len(attributes["quarantined"])) == (6, 5, 1)


def test_zarr_python_reads_ids_and_pictures_as_the_format_page_says(shard: Path) -> None:
    group: Any = zarr.open_group(shard, mode="r")
    ids = group["sample_id"][:]
    names = [name.decode() for name in ids.view(f"S{ids.shape[1]}")[:, 0]]
    assert names == [f"tiny:{index:06d}#0" for index in (0, 2, 3, 4, 5)]
    start, length = group["pictures/offset"][3, 1], group["pictures/length"][3, 1]
    assert decode_picture(group["pictures/bytes"][start : start + length].tobytes()).shape == (256, 256, 3)


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_features_are_one_record_a_view(tmp_path: Path, encoding: FeatureEncoding) -> None:
    shard = only_shard(write_tiny_cache(tmp_path, n=3, views=2, encoding=encoding, channels=5))
    array: Any = zarr.open_array(shard / "teacher/features", mode="r")
    assert (array.shape, array.shards, array.chunks) == ((3, 2, 8, 8, 5), (3, 2, 8, 8, 5), (1, 1, 8, 8, 5))
    record_bytes = 8 * 8 * 5 * array.dtype.itemsize + 4
    raw = (shard / "teacher/features/c.0.0.0.0.0").read_bytes()
    assert len(raw) == 6 * record_bytes + 6 * 16 + 4
    third = np.frombuffer(raw[3 * record_bytes : 4 * record_bytes - 4], array.dtype).reshape(8, 8, 5)
    np.testing.assert_array_equal(array[1, 1], third)


def test_zarr_python_notices_a_flipped_byte_in_a_record(shard: Path) -> None:
    path = shard / "teacher/features/c.0.0.0.0.0"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    array: Any = zarr.open_array(shard / "teacher/features", mode="r")
    with pytest.raises(ValueError, match=r"[Cc]hecksum"):
        array[0, 0]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_tiny_cache(tmp_path / name) for name in ("a", "b"))
    files = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    assert files == [path.relative_to(second) for path in sorted(second.rglob("*")) if path.is_file()]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def test_a_shard_of_quarantined_samples_only_is_an_empty_group(tmp_path: Path) -> None:
    root = write_tiny_cache(tmp_path, n=1, quarantined=2, samples_per_shard=1)
    cache = CacheFolder(root)
    empty = [record for record in cache.finished().values() if record.rows == 0]
    assert len(empty) == 2
    for record in empty:
        group = zarr.open_group(cache.shard_path(record.input_hash), mode="r")
        assert list(group.members(max_depth=None)) == []
        assert verify_shard(cache, record) == []


def test_a_shard_proves_itself_whole_without_its_record(shard: Path) -> None:
    root = shard.parent.parent
    recorded = CacheFolder(root).finished()[shard.stem]
    assert record_from_disk(shard) == recorded
    for name in recorded.files:
        path = shard / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(DamageError, match="is damaged"):
            record_from_disk(shard)
        path.write_bytes(data)
