"""Crops and moved labels against those of the original code (../shared/reference/reference_crops.npz)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from models.crops import (
    DEMO_BOX,
    HINT_BOX,
    IDENTITY,
    STUDENT_BOX,
    TEACHER_BOX,
    Augmentation,
    Crop,
    HandLabels,
    crop,
    move_labels,
    square_box_px,
    to_photo_px,
)
from tests.shared import REFERENCE, needs_shared

pytestmark = needs_shared

PROCEDURAL = 3  # the one source whose pixels may be shared
MEAN, STD = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])
_BY_PATH = {
    "eval": ["0", "1", "2", "3"],
    "eval_rescale2": ["0", "3"],
    "train_fixed": ["0_1", "0_3", "1_1", "1_2", "2_2", "3_0", "3_1", "3_3"],
    "tar_fixed": ["0_1_none", "3_1_none", "3_2_192x256"],
    "train_seed": ["0_1", "1_2", "3_3"],
    "vitdet": ["0", "1", "2", "3"],
}
CASES = [f"{path}/{case}" for path, cases in _BY_PATH.items() for case in cases]
WITH_PIXELS = [case for case in CASES if case.split("/")[1].startswith("3")]


class Reference:
    """The file's arrays, and one case's cut made by our code."""

    def __init__(self, path: Path) -> None:
        self.arrays = dict(np.load(path / "reference_crops.npz"))
        self.photo = cv2.imread(str(path / "source_procedural.png"))[:, :, ::-1]

    def source(self, case: str) -> int:
        return int(case.split("/")[1].split("_")[0])

    def image(self, source: int) -> np.ndarray[Any, Any]:
        height, width, _ = self.arrays["src_shape_hwc"][source]
        return self.photo if source == PROCEDURAL else np.zeros((height, width, 3), np.uint8)

    def augmentation(self, case: str) -> Augmentation:
        if f"{case}/aug" not in self.arrays:
            return IDENTITY
        scale, turn, flip, _extreme, _level, red, green, blue, x, y = self.arrays[f"{case}/aug"]
        return Augmentation(scale, turn, (x, y), (red, green, blue), bool(flip))

    def cut(self, case: str) -> Crop:
        source = self.source(case)
        box_px = float(self.arrays[f"{case}/box_size"])
        center = self.arrays[f"{case}/box_center"]
        right = self.arrays["right"][source]
        demo = case.startswith("vitdet")
        return crop(self.image(source), center, box_px, right, self.augmentation(case), antialias=demo)

    def labels(self, source: int) -> HandLabels:
        pose = self.arrays["hand_pose"][source]
        return HandLabels(
            self.arrays["keypoints_2d"][source].astype(np.float32),
            self.arrays["keypoints_3d"][source],
            pose[:3],
            pose[3:],
            self.arrays["betas"][source],
        )


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(REFERENCE)


def test_every_case_of_the_reference_is_here(reference: Reference) -> None:
    assert reference.arrays["cases"].tolist() == CASES


@pytest.mark.parametrize("case", CASES)
def test_transform(reference: Reference, case: str) -> None:
    cut = reference.cut(case)
    width = reference.arrays["src_shape_hwc"][reference.source(case)][1]
    mirror = np.array([[-1, 0, width - 1], [0, 1, 0], [0, 0, 1]]) if cut.mirrored else np.eye(3)
    np.testing.assert_allclose(cut.affine @ mirror, reference.arrays[f"{case}/trans"], atol=1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("vitdet")])
def test_labels(reference: Reference, case: str) -> None:
    labels = reference.labels(reference.source(case))
    cut = reference.cut(case)
    moved = move_labels(labels, cut, reference.augmentation(case))
    for name, value in {
        "keypoints_2d": moved.keypoints_2d,
        "keypoints_3d": moved.keypoints_3d,
        "mano_params/global_orient": moved.global_orient,
        "mano_params/hand_pose": moved.hand_pose,
        "mano_params/betas": moved.betas,
    }.items():
        np.testing.assert_allclose(value, reference.arrays[f"{case}/{name}"], atol=1e-6, err_msg=name)
    back = to_photo_px(moved.keypoints_2d[:, :2], cut.affine)
    np.testing.assert_allclose(back, labels.keypoints_2d[:, :2], atol=1e-3)


@pytest.mark.parametrize("case", [case for case in WITH_PIXELS if not case.startswith("vitdet")])
def test_pixels_before_colour_are_the_very_same(reference: Reference, case: str) -> None:
    source, drawn = reference.source(case), reference.augmentation(case)
    colourless = Augmentation(drawn.scale, drawn.rotation_deg, drawn.translation, flip=drawn.flip)
    box_px = float(reference.arrays[f"{case}/box_size"])
    center, right = reference.arrays["center"][source], reference.arrays["right"][source]
    cut = crop(reference.image(source), center, box_px, right, colourless)
    assert np.array_equal(cut.picture, reference.arrays[f"{case}/patch_rgb_uint8"])


@pytest.mark.parametrize("case", WITH_PIXELS)
def test_pixels_as_networks_see_them(reference: Reference, case: str) -> None:
    # our pictures are stored as bytes, HaMeR's factors and blur leave fractions: half a grey level is the rounding
    normalised = ((reference.cut(case).picture - MEAN) / STD).transpose(2, 0, 1).ravel()
    error_levels = (
        np.abs(normalised[reference.arrays["sample_index"]] - reference.arrays[f"{case}/img_samples"]) * STD.max()
    )
    assert np.mean(error_levels <= 1) == 1


def test_demo_blur_over_the_whole_picture(reference: Reference) -> None:
    wanted = reference.arrays["vitdet/3/img_float16"].astype(np.float64).transpose(1, 2, 0) * STD + MEAN
    error_levels = np.abs(reference.cut("vitdet/3").picture - wanted)
    assert error_levels.max() < 0.6


def test_boxes(reference: Reference) -> None:
    scale = reference.arrays["scale_px"] / 200
    for source in range(4):
        assert TEACHER_BOX.side_px(scale[source]) == pytest.approx(reference.arrays[f"eval/{source}/box_size"])
        assert STUDENT_BOX.side_px(scale[source]) == pytest.approx(reference.arrays["scale_px"][source].max())
        assert DEMO_BOX.side_px(scale[source]) == pytest.approx(reference.arrays[f"vitdet/{source}/box_size"])
    for source in (0, PROCEDURAL):
        assert HINT_BOX.side_px(scale[source]) == pytest.approx(reference.arrays[f"eval_rescale2/{source}/box_size"])
    wide = square_box_px(scale[PROCEDURAL] * 2, (192, 256))  # the tar of that case was packed with twice the box
    assert wide == pytest.approx(reference.arrays["tar_fixed/3_2_192x256/box_size"])


def test_rotation_of_the_hand(reference: Reference) -> None:
    for rotation, turn_deg, wanted in zip(
        reference.arrays["rot_aa/in"], reference.arrays["rot_aa/deg"], reference.arrays["rot_aa/out"], strict=True
    ):
        drawn = Augmentation(rotation_deg=turn_deg)
        cut = crop(np.zeros((8, 8, 3), np.uint8), (4, 4), 8, True, drawn)
        zeros = np.zeros
        labels = HandLabels(
            zeros((21, 3), np.float32),
            zeros((21, 4), np.float32),
            rotation,
            zeros(45, np.float32),
            zeros(10, np.float32),
        )
        np.testing.assert_allclose(move_labels(labels, cut, drawn).global_orient, wanted, atol=1e-6)
