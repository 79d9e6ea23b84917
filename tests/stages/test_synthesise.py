"""Synthesised sets: HaMeR's formats, exact labels, the same bytes each time; nothing overwritten or done twice."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.crops import CROP_PX, HandLabels, crop, move_labels, square_box_px
from models.hand_model import load_hand_model
from stages.config import HamerNpzDataset, HamerTarDataset, SynthesiseConfig, SynthesiseSet
from stages.hand_scenes import HandPicture, Studio
from stages.ingest import scan_source, source_files
from stages.skinning import pose_hand, rotation_matrices
from stages.synthesise import SynthesiseUnit, run_unit, scene_rng, synthesise_units, unit_done
from storage.errors import InputError
from storage.unpickling import load_annotations
from trainer.metrics import pa_mpjpe_mm

TRAIN = HamerTarDataset(format="hamer_tar", path="tars/{000000..000002}.tar")
HELD_OUT = HamerNpzDataset(
    format="hamer_npz", path="val/val.npz", image_dir="val/rgb", protocol="freihand",
    truth_xyz="val/xyz.json", truth_verts="val/verts.json",
)  # fmt: skip


def units_for(base: Path, **hands: int) -> list[SynthesiseUnit]:
    config = SynthesiseConfig(sets={name: SynthesiseSet(hands=count, seed=3) for name, count in hands.items()})
    return synthesise_units(config, {"train": TRAIN, "val": HELD_OUT}, base)


@pytest.fixture(scope="module")
def pictures() -> list[HandPicture]:
    studio = Studio(load_hand_model("open-hand"))
    return [studio.take(scene_rng(0, number)) for number in range(6)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("made")
    for unit in units_for(base, train=5, val=3):
        run_unit(unit)
    return base


def test_hands_are_spread_evenly_over_the_tars(tmp_path: Path) -> None:
    units = units_for(tmp_path, train=5, val=3)
    assert [(unit.first, unit.hands) for unit in units] == [(0, 2), (2, 2), (4, 1), (0, 3)]
    assert not any(unit_done(unit) for unit in units)


def test_tars_hold_what_hamer_reads(made: Path) -> None:
    with tarfile.open(made / "tars" / "000000.tar") as tar:
        names = tar.getnames()
        assert names == [f"train/0000000{i}.{kind}" for i in range(2) for kind in ("jpg", "data.pyd")]
        hands = load_annotations(tar.extractfile(names[1]).read(), "test")  # type: ignore[union-attr]
    shapes = {name: (np.shape(value), np.asarray(value).dtype.name) for name, value in hands[0].items()}
    assert len(hands) == 1
    expected = {
        "keypoints_2d": ((21, 3), "float32"), "keypoints_3d": ((21, 4), "float32"), "center": ((2,), "float64"),
        "scale": ((2,), "float64"), "hand_pose": ((48,), "float32"), "betas": ((10,), "float32"),
        "right": ((), "float32"), "has_hand_pose": ((), "float32"), "has_betas": ((), "float32"),
    }  # fmt: skip
    assert {name: shapes[name] for name in expected} == expected


def test_ingest_takes_every_hand_of_both_formats(made: Path) -> None:
    tables = [scan_source("train", TRAIN, source, made) for source in source_files(TRAIN, made)]
    tables.append(scan_source("val", HELD_OUT, *source_files(HELD_OUT, made), made))
    assert [table.num_rows for table in tables] == [2, 2, 1, 3]
    assert all(table["reason"].null_count == table.num_rows for table in tables)
    row = tables[-1].to_pylist()[0]
    vertices = load_hand_model("open-hand").n_vertices
    assert len(row["truth_vertices"]) == 3 * vertices
    labelled = np.reshape(row["keypoints_3d"], (21, 4))[:, :3]
    np.testing.assert_allclose(np.reshape(row["truth_xyz"], (21, 3)), labelled, atol=1e-6)


def test_the_same_settings_give_the_same_bytes_in_any_order(made: Path, tmp_path: Path) -> None:
    for unit in reversed(units_for(tmp_path, train=5, val=3)):
        run_unit(unit)
    first = {path.relative_to(made): path.read_bytes() for path in made.rglob("*") if path.is_file()}
    again = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(first) == 3 * 2 + 2 + 2 + 3
    assert first == again


def test_more_tars_than_hands_leaves_empty_tars_that_ingest_takes(tmp_path: Path) -> None:
    for unit in units_for(tmp_path, train=1):
        run_unit(unit)
        assert unit_done(unit)
    tables = [scan_source("train", TRAIN, source, tmp_path) for source in source_files(TRAIN, tmp_path)]
    assert [table.num_rows for table in tables] == [1, 0, 0]


def test_another_seed_gives_other_hands(pictures: list[HandPicture]) -> None:
    other = Studio(load_hand_model("open-hand")).take(scene_rng(1, 0))
    assert not np.allclose(other.pose, pictures[0].pose)


def test_the_held_out_set_shares_no_pose_shape_or_background_and_the_mean_pose_costs_eighteen_millimetres() -> None:
    """The seeds of pipeline.yaml. The picture's border is background: no two borders are alike."""
    studio = Studio(load_hand_model("open-hand"))
    made = {seed: [studio.take(scene_rng(seed, number)) for number in range(12)] for seed in (1, 2)}
    borders = {seed: np.stack([_pixels(one)[:6].ravel() for one in pictures]) for seed, pictures in made.items()}
    for attribute in ("pose", "betas"):
        first, second = (np.stack([getattr(one, attribute) for one in made[seed]]) for seed in (1, 2))
        assert np.abs(first[:, None] - second[None]).max(axis=2).min() > 0.05, attribute
    apart = np.abs(borders[1][:, None] - borders[2][None]).mean(axis=2)
    assert apart.min() > 2.0
    draws = np.random.default_rng(0)
    joints = []
    for _ in range(250):
        rotations = studio._draw_rotations(draws)
        joints.append(pose_hand(studio.hand, rotations, np.clip(draws.normal(0, 1, 10), -2.5, 2.5))[1])
    posed = np.stack(joints)
    mean = np.concatenate([np.eye(3)[None], rotation_matrices(studio.hand.hands_mean.reshape(15, 3))])
    answer = np.broadcast_to(pose_hand(studio.hand, mean, np.zeros(10))[1], posed.shape)
    assert pa_mpjpe_mm(answer, posed).mean() > 18


def test_what_is_done_is_found_done_and_nothing_else(made: Path, tmp_path: Path) -> None:
    units = units_for(made, train=5, val=3)
    assert all(unit_done(unit) for unit in units)
    assert not unit_done(replace(units[0], seed=4))
    assert not unit_done(replace(units[0], hand_model_sha256="0" * 64))
    val = units_for(tmp_path, val=1)[0]
    run_unit(val)
    (tmp_path / "val" / "rgb" / "00000000.jpg").unlink()
    assert not unit_done(val)
    run_unit(val)
    assert unit_done(val)


def test_a_unit_killed_after_its_file_was_renamed_is_made_again(tmp_path: Path) -> None:
    unit = units_for(tmp_path, train=3)[0]
    run_unit(unit)
    whole = unit.record.read_bytes()
    unit.record.write_bytes(b'{"files": {}, "identity": {}}\n')  # as it stands before the file is written
    assert not unit_done(unit)
    run_unit(units_for(tmp_path, train=3)[0])
    assert unit.record.read_bytes() == whole


@pytest.mark.parametrize("theirs", ["tars/000001.tar", "val/val.npz", "val/xyz.json", "val/rgb/photo.jpg"])
def test_foreign_files_are_never_overwritten(tmp_path: Path, theirs: str) -> None:
    file = tmp_path / theirs
    file.parent.mkdir(parents=True)
    file.write_bytes(b"precious")
    with pytest.raises(InputError, match="would overwrite"):
        units_for(tmp_path, train=3, val=1)
    assert file.read_bytes() == b"precious"


def test_a_set_without_a_data_set_is_refused(tmp_path: Path) -> None:
    config = SynthesiseConfig(sets={"trian": SynthesiseSet(hands=1)})
    with pytest.raises(InputError, match=r"synthesise\.sets\.trian.*train"):
        synthesise_units(config, {"train": TRAIN}, tmp_path)


def test_pictures_show_hands_of_both_sides(pictures: list[HandPicture]) -> None:
    assert {picture.right for picture in pictures} == {True, False}
    for picture in pictures:
        assert Image.open(io.BytesIO(picture.jpeg)).size == (256, 256)
        inside = (picture.keypoints_2d > 0) & (picture.keypoints_2d < 255)
        assert inside.all(axis=1).mean() > 0.6


def test_labels_follow_from_pose_and_shape_once_left_hands_are_mirrored(pictures: list[HandPicture]) -> None:
    """The whole chain: what HaMeR's preprocessing makes of a picture's labels is what the hand model gives."""
    hand = load_hand_model("open-hand")
    for picture in pictures:
        labels, moved = _through_the_crop(picture)
        rotations = rotation_matrices(np.concatenate([moved.global_orient, moved.hand_pose]).reshape(16, 3))
        vertices, joints = pose_hand(hand, rotations, moved.betas)
        found = moved.keypoints_3d[:, :3]
        np.testing.assert_allclose(found - found[0], joints - joints[0], atol=2e-6)
        mirror = np.array([1 if picture.right else -1, 1, 1])
        np.testing.assert_allclose(picture.vertices * mirror - found[0], vertices - joints[0], atol=2e-6)
        assert labels.keypoints_2d[:, 2].all()


def test_the_keypoints_lie_on_the_hand(pictures: list[HandPicture]) -> None:
    """Projecting the vertices with the camera that the 2D and 3D joints imply covers the joints."""
    for picture in pictures:
        x, y, z = picture.keypoints_3d.T
        design = np.stack([x / z, np.ones(21)], axis=1)
        (focal, centre), *_ = np.linalg.lstsq(design, picture.keypoints_2d[:, 0], rcond=None)
        assert centre == pytest.approx(127.5, abs=1e-6)
        np.testing.assert_allclose(y / z * focal + 127.5, picture.keypoints_2d[:, 1], atol=1e-6)
        outline = picture.vertices[:, :2] / picture.vertices[:, 2:] * focal + 127.5
        gaps = np.linalg.norm(outline[None] - picture.keypoints_2d[:, None], axis=2).min(axis=1)
        assert gaps.max() < 0.05 * np.ptp(outline, axis=0).max()


def _pixels(picture: HandPicture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.jpeg)).convert("L"), dtype=np.float64)


def _through_the_crop(picture: HandPicture) -> tuple[HandLabels, HandLabels]:
    ones = np.ones((21, 1))
    labels = HandLabels(
        np.hstack([picture.keypoints_2d, ones]).astype(np.float32),
        np.hstack([picture.keypoints_3d, ones]).astype(np.float32),
        picture.pose[:3].astype(np.float32),
        picture.pose[3:].astype(np.float32),
        picture.betas.astype(np.float32),
    )
    image: Any = np.array(Image.open(io.BytesIO(picture.jpeg)))
    cut = crop(image, picture.center, square_box_px(picture.box_px / 200), picture.right)
    assert cut.picture.shape == (CROP_PX, CROP_PX, 3)
    return labels, move_labels(labels, cut)
