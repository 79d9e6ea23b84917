"""The open hand is a hand: its size, its skeleton, which way it bends; and what MANO's readers make of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import smplx
import torch

from models.hand_model import FINGERTIP_VERTICES, HandModel, load_hand_model
from models.mano import OPENPOSE_ORDER, ManoLayer
from stages.hand_poses import (
    BASE_JOINTS,
    FINGERS,
    LIMITS,
    draw_pose,
)
from stages.open_hand import write_mano_pkl
from stages.skinning import TO_OPENPOSE, pose_hand, rotation_matrices
from tests.stages.posing import posed


@pytest.fixture(scope="module")
def hand() -> HandModel:
    return load_hand_model("open-hand")


def test_it_is_a_right_hand_of_a_grown_up_s_size_in_mano_s_frame(hand: HandModel) -> None:
    joints = hand.j_regressor @ hand.v_template
    tips = hand.v_template[list(FINGERTIP_VERTICES)]
    assert np.linalg.norm(tips[2] - joints[0]) == pytest.approx(0.19, abs=0.025)  # wrist to middle fingertip, 19 cm
    assert (tips[1:, 0] < joints[0, 0] - 0.12).all()  # fingers along -x
    assert tips[0, 2] > tips[1, 2] > tips[2, 2] > tips[3, 2] > tips[4, 2]  # thumb at +z, pinky at -z
    assert np.ptp(joints[1:13, 1]) < 0.015  # flat


def test_skeleton_and_skin_belong_together(hand: HandModel) -> None:
    for weights in (hand.j_regressor, hand.weights):
        assert weights.min() >= 0
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    assert ((hand.j_regressor > 0).sum(axis=1) >= 3).all()
    for finger, tip in zip(("thumb", *FINGERS), FINGERTIP_VERTICES, strict=True):
        assert hand.weights[tip].argmax() == BASE_JOINTS[finger] + 2
    assert sorted(set(hand.faces.reshape(-1).tolist())) == list(range(hand.n_vertices))


def test_shape_coefficients_have_unit_variance_and_the_first_is_size(hand: HandModel) -> None:
    spread = np.linalg.norm(hand.shapedirs.reshape(-1, 10), axis=0)
    assert (np.diff(spread) < 0).all()
    lengths = []
    for beta in (-1.0, 1.0):
        vertices, joints = pose_hand(hand, np.tile(np.eye(3), (16, 1, 1)), np.eye(10)[0] * beta)
        lengths.append(np.linalg.norm(joints[12] - joints[0]))
        assert np.isfinite(vertices).all()
    assert lengths[1] - lengths[0] == pytest.approx(0.03, abs=0.02)


@pytest.mark.parametrize("finger", range(4))
def test_fingers_flex_towards_the_palm(hand: HandModel, finger: int) -> None:
    tip = 4 * (finger + 2)
    (_, flat), (_, fist) = posed(hand, "flat"), posed(hand, "fist")
    middle = posed(hand, "table top")[1][tip]
    assert middle[1] < flat[tip, 1] - 0.04  # the palm looks towards -y
    assert np.linalg.norm(fist[tip] - fist[0]) < 0.75 * np.linalg.norm(flat[tip] - flat[0])


def test_thumb_meets_the_index_finger_in_a_pinch_and_lies_over_the_fist(hand: HandModel) -> None:
    pinch = posed(hand, "pinch")[1]
    assert np.linalg.norm(pinch[4] - pinch[8]) < 0.04
    fist = posed(hand, "fist")[1]
    assert np.linalg.norm(fist[4] - (fist[6] + fist[10]) / 2) < 0.05


def test_drawn_poses_keep_within_the_joints_limits() -> None:
    rng = np.random.default_rng(0)
    poses = np.stack([draw_pose(rng) for _ in range(300)])
    assert (poses >= LIMITS[:, 0] - 1e-9).all()
    assert (poses <= LIMITS[:, 1] + 1e-9).all()
    assert (poses.std(axis=0)[[0, 1, 4, 5, 8, 9, 12, 13]] > 15).all()


def test_numpy_and_torch_pose_alike(hand: HandModel) -> None:
    assert tuple(OPENPOSE_ORDER) == TO_OPENPOSE
    rng = np.random.default_rng(1)
    rotations, betas = rotation_matrices(rng.normal(0, 0.5, (16, 3))), rng.normal(0, 1, 10)
    vertices, joints = pose_hand(hand, rotations, betas)
    turns = torch.from_numpy(rotations[None]).float()
    out = ManoLayer(hand)(turns[:, :1], turns[:, 1:], torch.from_numpy(betas[None]).float())
    found_vertices, found_joints = (out[0], out[1]) if isinstance(out, tuple) else (out.vertices, out.keypoints_3d)
    np.testing.assert_allclose(found_vertices[0].numpy(), vertices, atol=1e-6)
    np.testing.assert_allclose(found_joints[0].numpy(), joints, atol=1e-6)


def test_smplx_and_our_own_reader_load_it_as_a_mano_pickle(hand: HandModel, tmp_path: Path) -> None:
    write_mano_pkl(hand, tmp_path / "MANO_RIGHT.pkl")
    again = load_hand_model(tmp_path / "MANO_RIGHT.pkl")
    np.testing.assert_array_equal(again.v_template, hand.v_template)
    np.testing.assert_array_equal(again.parents, hand.parents)
    layer = smplx.MANOLayer(str(tmp_path), is_rhand=True, use_pca=False)
    with torch.no_grad():
        vertices = layer().vertices[0].numpy()
    np.testing.assert_allclose(vertices, hand.v_template, atol=1e-6)
