"""The open hand in a named gesture, palm as it rests."""

from __future__ import annotations

import numpy as np

from models.hand_model import HandModel
from stages.hand_poses import GESTURES, pose_rotations, rest_axes, within_limits
from stages.skinning import pose_hand


def posed(hand: HandModel, gesture: str) -> tuple[np.ndarray, np.ndarray]:
    """(vertices (V,3), joints (16,3)) in metres, of the mean shape."""
    turns = pose_rotations(within_limits(GESTURES[gesture]), rest_axes(hand))
    return pose_hand(hand, np.concatenate([np.eye(3)[None], turns]), np.zeros(10))
