"""Hands drawn over their pictures: what was labelled in green, what the student said in red."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

BONES = tuple((0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, 21))
"""Pairs of joints in OpenPose order: wrist to each finger's base, then along the finger."""

_TRUE, _PRED = (40, 220, 90), (255, 60, 60)
_SHOWN_PX = 192


def sheet(
    pictures: NDArray[np.uint8],
    true: NDArray[Any],
    pred: NDArray[Any],
    columns: int = 4,
    shown_px: int = _SHOWN_PX,
) -> bytes:
    """A PNG of all pictures (N,256,256,3) with both skeletons (N,21,2+) in crop units (-0.5..0.5)."""
    tiles = [_tile(*each, shown_px) for each in zip(pictures, true, pred, strict=True)]
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    page = Image.new("RGB", (columns * shown_px, rows * shown_px))
    for i, tile in enumerate(tiles):
        page.paste(tile, (i % columns * shown_px, i // columns * shown_px))
    data = io.BytesIO()
    page.save(data, format="PNG")
    return data.getvalue()


def _tile(picture: NDArray[np.uint8], true: NDArray[Any], pred: NDArray[Any], shown_px: int) -> Image.Image:
    tile = Image.fromarray(picture).resize((shown_px, shown_px))
    draw = ImageDraw.Draw(tile)
    for points, colour in ((true, _TRUE), (pred, _PRED)):
        xy = ((np.asarray(points)[:, :2] + 0.5) * shown_px).tolist()
        for a, b in BONES:
            draw.line([_inside(xy[a], shown_px), _inside(xy[b], shown_px)], fill=colour, width=2)
    return tile


def _inside(point: Sequence[float], shown_px: int) -> tuple[float, float]:
    """A wild prediction must not make Pillow draw a line of a million pixels."""
    x, y = (float(np.clip(v, -shown_px, 2 * shown_px)) for v in point)
    return x, y
