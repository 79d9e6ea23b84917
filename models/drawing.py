"""The bones of a hand, drawn over a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw

BONES = tuple((0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, 21))
"""Pairs of joints in OpenPose order: wrist to each finger's base, then along the finger."""

FAR_PX = 10_000.0
"""A wild prediction must not make Pillow draw a line of a million pixels."""


def draw_hand(draw: ImageDraw.ImageDraw, joints_px: NDArray[Any], colour: tuple[int, int, int], width: int = 2) -> None:
    """Lines between the joints (21,2) pixels, OpenPose order; a bone with an end that is NaN is left out."""
    near = np.clip(joints_px, -FAR_PX, FAR_PX).tolist()
    for a, b in BONES:
        if not np.isnan([*near[a], *near[b]]).any():
            draw.line([*near[a], *near[b]], fill=colour, width=width)
