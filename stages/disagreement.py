"""How far a teacher's joints are from the labels', sample by sample, and which samples are worst.

Of a teacher that was trained on such data, a large distance is more often a wrong label than a hard picture. A wrong
label disagrees in every view and an unlucky crop in one: a sample is judged by the view in which the two agree best.

Letters: n samples, K views, J joints.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.alignment import align
from storage.encodings import PICTURE_SIZE_PX

Floats = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]

MEASURES = {"px": "in the picture, px", "root_mm": "from the wrist, mm", "pa_mm": "aligned, mm"}
"""Mean distance of a hand's joints: in the 256-pixel picture, in 3D from the wrist, and in 3D after alignment."""

MIN_CONFIDENCE_2D = 0.5
"""HInt's rule: a 2D label counts above this."""
MIN_JOINTS = 4
"""A similarity fits three points nearly anyhow, and so few joints in 2D say little about a label."""
_MM = 1000.0


@dataclass(frozen=True)
class Offender:
    """A sample and how far its teacher is from its labels."""

    value: float
    """By the measure that it is listed for, in the view in which that is least."""
    sample_id: str
    dataset: str
    shard: str
    row: int
    view: int
    values: Mapping[str, float]
    """All measures in that view; NaN where the labels do not say."""


def disagreements(arrays: Arrays) -> dict[str, Floats]:
    """(n,K) of each of MEASURES; NaN where fewer than MIN_JOINTS joints are labelled, or a number is not finite."""
    names = ("labels/keypoints_2d", "labels/keypoints_3d", "teacher/keypoints_2d", "teacher/keypoints_3d")
    labels_2d, labels_3d, said_2d, said_3d = (_infinite_as_nan(arrays[name]) for name in names)
    return {
        "px": _mean(said_2d, labels_2d[..., :2], labels_2d[..., 2] > MIN_CONFIDENCE_2D) * PICTURE_SIZE_PX,
        "root_mm": _from_wrist(said_3d, labels_3d) * _MM,
        "pa_mm": _aligned(said_3d, labels_3d) * _MM,
    }


def _infinite_as_nan(values: NDArray[Any]) -> Floats:
    """As float64, in which no difference of stored numbers overflows."""
    return np.where(np.isfinite(values), values.astype(np.float64), np.nan)


def _mean(said: Floats, label: Floats, counts: NDArray[np.bool_]) -> Floats:
    """(n,K) mean distance over the joints (n,K,J) that count."""
    usable = (counts.sum(-1) >= MIN_JOINTS) & np.isfinite(said).all((2, 3)) & np.isfinite(label).all((2, 3))
    total = np.where(counts, np.linalg.norm(said - label, axis=-1), 0).sum(-1)
    return np.where(usable, total / np.maximum(counts.sum(-1), 1), np.nan)


def _from_wrist(said: Floats, label: Floats) -> Floats:
    counts = (label[..., 3] > 0) & (label[..., :1, 3] > 0)
    points = label[..., :3]
    return _mean(said - said[:, :, :1], points - points[:, :, :1], counts)


def _aligned(said: Floats, label: Floats) -> Floats:
    """(n,K) mean distance after moving, turning and scaling the said joints on to the labelled ones."""
    counts, points = label[..., 3] > 0, label[..., :3]
    usable = (counts.sum(-1) >= MIN_JOINTS) & np.isfinite(said).all((2, 3)) & np.isfinite(points).all((2, 3))
    found = np.full(usable.shape, np.nan)
    if usable.any():
        moved = align(said[usable], points[usable], counts[usable], reflection=False)
        far = np.linalg.norm(moved - points[usable], axis=-1)
        found[usable] = np.where(counts[usable], far, 0).sum(-1) / counts[usable].sum(-1)
    return found


def least_over_views(values: Floats) -> Floats:
    """(n,) of (n,K): the view in which teacher and labels agree best; NaN where none is labelled."""
    least = np.where(np.isnan(values), np.inf, values).min(1)
    return np.where(np.isinf(least), np.nan, least)


def rows_of_largest(values: Floats, count: int) -> NDArray[np.int64]:
    """Rows of the `count` largest, in no order; of equals at the end all; NaN is not among them."""
    known = np.where(np.isnan(values), -np.inf, values)
    limit = np.partition(known, -count)[-count] if count < len(known) else -np.inf
    return np.asarray(np.flatnonzero((known >= limit) & ~np.isnan(values)))


def worst_of(found: Iterable[Offender], count: int) -> tuple[Offender, ...]:
    """The `count` largest, the largest first; equals in the order of their ids."""
    return tuple(heapq.nsmallest(count, found, key=lambda offender: (-offender.value, offender.sample_id)))


def joint_distances(ours: Arrays, our_rows: Any, theirs: Arrays, their_rows: Any, views: int) -> dict[str, Floats]:
    """(n,views) mean distance of two teachers' joints to the same samples: `px` in the picture, `mm` from the wrist."""
    both = ((ours, our_rows), (theirs, their_rows))
    points = [_infinite_as_nan(arrays["teacher/keypoints_2d"][rows, :views]) for arrays, rows in both]
    joints = [_infinite_as_nan(arrays["teacher/keypoints_3d"][rows, :views]) for arrays, rows in both]
    rooted = [each - each[:, :, :1] for each in joints]
    return {
        "px": np.linalg.norm(points[0] - points[1], axis=-1).mean(-1) * PICTURE_SIZE_PX,
        "mm": np.linalg.norm(rooted[0] - rooted[1], axis=-1).mean(-1) * _MM,
    }
