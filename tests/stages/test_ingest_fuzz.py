"""Damage at random places: ingest ends in an InputError or in rows, and never in silence about a hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from stages.config import HamerNpzDataset, HamerTarDataset
from stages.ingest import scan_source
from storage.errors import InputError
from tests.tars import annotation, picture, sample, write_tar


def _damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(whole)
    for position in rng.integers(0, len(data), int(rng.integers(1, 6))):
        data[position] = rng.integers(0, 256)
    return bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.2 else data)


def _scan_damaged_tars(folder: Path, rounds: int, seed: int) -> int:
    """How many were refused as a whole."""
    small = {"a.jpg": picture(16, 16, kind="PNG"), "b.jpg": picture(16, 16, 1)}
    members = sample("a") | sample("b", annotation(), annotation(right=0)) | small
    path = write_tar(folder / "0.tar", members)
    whole, rng = path.read_bytes(), np.random.default_rng(seed)
    config = HamerTarDataset(format="hamer_tar", path="0.tar")
    refused = 0
    for _ in range(rounds):
        path.write_bytes(_damaged(whole, rng))
        try:
            reasons = scan_source("set", config, path, folder).column("reason").to_pylist()
        except InputError:
            refused += 1
        else:
            assert all(reason is None or ": " in reason for reason in reasons)
            assert len(reasons) >= 1
    return refused


def _scan_damaged_npz(folder: Path, rounds: int, seed: int) -> int:
    (folder / "0.jpg").write_bytes(picture(16, 16))
    stored = io.BytesIO()
    names = np.array(["0.jpg", "0.jpg"], object)
    np.savez(stored, imgname=names, center=np.full((2, 2), 8.0), scale=np.full((2, 2), 9.0), right=np.ones(2))
    rng, path = np.random.default_rng(seed), folder / "0.npz"
    config = HamerNpzDataset(format="hamer_npz", path="0.npz", image_dir=".")
    refused = 0
    for _ in range(rounds):
        path.write_bytes(_damaged(stored.getvalue(), rng))
        try:
            scan_source("val", config, path, folder)
        except InputError:
            refused += 1
    return refused


def test_damaged_tars(tmp_path: Path) -> None:
    assert 0 < _scan_damaged_tars(tmp_path, 60, 0) < 60


def test_damaged_npz(tmp_path: Path) -> None:
    assert 0 < _scan_damaged_npz(tmp_path, 60, 0) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_damaged_sources(tmp_path: Path, seed: int) -> None:
    assert _scan_damaged_tars(tmp_path, 1000, seed)
    assert _scan_damaged_npz(tmp_path, 1000, seed)
