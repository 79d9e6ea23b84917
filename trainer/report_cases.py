"""Single samples side by side for the report: the input, the label, and what each network said, as small pictures."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from models.drawing import draw_hand
from trainer.config import METRIC_TITLES
from trainer.report_tables import number
from trainer.showcase import Case

_TILE_PX = 192
_QUALITY = 82
_MAX_COLUMNS = 8
"""Pictures beside each other on a page; more are shared out among rows of about the same length."""
_LABEL, _TEACHER, _STUDENT = (40, 220, 90), (80, 170, 255), (255, 70, 60)
_MIN_CONFIDENCE = 0.5
"""Labels below it are not drawn; as scores count them (trainer.scores)."""


def cases_html(cases: Mapping[str, Sequence[Case]]) -> str:
    """The worst and the best samples of each data set, a row each."""
    parts = []
    for dataset, found in cases.items():
        for worst, heading in ((True, "answered worst"), (False, "answered best")):
            rows = [case for case in found if case.worst is worst]
            if rows:
                parts.append(f"<h3>{html.escape(dataset)}: {heading}</h3>" + "".join(map(_case, rows)))
    if parts:
        parts.insert(
            0, "<p class=note>By the students' mean error. Labels green, the teacher blue, students red; a joint that "
            "the labels do not call seen is not drawn.</p>"
        )  # fmt: skip
    return "".join(parts)


def picture_html(label: str, png: bytes) -> str:
    """The sheet of answers that a run left while it learned."""
    source = base64.b64encode(png).decode()
    caption = f"{html.escape(label)}: labels green, answers red"
    return f'<figure><img alt="" src="data:image/png;base64,{source}"><figcaption>{caption}</figcaption></figure>'


def sheet_png(case: Case) -> bytes:
    """One row of tiles as a PNG, for whoever shows pictures and no page."""
    tiles = [tile for _, tile in _tiles(case)]
    row = Image.new("RGB", (len(tiles) * _TILE_PX, _TILE_PX))
    for at, tile in enumerate(tiles):
        row.paste(tile, (at * _TILE_PX, 0))
    data = io.BytesIO()
    row.save(data, format="PNG", optimize=True)
    return data.getvalue()


def _case(case: Case) -> str:
    tiles = [
        f'<figure><img alt="" src="{_data_url(tile)}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for caption, tile in _tiles(case)
    ]
    rows = math.ceil(len(tiles) / _MAX_COLUMNS)
    grid = f'<div class=case style="--columns:{math.ceil(len(tiles) / rows)}">{"".join(tiles)}</div>'
    return f"<p class=caseid>{html.escape(case.sample_id)}</p>{grid}"


def _tiles(case: Case) -> list[tuple[str, Image.Image]]:
    seen = np.where(case.label[:, 2:] > _MIN_CONFIDENCE, case.label[:, :2], np.nan)
    unit = " mm" if case.metric.endswith("_mm") else ""
    title = METRIC_TITLES.get(case.metric, case.metric).removesuffix(", mm")  # type: ignore[call-overload]
    tiles = [("input", _tile(case.picture, None, _LABEL)), ("label", _tile(case.picture, seen, _LABEL))]
    for answer in case.answers:
        told = "no answer" if math.isnan(answer.error) else f"{title} {number(answer.error)}{unit}"
        colour = _TEACHER if answer.name == "teacher" else _STUDENT
        tiles.append((f"{answer.name}: {told}", _tile(case.picture, answer.points, colour)))
    return tiles


def _tile(picture: NDArray[np.uint8], points: NDArray[np.float64] | None, colour: tuple[int, int, int]) -> Image.Image:
    tile = Image.fromarray(picture).resize((_TILE_PX, _TILE_PX))
    if points is not None:
        draw_hand(ImageDraw.Draw(tile), (points + 0.5) * _TILE_PX, colour)
    return tile


def _data_url(tile: Image.Image) -> str:
    data = io.BytesIO()
    tile.save(data, format="JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
