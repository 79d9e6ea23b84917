"""What is accepted as a hand's annotation, and HaMeR's cleaning rules one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stages.annotations import HandAnnotation, UnusableError, check_box, clean, read_annotation
from stages.config import EvaluationFilteringConfig, FilteringConfig
from tests.tars import annotation

RULES = FilteringConfig()


def _hand(**changes: Any) -> HandAnnotation:
    return read_annotation(annotation(**changes))


def _with_confidences(*seen: float) -> np.ndarray:
    keypoints = annotation()["keypoints_2d"]
    keypoints[:, 2] = 0
    keypoints[: len(seen), 2] = seen
    return keypoints


@pytest.mark.parametrize(
    "right", [True, 0, 1.0, np.float32(0), np.array(1.0), np.array([1]), np.bool_(False)], ids=lambda value: repr(value)
)
def test_flags_may_be_numbers_or_arrays_of_one(right: Any) -> None:
    assert _hand(right=right).right == float(np.asarray(right).reshape(-1)[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"center": np.array([np.nan, 1])}, "bad-label: center holds values that are not finite"),
        ({"keypoints_3d": np.full((21, 4), np.inf)}, "bad-label: keypoints_3d holds values that are not finite"),
        ({"betas": np.full(10, 1e300)}, "bad-label: betas holds values that are not finite"),
        ({"keypoints_2d": np.zeros((17, 3))}, r"bad-label: keypoints_2d has shape \(17, 3\), wanted \(21, 3\)"),
        ({"hand_pose": np.zeros((16, 3))}, r"bad-label: hand_pose has shape \(16, 3\), wanted \(48,\)"),
        ({"betas": None}, "bad-label: betas holds object, wanted numbers"),
        ({"betas": "none"}, "bad-label: betas holds str.*, wanted numbers"),
        ({"center": [[1], [1, 2]]}, "bad-label: center is no array"),
        ({"scale": 1.0}, r"bad-label: scale has shape \(\), wanted \(2,\)"),
        ({"right": 2}, "bad-label: right is 2, wanted 0 or 1"),
        ({"has_betas": np.nan}, "bad-label: has_betas holds values that are not finite"),
        ({"extra_info": {"fitting_loss": {"reprojection_loss": "much"}}}, "bad-label: reprojection_loss holds"),
    ],
)
def test_what_cannot_be_read_says_why(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableError, match=f"^{reason}"):
        _hand(**change)


@pytest.mark.parametrize("name", sorted(set(annotation()) - {"personid", "extra_info"}))
def test_every_label_must_be_there(name: str) -> None:
    hand = annotation()
    del hand[name]
    with pytest.raises(UnusableError, match=f"^bad-label: it has no {name}$"):
        read_annotation(hand)


def test_low_confidences_become_zero() -> None:
    cleaned = clean(_hand(keypoints_2d=_with_confidences(0.29, 0.3, 1, 1, 1, 1, 1)), RULES)
    assert cleaned.keypoints_2d[:8, 2].tolist() == pytest.approx([0, 0.3, 1, 1, 1, 1, 1, 0])


def test_more_than_four_keypoints_are_wanted() -> None:
    assert clean(_hand(keypoints_2d=_with_confidences(1, 1, 1, 1, 1)), RULES)
    with pytest.raises(UnusableError, match=r"^filtered: min_keypoints: 4 keypoints, wanted more than 4$"):
        clean(_hand(keypoints_2d=_with_confidences(1, 1, 1, 1, 0.2, 0.2)), RULES)
    assert clean(_hand(keypoints_2d=_with_confidences()), FilteringConfig(min_keypoints=None))


def test_wild_shapes_are_not_trusted_and_take_the_pose_with_them() -> None:
    wild = _hand(betas=np.array([3.1, *[0.5] * 9]))
    cleaned = clean(wild, RULES)
    assert (cleaned.has_hand_pose, cleaned.has_betas, cleaned.betas.tolist()) == (0, 1, [0] * 10)
    alone = clean(wild, FilteringConfig(poses_betas_simultaneous=False))
    assert (alone.has_hand_pose, alone.has_betas, alone.betas.tolist()) == (1, 1, [0] * 10)
    unregularised = clean(wild, FilteringConfig(betas_regularisation=False))
    assert (unregularised.has_betas, unregularised.betas[0]) == (0, pytest.approx(3.1))


def test_a_shape_without_pose_is_not_trusted_either() -> None:
    cleaned = clean(_hand(has_hand_pose=0), RULES)
    assert (cleaned.has_hand_pose, cleaned.has_betas, cleaned.betas.any()) == (0, 1, False)
    with pytest.raises(UnusableError, match=r"^filtered: drop_without_pose"):
        clean(_hand(has_hand_pose=0), FilteringConfig(drop_without_pose=True))


@pytest.mark.parametrize("wrapped", [lambda loss: loss, np.array], ids=["dictionary", "array of a dictionary"])
def test_bad_fits_are_left_out(wrapped: Any) -> None:
    def hand(loss: float) -> HandAnnotation:
        return _hand(extra_info={"fitting_loss": wrapped({"reprojection_loss": loss})})

    assert clean(hand(30999.0), RULES)
    with pytest.raises(UnusableError, match=r"^filtered: max_reprojection_loss: 31000, wanted below 31000$"):
        clean(hand(31000.0), RULES)
    assert clean(hand(31000.0), FilteringConfig(max_reprojection_loss=None))


@pytest.mark.parametrize("extra", [{}, None, {"fitting_loss": np.array({})}, {"fitting_loss": {}}])
def test_no_recorded_fit_is_no_bad_fit(extra: Any) -> None:
    assert clean(_hand(extra_info=extra), RULES)


def test_small_boxes_are_left_out_when_asked() -> None:
    assert clean(_hand(), RULES)
    with pytest.raises(UnusableError, match=r"^filtered: min_box_px: 30 px, wanted more than 30$"):
        clean(_hand(), FilteringConfig(min_box_px=30))


def test_evaluation_sets_are_taken_as_they_are() -> None:
    hand = _hand(
        keypoints_2d=_with_confidences(0.1),
        betas=np.full(10, 9.0),
        has_hand_pose=0,
        extra_info={"fitting_loss": {"reprojection_loss": 1e9}},
    )
    cleaned = clean(hand, EvaluationFilteringConfig())
    for name, value in hand.columns().items():
        assert np.array_equal(value, cleaned.columns()[name])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale": [0.2, 0.0]}, "no-box: its box has no size"),
        ({"scale": [-0.2, 0.1]}, "no-box: its box has no size"),
        ({"scale": [1e9, 1.0]}, "no-box: a box of"),
        ({"center": [-21.0, 25.0]}, "outside: its box around"),
        ({"center": [30.0, 71.0]}, "outside: its box around"),
        ({"center": [1e12, 0.0]}, "outside: its box around"),
    ],
)
def test_boxes_that_cut_nothing_out(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableError, match=f"^{reason}"):
        check_box(_hand(**change), 60, 50)


@pytest.mark.parametrize("center", [[-19.0, 25.0], [30.0, 69.0], [30.0, 25.0]])
def test_boxes_that_touch_the_picture_stay(center: list[float]) -> None:
    check_box(_hand(center=center), 60, 50)
