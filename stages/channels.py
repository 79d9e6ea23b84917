"""Which channels of the features are dead or exploding, how the views differ, and what drifted between two caches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.moments import Floats, Moments
from storage.codecs import INT8_LIMIT

DEAD_SHARE = 0.01
"""A channel whose deviation is less than this share of the median channel's says nothing: int8 rounds it away, since a
token's step is about a thirtieth of a usual channel's deviation."""

EXPLODING_MAX = INT8_LIMIT / 4
"""A channel is exploding whose largest magnitude is more than so many deviations of the median channel. All channels of
a token share one int8 scale: where this one sets it, the step is a quarter of a usual channel's deviation, and rounding
adds 0.5% to the variance of what the student is to learn; it grows with the square."""

EXPLODING_STD = 10.0
"""... or whose deviation is more than so many times the median channel's: in a squared loss it counts as much as a
hundred usual channels."""

DRIFTED_SHIFT = 0.1
"""Two caches differ in a channel when its means are a tenth of a deviation apart. Encodings of the same features differ
by less than a hundredth, other teachers by much more."""

TOP = 10
"""So many channels are listed by name; all of them are in channels.parquet."""


def dead(channels: Moments) -> NDArray[np.bool_]:
    """(C) which channels are the same everywhere."""
    return channels.std <= DEAD_SHARE * _median_std(channels)


def exploding(channels: Moments) -> NDArray[np.bool_]:
    """(C) which channels are far beyond the others."""
    usual = _median_std(channels)
    found = (channels.largest > EXPLODING_MAX * usual) | (channels.std > EXPLODING_STD * usual)
    return np.asarray(found & (usual > 0))


def _median_std(channels: Moments) -> float:
    return float(np.median(channels.std))


def channel_summary(by_view: Moments) -> dict[str, Any]:
    """What the document says of features: (K,C) moments in."""
    channels = by_view.over_first()
    worst = np.argsort(-channels.largest, kind="stable")
    return {
        "channels": len(channels.mean),
        "std_median": _median_std(channels),
        "std_least": float(channels.std.min()),
        "std_largest": float(channels.std.max()),
        "abs_mean_largest": float(np.abs(channels.mean).max()),
        "abs_max": float(channels.largest.max()),
        "dead": np.flatnonzero(dead(channels)).tolist(),
        "exploding": [int(c) for c in worst if exploding(channels)[c]],
        "by_view": [_difference(by_view[0], by_view[view]) for view in range(len(by_view.count))],
    }


def _difference(plain: Moments, view: Moments) -> dict[str, float]:
    """How the channels of a view differ from those of view 0."""
    return {
        "mean_shift": float(np.abs(standardised_shift(plain, view)).mean()),
        "std_ratio": float(np.median(_ratio(view.std, plain.std))),
    }


def standardised_shift(before: Moments, after: Moments) -> Floats:
    """(C) how far the means are apart, in deviations of both together; 0 where a channel is dead in both."""
    spread = np.sqrt((before.std**2 + after.std**2) / 2)
    shift = after.mean - before.mean
    return np.asarray(np.divide(shift, spread, out=np.zeros(shift.shape), where=spread > 0))


def variance_ratio(before: Moments, after: Moments) -> Floats:
    """(C) variance after by variance before; 1 where a channel is dead in both."""
    return _ratio(after.std, before.std) ** 2


def _ratio(over: Floats, under: Floats) -> Floats:
    floor = np.finfo(np.float64).tiny ** 0.5
    return np.asarray((over + floor) / (under + floor))


def relative_frechet(before: Moments, after: Moments) -> float:
    """Frechet distance of the two distributions taken as Gaussians of independent channels, by the variance before.

    0: the same moments; 1: as far apart as the channels vary.
    """
    distance = ((before.mean - after.mean) ** 2 + (before.std - after.std) ** 2).sum()
    total = (before.std**2).sum()
    return float(distance / total) if total > 0 else 0.0


def drift(before: Moments, after: Moments, common: Mapping[str, Moments]) -> dict[str, Any]:
    """What changed between two caches of a data set: (C) moments of each, (K) joints' distances on common samples.

    Features of another number of channels are not compared: `features` is None.
    """
    joints = {name: found.over_first() for name, found in common.items()}
    said = {
        "common_views": int(joints["px"].count),
        "joints": {
            name: {"mean": float(found.mean), "std": float(found.std), "max": float(found.largest)}
            for name, found in joints.items()
            if found.count
        },
    }
    if before.mean.shape != after.mean.shape:
        return said | {"features": None}
    shift, ratio = standardised_shift(before, after), variance_ratio(before, after)
    order = np.argsort(-np.abs(shift), kind="stable")[:TOP]
    return said | {
        "features": {
            "relative_frechet": relative_frechet(before, after),
            "mean_abs_shift": float(np.abs(shift).mean()),
            "drifted": int((np.abs(shift) > DRIFTED_SHIFT).sum()),
            "top": [
                {"channel": int(c), "mean_shift": float(shift[c]), "variance_ratio": float(ratio[c])} for c in order
            ],
        }
    }
