"""Cached views made again from their sources and stored parameters: bit for bit, without a random number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from models import crops
from stages import preparation
from stages.config import HamerNpzDataset
from stages.ingest import scan_source
from stages.pictures import decode
from stages.preparation import read_photo
from stages.replay import Comparison, compare, remake, stored_view
from stages.sources import SourceChangedError, SourceMissingError
from stages.teach import TeachSettings
from storage.cache import CacheFolder, open_cache
from storage.config import CacheConfig, FeaturesConfig, PicturesConfig
from storage.encodings import decode_picture, encode_picture
from storage.manifest import Role
from storage.reading import CacheReader
from tests import tars
from tests.forging import Arrays, forge
from tests.stages.teaching import DATASET, run, settings, write_data

VIEWS = 4


def use(role: Role = "train", codec: Any = "jpeg") -> TeachSettings:
    cache = CacheConfig(
        views=VIEWS,
        samples_per_shard=8,
        pictures=PicturesConfig(codec=codec, quality=90),
        features=FeaturesConfig(grid="8x6-geometric", encoding="int8"),
    )
    return settings(role, cache)


def tar_data(base: Path) -> pa.Table:
    """Hands of both sides, one of them at the photograph's border, in photographs of several shapes."""
    left = tars.annotation(right=np.float32(0), center=np.array([3.0, 46.0]))
    members = {
        **tars.sample("000000", seed=0),
        **tars.sample("000001", tars.annotation(), left, seed=1),
        **tars.sample("000002", tars.annotation(center=np.array([59.0, 1.0]), scale=np.array([0.5, 0.1])), seed=2),
    }
    members["000002.jpg"] = tars.picture(width=90, height=40, seed=2, kind="PNG")
    return write_data(base, members)


def npz_data(base: Path) -> pa.Table:
    """Three hands of an evaluation npz with pictures in a folder, the second a left one."""
    hands = [tars.annotation(right=np.float32(side)) for side in (1, 0, 1)]
    (base / "rgb").mkdir(parents=True)
    for number in range(3):
        (base / "rgb" / f"{number}.png").write_bytes(tars.picture(seed=number, kind="PNG"))
    arrays = {name: np.stack([hand[name] for hand in hands]) for name in ("center", "right", "hand_pose", "betas")}
    arrays |= {f"hand_{name}": np.stack([hand[name] for hand in hands]) for name in ("keypoints_2d", "keypoints_3d")}
    arrays |= {"scale": np.tile([40.0, 30.0], (3, 1)), "has_hand_pose": np.ones(3), "has_betas": np.ones(3)}
    np.savez(base / "val.npz", imgname=np.array([f"{number}.png" for number in range(3)]), **arrays)
    config = HamerNpzDataset(format="hamer_npz", path="val.npz", image_dir="rgb", protocol="freihand")
    table = scan_source(DATASET, config, base / "val.npz", base)
    rng = np.random.default_rng(0)
    for name, values in (("truth_xyz", 63), ("truth_vertices", 30)):
        given = pa.array(
            [rng.normal(size=values).tolist(), None, rng.normal(size=values).tolist()], pa.list_(pa.float32())
        )
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), given)
    return table


def replayed(
    reader: CacheReader, base: Path, table: pa.Table, settings: TeachSettings, same_libraries: bool = True
) -> list[Comparison]:
    """Every view of every sample."""
    rows = {row["sample_id"]: row for row in table.to_pylist()}
    found = []
    for position, sample_id in enumerate(reader.ids):
        photo = decode(read_photo(rows[sample_id], base))
        assert photo is not None
        for view in range(reader.n_views):
            stored = stored_view(reader, position, view)
            remade = remake(stored, rows[sample_id], photo, settings.role, settings.pictures)
            found.append(compare(stored, remade, same_libraries))
    return found


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, and most of the time would go into waiting for the disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def forbid_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on drawing an augmentation is an error."""

    def drawn(*arguments: object) -> None:
        raise AssertionError("a random number was drawn")

    for module in (preparation, crops):
        for name in ("draw_augmentation", "view_rng"):
            monkeypatch.setattr(module, name, drawn)


@pytest.mark.parametrize("codec", ["jpeg", "png"])
@pytest.mark.parametrize("role", ["train", "evaluate"])
@pytest.mark.parametrize("data", [tar_data, npz_data])
def test_every_view_comes_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Callable[[Path], pa.Table], role: Role, codec: str
) -> None:
    table = data(tmp_path)
    reader = open_cache(run(tmp_path, tmp_path / "cache", table, use(role, codec)).root)
    everything = reader.read(list(range(len(reader))), [reader.n_views - 1] * len(reader))
    assert set(everything["views/flip"].tolist()) == {True, False}, "left hands are among them"
    if role == "train":
        for name in ("scale", "rotation_deg", "translation", "colour"):
            assert len(np.unique(everything[f"views/{name}"], axis=0)) > 1, f"{name} is never drawn"
    assert (everything["pictures"][..., 0, :] == 0).all(axis=-1).any(), "no box reaches over the border"
    forbid_drawing(monkeypatch)
    found = replayed(reader, tmp_path, table, use(role, codec))
    assert len(found) == len(reader) * (VIEWS if role == "train" else 2)
    assert [item for item in found if item.differences or not item.identical_picture] == []
    assert {(item.max_pixel_difference, item.max_label_difference) for item in found} == {(0, 0.0)}


def add(amount: float, view: int = 1) -> Callable[[NDArray[Any]], None]:
    def change(values: NDArray[Any]) -> None:
        values[0, view] += amount

    return change


def toggle(values: NDArray[Any]) -> None:
    values[0, 1] ^= True


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("views/scale", add(0.01), {"views/affine", "labels/keypoints_2d", "the picture"}),
        (
            "views/rotation_deg",
            add(0.5),
            {"views/affine", "labels/keypoints_3d", "labels/global_orient", "the picture"},
        ),
        ("views/translation", add(0.01), {"views/affine", "labels/keypoints_2d", "the picture"}),
        ("views/colour", add(0.05), {"the picture"}),
        ("views/flip", toggle, {"views/flip", "views/affine", "labels/hand_pose", "the picture"}),
        ("views/center", add(1.0), {"views/center", "views/affine", "the picture"}),
        ("views/box_px", add(1.0), {"views/box_px", "views/affine", "the picture"}),
        ("views/affine", add(0.01), {"views/affine"}),
        ("labels/keypoints_2d", add(0.001), {"labels/keypoints_2d"}),
        ("labels/keypoints_3d", add(0.001), {"labels/keypoints_3d"}),
        ("labels/global_orient", add(0.001), {"labels/global_orient"}),
        ("labels/hand_pose", add(0.001), {"labels/hand_pose"}),
        ("labels/betas", add(0.001), {"labels/betas"}),
        ("labels/betas", add(float("nan")), {"labels/betas"}),
    ],
)
def test_a_parameter_or_label_that_was_changed_is_found(
    tmp_path: Path, name: str, change: Callable[[NDArray[Any]], None], told: set[str]
) -> None:
    table = tar_data(tmp_path)
    cache = run(tmp_path, tmp_path / "cache", table, use())
    forge(open_cache(cache.root).shard_path(0), lambda arrays: change(arrays[name]))
    found = replayed(open_cache(cache.root), tmp_path, table, use())
    wrong = [item for item in found if item.differences]
    assert [(item.sample_id, item.view) for item in wrong] == [(f"{DATASET}:000000#0", 1)]
    said = "; ".join(wrong[0].differences)
    assert all(part in said for part in told), said


@pytest.mark.parametrize(
    "name", ["labels/right", "labels/has_betas", "labels/has_hand_pose", "labels/box_size", "labels/image_size",
             "labels/truth_xyz", "labels/truth_vertices", "labels/has_truth"],
)  # fmt: skip
def test_what_a_sample_has_once_is_compared_too(tmp_path: Path, name: str) -> None:
    table = npz_data(tmp_path)
    cache = run(tmp_path, tmp_path / "cache", table, use("evaluate"))

    def change(arrays: Arrays) -> None:
        arrays[name][0] += 1

    forge(open_cache(cache.root).shard_path(2), change)
    wrong = [item for item in replayed(open_cache(cache.root), tmp_path, table, use("evaluate")) if item.differences]
    assert [item.view for item in wrong] == [0, 1]
    assert {item.sample_id for item in wrong} == {f"{DATASET}:2.png#2"}
    assert all(item.differences[0].startswith(name) for item in wrong)


def test_pictures_of_two_samples_that_changed_places_are_found(tmp_path: Path) -> None:
    table = tar_data(tmp_path)
    cache = run(tmp_path, tmp_path / "cache", table, use())

    def change(arrays: Arrays) -> None:
        for name in ("offset", "length", "crc32c"):
            arrays[f"pictures/{name}"][[0, 1]] = arrays[f"pictures/{name}"][[1, 0]]

    forge(open_cache(cache.root).shard_path(0), change)
    wrong = [item for item in replayed(open_cache(cache.root), tmp_path, table, use()) if item.differences]
    assert len(wrong) == 2 * VIEWS
    assert all(item.differences[0].startswith("the picture differs in ") for item in wrong)


def test_other_libraries_may_move_a_picture_a_little_and_not_more(tmp_path: Path) -> None:
    table = tar_data(tmp_path)
    cache = run(tmp_path, tmp_path / "cache", table, use())
    rows = {row["sample_id"]: row for row in table.to_pylist()}
    reader = open_cache(cache.root)
    row = rows[reader.ids[0]]
    photo = decode(read_photo(row, tmp_path))
    assert photo is not None
    stored = stored_view(reader, 0, 1)
    remade = remake(stored, row, photo, "train", use().pictures)
    pixels = decode_picture(remade.encoded)
    for brighter, allowed in ((np.uint8(1), True), (np.uint8(9), False)):
        shifted = np.where(pixels < 200, pixels + brighter, pixels)
        other = type(remade)(remade.sample_id, 1, encode_picture(shifted, "png", 90), remade.values)
        assert compare(stored, other, same_libraries=True).differences
        comparison = compare(stored, other, same_libraries=False)
        assert (comparison.differences == ()) is allowed
        assert not comparison.identical_picture
        assert comparison.max_pixel_difference >= brighter


def test_a_source_that_is_gone_or_changed_is_told_apart(tmp_path: Path) -> None:
    table = tar_data(tmp_path)
    row = table.to_pylist()[0]
    tar = tmp_path / row["source"]
    data = bytearray(tar.read_bytes())
    data[row["image_offset"] + 200] ^= 1
    tar.write_bytes(data)
    with pytest.raises(SourceChangedError, match="has changed since it was ingested"):
        read_photo(row, tmp_path)
    tar.unlink()
    with pytest.raises(SourceMissingError, match="cannot be read"):
        read_photo(row, tmp_path)


def test_forging_nothing_changes_no_byte(tmp_path: Path) -> None:
    """The tool of these tests writes what the real writer writes."""
    cache: CacheFolder = run(tmp_path, tmp_path / "cache", tar_data(tmp_path), use())
    before = {path: path.read_bytes() for path in cache.root.rglob("*") if path.is_file()}
    for shard in cache.shards_dir.iterdir():
        forge(shard, lambda arrays: None)
    assert {path: path.read_bytes() for path in cache.root.rglob("*") if path.is_file()} == before
