"""Properties of crops that hold for any picture."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from models.crops import (
    HINT_BOX,
    IDENTITY,
    STUDENT_BOX,
    TEACHER_BOX,
    Augmentation,
    HandLabels,
    boxes_for,
    camera_in_photo,
    crop,
    draw_augmentation,
    mirror_axis_angles,
    move_labels,
    square_box_px,
    to_photo_px,
    view_rng,
)


def _photo(height: int = 90, width: int = 120) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _labels(rng: np.random.Generator) -> HandLabels:
    return HandLabels(
        rng.uniform(0, 90, (21, 3)).astype(np.float32),
        rng.normal(size=(21, 4)).astype(np.float32),
        rng.normal(size=3).astype(np.float32),
        rng.normal(size=45).astype(np.float32),
        rng.normal(size=10).astype(np.float32),
    )


def test_a_left_hand_is_the_mirrored_pictures_right_hand() -> None:
    photo, drawn = _photo(), Augmentation(1.1, 20.0, (0.01, -0.02))
    left = crop(photo, (40, 50), 60, right=False)
    right = crop(photo[:, ::-1], (119 - 40, 50), 60, right=True)
    assert np.array_equal(left.picture, right.picture)
    assert np.linalg.det(left.affine[:, :2]) < 0 < np.linalg.det(right.affine[:, :2])
    assert crop(photo, (40, 50), 60, False, drawn).mirrored


def test_a_mirrored_left_hand_is_not_mirrored_back() -> None:
    photo = _photo()
    flipped = crop(photo, (40, 50), 60, right=False, augmentation=Augmentation(flip=True))
    assert np.array_equal(flipped.picture, crop(photo, (40, 50), 60, right=False).picture)


def test_outside_the_photograph_is_black() -> None:
    assert not crop(_photo(), (1000, 1000), 50, right=True).picture.any()


def test_points_return_to_the_photograph() -> None:
    labels = _labels(np.random.default_rng(1))
    drawn = Augmentation(0.8, -35.0, (0.02, 0.01))
    for right in (True, False):
        cut = crop(_photo(), (40, 50), 60, right, drawn)
        moved = move_labels(labels, cut, drawn)
        np.testing.assert_allclose(
            to_photo_px(moved.keypoints_2d[:, :2], cut.affine), labels.keypoints_2d[:, :2], atol=1e-4
        )
        assert np.array_equal(moved.keypoints_2d[:, 2], labels.keypoints_2d[:, 2])
        assert np.array_equal(moved.keypoints_3d[:, 3], labels.keypoints_3d[:, 3])


def test_mirroring_twice_gives_the_pose_back() -> None:
    pose = _labels(np.random.default_rng(2)).hand_pose
    assert np.array_equal(mirror_axis_angles(mirror_axis_angles(pose)), pose)


def test_a_view_is_drawn_by_its_name_alone() -> None:
    again = [draw_augmentation(view_rng(0, "set:key#0", 1)) for _ in range(2)]
    assert again[0] == again[1]
    others = [view_rng(1, "set:key#0", 1), view_rng(0, "set:key#1", 1), view_rng(0, "set:key#0", 2)]
    assert all(draw_augmentation(rng) != again[0] for rng in others)


def test_drawn_augmentations_keep_to_hamers_ranges() -> None:
    rng = np.random.default_rng(3)
    drawn = [draw_augmentation(rng) for _ in range(4000)]
    scale, turn = np.array([a.scale for a in drawn]), np.array([a.rotation_deg for a in drawn])
    shift, colour = np.array([a.translation for a in drawn]), np.array([a.colour for a in drawn])
    assert scale.min() == pytest.approx(0.7)
    assert scale.max() == pytest.approx(1.3)
    assert np.abs(turn).max() == pytest.approx(60)
    assert np.mean(turn != 0) == pytest.approx(0.6, abs=0.03)
    assert np.abs(shift).max() == pytest.approx(0.02)
    assert 0.8 <= colour.min() < 0.81
    assert 1.19 < colour.max() <= 1.2
    assert not any(a.flip for a in drawn)


def test_box_rules() -> None:
    assert square_box_px((1.0, 0.5)) == 200
    assert square_box_px((1.0, 0.5), (192, 256)) == pytest.approx(200 * 4 / 3)
    assert square_box_px((0.5, 1.0), (192, 256)) == pytest.approx(200)
    assert square_box_px(0.7) == pytest.approx(140)
    assert HINT_BOX.side_px((1.0, 0.5)) == 400
    assert boxes_for("hint") == (HINT_BOX, HINT_BOX)
    assert boxes_for("freihand") == boxes_for(None) == (STUDENT_BOX, TEACHER_BOX)


def test_camera_in_the_photograph_projects_as_the_crop_does() -> None:
    joint = np.array([0.03, -0.02, 0.01])  # metres, right hand
    cam = np.array([0.9, 0.05, -0.04])
    for right in (True, False):
        cut = crop(_photo(), (40, 50), 60, right, IDENTITY)
        translation = np.array([cam[1], cam[2], 2 * 5000 / (256 * cam[0])])
        in_crop = joint + translation
        units = 5000 / 256 * in_crop[:2] / in_crop[2]
        placed, focal_px = camera_in_photo(cam, cut, 120, 90)
        in_photo = joint * ([1, 1, 1] if right else [-1, 1, 1]) + placed
        photo_px = focal_px * in_photo[:2] / in_photo[2] + [60, 45]
        # weak against full perspective: the mirrored column is W - 1 - x here and W - x in HaMeR's camera
        np.testing.assert_allclose(photo_px, to_photo_px(units, cut.affine), atol=1.1)


def test_smoothing_what_the_crop_reads_is_smoothing_the_photograph() -> None:
    """To the bit, at the photograph's edges, turned and mirrored; and nothing else of the photograph is smoothed."""
    rng = np.random.default_rng(0)
    for size, right in ((560, True), (700, False), (2500, True), (900, False)):
        photo = rng.integers(0, 256, (620, 810, 3), dtype=np.uint8)
        center = rng.uniform(-50, 800, 2)
        turned = Augmentation(rotation_deg=float(rng.uniform(-60, 60)))
        found = crop(photo, center, size, right, turned, antialias=True)
        sigma = (size / 256 / 2 - 1) / 2
        side = 2 * int(4 * sigma + 0.5) + 1
        source = photo if right else np.ascontiguousarray(photo[:, ::-1])
        whole = source.astype(np.float32)
        if size / 256 / 2 > 1.1:
            whole = cv2.GaussianBlur(whole, (side, side), sigma, borderType=cv2.BORDER_REPLICATE)
        mirror = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]] if right else [[-1.0, 0, 809], [0, 1, 0], [0, 0, 1]])
        wanted = cv2.warpAffine(whole, found.affine @ mirror, (256, 256), flags=cv2.INTER_LINEAR)
        assert np.array_equal(found.picture, np.rint(np.clip(wanted, 0, 255)).astype(np.uint8))
