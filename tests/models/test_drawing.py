from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from models.drawing import BONES, draw_hand

RED = (255, 0, 0)


def drawn(
    joints_px: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Which pixels (64,64) are red."""
    image = Image.new("RGB", (64, 64))
    draw_hand(ImageDraw.Draw(image), joints_px, RED)
    return np.asarray(image)[..., 0] > 0


def test_bones_go_from_the_wrist_along_each_finger() -> None:
    assert len(BONES) == 20
    assert [bone for bone in BONES if bone[0] == 0] == [(0, 1), (0, 5), (0, 9), (0, 13), (0, 17)]
    assert sorted(joint for _, joint in BONES) == list(range(1, 21))


def test_a_bone_is_a_line_between_its_joints() -> None:
    joints = np.full((21, 2), 10.0)
    joints[4] = [50, 10]
    red = drawn(joints)
    assert red[10, 12:50].all()
    assert not red[20:].any()


def test_unknown_joints_are_left_out_and_wild_ones_are_cut() -> None:
    joints = np.full((21, 2), np.nan)
    assert not drawn(joints).any()
    joints[0], joints[1], joints[5] = [32, 32], [1e30, 32], [-np.inf, 32]
    red = drawn(joints)
    assert red[32].all()
    assert not red[:28].any()
