"""Posing a hand mesh in numpy: what `models.mano.ManoLayer` computes, without torch, for one hand at a time.

V vertices, 16 joints in MANO's order: 0 wrist, 1-3 index, 4-6 middle, 7-9 pinky, 10-12 ring, 13-15 thumb.
Metres throughout. A hand at rest lies in MANO's frame: right hand, fingers along -x, palm towards -y, thumb towards +z.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.hand_model import FINGERTIP_VERTICES, HandModel

Floats = NDArray[np.float64]

PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)
TO_OPENPOSE = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)
"""From 16 joints + 5 tips to OpenPose's 21 (wrist, then thumb to pinky, base to tip), as HaMeR's MANO wrapper does."""


def rotation_matrices(axis_angle: NDArray[Any]) -> Floats:
    """Axis-angle (..., 3) in radians -> rotation matrices (..., 3, 3) by Rodrigues' formula."""
    vectors = np.asarray(axis_angle, dtype=np.float64)
    angle = np.linalg.norm(vectors, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vectors, -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*x.shape, 3, 3)
    # sin(a)/a and (1 - cos(a))/a^2, written with sinc so that they are exact at zero.
    first = np.sinc(angle / np.pi)
    second = 0.5 * np.sinc(angle / (2 * np.pi)) ** 2
    return np.asarray(np.eye(3) + first * cross + second * (cross @ cross))


def shaped_vertices(hand: HandModel, betas: NDArray[Any]) -> Floats:
    """Rest vertices (V, 3) of the shape with these coefficients (10,)."""
    return np.asarray(hand.v_template + hand.shapedirs @ np.asarray(betas, dtype=np.float64), dtype=np.float64)


def joint_transforms(joints: Floats, rotations: Floats) -> Floats:
    """World transforms (16, 4, 4) of a chain whose rest joints are (16, 3), turned by local rotations (16, 3, 3)."""
    world = np.zeros((16, 4, 4))
    world[:, 3, 3] = 1
    for joint, parent in enumerate(PARENTS):
        local = np.eye(4)
        local[:3, :3] = rotations[joint]
        local[:3, 3] = joints[joint] - (joints[parent] if parent >= 0 else 0)
        world[joint] = local if parent < 0 else world[parent] @ local
    return world


def skin(vertices: Floats, joints: Floats, weights: NDArray[Any], rotations: Floats) -> tuple[Floats, Floats]:
    """Linear blend skinning of rest vertices (V, 3) by weights (V, 16): posed vertices (V, 3) and joints (16, 3)."""
    world = joint_transforms(joints, rotations)
    relative = world[:, :3].copy()  # the same transforms, of points given in the rest pose
    relative[:, :, 3] -= np.einsum("jab,jb->ja", world[:, :3, :3], joints)
    blended = np.einsum("vj,jab->vab", weights, relative)
    return np.einsum("vab,vb->va", blended[:, :, :3], vertices) + blended[:, :, 3], world[:, :3, 3].copy()


def pose_hand(hand: HandModel, rotations: Floats, betas: NDArray[Any]) -> tuple[Floats, Floats]:
    """Vertices (V, 3) and 21 OpenPose joints (21, 3) for rotations (16, 3, 3), the first of the whole hand.

    The wrist joint stays where the rest pose has it, as in MANO: the result is not root-centred.
    """
    shaped = shaped_vertices(hand, betas)
    rest_joints = np.asarray(hand.j_regressor @ shaped, dtype=np.float64)
    pose_feature = (rotations[1:] - np.eye(3)).reshape(135)
    posed = shaped + hand.posedirs @ pose_feature
    vertices, joints = skin(posed, rest_joints, hand.weights, rotations)
    return vertices, np.concatenate([joints, vertices[list(FINGERTIP_VERTICES)]])[list(TO_OPENPOSE)]
