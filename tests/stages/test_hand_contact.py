"""Poses whose parts do not pass through each other: distances that can be worked out, and what is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from models.hand_model import HandModel, load_hand_model
from stages.hand_contact import MOST_DEPTH_M, Capsules, draw_plausible_pose, segment_distances
from stages.hand_poses import GESTURES, LIMITS, draw_pose, pose_rotations, rest_axes, within_limits


@pytest.fixture(scope="module")
def hand() -> HandModel:
    return load_hand_model("open-hand")


def test_distances_of_segments() -> None:
    a, b = np.array([[0.0, 0, 0]] * 4), np.array([[1.0, 0, 0]] * 4)
    c = np.array([[0.5, -1, 2], [2, 0, 0], [0.2, 3, 0], [0.3, 0.4, -1]])
    d = np.array([[0.5, 1, 2], [3, 0, 0], [0.8, 3, 0], [0.3, 0.4, 1.0]])
    np.testing.assert_allclose(segment_distances(a, b, c, d), [2, 1, 3, 0.4], atol=1e-9)


def test_gestures_are_free_of_what_no_hand_can_do_and_a_crushed_hand_is_not(hand: HandModel) -> None:
    axes, capsules = rest_axes(hand), Capsules(hand)
    assert capsules.depth_m(np.tile(np.eye(3), (15, 1, 1))) == 0
    depths = {name: capsules.depth_m(pose_rotations(within_limits(g), axes)) for name, g in GESTURES.items()}
    assert max(depths.values()) < 0.007, depths
    crushed = np.array([92.0, 112, 78, 0] * 4 + [45.0, 0, 0, 62, 82])
    assert capsules.depth_m(pose_rotations(crushed, axes)) > 0.010


def test_drawn_poses_keep_to_the_depth_and_to_the_limits_and_still_make_fists(hand: HandModel) -> None:
    axes, capsules, rng = rest_axes(hand), Capsules(hand), np.random.default_rng(0)
    drawn = [draw_plausible_pose(rng, axes, capsules) for _ in range(150)]
    assert max(depth for _, depth in drawn) <= MOST_DEPTH_M
    poses = np.stack([angles for angles, _ in drawn])
    assert (poses >= LIMITS[:, 0] - 1e-9).all()
    assert (poses <= LIMITS[:, 1] + 1e-9).all()
    plain = np.stack([draw_pose(rng) for _ in range(150)])
    fists, unchecked = ((some[:, [1, 5, 9, 13]].min(axis=1) > 70).mean() for some in (poses, plain))
    assert fists > 0.4 * unchecked > 0
    assert max(capsules.depth_m(pose_rotations(one, axes)) for one in plain) > MOST_DEPTH_M  # what redrawing is for
