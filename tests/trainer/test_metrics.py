from __future__ import annotations

import time

import numpy as np
import pytest

from trainer import metrics as m

RNG = np.random.default_rng(0)
TRUE = RNG.normal(size=(4, 21, 3)) * 0.04
OFFSET = np.array([0.003, 0.004, 0])
MIRROR = np.array([-1.0, 1.0, 1.0])


def turned(points: np.ndarray) -> np.ndarray:
    q, _ = np.linalg.qr(RNG.normal(size=(3, 3)))
    return 1.7 * points @ (q * np.sign(np.linalg.det(q))) + 0.3


def test_a_similarity_has_no_error_after_alignment() -> None:
    assert m.pa_mpjpe_mm(turned(TRUE), TRUE) == pytest.approx(np.zeros(4), abs=1e-3)
    assert m.pa_mpjpe_mm(turned(TRUE), TRUE, reflection=False) == pytest.approx(np.zeros(4), abs=1e-3)


def test_only_reflection_forgives_a_mirrored_hand() -> None:
    assert m.pa_mpjpe_mm(turned(TRUE * MIRROR), TRUE) == pytest.approx(np.zeros(4), abs=1e-3)
    assert (m.pa_mpjpe_mm(turned(TRUE * MIRROR), TRUE, reflection=False) > 5).all()


def test_millimetres_a_sample() -> None:
    assert m.mpjpe_mm(TRUE + OFFSET, TRUE) == pytest.approx(np.full(4, 5.0))
    assert m.mpjpe_mm(TRUE + OFFSET, TRUE, root=0) == pytest.approx(np.zeros(4))


def test_joints_that_are_not_valid_neither_count_nor_pull() -> None:
    wild = turned(TRUE)
    wild[:, 7] += 5.0
    valid = np.ones((4, 21), bool)
    valid[:, 7] = False
    assert m.pa_mpjpe_mm(wild, TRUE, valid) == pytest.approx(np.zeros(4), abs=1e-3)
    assert (m.pa_mpjpe_mm(wild, TRUE) > 5).all()
    assert np.isnan(m.mpjpe_mm(TRUE, TRUE, np.zeros((4, 21), bool))).all()
    assert m.auc(wild, wild, valid) == pytest.approx(1.0)


def test_a_prediction_shrunk_to_one_point_is_the_mean_of_the_truth() -> None:
    flat = np.zeros_like(TRUE)
    assert m.align(flat, TRUE) == pytest.approx(np.broadcast_to(TRUE.mean(1, keepdims=True), TRUE.shape))


def test_f_score_by_hand_and_strictly_nearer() -> None:
    true = np.array([[[0.0, 0, 0], [1, 0, 0]]])
    pred = np.array([[[0.0, 0, 0.5], [9, 0, 0], [9, 0, 0]]])
    assert m.f_score(pred, true, 0.6) == pytest.approx([2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)])
    assert m.f_score(pred, true, 0.5) == pytest.approx([0.0])


def test_pck_is_the_mean_over_joints_that_were_ever_seen() -> None:
    true = np.zeros((2, 3, 2))
    pred = np.array([[[5.0, 0], [0, 0], [0, 0]], [[20.0, 0], [0, 11.0], [0, 0]]])
    valid = np.array([[True, True, False], [True, True, False]])
    size = np.array([100.0, 100.0])
    assert m.pck(pred, true, valid, size, 0.05) == pytest.approx((0.5 + 0.5) / 2)
    assert m.pck(pred, true, valid, size, 0.15) == pytest.approx((0.5 + 1.0) / 2)
    assert np.isnan(m.pck(pred, true, np.zeros((2, 3), bool), size, 0.05))


@pytest.mark.parametrize("bad", [TRUE[:, :20], TRUE[:3], np.where(np.arange(4)[:, None, None] == 2, np.nan, TRUE)])
def test_unlike_shapes_and_nans_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"shape|sample 2 of 4"):
        m.pa_mpjpe_mm(bad, TRUE)


@pytest.mark.slow
def test_freihand_is_scored_in_half_a_minute() -> None:
    true = RNG.normal(size=(3960, 778, 3)) * 0.04
    pred = true + RNG.normal(size=true.shape) * 0.004
    start = time.perf_counter()
    aligned = m.align(pred, true)
    m.f_scores(aligned, true, (0.005, 0.015))
    m.auc(aligned, true)
    assert time.perf_counter() - start < 30
