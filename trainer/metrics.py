"""Errors of predicted hands, by the definitions of the official FreiHAND, HO-3D and HInt evaluators; numpy, batched.

Letters: N samples, K points of a hand (21 joints or V vertices). Points are metres in the camera frame unless a name
ends in _px; an error leaves in millimetres, one a sample. What the definitions rest on: HAMER_SPEC sections 7 and 9.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.spatial import cKDTree

from models.alignment import Floats, Mask, align, checked_points

__all__ = [
    "align",
    "align_scale_translation",
    "auc",
    "auc_of_errors",
    "f_score",
    "f_scores",
    "mpjpe_mm",
    "pa_mpjpe_mm",
    "pa_mpvpe_mm",
    "pck",
    "pck_of_errors",
]

_MM = 1000.0
AUC_MAX_M = 0.05
AUC_STEPS = 100


def mpjpe_mm(pred: Floats, true: Floats, valid: Mask | None = None, root: int | None = None) -> Floats:
    """Mean distance of corresponding points, unaligned; with `root`, that point of both is moved to the origin first.

    pred, true (N,K,3) metres; valid (N,K): which points count (all). Returns (N,), NaN where a sample has no point.
    """
    pred, true, weights = checked_points(pred, true, valid)
    if root is not None:
        pred, true = pred - pred[:, root : root + 1], true - true[:, root : root + 1]
    return _MM * _mean(np.linalg.norm(pred - true, axis=-1), weights)


def pa_mpjpe_mm(pred: Floats, true: Floats, valid: Mask | None = None, reflection: bool = True) -> Floats:
    """Mean distance after `align`: (N,K,3) metres in, (N,) millimetres out."""
    return mpjpe_mm(align(pred, true, valid=valid, reflection=reflection), true, valid)


def pa_mpvpe_mm(pred: Floats, true: Floats, reflection: bool = True) -> Floats:
    """`pa_mpjpe_mm` of meshes, aligned by their own vertices: (N,V,3) metres in, (N,) millimetres out."""
    return pa_mpjpe_mm(pred, true, reflection=reflection)


def align_scale_translation(pred: Floats, true: Floats) -> Floats:
    """HO-3D's third alignment: wrists together, and the length of joint 4 from joint 0 made equal. (N,21,3)."""
    pred, true, _ = checked_points(pred, true, None)
    length_pred, length_true = (np.linalg.norm(p[:, 4] - p[:, 0], axis=-1)[:, None, None] for p in (pred, true))
    scaled = pred * np.divide(length_true, length_pred, out=np.copy(length_true), where=length_pred > 0)
    return np.asarray(scaled - scaled[:, :1] + true[:, :1])


def auc(pred: Floats, true: Floats, valid: Mask | None = None) -> float:
    """Area under the PCK curve of 100 thresholds evenly in [0, 5 cm], the curve of each point first, then the mean.

    (N,K,3) metres, taken as they are: `align` them before for the aligned number. Points never valid are left out.
    """
    pred, true, weights = checked_points(pred, true, valid)
    return auc_of_errors(np.linalg.norm(pred - true, axis=-1), weights > 0)


def auc_of_errors(errors_m: Floats, valid: Mask) -> float:
    """`auc` from distances (N,K) in metres and which of them count; NaN if none does."""
    thresholds = np.linspace(0, AUC_MAX_M, AUC_STEPS)
    seen = valid.sum(0)
    hits = np.stack([((errors_m <= threshold) & valid).sum(0) for threshold in thresholds])
    curves = hits[:, seen > 0] / seen[seen > 0]
    return float(np.trapezoid(curves, thresholds, axis=0).mean() / AUC_MAX_M) if curves.size else float("nan")


def f_score(pred: Floats, true: Floats, threshold_m: float) -> Floats:
    """Harmonic mean of precision and recall of points nearer than the threshold (strictly) to the other cloud.

    (N,V,3) and (N,W,3) metres, taken as they are. Returns (N,) in 0..1.
    """
    return f_scores(pred, true, (threshold_m,))[:, 0]


def f_scores(pred: Floats, true: Floats, thresholds_m: tuple[float, ...]) -> Floats:
    """`f_score` at several thresholds for one search of the neighbours: (N, thresholds)."""
    if pred.ndim != 3 or true.ndim != 3 or len(pred) != len(true) or pred.shape[2] != 3 or true.shape[2] != 3:
        raise ValueError(f"found clouds of shape {pred.shape} and {true.shape}; wanted (N,V,3) and (N,W,3)")
    limits = np.asarray(thresholds_m, dtype=np.float64)

    def one(i: int) -> Floats:
        to_true, _ = cKDTree(true[i]).query(pred[i])
        to_pred, _ = cKDTree(pred[i]).query(true[i])
        precision = (to_true[:, None] < limits).mean(0)
        recall = (to_pred[:, None] < limits).mean(0)
        return np.asarray(2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny))

    with ThreadPoolExecutor() as pool:  # the search releases the interpreter lock
        scores = list(pool.map(one, range(len(pred)), chunksize=64))
    return np.stack(scores) if scores else np.zeros((0, len(limits)))


def pck(pred_px: Floats, true_px: Floats, valid: Mask, size_px: Floats, threshold: float) -> float:
    """Share of keypoints not farther off than `threshold` times the hand's size; HInt's, each joint first.

    pred_px, true_px (N,K,2) pixels; valid (N,K); size_px (N,): the longer side of the annotated box. HaMeR returns
    NaN when some joint is never valid; here such a joint is left out, and NaN means that no joint ever was.
    """
    pred_px, true_px, weights = checked_points(pred_px, true_px, valid)
    shares = np.linalg.norm(pred_px - true_px, axis=-1) / np.asarray(size_px, dtype=np.float64)[:, None]
    return pck_of_errors(shares, weights > 0, threshold)


def pck_of_errors(shares: Floats, valid: Mask, threshold: float) -> float:
    """`pck` from distances (N,K) as shares of the hand's size, and which of them count."""
    seen = valid.sum(0)
    by_joint = ((shares <= threshold) & valid).sum(0)[seen > 0] / seen[seen > 0]
    return float(by_joint.mean()) if by_joint.size else float("nan")


def _mean(values: Floats, weights: Floats) -> Floats:
    total = weights.sum(1)
    return np.asarray(np.divide((values * weights).sum(1), total, out=np.full(len(total), np.nan), where=total > 0))
