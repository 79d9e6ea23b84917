"""Statistics that merge: moments of values and histograms of distances, of any part of a cache, in bounded memory.

Merging is by Chan's formulas in float64. It is not exactly associative, so whoever wants the same digits twice merges
the same parts in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

BINS_A_DECADE = 100
"""A quantile read off the histogram is at most 1.2% away from the true one."""
LEAST, DECADES = 1e-2, 6
"""Distances below a hundredth of a pixel or millimetre are counted as that; those above ten thousand likewise."""
BINS = DECADES * BINS_A_DECADE + 2


@dataclass(frozen=True)
class Moments:
    """Of values in cells (say, the channels of each view): how many, mean, squared deviations, least, largest.

    All arrays have the shape of the cells. Values that are not finite are not among them.
    """

    count: Counts
    mean: Floats
    squares: Floats
    """Sum of the squared deviations from the mean."""
    low: Floats
    high: Floats

    @staticmethod
    def empty(shape: tuple[int, ...]) -> Moments:
        """Of nothing."""
        zeros = np.zeros(shape)
        return Moments(np.zeros(shape, np.int64), zeros, zeros, np.full(shape, np.inf), np.full(shape, -np.inf))

    @staticmethod
    def of(values: NDArray[np.floating]) -> Moments:
        """Of values (T, ...), cells (...); T may be 0."""
        if not len(values):
            return Moments.empty(values.shape[1:])
        low, high = values.min(0), values.max(0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            return _of_some(values.astype(np.float64), np.isfinite(values))
        with np.errstate(over="ignore", invalid="ignore"):
            mean = values.mean(0)
            apart = values - mean
            squares = np.einsum("t...,t...->...", apart, apart).astype(np.float64)
            left = apart.sum(0).astype(np.float64)  # what float32 left of the mean
        if not np.isfinite(squares).all():  # beyond float32, whose squares end at 1e38
            return _of_some(values.astype(np.float64), np.isfinite(values))
        count = np.full(low.shape, len(values), np.int64)
        return Moments(
            count, mean + left / len(values), np.maximum(squares - left**2 / len(values), 0), _f8(low), _f8(high)
        )

    def merged(self, other: Moments) -> Moments:
        """Of both."""
        count = self.count + other.count
        share = np.divide(other.count, count, out=np.zeros(count.shape), where=count > 0)
        apart = other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * share,
            self.squares + other.squares + apart**2 * self.count * share,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )

    def over_first(self) -> Moments:
        """Of all cells along the first axis together (the views, for one)."""
        total = self[0]
        for i in range(1, len(self.count)):
            total = total.merged(self[i])
        return total

    def __getitem__(self, cell: int) -> Moments:
        return Moments(self.count[cell], self.mean[cell], self.squares[cell], self.low[cell], self.high[cell])

    @staticmethod
    def stacked(parts: list[Moments]) -> Moments:
        """Cells of a new first axis."""
        return Moments(*(np.stack([getattr(part, name) for part in parts]) for name in _FIELDS))

    @property
    def std(self) -> Floats:
        """Standard deviation (of the values themselves, not an estimate from a sample); 0 where there is none."""
        variance = np.divide(self.squares, self.count, out=np.zeros(np.shape(self.mean)), where=self.count > 0)
        return np.asarray(np.sqrt(variance))

    @property
    def largest(self) -> Floats:
        """Largest magnitude; 0 where there is no value."""
        return np.where(self.count > 0, np.maximum(np.abs(self.low), np.abs(self.high)), 0.0)


_FIELDS = ("count", "mean", "squares", "low", "high")


def _f8(values: NDArray[np.floating]) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _of_some(values: Floats, chosen: NDArray[np.bool_]) -> Moments:
    """Of the chosen values only; the way of batches in which something is not finite."""
    count = chosen.sum(0)
    zeroed = np.where(chosen, values, 0)
    mean = np.divide(zeroed.sum(0), count, out=np.zeros(count.shape), where=count > 0)
    apart = np.where(chosen, zeroed - mean, 0)
    low, high = np.where(chosen, values, np.inf).min(0), np.where(chosen, values, -np.inf).max(0)
    return Moments(count.astype(np.int64), mean, (apart**2).sum(0), low, high)


@dataclass(frozen=True)
class Distances:
    """How distances (pixels, millimetres) are distributed: logarithmic bins, the sum and the largest.

    Cells (...) as in `Moments`; `bins` (..., BINS).
    """

    bins: Counts
    total: Floats
    high: Floats

    @staticmethod
    def of(values: Floats) -> Distances:
        """Of values (T, ...); NaN is not counted."""
        cells = values.reshape(len(values), -1)
        bins = np.stack([np.bincount(_bin(cell[~np.isnan(cell)]), minlength=BINS) for cell in cells.T])
        known = np.where(np.isnan(values), 0, values)
        high = known.max(0) if len(values) else np.zeros(values.shape[1:])
        return Distances(bins.reshape(*values.shape[1:], BINS), known.sum(0), high)

    def merged(self, other: Distances) -> Distances:
        """Of both."""
        return Distances(self.bins + other.bins, self.total + other.total, np.maximum(self.high, other.high))

    @property
    def count(self) -> Counts:
        """How many distances there are in each cell."""
        return np.asarray(self.bins.sum(-1))

    def quantile(self, share: float) -> Floats:
        """In each cell the distance that `share` of them do not pass, to 1.2%; NaN where there is none."""
        reached = np.cumsum(self.bins, axis=-1) >= np.maximum(np.ceil(share * self.count), 1)[..., None]
        middle = LEAST * 10 ** ((np.argmax(reached, axis=-1) - 0.5) / BINS_A_DECADE)
        return np.where(self.count > 0, np.minimum(middle, self.high), np.nan)


def _bin(values: Floats) -> Counts:
    places = np.floor(np.log10(np.maximum(values, LEAST / 10) / LEAST) * BINS_A_DECADE) + 1
    return np.asarray(np.clip(places, 0, BINS - 1).astype(np.int64))
