"""How well networks trained on rendered hands do on real photographs, and what the detector finds there.

    python benchmarks/real_hands.py [--network NAME|PATH] [--mano-model FILE] [--detector WHEEL] [--worst FILE.svg]
                                    [--quick] [--json FILE]

The 24 hands of ../shared/data/real-hands through `handstill predict`'s path, with the annotated boxes: PA-MPJPE (proper
rotations) and MPJPE from the wrist where there is 3D truth, the share of joints within 5, 10 and 15% of the tight box
(HInt's PCK) for all. The mean hand in the mean pose, moved onto the 3D truth, is the error of knowing nothing. With
--detector: how many of the annotated hands it finds (its box overlaps the tight one by half), their sides, and what it
finds besides. Nothing is timed but the detector.

--worst draws the hands that the first network answers worst, over their labels and without the photographs, which their
licences keep where they are.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from models.drawing import BONES
from models.hand_box import HandBox
from models.hand_detector import load_hand_detector, overlap
from models.hand_model import HandModel
from models.photo_hands import PredictedHand
from pipeline.predicting import load_predictor
from stages.annotations import HandAnnotation
from stages.pictures import decode
from stages.skinning import pose_hand, rotation_matrices
from stages.tar_source import tar_hands
from trainer import metrics
from trainer.report_figures import as_svg

ROOT = Path(__file__).resolve().parents[1]
TEACHER = ROOT / "models/assets/demo_teacher/checkpoints/hamer.ckpt"
REAL_HANDS = ROOT.parent / "shared/data/real-hands"
PHOTOS = ROOT.parent / "shared/data/photos"
FOUND_IOU = 0.5
WORST = 8
FINGER_COLOURS = ("#cc79a7", "#0072b2", "#56b4e9", "#009e73", "#d55e00")
"""Thumb to little finger."""

Row = dict[str, Any]


@dataclass(frozen=True)
class RealHand:
    """One annotated hand and its photograph."""

    data_set: str
    picture: NDArray[np.uint8]
    label: HandAnnotation

    @property
    def box(self) -> HandBox:
        """As annotated: twice the tight one."""
        width, height = self.label.scale * 200
        x, y = self.label.center - self.label.scale * 100
        return HandBox(float(x), float(y), float(width), float(height), self.label.right > 0.5)

    @property
    def tight(self) -> NDArray[np.float64]:
        """(4,) left, top, right, bottom of its visible joints."""
        seen = self.label.keypoints_2d[self.label.keypoints_2d[:, 2] > 0, :2]
        return np.concatenate([seen.min(axis=0), seen.max(axis=0)]).astype(np.float64)

    @property
    def size_px(self) -> float:
        """The tight box's longer side."""
        return float((self.tight[2:] - self.tight[:2]).max())

    @property
    def sure(self) -> NDArray[np.bool_]:
        """(21,) joints whose place is counted."""
        return np.asarray(self.label.keypoints_2d[:, 2] > 0.5)


def real_hands() -> list[RealHand]:
    """In the tars' order."""
    hands = []
    for tar in sorted(REAL_HANDS.glob("*/*.tar")):
        content = tar.read_bytes()
        for found in tar_hands(tar).hands():
            picture = decode(content[found.picture.offset : found.picture.offset + found.picture.length])
            assert picture is not None
            assert isinstance(found.annotation, HandAnnotation)
            hands.append(RealHand(tar.parent.name, picture, found.annotation))
    return hands


def scores(name: str, hands: Sequence[RealHand], said: Sequence[PredictedHand]) -> list[Row]:
    rows = []
    for data_set in sorted({hand.data_set for hand in hands}):
        pairs = [(hand, one) for hand, one in zip(hands, said, strict=True) if hand.data_set == data_set]
        for what, value in _scores(pairs).items():
            unit = "mm" if what.endswith("mpjpe") else "share"
            rows.append({"what": f"{name}: {data_set} ({len(pairs)} hands): {what}", "value": value, "unit": unit})
    return rows


def _scores(pairs: Sequence[tuple[RealHand, PredictedHand]]) -> dict[str, float]:
    flat = np.stack([hand.label.keypoints_2d for hand, _ in pairs]).astype(np.float64)
    sure = np.stack([hand.sure for hand, _ in pairs])
    pred = np.stack([one.joints_2d_px for _, one in pairs])
    size_px = np.array([hand.size_px for hand, _ in pairs])
    found = {
        f"pck_{round(100 * limit):02d}": metrics.pck(pred, flat[..., :2], sure, size_px, limit)
        for limit in (0.05, 0.1, 0.15)
    }
    deep = np.stack([hand.label.keypoints_3d for hand, _ in pairs]).astype(np.float64)
    known = deep[..., 3] > 0
    if known.any():
        joints = np.stack([one.joints_3d_m for _, one in pairs])
        found["pa_mpjpe"] = float(np.nanmean(metrics.pa_mpjpe_mm(joints, deep[..., :3], known, reflection=False)))
        found["mpjpe"] = float(np.nanmean(metrics.mpjpe_mm(joints, deep[..., :3], known, root=0)))
    return found


def draw_worst(hands: Sequence[RealHand], said: Sequence[PredictedHand], path: Path) -> None:
    """The hands with the largest distance of 2D joints by the tight box's longer side, the worst first."""
    errors = np.array([_share_of_box(hand, one) for hand, one in zip(hands, said, strict=True)])
    worst = np.argsort(errors)[::-1][:WORST]
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    panels = figure.subplots(2, -(-WORST // 2)).ravel()
    for axes, index in zip(panels, worst, strict=False):
        _draw(axes, hands[index], said[index])
        axes.set_title(f"{hands[index].data_set}\n{errors[index]:.0%} of the box", fontsize=8)
    for axes in panels[len(worst) :]:
        axes.set_axis_off()
    figure.supxlabel("grey: labelled; coloured: answered, thumb to little finger; frame: the tight box", fontsize=8)
    path.write_text(as_svg(figure), encoding="utf-8")


def _share_of_box(hand: RealHand, said: PredictedHand) -> float:
    if not hand.sure.any():
        return 0.0  # nobody knows where this hand's joints are
    distance = np.linalg.norm(said.joints_2d_px - hand.label.keypoints_2d[:, :2], axis=1)[hand.sure]
    return float(distance.mean() / hand.size_px)


def _draw(axes: Axes, hand: RealHand, said: PredictedHand) -> None:
    left, top, right, bottom = hand.tight
    axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="#ddd", linewidth=1)
    for number, (a, b) in enumerate(BONES):
        if hand.sure[[a, b]].all():
            axes.plot(*hand.label.keypoints_2d[[a, b], :2].T, color="#999", linewidth=3, solid_capstyle="round")
        axes.plot(*said.joints_2d_px[[a, b]].T, color=FINGER_COLOURS[number // 4], linewidth=1.4)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_yticks([])


def mean_pose(hands: Sequence[RealHand], model: HandModel) -> list[Row]:
    """PA-MPJPE of a hand that never moves."""
    rotations = np.concatenate([np.eye(3)[None], rotation_matrices(model.hands_mean.reshape(15, 3))])
    _, joints = pose_hand(model, rotations, np.zeros(10))
    deep = np.stack([hand.label.keypoints_3d for hand in hands]).astype(np.float64)
    known = deep[..., 3] > 0
    some = known.any(axis=1)
    sides = np.array([1.0 if hand.label.right > 0.5 else -1.0 for hand in hands])[some]
    still = np.repeat(joints[None], some.sum(), axis=0)
    still[..., 0] *= sides[:, None]
    error = metrics.pa_mpjpe_mm(still, deep[some, :, :3], known[some], reflection=False)
    return [{"what": f"mean pose ({some.sum()} hands): pa_mpjpe", "value": float(np.nanmean(error)), "unit": "mm"}]


def detections(wheel: Path, hands: Sequence[RealHand]) -> list[Row]:
    from stages.photos import find_photos, read_photo

    detector = load_hand_detector(wheel)
    rows: list[Row] = []
    for thorough in (False, True):
        kind = "quarters too" if thorough else "whole pictures"
        started, found, right_side, besides, pictures = time.monotonic(), 0, 0, 0, 0
        by_picture: dict[bytes, list[RealHand]] = {}
        for hand in hands:
            by_picture.setdefault(hand.picture.tobytes(), []).append(hand)
        for group in by_picture.values():
            boxes = detector(group[0].picture, thorough=thorough)
            pictures += 1
            matched: set[int] = set()
            for hand in group:
                overlaps = [overlap(hand.tight, _corners(box)) for box in boxes]
                best = int(np.argmax(overlaps)) if overlaps else -1
                if best >= 0 and overlaps[best] >= FOUND_IOU:
                    found += 1
                    matched.add(best)
                    right_side += boxes[best].right == (hand.label.right > 0.5)
            besides += len(boxes) - len(matched)
        photos = [detector(read_photo(photo.path), thorough=thorough) for photo in find_photos([PHOTOS])]
        seconds = (time.monotonic() - started) / (pictures + len(photos))
        rows += [
            {"what": f"detector, {kind}: annotated hands found (of {len(hands)})", "value": found, "unit": "hands"},
            {"what": f"detector, {kind}: of these with the right side", "value": right_side, "unit": "hands"},
            {"what": f"detector, {kind}: found besides", "value": besides, "unit": "boxes"},
            {
                "what": f"detector, {kind}: hands in {len(photos)} photos",
                "value": sum(map(len, photos)),
                "unit": "boxes",
            },
            {"what": f"detector, {kind}: time a picture", "value": seconds, "unit": "s"},
        ]
    return rows


def _corners(box: HandBox) -> NDArray[np.float64]:
    return np.array([box.x, box.y, box.x + box.width, box.y + box.height])


def report(arguments: argparse.Namespace) -> Row:
    hands = real_hands()
    if arguments.quick:
        hands = [hand for hand in hands if hand.data_set.startswith("interhand")]
    rows: list[Row] = []
    networks = arguments.network or [str(TEACHER)]
    for number, name in enumerate(networks):
        mano_model = arguments.mano_model or ("open-hand" if name == str(TEACHER) else None)
        predictor = load_predictor(name, config=arguments.config, mano_model=mano_model, rescale=1.0)
        said = [predictor(hand.picture, [hand.box])[0] for hand in hands]
        rows += scores("demo teacher" if name == str(TEACHER) else name, hands, said)
        if number == 0:
            rows += mean_pose(hands, predictor.named.hand_model)
            if arguments.worst is not None:
                draw_worst(hands, said, arguments.worst)
    if arguments.detector is not None:
        rows += detections(arguments.detector, hands)
    return {
        "name": "real_hands",
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "rows": rows,
        "ratios": {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", help="as for `handstill predict`; may be given again")
    parser.add_argument("--config", type=Path, default=Path("pipeline.yaml"))
    parser.add_argument("--mano-model")
    parser.add_argument("--detector", type=Path)
    parser.add_argument("--worst", type=Path, help="an SVG")
    parser.add_argument("--quick", action="store_true", help="the InterHand2.6M hands only")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not REAL_HANDS.is_dir():
        sys.exit(f"{REAL_HANDS} is not there: this needs the photographs of ../shared")
    text = json.dumps(report(arguments), indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
