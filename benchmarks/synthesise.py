"""How fast pictures of hands are made on one core, and what rays on edges alone save against four rays in every pixel.

    python benchmarks/synthesise.py [--quick] [--json FILE] [--sheet docs/pictures/synthesised.png]

`--sheet` also draws a contact sheet: pictures as written, and the last row with their labels on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from models.hand_model import load_hand_model
from stages import rendering
from stages.hand_scenes import HandPicture, Studio
from stages.synthesise import scene_rng

_CELL_PX = 144
_COLUMNS, _ROWS = 6, 4
_FINGER_COLOURS = ("#ff3030", "#ffa000", "#30e030", "#30c0ff", "#ff50ff")


def pictures_a_second(studio: Studio, count: int, edge: float) -> float:
    """Rate over `count` whole pictures, encoded, when differences above `edge` count as edges."""
    usual = rendering._EDGE
    rendering._EDGE = edge
    try:
        studio.take(scene_rng(0, 0))
        started = time.perf_counter()
        for number in range(count):
            studio.take(scene_rng(0, number))
        return count / (time.perf_counter() - started)
    finally:
        rendering._EDGE = usual


def contact_sheet(studio: Studio) -> Image.Image:
    """A palette image: whole pictures cut to their boxes, the last row with joints and fingers drawn."""
    sheet = Image.new("RGB", (_COLUMNS * _CELL_PX, _ROWS * _CELL_PX))
    for number in range(_COLUMNS * _ROWS):
        row, column = divmod(number, _COLUMNS)
        cell = _cell(studio.take(scene_rng(0, number)), with_labels=row == _ROWS - 1)
        sheet.paste(cell, (column * _CELL_PX, row * _CELL_PX))
    return sheet.quantize(256, kmeans=2)


def _cell(picture: HandPicture, with_labels: bool) -> Image.Image:
    image = Image.open(io.BytesIO(picture.jpeg)).convert("RGB").resize((448, 448), Image.Resampling.BICUBIC)
    if with_labels:
        draw = ImageDraw.Draw(image)
        points = [tuple(point) for point in ((picture.keypoints_2d + 0.5) * 2).tolist()]
        for finger, colour in enumerate(_FINGER_COLOURS):
            draw.line([points[0], *points[1 + 4 * finger : 5 + 4 * finger]], fill=colour, width=4)
    half = picture.box_px.max() * 0.85  # in the enlarged picture's pixels
    low = np.clip((picture.center + 0.5) * 2 - half, 0, 448 - 2 * half)
    box = (*low.tolist(), *(low + 2 * half).tolist())
    return image.resize((_CELL_PX, _CELL_PX), Image.Resampling.LANCZOS, box=box if 2 * half < 448 else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    studio = Studio(load_hand_model("open-hand"))
    if arguments.sheet is not None:
        contact_sheet(studio).save(arguments.sheet, optimize=True)
    count = 30 if arguments.quick else 300
    ours = pictures_a_second(studio, count, rendering._EDGE)
    all_pixels = pictures_a_second(studio, count, -1.0)
    report = {
        "name": "synthesise",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread used",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": [
            {"what": "pictures, extra rays on edges", "value": round(ours, 1), "unit": "1/s"},
            {"what": "pictures, extra rays everywhere", "value": round(all_pixels, 1), "unit": "1/s"},
        ],
        "ratios": {"edges_over_everywhere": round(ours / all_pixels, 2)},
    }
    print(json.dumps(report, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
