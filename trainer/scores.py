"""From predicted hands and a cache's labels to the metrics of a data set, batch by batch. Numpy only.

N samples, 21 joints in OpenPose order, V vertices. Predictions and labels are right-hand-like in the camera frame of
the view (left hands mirrored); the authors' truth is in their own order and axes, so predictions are brought there.

Against which truth: the authors' joints and meshes where the source gave them, else the 3D joint labels, those with
confidence above 0 only. `mpjpe_mm` is from the wrist, since one picture does not tell absolute depth; the other 3D
metrics are after each sample's own alignment, as the official scripts do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.crops import to_crop, to_photo_px
from storage.errors import WorkError
from trainer import metrics as m

Protocol = Literal["freihand", "ho3d", "hint"]
Array = NDArray[Any]

HO3D_ORDER = (0, 5, 6, 7, 9, 10, 11, 17, 18, 19, 13, 14, 15, 1, 2, 3, 4, 8, 12, 16, 20)
"""Rows of the OpenPose order that give HO-3D's: HAMER_SPEC 6.3."""
F_THRESHOLDS_M = (0.005, 0.015)
PCK_THRESHOLDS = {"pck_05": 0.05, "pck_10": 0.10, "pck_15": 0.15}
MIN_CONFIDENCE_2D = 0.5
"""HInt counts keypoints above this."""
MIN_JOINTS_3D = 4
"""A similarity fits three points nearly anyhow."""

TRUTH_KEYS = ("labels/has_truth", "labels/truth_xyz", "labels/truth_vertices")
STUDENTS_AFFINE = "views/affine of the students' view"
"""Key of a batch of the teacher's view."""
LABEL_KEYS = ("labels/keypoints_2d", "labels/keypoints_3d", "labels/right", "labels/box_size", "views/box_px")


@dataclass(frozen=True)
class Hands:
    """Predictions for one batch."""

    keypoints_3d: Array
    """(B,21,3) metres."""
    vertices: Array
    """(B,V,3) metres."""
    keypoints_2d: Array | None = None
    """(B,21,2) crop units; None: no camera, no PCK."""

    def for_authors(self, right: Array, protocol: Protocol | None) -> tuple[Array, Array]:
        """Joints (wrist at the origin) and vertices (from the same origin) as the authors write theirs.

        Left hands are mirrored back; HO-3D wants its own joint order and OpenGL axes (y up, z backward).
        """
        side = np.where(right > 0.5, 1.0, -1.0)[:, None, None] * [1, 0, 0] + [0, 1, 1]
        wrist = self.keypoints_3d[:, :1]
        joints, vertices = (self.keypoints_3d - wrist) * side, (self.vertices - wrist) * side
        if protocol == "ho3d":
            joints, vertices = joints[:, HO3D_ORDER] * [1, -1, -1], vertices * [1, -1, -1]
        return joints, vertices


@dataclass
class Scoring:
    """Collects batches, then gives the data set's metrics and the errors of each sample."""

    protocol: Protocol | None = None
    _columns: dict[str, list[Array]] = field(default_factory=dict)
    _about: dict[str, list[Array]] = field(default_factory=dict)
    """Columns of the samples table that are no errors."""
    _sample_ids: list[Array] = field(default_factory=list)

    def add(self, batch: Mapping[str, Array], hands: Hands) -> None:
        """Score one batch; `batch` holds LABEL_KEYS, `sample_id`, and TRUTH_KEYS where the source has them."""
        _check_finite(batch, hands)
        self._sample_ids.append(batch["sample_id"])
        columns = self._against_authors(batch, hands) if "labels/truth_xyz" in batch else _against_labels(batch, hands)
        columns |= _pck_columns(batch, hands)
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(values)
        for name, values in _about(batch, hands).items():
            self._about.setdefault(name, []).append(values)

    def metrics(self) -> dict[str, float]:
        """Means over the samples; a metric for which the set has no truth is left out."""
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        found = {name: _nanmean(values) for name, values in columns.items() if values.ndim == 1}
        for name, errors in (("auc", "joint_errors_m"), ("auc_mesh", "vertex_errors_m")):
            if errors in columns:
                found[name] = m.auc_of_errors(columns[errors], np.isfinite(columns[errors]))
        shares = columns.get("shares_2d", np.zeros((0, 21)))
        found |= {name: m.pck_of_errors(shares, np.isfinite(shares), limit) for name, limit in PCK_THRESHOLDS.items()}
        return {name: value for name, value in found.items() if np.isfinite(value)}

    def samples(self) -> dict[str, Array]:
        """`sample_id` (N,), each per-sample error (N,), NaN where the sample has no truth for it, and what a comparison
        wants beside them: `hand_px` and `visible_share` (N,) of the labels, `joint_errors_mm` (N,21) after alignment in
        OpenPose order, `keypoints_2d` (N,21,2) as predicted, crop units of the students' view."""
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        errors = {name: values for name, values in columns.items() if values.ndim == 1}
        if "shares_2d" in columns:
            errors["error_2d_share"] = _row_nanmean(columns["shares_2d"])
        about = {name: np.concatenate(parts) for name, parts in self._about.items()}
        return {
            "sample_id": np.concatenate(self._sample_ids),
            **errors,
            **about,
            "joint_errors_mm": columns["joint_errors_m"] * 1e3,
        }

    def _against_authors(self, batch: Mapping[str, Array], hands: Hands) -> dict[str, Array]:
        joints, vertices = hands.for_authors(batch["labels/right"], self.protocol)
        given = batch["labels/has_truth"] > 0
        true = np.where(given[:, None, None], batch["labels/truth_xyz"], 0).astype(np.float64)
        columns = _joint_columns(joints, true, np.repeat(given[:, None], true.shape[1], axis=1))
        if self.protocol == "ho3d":
            columns["joint_errors_m"] = columns["joint_errors_m"][:, np.argsort(HO3D_ORDER)]
        if "labels/truth_vertices" in batch:
            mesh = np.where(given[:, None, None], batch["labels/truth_vertices"], 0).astype(np.float64)
            columns |= _mesh_columns(joints, vertices, true, mesh, given)
        return columns


def _check_finite(batch: Mapping[str, Array], hands: Hands) -> None:
    for name in ("keypoints_3d", "vertices", "keypoints_2d"):
        values = getattr(hands, name)
        if values is not None and not (finite := np.isfinite(values).all((1, 2))).all():
            raise WorkError(f"{name} predicted for {batch['sample_id'][finite.argmin()]} are not finite")


def _against_labels(batch: Mapping[str, Array], hands: Hands) -> dict[str, Array]:
    labels = batch["labels/keypoints_3d"].astype(np.float64)
    valid = labels[..., 3] > 0
    return _joint_columns(hands.keypoints_3d, labels[..., :3], valid & (valid.sum(1) >= MIN_JOINTS_3D)[:, None])


def _joint_columns(joints: Array, true: Array, valid: Array) -> dict[str, Array]:
    aligned = m.align(joints, true, valid)
    errors = np.where(valid, np.linalg.norm(aligned - true, axis=-1), np.nan)
    has_wrist = valid & valid[:, :1]
    return {
        "pa_mpjpe_mm": m.mpjpe_mm(aligned, true, valid),
        "mpjpe_mm": m.mpjpe_mm(joints, true, has_wrist, root=0),
        "joint_errors_m": errors,
    }


def _mesh_columns(joints: Array, vertices: Array, true_joints: Array, true: Array, given: Array) -> dict[str, Array]:
    """Mesh errors; for another topology than the truth's only F-scores, the mesh moved as its joints are."""
    columns: dict[str, Array] = {}
    if vertices.shape == true.shape:
        aligned = m.align(vertices, true)
        errors = np.where(given[:, None], np.linalg.norm(aligned - true, axis=-1), np.nan)
        columns = {"pa_mpvpe_mm": errors.mean(1) * 1e3, "vertex_errors_m": errors}
    else:
        both = np.concatenate([joints, vertices], axis=1)
        target = np.concatenate([true_joints, np.zeros_like(vertices)], axis=1)
        pulls = np.arange(both.shape[1]) < joints.shape[1]
        aligned = m.align(both, target, np.repeat(pulls[None], len(both), axis=0))[:, joints.shape[1] :]
    f5, f15 = np.where(given[:, None], m.f_scores(aligned, true, F_THRESHOLDS_M), np.nan).T
    return columns | {"f5": f5, "f15": f15}


def _pck_columns(batch: Mapping[str, Array], hands: Hands) -> dict[str, Array]:
    """2D errors as shares of the longer side of the annotated box, NaN where a keypoint does not count."""
    if hands.keypoints_2d is None:
        return {}
    labels = batch["labels/keypoints_2d"].astype(np.float64)
    off_px = np.linalg.norm(hands.keypoints_2d - labels[..., :2], axis=-1) * batch["views/box_px"][:, None]
    shares = off_px / batch["labels/box_size"].max(1)[:, None]
    return {"shares_2d": np.where(labels[..., 2] > MIN_CONFIDENCE_2D, shares, np.nan)}


def _about(batch: Mapping[str, Array], hands: Hands) -> dict[str, Array]:
    """How large the hand is in its source picture, how much of it is labelled as seen, and where it was said to be."""
    about = {
        "hand_px": batch["labels/box_size"].max(1).astype(np.float64),
        "visible_share": (batch["labels/keypoints_2d"][..., 2] > MIN_CONFIDENCE_2D).mean(1),
    }
    if hands.keypoints_2d is not None:
        about["keypoints_2d"] = in_students_view(hands.keypoints_2d, batch)
    return about


def in_students_view(points: Array, batch: Mapping[str, Array]) -> Array:
    """Points (B,21,2) in crop units of the batch's view, in those of the students' own: for pictures of both.

    `STUDENTS_AFFINE` (B,2,3), source pixels -> picture pixels, is there where the batch is of another view.
    """
    if STUDENTS_AFFINE not in batch:
        return points
    both = zip(points, batch["views/affine"], batch[STUDENTS_AFFINE], strict=True)
    return np.stack([to_crop(to_photo_px(each, theirs), ours) for each, theirs, ours in both])


def _nanmean(values: Array) -> float:
    known = np.isfinite(values)
    return float(values[known].mean()) if known.any() else float("nan")


def _row_nanmean(values: Array) -> Array:
    known = np.isfinite(values)
    count = known.sum(1)
    return np.asarray(
        np.divide(np.where(known, values, 0).sum(1), count, out=np.full(len(values), np.nan), where=count > 0)
    )
