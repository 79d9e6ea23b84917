"""Numpy's npz, read without trusting it."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from storage.errors import InputError
from storage.npz import read_npz
from tests import hostile_pickles


def test_arrays_come_back(tmp_path: Path) -> None:
    arrays = {
        "imgname": np.array(["a.jpg", "b.jpg"]),
        "objects": np.array(["a.jpg", {"x": np.float32(1)}], object),
        "center": np.arange(4.0).reshape(2, 2).T,
        "none": np.zeros((0, 3)),
    }
    for name, save in {"plain.npz": np.savez, "small.npz": np.savez_compressed}.items():
        save(tmp_path / name, **arrays)
        read = read_npz(tmp_path / name, [*arrays, "missing"])
        assert read.keys() == arrays.keys()
        for key, value in arrays.items():
            assert read[key].dtype == value.dtype
            assert read[key].tolist() == value.tolist()


def _npz_with_pickle(path: Path, data: bytes, shape: str = "(1,)") -> Path:
    header = f"{{'descr': '|O', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("imgname.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)
    return path


@pytest.mark.parametrize("name", hostile_pickles.NAMES)
def test_hostile_object_arrays_are_refused(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = _npz_with_pickle(tmp_path / "hostile.npz", hostile_pickles.every_one(marker)[name])
    with pytest.raises(InputError, match=r"hostile\.npz, array imgname"):
        read_npz(path, ["imgname"])
    assert not marker.exists()


def test_damage_is_an_input_error(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.savez_compressed(whole, center=np.random.default_rng(0).normal(size=(100, 2)))
    data, path = whole.getvalue(), tmp_path / "0.npz"
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    for damaged in (b"", data[: len(data) // 2], b"not a zip", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"0\.npz"):
            read_npz(path, ["center"])


def test_a_shape_beyond_its_bytes_is_refused(tmp_path: Path) -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }\n"
    with zipfile.ZipFile(tmp_path / "0.npz", "w") as archive:
        archive.writestr("center.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(InputError, match="announces shape"):
        read_npz(tmp_path / "0.npz", ["center"])


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_npz(tmp_path / "none.npz", ["center"])
