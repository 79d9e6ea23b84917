"""Anatomy of hand poses: axes of the joints, limits of their angles, common gestures, and random poses among them.

A pose is 21 angles in degrees: for index, middle, ring and pinky [MCP flexion, PIP flexion, DIP flexion, spread], then
for the thumb [CMC flexion, CMC palmar abduction, CMC pronation, MCP flexion, IP flexion]. Flexion is towards the palm,
spread is away from the middle finger (for the middle finger itself: towards the thumb).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.hand_model import FINGERTIP_VERTICES, HandModel
from stages.skinning import Floats, rotation_matrices

FINGERS = ("index", "middle", "ring", "pinky")
BASE_JOINTS = {"index": 1, "middle": 4, "ring": 10, "pinky": 7, "thumb": 13}
"""MANO's number of each chain's first joint."""

_PALM_NORMALS = {
    "index": (0.0, -0.94, -0.34),
    "middle": (0.0, -0.98, -0.20),
    "ring": (0.0, -0.99, -0.12),
    "pinky": (0.0, -0.99, 0.11),
    "thumb": (-0.40, -0.38, -0.83),
}
"""Where each finger's pad looks in the rest frame: the local z axis of Anny's finger bones. They converge, so that
flexed fingers meet at the wrist as real ones do."""

_SPREAD_SIGN = {"index": -1.0, "middle": -1.0, "ring": 1.0, "pinky": 1.0}

_FINGER_LIMITS = ((-20.0, 92.0), (-3.0, 112.0), (-8.0, 78.0), (-22.0, 22.0))
_THUMB_LIMITS = ((-25.0, 45.0), (-25.0, 40.0), (-15.0, 40.0), (-12.0, 62.0), (-22.0, 82.0))
LIMITS = np.array([*_FINGER_LIMITS * 4, *_THUMB_LIMITS])
"""(21, 2) degrees: the active range of motion of healthy adults, roughly. Spread counts from the rest pose, in which
the open hand's fingers already stand apart, so closing them takes up to -22."""

_CURLED = (76.0, 97.0, 52.0, 0.0)
_STRAIGHT = (0.0, 3.0, 2.0, 3.0)
_SPREAD = (-6.0, 2.0, 0.0, 14.0)
_RELAXED = (22.0, 28.0, 14.0, 3.0)
_TUCKED = (20.0, -8.0, 15.0, 42.0, 52.0)
_THUMB_OUT = (-18.0, -8.0, 0.0, -2.0, -6.0)
_THUMB_RELAXED = (4.0, 4.0, 4.0, 10.0, 12.0)

_GESTURES: dict[str, tuple[float, ...]] = {
    "flat": (0, 3, 2, -5, 0, 3, 2, 8, 0, 3, 2, -14, 0, 3, 2, -20, -4, -8, 0, 0, 0),
    "spread": (*_SPREAD, -4, 2, 0, 2, *_SPREAD, -6, 3, 1, 20, *_THUMB_OUT),
    "relaxed": (*_RELAXED, 28, 34, 16, 0, 32, 38, 18, 2, 36, 36, 18, 4, *_THUMB_RELAXED),
    "fist": (*_CURLED * 4, *_TUCKED),
    "point": (*_STRAIGHT, *_CURLED * 3, *_TUCKED),
    "victory": (-2, 3, 2, 13, -2, 3, 2, -10, *_CURLED * 2, *_TUCKED),
    "three": (*_SPREAD, -4, 2, 0, 0, *_SPREAD, *_CURLED, 28, -2, 18, 48, 56),
    "four": (*_SPREAD, -4, 2, 0, 2, *_SPREAD, -4, 2, 1, 16, 30, -4, 16, 48, 56),
    "thumb up": (*_CURLED * 4, -20, -18, 0, -6, -14),
    "call": (*_CURLED * 3, -4, 6, 2, 18, *_THUMB_OUT),
    "horns": (*_STRAIGHT, *_CURLED * 2, *_STRAIGHT, *_TUCKED),
    "pinch": (46, 46, 22, 0, 26, 26, 12, 0, 18, 20, 10, 4, 12, 18, 10, 8, 22, 20, 22, 22, 30),
    "ring": (52, 58, 26, 0, 12, 14, 8, 0, 4, 8, 6, 6, 0, 6, 4, 12, 22, 20, 22, 26, 34),
    "tripod": (48, 44, 20, 0, 56, 48, 20, 0, 66, 70, 34, 0, 70, 74, 36, 0, 22, 22, 20, 18, 28),
    "wide grasp": (24, 36, 22, 6, 26, 38, 22, 0, 28, 40, 24, 4, 30, 38, 24, 10, 8, 26, 14, 12, 18),
    "tight grasp": (58, 70, 34, 2, 62, 74, 36, 0, 66, 76, 38, 0, 68, 72, 38, 2, 20, 26, 18, 24, 34),
    "hook": (4, 92, 52, 0, 4, 94, 54, 0, 4, 94, 54, 0, 6, 90, 50, 0, 4, 0, 4, 20, 30),
    "claw": (-8, 62, 38, 10, -8, 64, 38, 0, -8, 64, 38, 8, -6, 60, 36, 14, -8, 10, 4, 14, 44),
    "key": (44, 62, 30, 0, 56, 72, 36, 0, 62, 76, 38, 0, 64, 72, 38, 2, 14, 6, 10, 14, 26),
    "pen": (46, 38, 14, 0, 52, 46, 18, 0, 58, 66, 32, 0, 62, 68, 34, 0, 16, 20, 18, 20, 24),
    "phone": (26, 44, 24, 4, 30, 52, 28, 0, 34, 54, 30, 2, 36, 50, 28, 6, 6, 18, 10, 4, 8),
    "count two": (*_STRAIGHT, *_CURLED * 3, *_THUMB_OUT),
    "beckon": (62, 12, 6, 0, 48, 10, 5, 0, 36, 8, 4, 0, 24, 8, 4, 4, 0, 8, 4, 6, 10),
    "table top": (74, 6, 4, 0, 76, 6, 4, 0, 78, 6, 4, 0, 78, 8, 4, 0, 10, 10, 8, 8, 8),
}
GESTURES = {name: np.array(angles, dtype=np.float64) for name, angles in _GESTURES.items()}
"""Name -> 21 angles in degrees."""


@dataclass(frozen=True)
class JointAxes:
    """Unit axes (15, 3) of joints 1..15 in the rest frame; turning by positive angles is right-handed about them."""

    flexion: Floats
    """Towards the palm."""
    abduction: Floats
    """In the plane of the palm, for every finger towards the little finger's side."""
    twist: Floats
    """Along the bone, towards the tip."""
    thumb_palmar: Floats
    """(3,): lifts the thumb's metacarpal out of the plane of the palm, towards the palm's side."""


def joint_axes(joints: Floats, tips: Floats) -> JointAxes:
    """Axes of a hand at rest from its joints (16, 3) and fingertips (5, 3: thumb, index, middle, ring, pinky)."""
    flexion, abduction, twist = np.zeros((3, 15, 3))
    tip_of = dict(zip(("thumb", *FINGERS), tips, strict=True))
    for finger, base in BASE_JOINTS.items():
        chain = [*joints[base : base + 3], tip_of[finger]]
        normal = np.array(_PALM_NORMALS[finger])
        for step in range(3):
            bone = _unit(chain[step + 1] - chain[step])
            flexion[base + step - 1] = _unit(np.cross(bone, normal))
            abduction[base + step - 1] = _unit(np.cross(flexion[base + step - 1], bone))
            twist[base + step - 1] = bone
    palmar = _unit(np.cross(twist[12], np.array([0.0, -1.0, 0.0])))
    return JointAxes(flexion, abduction, twist, palmar)


def rest_axes(hand: HandModel) -> JointAxes:
    """Joint axes of the hand's mean shape."""
    template = np.asarray(hand.v_template, dtype=np.float64)
    return joint_axes(hand.j_regressor @ template, template[list(FINGERTIP_VERTICES)])


def pose_rotations(angles_deg: Floats, axes: JointAxes) -> Floats:
    """Rotation matrices (15, 3, 3) of joints 1..15 for a pose of 21 angles."""
    angles = np.radians(angles_deg)
    flexions, spreads = np.zeros(15), np.zeros(15)
    for number, finger in enumerate(FINGERS):
        joint = BASE_JOINTS[finger] - 1
        flexions[joint : joint + 3] = angles[4 * number : 4 * number + 3]
        spreads[joint] = _SPREAD_SIGN[finger] * angles[4 * number + 3]
    cmc_flexion, palmar, pronation, mcp, ip = angles[16:]
    flexions[12:] = cmc_flexion, mcp, ip
    vectors = np.concatenate(
        [
            flexions[:, None] * axes.flexion,
            spreads[:, None] * axes.abduction,
            [palmar * axes.thumb_palmar, pronation * axes.twist[12]],
        ]
    )
    turns = rotation_matrices(vectors)
    rotations = turns[15:30] @ turns[:15]
    rotations[12] = turns[30] @ rotations[12] @ turns[31]
    return np.asarray(rotations)


def within_limits(angles_deg: Floats) -> Floats:
    """The pose, brought inside the joints' ranges; flexed fingers cannot spread (the collateral ligaments tighten)."""
    clipped = np.clip(angles_deg, LIMITS[:, 0], LIMITS[:, 1])
    for number in range(4):
        flexion = clipped[4 * number]
        clipped[4 * number + 3] *= np.clip(1 - flexion / 80, 0, 1)
    return np.asarray(clipped)


def draw_pose(rng: np.random.Generator) -> Floats:
    """A random pose of 21 angles: between two gestures, loosened as a whole and finger by finger, within the limits."""
    names = sorted(GESTURES)
    first, second = (GESTURES[names[i]] for i in rng.integers(len(names), size=2))
    mix = np.repeat(
        np.clip(rng.beta(0.5, 0.5) + _finger_lead(rng), 0, 1), (4, 4, 4, 4, 5)
    )  # mostly near one of the two
    angles = mix * first + (1 - mix) * second
    angles = angles + rng.normal(0, 7) * _flexions() + _finger_noise(rng) + rng.normal(0, 3, 21)
    return within_limits(angles)


def _finger_lead(rng: np.random.Generator) -> Floats:
    """(5,) how far each finger is ahead of the hand from one gesture to the other: neighbours are tied by tendons, ring
    and little finger most, index and thumb are freest."""
    lead = rng.normal(0, [0.22, 0.12, 0.10, 0.12, 0.25])
    lead[2:4] = 0.5 * lead[2:4] + 0.5 * lead[2:4].mean()
    return np.asarray(lead)


def _flexions() -> Floats:
    """1 where an angle is a finger's flexion, 0 elsewhere (21,)."""
    return np.array([1.0, 1.2, 0.7, 0.0] * 4 + [0.0] * 5)


def _finger_noise(rng: np.random.Generator) -> Floats:
    """Each finger curls a little by itself; its two outer joints move together, as their tendons do."""
    noise = np.zeros(21)
    for number in range(4):
        outer = rng.normal(0, 8)
        noise[4 * number : 4 * number + 4] = [rng.normal(0, 7), outer, 0.6 * outer, rng.normal(0, 3)]
    noise[16:] = rng.normal(0, [6, 6, 4, 7, 9])
    return noise


def _unit(vector: Floats) -> Floats:
    return np.asarray(vector / np.linalg.norm(vector))
