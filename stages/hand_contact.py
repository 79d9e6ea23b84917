"""How far the parts of a posed hand pass through each other, from capsules about its bones; and poses without it.

Skin gives way where fingers press on each other: a few millimetres are contact, more is not a hand.
"""

from __future__ import annotations

import numpy as np

from models.hand_model import FINGERTIP_VERTICES, HandModel
from stages.hand_poses import BASE_JOINTS, JointAxes, draw_pose, pose_rotations
from stages.skinning import Floats, joint_transforms

MOST_DEPTH_M = 0.005
"""Fingers that press on each other or on the palm flatten by about so much together."""
_MOST_DRAWS = 12
_PALM_BONES = ((0, 1), (0, 4), (0, 7), (0, 10))
"""From the wrist to the knuckles: the palm's capsules."""


class Capsules:
    """The bones of one hand model as capsules: 15 of the fingers, then four of the palm."""

    def __init__(self, hand: HandModel) -> None:
        rest = hand.v_template.astype(np.float64)
        self._joints = np.asarray(hand.j_regressor @ rest, dtype=np.float64)
        tips = rest[list(FINGERTIP_VERTICES)]
        self._ends, self._finger = [], []
        ends = {base + 2: tips[number] for number, base in enumerate(_bases())}
        for joint in range(1, 16):
            self._ends.append(ends[joint] if joint in ends else self._joints[joint + 1])
            self._finger.append((joint - 1) // 3)
        self._radii = np.array([_radius(hand, rest, self._joints[j], self._ends[j - 1], j) for j in range(1, 16)])
        inset = self._radii[[base + 1 for base in _bases()]]
        for number, base in enumerate(_bases()):  # a capsule's round end reaches as far as the fingertip
            bone = self._ends[base + 1] - self._joints[base + 2]
            self._ends[base + 1] = self._ends[base + 1] - bone / np.linalg.norm(bone) * inset[number]
        palm = float(np.median(np.abs((rest - self._joints[4])[_palm_vertices(hand, rest, self._joints)][:, 1])))
        self._palm_radius = palm
        self._pairs = np.array([pair for pair in _pairs() if not self._touching_at_rest(pair)])

    def depth_m(self, rotations: Floats) -> float:
        """How far, at most, two parts pass through each other in a pose: rotations (15, 3, 3); 0 where none do."""
        starts, ends, radii = self._posed(np.concatenate([np.eye(3)[None], rotations]))
        first, second = self._pairs.T
        apart = segment_distances(starts[first], ends[first], starts[second], ends[second])
        return float(np.clip(radii[first] + radii[second] - apart, 0, None).max())

    def _posed(self, rotations: Floats) -> tuple[Floats, Floats, Floats]:
        """Capsules' starts (19, 3), ends (19, 3) and radii (19,)."""
        world = joint_transforms(self._joints, rotations)
        places = world[:, :3, 3]
        local = np.array(self._ends) - self._joints[1:]
        ends = places[1:] + np.einsum("jab,jb->ja", world[1:, :3, :3], local)
        palm = np.array(
            [[places[a] * 0.75 + places[b] * 0.25, places[a] * 0.25 + places[b] * 0.75] for a, b in _PALM_BONES]
        )
        starts = np.concatenate([places[1:], palm[:, 0]])
        radii = np.concatenate([self._radii, np.full(len(_PALM_BONES), self._palm_radius)])
        return starts, np.concatenate([ends, palm[:, 1]]), radii

    def _touching_at_rest(self, pair: tuple[int, int]) -> bool:
        """Neighbours in the flesh: the roots of two fingers, the ball of the thumb and the palm."""
        starts, ends, radii = self._posed(np.tile(np.eye(3), (16, 1, 1)))
        a, b = pair
        apart = segment_distances(starts[[a]], ends[[a]], starts[[b]], ends[[b]])[0]
        return bool(apart < radii[a] + radii[b])


def draw_plausible_pose(rng: np.random.Generator, axes: JointAxes, capsules: Capsules) -> tuple[Floats, float]:
    """A pose of 21 angles as `draw_pose` draws them, and its depth in metres.

    Redrawn while parts pass through each other by more than MOST_DEPTH_M; the best of twelve where none keeps to it.
    """
    best, least = draw_pose(rng), np.inf
    for draw in range(_MOST_DRAWS):
        angles = best if draw == 0 else draw_pose(rng)
        depth = capsules.depth_m(pose_rotations(angles, axes))
        if depth < least:
            best, least = angles, depth
        if least <= MOST_DEPTH_M:
            break
    return best, float(least)


def segment_distances(a: Floats, b: Floats, c: Floats, d: Floats) -> Floats:
    """(n,) smallest distances of the segments from a to b and from c to d, each (n, 3)."""
    along, other, between = b - a, d - c, a - c
    aa, ee = _dot(along, along) + 1e-12, _dot(other, other) + 1e-12
    ab, ac, ec = _dot(along, other), _dot(along, between), _dot(other, between)
    crossing = aa * ee - ab * ab
    s = np.clip(np.where(crossing > 1e-12, (ab * ec - ac * ee) / np.maximum(crossing, 1e-12), 0.0), 0, 1)
    t = np.clip((ab * s + ec) / ee, 0, 1)
    s = np.clip((ab * t - ac) / aa, 0, 1)
    return np.asarray(np.linalg.norm(between + s[:, None] * along - t[:, None] * other, axis=1))


def _bases() -> tuple[int, ...]:
    """First joints in the fingertips' order: thumb, index, middle, ring, pinky."""
    return tuple(BASE_JOINTS[finger] for finger in ("thumb", "index", "middle", "ring", "pinky"))


def _pairs() -> list[tuple[int, int]]:
    """Capsules that may not pass through each other: of two fingers, or of a finger's outer bones and the palm."""
    fingers = [(a, b) for a in range(15) for b in range(a + 1, 15) if a // 3 != b // 3]
    return fingers + [(a, b) for a in range(15) if a % 3 for b in range(15, 19)]


def _radius(hand: HandModel, rest: Floats, start: Floats, end: Floats, joint: int) -> float:
    mine = hand.weights[:, joint] > 0.6
    bone = (end - start) / np.linalg.norm(end - start)
    offsets = rest[mine] - start
    across = offsets - (offsets @ bone)[:, None] * bone
    return float(np.percentile(np.linalg.norm(across, axis=1), 40))


def _palm_vertices(hand: HandModel, rest: Floats, joints: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    along = (rest[:, 0] - joints[4, 0]) / (joints[0, 0] - joints[4, 0])
    return np.asarray((hand.weights[:, 0] > 0.9) & (along > 0.2) & (along < 0.8) & (np.abs(rest[:, 2]) < 0.02))


def _dot(left: Floats, right: Floats) -> Floats:
    return np.asarray(np.einsum("nk,nk->n", left, right))
