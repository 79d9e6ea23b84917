"""Hands drawn over their pictures: what was labelled in green, what the student said in red."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from models.drawing import draw_hand

_TRUE, _PRED = (40, 220, 90), (255, 60, 60)
_SHOWN_PX = 192
_CAPTION_PX = 14


def sheet(
    pictures: NDArray[np.uint8],
    true: NDArray[Any],
    pred: NDArray[Any],
    columns: int = 4,
    shown_px: int = _SHOWN_PX,
    captions: Sequence[str] = (),
) -> bytes:
    """A PNG of all pictures (N,256,256,3) with both skeletons (N,21,2+) in crop units (-0.5..0.5).

    captions: a line in the corner of each picture, or none at all.
    """
    tiles = [_tile(*each, shown_px) for each in zip(pictures, true, pred, strict=True)]
    for tile, caption in zip(tiles, captions, strict=False):
        _write(tile, caption)
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    page = Image.new("RGB", (columns * shown_px, rows * shown_px))
    for i, tile in enumerate(tiles):
        page.paste(tile, (i % columns * shown_px, i // columns * shown_px))
    data = io.BytesIO()
    page.save(data, format="PNG")
    return data.getvalue()


def _write(tile: Image.Image, caption: str) -> None:
    """On a strip of its own, to be read over any picture."""
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(size=_CAPTION_PX)
    left, _, right, bottom = draw.textbbox((4, 2), caption, font=font)
    draw.rectangle((left - 4, 0, right + 4, bottom + 3), fill=(0, 0, 0))
    draw.text((4, 2), caption, font=font, fill=(255, 255, 255))


def _tile(picture: NDArray[np.uint8], true: NDArray[Any], pred: NDArray[Any], shown_px: int) -> Image.Image:
    tile = Image.fromarray(picture).resize((shown_px, shown_px))
    draw = ImageDraw.Draw(tile)
    for points, colour in ((true, _TRUE), (pred, _PRED)):
        draw_hand(draw, (np.asarray(points)[:, :2] + 0.5) * shown_px, colour)
    return tile
