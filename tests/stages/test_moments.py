"""Statistics that merge say what numpy says of all values together, wherever they were cut."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.moments import Distances, Moments

RNG = np.random.default_rng(0)
VALUES = RNG.normal([0, 1000, 3, -2], [1, 5, 0, 0.01], (300, 4)).astype(np.float32)


def of_pieces(cuts: list[int]) -> Moments:
    return reduce(Moments.merged, (Moments.of(part) for part in np.split(VALUES, sorted(cuts))))


@given(st.lists(st.integers(0, 300), max_size=6))
def test_cut_anywhere_the_moments_are_numpys(cuts: list[int]) -> None:
    found, exact = of_pieces(cuts), VALUES.astype(np.float64)
    assert found.count.tolist() == [300] * 4
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std, exact.std(0), rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(found.low, exact.min(0))
    np.testing.assert_array_equal(found.high, exact.max(0))


def test_the_same_parts_in_the_same_order_give_the_same_digits() -> None:
    once, again = of_pieces([7, 100, 101]), of_pieces([7, 100, 101])
    np.testing.assert_array_equal(once.squares, again.squares)
    np.testing.assert_array_equal(once.mean, again.mean)


def test_values_that_are_not_finite_are_left_out() -> None:
    spoilt = VALUES.copy()
    spoilt[3, 0], spoilt[5, 0], spoilt[:, 3] = np.nan, np.inf, np.nan
    found = Moments.of(spoilt)
    assert found.count.tolist() == [298, 300, 300, 0]
    rest = np.delete(VALUES[:, 0], [3, 5]).astype(np.float64)
    assert (found.mean[0], found.low[0], found.high[0]) == pytest.approx((rest.mean(), rest.min(), rest.max()))
    assert found.std[0] == pytest.approx(rest.std())
    assert (found.std[3], found.largest[3]) == (0, 0)


def test_values_whose_squares_float32_cannot_hold() -> None:
    huge = (VALUES * np.float32(1e30)).astype(np.float32)
    found = Moments.of(huge)
    np.testing.assert_allclose(found.std, huge.astype(np.float64).std(0), rtol=1e-5)


def test_merging_with_nothing_changes_nothing() -> None:
    found = Moments.of(VALUES)
    for merged in (found.merged(Moments.empty((4,))), Moments.empty((4,)).merged(found)):
        for name in ("count", "mean", "squares", "low", "high"):
            np.testing.assert_array_equal(getattr(merged, name), getattr(found, name))


def test_cells_along_the_first_axis_are_taken_together() -> None:
    by_view = Moments.stacked([Moments.of(part) for part in np.split(VALUES, 3)])
    np.testing.assert_allclose(by_view.over_first().std, VALUES.astype(np.float64).std(0), rtol=1e-5)


def test_quantiles_are_numpys_to_a_hundredth() -> None:
    values = RNG.lognormal(2, 1, (2000, 2))
    values[::7, 1] = np.nan
    found = reduce(Distances.merged, (Distances.of(part) for part in np.split(values, [10, 500])))
    assert found.count.tolist() == [2000, 1714]
    for share in (0.5, 0.9, 0.99):
        np.testing.assert_allclose(found.quantile(share), np.nanquantile(values, share, axis=0), rtol=0.02)
    np.testing.assert_allclose(found.total, np.nansum(values, 0))
    np.testing.assert_array_equal(found.high, np.nanmax(values, 0))


def test_extreme_distances_are_counted_and_bounded() -> None:
    found = Distances.of(np.array([[0.0], [1e-9], [1e9]]))
    assert found.count.tolist() == [3]
    assert found.quantile(0.5)[0] <= 0.01
    assert 1e4 <= found.quantile(1.0)[0] <= 1e9
    assert np.isnan(Distances.of(np.full((2, 1), np.nan)).quantile(0.5)[0])
