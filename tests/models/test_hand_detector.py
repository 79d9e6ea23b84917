"""MediaPipe's decoding with networks of our own making; the real ones where HANDSTILL_DETECTOR names the wheel."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from models import hand_detector
from models.hand_detector import (
    LANDMARKS,
    PALMS,
    HandDetector,
    Landmarks,
    Palm,
    decode_palms,
    load_hand_detector,
    merged,
    overlap,
    palm_anchors,
    turned_square,
)
from stages.pictures import decode
from stages.tar_source import tar_hands
from storage.errors import InputError
from tests.shared import REAL_HANDS, needs_shared

Floats = NDArray[np.float64]


def palm(left: float, top: float, side: float, score: float = 0.9, angle: float = 0.0) -> Palm:
    """A square palm whose fingers point up, turned by `angle` (radians, x towards y)."""
    middle = np.array([left + side / 2, top + side / 2])
    up = np.array([np.sin(angle), -np.cos(angle)]) * side / 2
    points = np.tile(middle, (7, 1))
    points[0], points[2] = middle - up, middle + up
    return Palm(np.array([left, top, left + side, top + side]), points, score)


def test_the_anchors_are_the_middles_of_cells() -> None:
    anchors = palm_anchors()
    assert anchors.shape == (2016, 2)
    assert anchors[0].tolist() == anchors[1].tolist() == [0.5 / 24, 0.5 / 24]
    assert anchors[2].tolist() == [1.5 / 24, 0.5 / 24], "along a row first"
    assert (anchors[24 * 24 * 2 :] == [0.5 / 12, 0.5 / 12]).all(axis=1).sum() == 6


def test_raw_boxes_become_palms_of_the_photo() -> None:
    raw, scores = np.zeros((2016, 18), np.float32), np.full(2016, -20, np.float32)
    raw[2, :4] = [4, 8, 24, 48]  # the middle of the second cell, moved; width, height
    raw[2, 4:6] = [1, 1]
    scores[2] = 3
    to_photo = np.array([[2.0, 0, 10], [0, 2.0, 20]])
    (found,) = decode_palms(raw, scores, palm_anchors(), to_photo)
    corners = np.array([[16 - 12, 12 - 24], [16 + 12, 12 + 24]])
    assert found.box.tolist() == (2 * corners + [10, 20]).reshape(4).tolist()
    assert found.points[0].tolist() == (2 * np.array([13, 5]) + [10, 20]).tolist()
    assert found.score == pytest.approx(1 / (1 + np.exp(-3)))


def test_palms_that_overlap_are_one() -> None:
    same = [palm(100, 100, 40, 0.6), palm(104, 100, 40, 0.9), palm(300, 100, 40, 0.7)]
    first, second = merged(same)
    assert first.score == 0.9
    assert first.box[0] == pytest.approx((104 * 0.9 + 100 * 0.6) / 1.5)
    assert second.box[0] == 300
    assert merged([]) == []


@pytest.mark.parametrize(("a", "b", "wanted"), [((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7), ((0, 0, 1, 1), (2, 2, 3, 3), 0)])
def test_overlap(a: tuple[int, ...], b: tuple[int, ...], wanted: float) -> None:
    assert overlap(np.array(a), np.array(b)) == pytest.approx(wanted)


@pytest.mark.parametrize("angle", [0.0, 0.7, np.pi / 2, 3.0, -2.0])
def test_in_the_turned_square_fingers_point_up(angle: float) -> None:
    found = palm(200, 100, 40, angle=angle)
    to_photo = turned_square(found)
    inverse = np.linalg.inv(to_photo[:, :2])
    wrist, base = (inverse @ (found.points[i] - to_photo[:, 2]) for i in (0, 2))
    assert wrist[0] == pytest.approx(base[0]), "one above the other"
    assert base[1] < wrist[1]
    assert np.hypot(*to_photo[:, 0]) * 224 == pytest.approx(2.6 * 40)
    middle = to_photo @ [112, 112, 1]
    fingers = (found.points[2] - found.points[0]) / 40
    assert middle == pytest.approx(np.array([220, 120]) + 20 * fingers), "half a palm towards the fingers"


class World:
    """Stands for both networks: hands are bright squares, left ones darker; the palm network finds them by colour."""

    def __init__(self) -> None:
        self.looks = 0

    def palms(self, picture: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.looks += 1
        raw, scores = np.zeros((2016, 18), np.float32), np.full(2016, -20, np.float32)
        for slot, colour in enumerate((200, 120)):
            y, x = np.nonzero(np.abs(picture[..., 0].astype(int) - colour) < 20)
            if len(x) > 60:
                low, high = np.array([x.min(), y.min()]), np.array([x.max() + 1, y.max() + 1])
                middle, anchor = (low + high) / 2, palm_anchors()[slot] * 192
                raw[slot, :4] = [*(middle - anchor), *(high - low)]
                raw[slot, 4:] = np.tile(middle - anchor, 7)
                raw[slot, 5] += (high - low)[1] / 2  # the wrist is below, the fingers above
                raw[slot, 9] -= (high - low)[1] / 2
                scores[slot] = 4
        return raw, scores

    def landmarks(self, picture: NDArray[np.uint8]) -> Landmarks:
        y, x = np.nonzero(picture[..., 0] > 60)
        if not len(x):
            return Landmarks(np.zeros((21, 2)), 0.0, 0.0)
        joints = np.linspace([x.min(), y.min()], [x.max() + 1, y.max() + 1], 21)
        return Landmarks(joints, 0.8, float(picture[y, x, 0].mean() > 160))


def test_hands_of_a_photo_are_found_with_their_sides() -> None:
    photo = np.zeros((300, 370, 3), np.uint8)  # its quarters would have to be enlarged
    photo[100:150, 60:110] = 200
    photo[80:140, 250:310] = 120
    world = World()
    boxes = HandDetector(world.palms, world.landmarks)(photo)
    assert world.looks == 1
    found = sorted(boxes, key=lambda box: box.x)
    assert [(box.side, box.side_from, box.score) for box in found] == [
        ("right", "detector", 0.8),
        ("left", "detector", 0.8),
    ]
    for box, wanted in zip(found, ((60, 100, 50, 50), (250, 80, 60, 60)), strict=True):
        np.testing.assert_allclose(box.as_list(), wanted, atol=4)
    assert HandDetector(world.palms, world.landmarks)(np.zeros((50, 60, 3), np.uint8)) == []


def test_a_small_hand_needs_a_thorough_look() -> None:
    """In a large photo it is too few pixels of the palm network's picture, in a quarter of the photo it is not."""
    photo = np.zeros((1200, 1600, 3), np.uint8)
    photo[300:360, 200:260] = 200
    world = World()
    detector = HandDetector(world.palms, world.landmarks)
    assert detector(photo, thorough=False) == []
    (box,) = detector(photo)
    np.testing.assert_allclose(box.as_list(), (200, 300, 60, 60), atol=8)


def test_what_is_no_source_of_weights_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.whl").write_text("no zip")
    for name, contents in (("newer.whl", {}), ("other.whl", {PALMS: b"x", LANDMARKS: b"y"})):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("mediapipe/modules/readme", "")
            for member, content in contents.items():
                archive.writestr(f"mediapipe/modules/{member}", content)
    sources = {
        None: "Give --box",
        tmp_path / "nowhere.whl": "is not there",
        tmp_path / "text.whl": "cannot be read as a wheel",
        tmp_path / "empty": f"holds no {PALMS}",
        tmp_path / "newer.whl": f"holds no {PALMS}",
        tmp_path / "other.whl": "another version",
    }
    for source, told in sources.items():
        with pytest.raises(InputError, match=told) as caught:
            load_hand_detector(source)
        assert hand_detector.PACKAGE in str(caught.value), "what to fetch"


@needs_shared
@pytest.mark.skipif("HANDSTILL_DETECTOR" not in os.environ, reason="HANDSTILL_DETECTOR names no wheel of MediaPipe's")
def test_the_real_detector_on_a_real_photograph() -> None:
    """A left hand that fills a third of the picture: its box within a tenth, and its side."""
    detector = load_hand_detector(Path(os.environ["HANDSTILL_DETECTOR"]))
    tar = next(REAL_HANDS.glob("interhand26m-real/*.tar"))
    hand = next(hand for hand in tar_hands(tar).hands() if hand.key.endswith("image29590"))
    start = hand.picture.offset
    picture = decode(tar.read_bytes()[start : start + hand.picture.length])
    assert picture is not None
    assert not isinstance(hand.annotation, str)
    joints = hand.annotation.keypoints_2d
    seen = joints[joints[:, 2] > 0, :2]
    (box,) = detector(picture)
    assert box.side == "left"
    found = np.array([box.x, box.y, box.x + box.width, box.y + box.height])
    assert overlap(found, np.concatenate([seen.min(axis=0), seen.max(axis=0)])) > 0.9
