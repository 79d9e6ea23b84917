"""How fast pictures of hands are made on one core, what rays on edges alone save, how deep fingers go into each other.

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
from stages.hand_contact import draw_plausible_pose
from stages.hand_poses import draw_pose, pose_rotations
from stages.hand_scenes import PICTURE_PX, HandPicture, Studio
from stages.skinning import pose_hand, rotation_matrices
from stages.synthesise import scene_rng
from trainer.metrics import pa_mpjpe_mm

_CELL_PX = 144
_COLUMNS, _ROWS = 6, 4
_LARGE_PX = 2 * PICTURE_PX
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


def depths_mm(studio: Studio, count: int) -> dict[str, np.ndarray]:
    """How far parts of the hand pass through each other: in poses as drawn, and in those that are kept."""
    rng = np.random.default_rng(0)
    drawn = [studio.capsules.depth_m(pose_rotations(draw_pose(rng), studio.axes)) for _ in range(count)]
    kept = [draw_plausible_pose(rng, studio.axes, studio.capsules)[1] for _ in range(count)]
    return {"poses as drawn": np.array(drawn) * 1e3, "poses kept": np.array(kept) * 1e3}


def mean_pose_mm(studio: Studio, count: int) -> float:
    """PA-MPJPE of always answering the mean pose and shape."""
    mean = np.concatenate([np.eye(3)[None], rotation_matrices(studio.hand.hands_mean.reshape(15, 3))])
    answer = pose_hand(studio.hand, mean, np.zeros(10))[1]
    true = np.stack([studio.take(scene_rng(2, number)).keypoints_3d for number in range(count)])
    return float(pa_mpjpe_mm(np.broadcast_to(answer, true.shape), true, reflection=True).mean())


def contact_sheet(studio: Studio) -> Image.Image:
    """A palette image: whole pictures cut to their boxes, the last row with joints and fingers drawn."""
    sheet = Image.new("RGB", (_COLUMNS * _CELL_PX, _ROWS * _CELL_PX))
    for number in range(_COLUMNS * _ROWS):
        row, column = divmod(number, _COLUMNS)
        cell = _cell(studio.take(scene_rng(0, number)), with_labels=row == _ROWS - 1)
        sheet.paste(cell, (column * _CELL_PX, row * _CELL_PX))
    return sheet.quantize(256, kmeans=2)


def _cell(picture: HandPicture, with_labels: bool) -> Image.Image:
    image = Image.open(io.BytesIO(picture.jpeg)).convert("RGB").resize((_LARGE_PX,) * 2, Image.Resampling.BICUBIC)
    if with_labels:
        draw = ImageDraw.Draw(image)
        points = [tuple(point) for point in ((picture.keypoints_2d + 0.5) * 2).tolist()]
        for finger, colour in enumerate(_FINGER_COLOURS):
            draw.line([points[0], *points[1 + 4 * finger : 5 + 4 * finger]], fill=colour, width=4)
    half = picture.box_px.max() * 0.85  # in the enlarged picture's pixels
    low = np.clip((picture.center + 0.5) * 2 - half, 0, max(_LARGE_PX - 2 * half, 0))
    box = (*low.tolist(), *(low + 2 * half).tolist())
    return image.resize((_CELL_PX, _CELL_PX), Image.Resampling.LANCZOS, box=box if 2 * half < _LARGE_PX else None)


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
    depth_rows = [
        {"what": f"{which}, {name}", "value": round(float(value), 2), "unit": unit}
        for which, depths in depths_mm(studio, 20 * count).items()
        for name, value, unit in (
            ("deepest", depths.max(), "mm"),
            ("99th percentile", np.percentile(depths, 99), "mm"),
            ("mean", depths.mean(), "mm"),
            ("deeper than 5 mm", 100 * (depths > 5).mean(), "%"),
        )
    ]
    report = {
        "name": "synthesise",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread used",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": [
            {"what": "pictures, extra rays on edges", "value": round(ours, 1), "unit": "1/s"},
            {"what": "pictures, extra rays everywhere", "value": round(all_pixels, 1), "unit": "1/s"},
            *depth_rows,
            {"what": "mean pose's PA-MPJPE", "value": round(mean_pose_mm(studio, count), 2), "unit": "mm"},
        ],
        "ratios": {"edges_over_everywhere": round(ours / all_pixels, 2)},
    }
    print(json.dumps(report, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
