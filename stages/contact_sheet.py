"""The samples on which teacher and labels disagree most, as one picture: labels in green, the teacher in red."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from models.drawing import draw_hand
from stages.disagreement import MIN_CONFIDENCE_2D, Offender
from stages.tally import open_shard
from storage.encodings import decode_picture

SHOWN = 12
"""So many of the worst samples are drawn for each measure."""
COLUMNS = 6
_LABEL, _TEACHER = (40, 220, 90), (255, 60, 60)
_TILE_PX = 256
_TILE_IN = 2.1
_CAPTION_IN = 0.62
_TITLE_IN = 0.45
_GAP_IN = 0.15


@dataclass(frozen=True)
class Block:
    """Some samples under a heading, the worst first."""

    title: str
    root: Path
    worst: Sequence[Offender]


def contact_sheet(blocks: Sequence[Block]) -> Figure:
    """The first of every block's samples. Only the pictures that are shown are read."""
    rows = [-(-min(len(block.worst), SHOWN) // COLUMNS) for block in blocks]
    height_in = sum(_TITLE_IN + count * (_TILE_IN + _CAPTION_IN) for count in rows) + _TITLE_IN
    figure = Figure(figsize=(COLUMNS * (_TILE_IN + _GAP_IN) + 0.2, height_in))
    figure.text(0.5, 1 - 0.22 / height_in, "labels green, teacher red", ha="center", va="center", fontsize=11)
    top_in = height_in - _TITLE_IN
    for block, count in zip(blocks, rows, strict=True):
        figure.text(0.012, (top_in - 0.25) / height_in, block.title, va="center", fontsize=11, weight="bold")
        top_in -= _TITLE_IN
        for place, offender in enumerate(block.worst[:SHOWN]):
            left_in = 0.1 + (place % COLUMNS) * (_TILE_IN + _GAP_IN)
            bottom_in = top_in - (place // COLUMNS) * (_TILE_IN + _CAPTION_IN) - _TILE_IN
            _show(figure, block.root, offender, (left_in, bottom_in))
        top_in -= count * (_TILE_IN + _CAPTION_IN)
    return figure


def _show(figure: Figure, root: Path, offender: Offender, at_in: tuple[float, float]) -> None:
    width_in, height_in = figure.get_size_inches()
    axes = figure.add_axes((at_in[0] / width_in, at_in[1] / height_in, _TILE_IN / width_in, _TILE_IN / height_in))
    axes.imshow(tile(root, offender))
    axes.set_axis_off()
    lines = [*_wrapped(offender.sample_id), f"view {offender.view}", _values(offender)]
    axes.text(0, -0.03, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=7)


def _values(offender: Offender) -> str:
    said = {"px": "{:.3g} px", "root_mm": "{:.3g} mm", "pa_mm": "PA {:.3g} mm"}
    return ", ".join(text.format(offender.values[name]) for name, text in said.items() if offender.values[name] >= 0)


def _wrapped(sample_id: str, width: int = 38) -> list[str]:
    """An id on at most two lines; of a longer one the end, which tells samples apart."""
    if len(sample_id) <= width:
        return [sample_id]
    if len(sample_id) > 2 * width:
        sample_id = "..." + sample_id[3 - 2 * width :]
    return [sample_id[:width], sample_id[width:]]


def tile(root: Path, offender: Offender) -> Image.Image:
    """The picture of one view with both hands; of the labels only the joints that count."""
    shard = open_shard(root, offender.shard)
    row, view = offender.row, offender.view
    image = Image.fromarray(decode_picture(shard.picture_bytes(row * shard.n_views + view))).resize(
        (_TILE_PX, _TILE_PX)
    )
    draw = ImageDraw.Draw(image)
    label: Any = shard.small["labels/keypoints_2d"][row, view]
    label = np.where(label[:, 2:] > MIN_CONFIDENCE_2D, label[:, :2], np.nan)
    for points, colour in ((label, _LABEL), (shard.small["teacher/keypoints_2d"][row, view], _TEACHER)):
        draw_hand(draw, (points + 0.5) * _TILE_PX, colour)
    return image


def png(figure: Figure) -> bytes:
    """The same figure gives the same bytes."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    return data.getvalue()
