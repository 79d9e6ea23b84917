"""Where hands of whole photographs come out: frames, mirroring, and the full-image camera."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.hand_box import HandBox
from models.photo_hands import HANDS_AT_ONCE, HandPredictor, PredictedHand
from tests.tiny_networks import tiny_student

WIDTH, HEIGHT = 320, 240


@pytest.fixture(scope="module")
def predictor() -> HandPredictor:
    student = tiny_student()
    with torch.no_grad():  # a camera off the middle, and hands that depend on the picture
        student.mano_head.deccam.bias.copy_(torch.tensor([3.0, 0.05, -0.08]))
    return HandPredictor(student, student.hand_model, sees_inner_columns=True)


@pytest.fixture(scope="module")
def photo() -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    return np.asarray(cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC), np.uint8)


BOXES = [HandBox(40, 50, 60, 90, right=True), HandBox(180, 20, 100, 60, right=False)]


def test_the_camera_projects_the_joints_onto_the_2d_joints(predictor: HandPredictor, photo: NDArray[np.uint8]) -> None:
    """For both hands, anywhere in the photograph: within 1% of the square, what two nearly parallel views differ by."""
    for hand in predictor(photo, BOXES):
        assert hand.in_front
        spread = np.ptp(hand.joints_2d_px, axis=0).max()
        assert spread > 0.1 * hand.square_px[2], "the hand is large enough to tell"
        assert hand.span == spread / hand.square_px[2]
        assert not hand.is_dot
        assert 0 < hand.disagreement_px < 0.01 * hand.square_px[2]
        assert np.abs(hand.joints_2d_px - hand.square_px[:2]).max() < hand.square_px[2]


@pytest.mark.parametrize("right", [True, False])
def test_it_does_so_exactly_where_the_square_is_the_photograph(
    predictor: HandPredictor, photo: NDArray[np.uint8], right: bool
) -> None:
    """There the crop's camera and the photograph's are one."""
    square = photo[:, :HEIGHT]
    half = HandBox(HEIGHT / 4, HEIGHT / 4, HEIGHT * 3 / 8, HEIGHT / 2, right)  # widened by 4/3, then doubled
    centred = HandBox(half.x + HEIGHT / 16, half.y, half.width, half.height, right)
    (hand,) = predictor(np.ascontiguousarray(square), [centred])
    assert hand.square_px == (HEIGHT / 2, HEIGHT / 2, HEIGHT)
    assert hand.disagreement_px < 1e-3
    assert hand.focal_px == 5000 / 256 * HEIGHT


def test_a_left_hand_is_the_mirror_image_of_a_right_one(predictor: HandPredictor, photo: NDArray[np.uint8]) -> None:
    """The same picture mirrored, its hand called the other one: the same crop, so everything mirrors exactly."""
    (right,) = predictor(photo, [BOXES[0]])
    mirrored = np.ascontiguousarray(photo[:, ::-1])
    x = WIDTH - 1 - (BOXES[0].x + BOXES[0].width)
    (left,) = predictor(mirrored, [HandBox(x, BOXES[0].y, BOXES[0].width, BOXES[0].height, right=False)])
    np.testing.assert_allclose(left.cam, right.cam, atol=1e-4)
    np.testing.assert_allclose(left.joints_2d_px[:, 0], WIDTH - 1 - right.joints_2d_px[:, 0], atol=0.01)
    np.testing.assert_allclose(left.joints_2d_px[:, 1], right.joints_2d_px[:, 1], atol=0.01)
    own_left, own_right = (hand.vertices_m - hand.joints_3d_m[0] for hand in (left, right))
    np.testing.assert_allclose(own_left, own_right * [-1, 1, 1], atol=1e-4)
    np.testing.assert_allclose(left.hand_pose, right.hand_pose, atol=1e-3)
    assert np.array_equal(left.faces, right.faces[:, ::-1]), "turned round, so that outside stays outside"


def test_the_mesh_follows_from_the_parameters(predictor: HandPredictor, photo: NDArray[np.uint8]) -> None:
    """MANO's output, mirrored for a left hand, moved by the translation: what users put together themselves."""
    mano = tiny_student().mano
    for hand in predictor(photo, BOXES):
        parts = (hand.global_orient[None, None], hand.hand_pose[None], hand.betas[None])
        with torch.no_grad():
            vertices, joints = mano(*(torch.tensor(part, dtype=torch.float32) for part in parts))
        mirror = np.array([1 if hand.box.right else -1, 1, 1])
        np.testing.assert_allclose(vertices[0].numpy() * mirror + hand.translation_m, hand.vertices_m, atol=1e-5)
        np.testing.assert_allclose(joints[0].numpy() * mirror + hand.translation_m, hand.joints_3d_m, atol=1e-5)


def test_a_focal_length_moves_the_hand_and_not_its_picture(predictor: HandPredictor, photo: NDArray[np.uint8]) -> None:
    (far,), (near,) = (predictor(photo, [BOXES[0]], focal_px=focal) for focal in (6250.0, 3125.0))
    assert near.translation_m[2] == pytest.approx(far.translation_m[2] / 2, rel=1e-6)
    np.testing.assert_allclose(near.translation_m[:2], far.translation_m[:2])
    assert np.abs(near.projected_px - far.projected_px).max() < 0.02 * near.square_px[2]
    assert np.array_equal(near.joints_2d_px, far.joints_2d_px)


def test_many_hands_are_looked_at_a_few_at_a_time(photo: NDArray[np.uint8]) -> None:
    student = tiny_student()
    batches = []
    student.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    predictor = HandPredictor(student, student.hand_model, sees_inner_columns=False)
    boxes = [HandBox(10 + 5 * i, 20, 50, 50, right=True) for i in range(HANDS_AT_ONCE + 3)]
    hands: list[PredictedHand] = predictor(photo, boxes)
    assert batches == [HANDS_AT_ONCE, 3]
    assert [hand.box for hand in hands] == boxes
    assert [hand.square_px[2] for hand in hands] == [100] * len(boxes), "no widening for a network that sees it all"
    assert predictor(photo, []) == []
