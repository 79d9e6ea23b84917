from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trainer.intervals import over_samples, over_seeds, picture_of


def ids(count: int) -> list[str]:
    return [f"val:{i}" for i in range(count)]


def test_the_interval_over_samples_covers_the_mean_and_ignores_unknowns() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.5, np.sqrt(2), 500)
    values[:5] = np.nan
    interval, means = over_samples(values, ids(500), 500)
    assert interval.low < interval.mean < interval.high
    assert interval.mean == pytest.approx(values[5:].mean())
    assert interval.count == 495
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * np.sqrt(2 / 495), rel=0.2)
    assert len(means) == 500
    wider, _ = over_samples(values, ids(500), 500, confidence=0.99)
    assert wider.high - wider.low > interval.high - interval.low


def test_an_interval_of_nothing_is_nothing() -> None:
    interval, means = over_samples(np.array([np.nan]), ids(1), 100)
    assert (np.isnan(interval.mean), interval.count, len(means)) == (True, 0, 0)


def test_two_hands_of_one_picture_are_one_witness() -> None:
    one_each = np.random.default_rng(0).normal(0, 1, 200)
    single, _ = over_samples(one_each, [picture_of(f"val:{i}#0") for i in range(200)], 1000)
    twice, _ = over_samples(
        np.repeat(one_each, 2), [picture_of(f"val:{i}#{h}") for i in range(200) for h in (0, 1)], 1000
    )
    assert twice.high - twice.low == pytest.approx(single.high - single.low, rel=0.05)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    draw = np.random.default_rng(7)
    held = [
        interval.low <= 1.0 <= interval.high
        for interval, _ in (over_samples(draw.exponential(1.0, 80), ids(80), 200) for _ in range(200))
    ]
    assert 0.88 < np.mean(held) < 0.99


def test_seeds_are_paired_where_both_sides_have_them() -> None:
    ours, theirs = {0: 8.0, 1: 9.1, 2: 8.4}, {0: 8.5, 1: 9.4, 2: 9.2}
    interval = over_seeds(ours, theirs)
    assert interval is not None
    expected = stats.ttest_rel(list(ours.values()), list(theirs.values())).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert (interval.mean, interval.count) == (pytest.approx(-8 / 15), 3)


def test_other_seeds_are_held_against_each_other_by_welch() -> None:
    ours, theirs = {0: 8.0, 1: 9.1, 2: 8.4}, {3: 8.5, 4: 9.9}
    interval = over_seeds(ours, theirs)
    assert interval is not None
    test = stats.ttest_ind(list(ours.values()), list(theirs.values()), equal_var=False)
    expected = test.confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_every_seed_is_held_against_the_one_teacher_and_one_seed_tells_nothing() -> None:
    interval = over_seeds({0: 8.0, 1: 9.0}, {None: 6.0})
    assert interval is not None
    assert (interval.mean, interval.count) == (2.5, 2)
    assert over_seeds({0: 8.0}, {None: 6.0}) is None
    assert over_seeds({0: 8.0}, {0: 6.0}) is None
    alike = over_seeds({0: 8.0, 1: 8.0}, {2: 7.0, 3: 7.0})
    assert alike is not None
    assert (alike.low, alike.high) == (1.0, 1.0)
