"""Laying one cloud of points on another, each sample by itself: the Procrustes alignment of the official evaluators.

Letters: N samples, K points of a hand (21 joints or V vertices). Numpy only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_NORM_FLOOR = 1e-8
"""Added to both norms by the official align_w_scale; visible in the sixth digit of predictions shrunk 1e4 times."""


def align(pred: Floats, true: Floats, valid: Mask | None = None, reflection: bool = True) -> Floats:
    """`pred` moved, turned and scaled on to `true`, each sample by itself: (N,K,3).

    reflection=True is the official scripts' orthogonal Procrustes, which may mirror the hand (a mirrored cloud gets
    error 0); False keeps det = +1 as HaMeR's own evaluator does. Points that are not `valid` do not pull, but move.
    """
    pred, true, weights = checked_points(pred, true, valid)
    w_NK1 = weights[..., None]
    count = np.maximum(w_NK1.sum(1, keepdims=True), 1)
    mean_pred, mean_true = (pred * w_NK1).sum(1, keepdims=True) / count, (true * w_NK1).sum(1, keepdims=True) / count
    unit_pred, size_pred = _unit((pred - mean_pred) * w_NK1)
    unit_true, size_true = _unit((true - mean_true) * w_NK1)
    rotation, scale = _procrustes(unit_pred, unit_true, reflection)
    return np.asarray((pred - mean_pred) / size_pred @ rotation * scale * size_true + mean_true)


def checked_points(pred: Floats, true: Floats, valid: Mask | None) -> tuple[Floats, Floats, Floats]:
    """Both as float64 and the valid mask as weights; refuses what would give a wrong or silent NaN error."""
    pred, true = np.asarray(pred, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if pred.shape != true.shape or pred.ndim != 3:
        raise ValueError(f"found points of shape {pred.shape} and {true.shape}; wanted two alike, (N,K,coordinates)")
    weights = np.ones(pred.shape[:2]) if valid is None else np.asarray(valid, dtype=np.float64)
    if weights.shape != pred.shape[:2]:
        raise ValueError(f"found a mask of shape {weights.shape} for points of shape {pred.shape}")
    bad = ~(np.isfinite(pred).all((1, 2)) & np.isfinite(true).all((1, 2)))
    if np.any(bad):
        raise ValueError(f"sample {int(np.argmax(bad))} of {len(pred)} has a coordinate that is not finite")
    return pred, true, weights


def _unit(centred: Floats) -> tuple[Floats, Floats]:
    size = np.linalg.norm(centred, axis=(1, 2), keepdims=True) + _NORM_FLOOR
    return centred / size, size


def _procrustes(pred: Floats, true: Floats, reflection: bool) -> tuple[Floats, Floats]:
    """R (N,3,3) and s (N,1,1) that make pred @ R * s nearest to true; both of unit norm."""
    u, stretch, vt = np.linalg.svd(pred.transpose(0, 2, 1) @ true)
    if not reflection:
        sign = np.where(np.linalg.det(u @ vt) < 0, -1.0, 1.0)
        u[:, :, 2] *= sign[:, None]
        stretch[:, 2] *= sign
    return u @ vt, stretch.sum(1)[:, None, None]
