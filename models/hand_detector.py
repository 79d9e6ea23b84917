"""Finding hands in photographs with MediaPipe's two small networks, run by OpenCV; nothing is imported from MediaPipe.

The weights are read out of MediaPipe's package (Apache-2.0), as a wheel file or installed, and known by their digests;
decision 018 says why not the package itself. The first network finds palms in a picture of 192 x 192, the second sees a
turned square round each, says whether a hand is there and which, and where its 21 joints are: the box is theirs.
The constants are those of MediaPipe's graphs palm_detection_cpu, palm_detection_detection_to_roi and hand_landmark_cpu.
"""

from __future__ import annotations

import importlib.util
import lzma
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from models.crops import Picture
from models.hand_box import HandBox
from storage.durable import sha256_bytes
from storage.errors import InputError

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]

PACKAGE = "mediapipe==0.10.21"
"""The last whose wheel holds the networks; later ones fetch them when they run."""
PALMS, LANDMARKS = "palm_detection_full.tflite", "hand_landmark_full.tflite"
_SHA256 = {
    PALMS: "1b14e9422c6ad006cde6581a46c8b90dd573c07ab7f3934b5589e7cea3f89a54",
    LANDMARKS: "11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3",
}
_LARGEST_FILE = 1 << 24

PALM_INPUT_PX, LANDMARK_INPUT_PX = 192, 224
_MIN_PALM_SCORE, _MIN_HAND_SCORE = 0.2, 0.7
"""MediaPipe has 0.5 for both; on photographs, the second network was the better judge (docs/log.md)."""
_SAME_PALM_IOU = 0.3
_SQUARE_OVER_PALM, _SQUARE_SHIFT = 2.6, -0.5
"""The turned square is 2.6 palms wide and lies half a palm towards the fingers."""
_WRIST, _MIDDLE_BASE = 0, 2
"""Of a palm's seven points: those whose line shows how the hand is turned."""
_SAME_HAND = 0.25
"""Two hands whose joints are this share of the smaller one's box apart, on average, are one hand found twice."""


@dataclass(frozen=True, eq=False)
class Palm:
    """Where a palm is in the photograph."""

    box: Floats
    """(4,) left, top, right, bottom in photo px"""
    points: Floats
    """(7, 2) photo px"""
    score: float


@dataclass(frozen=True, eq=False)
class Landmarks:
    """What the second network says of one turned square."""

    joints: Floats
    """(21, 2) pixels of its 224 x 224 input"""
    score: float
    """0 to 1: a hand is there"""
    right: float
    """0 to 1: it is a right one"""


PalmNetwork = Callable[[Picture], tuple[Floats32, Floats32]]
"""(192, 192, 3) RGB to raw boxes with points (2016, 18) and scores (2016,)."""
LandmarkNetwork = Callable[[Picture], Landmarks]
"""(224, 224, 3) RGB"""


class HandDetector:
    """Boxes of the hands in an RGB photograph, the surest first. Made by `load_hand_detector`."""

    def __init__(self, palms: PalmNetwork, landmarks: LandmarkNetwork) -> None:
        self._palms, self._landmarks = palms, landmarks
        self._anchors = palm_anchors()

    def __call__(self, picture: Picture, *, thorough: bool = True) -> list[HandBox]:
        """The boxes (empty where no hand is found) of a photograph (H, W, 3) uint8.

        thorough: look at overlapping quarters of it too, which finds hands half as large and takes five times as long.
        """
        squares = _squares(picture.shape[1], picture.shape[0], levels=2 if thorough else 1)
        palms = [palm for square in squares for palm in self._palms_in(picture, square)]
        hands: list[tuple[Floats, Landmarks]] = []
        for palm in merged(palms):
            to_photo = turned_square(palm)
            found = self._landmarks(_cut(picture, to_photo, LANDMARK_INPUT_PX))
            joints = found.joints @ to_photo[:, :2].T + to_photo[:, 2]
            if found.score >= _MIN_HAND_SCORE and not any(_same_hand(joints, other) for other, _ in hands):
                hands.append((joints, found))
        boxes = [_box(joints, found) for joints, found in hands]
        return sorted((box for box in boxes if _touches(box, picture)), key=lambda box: -(box.score or 0))

    def _palms_in(self, picture: Picture, to_photo: Floats) -> list[Palm]:
        raw, scores = self._palms(_cut(picture, to_photo, PALM_INPUT_PX))
        return decode_palms(raw, scores, self._anchors, to_photo)


def load_hand_detector(source: Path | None = None) -> HandDetector:
    """The detector with its weights from `source`: a wheel of MediaPipe's, or a folder that has the two files.

    None: an installed package `mediapipe` that has them. Raises InputError that says how to come by them.
    """
    files = _from_package() if source is None else _from_source(source)
    for name, content in files.items():
        if sha256_bytes(content) != _SHA256[name]:
            raise InputError(
                f"{source or 'mediapipe'}: {name}: sha256 {sha256_bytes(content)[:16]}..., wanted "
                f"{_SHA256[name][:16]}...: another version than this detector was written for. {how_to_get_it()}"
            )
    return HandDetector(_palm_network(files[PALMS]), _landmark_network(files[LANDMARKS]))


def how_to_get_it() -> str:
    """The two lines that bring the detector."""
    return (
        f"`pip download --no-deps --only-binary=:all: --python-version 3.11 {PACKAGE}` fetches a wheel of 36 MB, which "
        "need not be installed: name it with --detector."
    )


def _from_source(source: Path) -> dict[str, bytes]:
    if source.is_dir():
        found = {name: sorted(source.rglob(name))[:1] for name in _SHA256}
        return {name: _demand(paths[0].read_bytes() if paths else None, name, source) for name, paths in found.items()}
    if not source.is_file():
        raise InputError(f"--detector: {source} is not there. {how_to_get_it()}")
    try:
        with zipfile.ZipFile(source) as archive:
            return {name: _demand(_member(archive, name), name, source) for name in _SHA256}
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(
            f"--detector: {source} cannot be read as a wheel ({type(error).__name__}: {error}). {how_to_get_it()}"
        ) from None


def _member(archive: zipfile.ZipFile, name: str) -> bytes | None:
    members = [info for info in archive.infolist() if info.filename.endswith("/" + name)]
    if not members or members[0].file_size > _LARGEST_FILE:
        return None
    return archive.read(members[0])


def _demand(content: bytes | None, name: str, source: Path) -> bytes:
    if content is None:
        raise InputError(f"--detector: {source} holds no {name} (newer packages do not). {how_to_get_it()}")
    return content


def _from_package() -> dict[str, bytes]:
    """Out of the installed package's folder; it is never imported."""
    spec = importlib.util.find_spec("mediapipe")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"no boxes are given and there is no detector of hands. Give --box x,y,width,height,left|right (in Python: "
            f"boxes=). Or: {how_to_get_it()} (in Python: load_predictor(..., detector=FILE))"
        )
    return _from_source(Path(next(iter(spec.submodule_search_locations))) / "modules")


def _palm_network(content: bytes) -> PalmNetwork:
    network = cv2.dnn.readNetFromTFLite(np.frombuffer(content, np.uint8))
    names = ["Identity", "Identity_1"]

    def look(picture: Picture) -> tuple[Floats32, Floats32]:
        network.setInput(cv2.dnn.blobFromImage(picture, 1 / 255))
        raw, scores = network.forward(names)
        return np.asarray(raw[0]), np.asarray(scores[0, :, 0])

    return look


def _landmark_network(content: bytes) -> LandmarkNetwork:
    network = cv2.dnn.readNetFromTFLite(np.frombuffer(content, np.uint8))
    names = ["Identity", "Identity_1", "Identity_2"]

    def look(picture: Picture) -> Landmarks:
        network.setInput(cv2.dnn.blobFromImage(picture, 1 / 255))
        joints, hand, right = network.forward(names)
        return Landmarks(np.asarray(joints, np.float64).reshape(21, 3)[:, :2], float(hand.item()), float(right.item()))

    return look


def palm_anchors() -> Floats:
    """(2016, 2) middles of the cells that raw boxes are relative to, shares of the input: two a cell of 24 x 24, then
    six a cell of 12 x 12."""
    layers = []
    for cells, repeated in ((24, 2), (12, 6)):
        y, x = np.mgrid[:cells, :cells]
        layers.append(np.repeat((np.stack([x, y], axis=-1).reshape(-1, 2) + 0.5) / cells, repeated, axis=0))
    return np.concatenate(layers)


def decode_palms(raw: Floats32, scores: Floats32, anchors: Floats, to_photo: Floats) -> list[Palm]:
    """Raw boxes x, y, width, height and seven points (n, 18), in input px from their anchors, to palms in the photo."""
    surely = 1 / (1 + np.exp(-np.clip(scores.astype(np.float64), -100, 100)))
    kept = np.flatnonzero(surely >= _MIN_PALM_SCORE)
    values = raw[kept].astype(np.float64).reshape(-1, 9, 2)
    values[:, [0, *range(2, 9)]] += anchors[kept][:, None] * PALM_INPUT_PX
    half = values[:, 1] / 2
    corners = np.stack([values[:, 0] - half, values[:, 0] + half], axis=1) @ to_photo[:, :2].T + to_photo[:, 2]
    points = values[:, 2:] @ to_photo[:, :2].T + to_photo[:, 2]
    return [Palm(corners[i].reshape(4), points[i], float(surely[kept[i]])) for i in range(len(kept))]


def merged(palms: Sequence[Palm]) -> list[Palm]:
    """Boxes that overlap become their mean, weighted by score, under the best score; the surest first."""
    left = sorted(palms, key=lambda palm: -palm.score)
    found = []
    while left:
        group = [palm for palm in left if overlap(left[0].box, palm.box) > _SAME_PALM_IOU] or left[:1]
        left = [palm for palm in left if palm not in group]
        shares = np.array([palm.score for palm in group]) / sum(palm.score for palm in group)
        box = np.einsum("n,nc->c", shares, np.stack([palm.box for palm in group]))
        points = np.einsum("n,npc->pc", shares, np.stack([palm.points for palm in group]))
        found.append(Palm(box, points, group[0].score))
    return found


def overlap(a: Floats, b: Floats) -> float:
    """Intersection over union of two boxes (4,) left, top, right, bottom."""
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    common = float(sides.prod())
    union = float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - common
    return common / union if union > 0 else 0.0


def turned_square(palm: Palm) -> Floats:
    """(2, 3) from pixels of the landmark network's input to photo px, for the hand that a palm belongs to: its fingers
    point up there."""
    x, y = palm.points[_MIDDLE_BASE] - palm.points[_WRIST]
    angle = np.pi / 2 - np.arctan2(-y, x)
    across = np.array([np.cos(angle), np.sin(angle)])
    down = np.array([-np.sin(angle), np.cos(angle)])
    size = palm.box[2:] - palm.box[:2]
    middle = (palm.box[:2] + palm.box[2:]) / 2 + down * size[1] * _SQUARE_SHIFT
    scale = float(size.max()) * _SQUARE_OVER_PALM / LANDMARK_INPUT_PX
    axes = np.stack([across, down], axis=1) * scale
    corner = middle - axes @ np.full(2, LANDMARK_INPUT_PX / 2)
    return np.concatenate([axes, corner[:, None]], axis=1)


def _squares(width: int, height: int, levels: int) -> list[Floats]:
    """(2, 3) each, from pixels of the palm network's input to photo px: the whole photograph, black round it, then
    squares half as large that overlap by half, where that does not mean to enlarge it."""
    squares = []
    for level in range(levels):
        side = max(width, height) / 2**level
        if level and side < PALM_INPUT_PX:
            break
        scale = side / PALM_INPUT_PX
        corners = [(x, y) for y in _starts(height, side) for x in _starts(width, side)]
        squares += [np.array([[scale, 0, x], [0, scale, y]]) for x, y in corners]
    return squares


def _starts(length: float, side: float) -> list[float]:
    """Where squares begin that cover `length` and overlap by half or more; a single one is centred."""
    if length <= side:
        return [(length - side) / 2]
    count = int(np.ceil((length - side) / (side / 2))) + 1
    return [float(start) for start in np.linspace(0, length - side, count)]


def _cut(picture: Picture, to_photo: Floats, side_px: int) -> Picture:
    """What an input of that size sees; black outside of the photograph. Shrunk by area, so that nothing is skipped."""
    scale = float(np.hypot(*to_photo[:, 0]))
    if scale > 1.5:
        size = [max(1, round(length / scale)) for length in picture.shape[1::-1]]
        shrunk = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
        share = np.array([shrunk.shape[1] / picture.shape[1], shrunk.shape[0] / picture.shape[0]])
        return _warped(shrunk, to_photo * share[:, None], side_px)
    return _warped(picture, to_photo, side_px)


def _warped(picture: Picture, to_picture: Floats, side_px: int) -> Picture:
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(picture, to_picture, (side_px, side_px), flags=flags), np.uint8)


def _same_hand(a: Floats, b: Floats) -> bool:
    size = min(np.ptp(a, axis=0).max(), np.ptp(b, axis=0).max())
    return bool(np.linalg.norm(a - b, axis=1).mean() < _SAME_HAND * size)


def _box(joints: Floats, found: Landmarks) -> HandBox:
    (x, y), (width, height) = joints.min(axis=0), np.ptp(joints, axis=0)
    return HandBox(
        float(x), float(y), float(width), float(height), found.right >= 0.5, side_from="detector", score=found.score
    )


def _touches(box: HandBox, picture: Picture) -> bool:
    height, width = picture.shape[:2]
    return box.x < width and box.y < height and box.x + box.width > 0 and box.y + box.height > 0
