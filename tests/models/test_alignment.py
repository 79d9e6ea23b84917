from __future__ import annotations

import cv2
import numpy as np
import pytest

from models.alignment import align

RNG = np.random.default_rng(0)
TRUE = RNG.normal(0, 0.05, (3, 21, 3))
TURN, _ = cv2.Rodrigues(np.array([0.3, -1.2, 0.5]))
MOVED = 1.7 * TRUE @ TURN.T + np.array([0.1, 0.2, 0.9])


def test_what_differs_by_a_similarity_is_laid_on_exactly() -> None:
    for reflection in (True, False):
        np.testing.assert_allclose(align(MOVED, TRUE, reflection=reflection), TRUE, atol=1e-6)


def test_a_mirrored_hand_is_turned_over_only_where_that_is_allowed() -> None:
    mirrored = MOVED * [-1, 1, 1]
    np.testing.assert_allclose(align(mirrored, TRUE), TRUE, atol=1e-6)
    assert np.linalg.norm(align(mirrored, TRUE, reflection=False) - TRUE, axis=-1).mean() > 0.01


def test_points_that_are_not_valid_move_along_and_do_not_pull() -> None:
    valid = np.ones((3, 21), dtype=np.bool_)
    valid[:, 20] = False
    wrong = MOVED.copy()
    wrong[:, 20] += 5
    aligned = align(wrong, TRUE, valid=valid)
    np.testing.assert_allclose(aligned[:, :20], TRUE[:, :20], atol=1e-6)
    assert (np.linalg.norm(aligned[:, 20] - TRUE[:, 20], axis=-1) > 1).all()


def test_points_that_are_no_numbers_are_refused() -> None:
    wrong = MOVED.copy()
    wrong[1, 3, 2] = np.nan
    with pytest.raises(ValueError, match="sample 1 of 3"):
        align(wrong, TRUE)
