"""How sure a difference is: over the samples that two networks answered, and over the seeds of their training.

Over samples: the bootstrap of paired differences, resampled by picture, since two hands of one picture are not two
witnesses. Over seeds: Student's t of the seeds' differences, paired where both sides have the same seeds (Welch's
where they do not). The two answer different questions: whether *these* weights differ on pictures like these, and
whether training *again* would show the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds that hold it with the confidence that was asked for; NaN: nothing is known."""

    mean: float
    low: float
    high: float
    count: int
    """Samples, or seeds."""


def picture_of(sample_id: str) -> str:
    """`<data set>:<key>#<hand>` without its hand."""
    return sample_id.rpartition("#")[0] or sample_id


def bootstrap_means(values: Floats, groups: Sequence[str], resamplings: int) -> Floats:
    """Means (resamplings,) of the values (N,) of as many groups, drawn with replacement, as there are. The same each
    time."""
    _, of = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(of, weights=values), np.bincount(of).astype(np.float64)
    rng = np.random.default_rng(0)
    drawn = (rng.integers(len(sums), size=len(sums)) for _ in range(resamplings))
    return np.array([sums[rows].sum() / counts[rows].sum() for rows in drawn])


def over_samples(
    values: Floats, groups: Sequence[str], resamplings: int, confidence: float = 0.95
) -> tuple[Interval, Floats]:
    """The mean of the values (N,) that are known, its bootstrap interval, and the resampled means behind it."""
    known = np.isfinite(values)
    if not known.any():
        return Interval(math.nan, math.nan, math.nan, 0), np.array([])
    means = bootstrap_means(values[known], [g for g, k in zip(groups, known, strict=True) if k], resamplings)
    low, high = np.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)])
    return Interval(float(values[known].mean()), float(low), float(high), int(known.sum())), means


def over_seeds(
    ours: Mapping[int | None, float], theirs: Mapping[int | None, float], confidence: float = 0.95
) -> Interval | None:
    """Ours minus theirs, by seed; None where there are too few seeds to tell. A side of one network that has no seed
    (the teacher) is what every seed is held against."""
    if len(theirs) == 1 and None in theirs:
        theirs = dict.fromkeys(ours, theirs[None])
    both = sorted(ours.keys() & theirs.keys(), key=str)
    if len(both) > 1 and len(both) == len(ours) == len(theirs):
        return _student_t(np.array([ours[seed] - theirs[seed] for seed in both]), confidence)
    if len(ours) > 1 and len(theirs) > 1:
        return _welch(np.array(list(ours.values())), np.array(list(theirs.values())), confidence)
    return None


def _student_t(values: Floats, confidence: float) -> Interval:
    mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
    reach = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return Interval(mean, mean - reach, mean + reach, len(values))


def _welch(a: Floats, b: Floats, confidence: float) -> Interval:
    mean, variances = float(a.mean() - b.mean()), (a.var(ddof=1) / len(a), b.var(ddof=1) / len(b))
    total = float(sum(variances))
    if total == 0:
        return Interval(mean, mean, mean, min(len(a), len(b)))
    freedom = total**2 / (variances[0] ** 2 / (len(a) - 1) + variances[1] ** 2 / (len(b) - 1))
    reach = float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(total)
    return Interval(mean, mean - reach, mean + reach, min(len(a), len(b)))
