"""What a teacher's answers must be, whatever it was shown: quantities of each view, and where they stop being possible.

Letters: n samples, K views, J joints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Quantity:
    """One number of a view, and between which limits it is believed."""

    unit: str
    low: float
    high: float
    allowed_share: float
    """Of the views beyond the limits: a cache with more of them is not fit to train on. 0 where a single one proves
    that the bytes or the network are wrong."""
    about: str


QUANTITIES: dict[str, Quantity] = {
    "rotation_error": Quantity(
        "1", 0.0, 1e-3, 0.0, "largest |RtR - I| of the pose's matrices; mirrored ones count as 2"
    ),  # HaMeR makes them orthonormal in float32: 1e-6
    "beta_magnitude": Quantity("1", 0.0, 10.0, 0.01, "largest |beta|; MANO's components have deviation 1"),
    "camera_scale": Quantity("1", 1e-6, 100.0, 0.01, "scale of the weak-perspective camera; below 0 is behind it"),
    "frame": Quantity("crop", 0.0, 1.5, 0.01, "farthest joint from the picture's middle; the picture ends at 0.5"),
    "hand_size": Quantity("m", 0.05, 0.4, 0.01, "farthest joint from the wrist; a grown-up's stretched hand has 0.18"),
}
"""In the order of the report."""


def quantities(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """(n,K) of every quantity; NaN where an input is not finite, which is counted elsewhere."""
    with np.errstate(invalid="ignore", over="ignore"):
        found = _computed(arrays)
    return {name: np.where(np.isfinite(found[name]), found[name], np.nan) for name in QUANTITIES}


def _computed(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    poses = np.concatenate([arrays["teacher/global_orient"], arrays["teacher/hand_pose"]], axis=2).astype(np.float64)
    points, joints = arrays["teacher/keypoints_2d"], arrays["teacher/keypoints_3d"].astype(np.float64)
    return {
        "rotation_error": _rotation_error(poses),
        "beta_magnitude": np.abs(arrays["teacher/betas"]).max(-1).astype(np.float64),
        "camera_scale": arrays["teacher/cam"][..., 0].astype(np.float64),
        "frame": np.abs(points).max((2, 3)).astype(np.float64),
        "hand_size": np.linalg.norm(joints - joints[:, :, :1], axis=-1).max(-1),
    }


def _rotation_error(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,K) of matrices (n,K,J,3,3)."""
    product = np.einsum("...ji,...jk->...ik", matrices, matrices)
    error = np.abs(product - np.eye(3)).max((-1, -2))
    side = np.einsum("...i,...i->...", np.cross(matrices[..., 0], matrices[..., 1]), matrices[..., 2])
    return np.asarray(np.where(side < 0, np.maximum(error, 2.0), error).max(-1))


def beyond(name: str, values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which values of a quantity are beyond its limits; NaN is not."""
    limits = QUANTITIES[name]
    return (values < limits.low) | (values > limits.high)
