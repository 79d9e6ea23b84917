"""One hand's annotation as its file has it: read strictly, then cleaned by HaMeR's rules.

What cannot be used raises `UnusableError` with the reason that the manifest will carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from models.crops import STUDENT_BOX
from stages.config import FilteringConfig

Float32Array = npt.NDArray[np.float32]
FloatArray = npt.NDArray[np.float64]

LARGEST_BOX = 64
"""A box this many times the picture's longer side is a mistake: the hand would be four pixels of the crop."""


class UnusableError(Exception):
    """This hand is left out; the text, `<word>: <detail>`, says why."""


@dataclass(frozen=True)
class HandAnnotation:
    """A hand's labels in photo px and metres, as the manifest's columns of the same names."""

    center: FloatArray
    scale: FloatArray
    right: float
    keypoints_2d: Float32Array
    keypoints_3d: Float32Array
    hand_pose: Float32Array
    betas: Float32Array
    has_hand_pose: float
    has_betas: float
    reprojection_loss: float | None = None
    """Of the fit that made the labels, where it was recorded; not itself a label."""

    def columns(self) -> dict[str, Any]:
        """Flat values of the manifest's label columns."""
        return {
            "center": self.center,
            "scale": self.scale,
            "right": self.right,
            "keypoints_2d": self.keypoints_2d.ravel(),
            "keypoints_3d": self.keypoints_3d.ravel(),
            "hand_pose": self.hand_pose,
            "betas": self.betas,
            "has_hand_pose": self.has_hand_pose,
            "has_betas": self.has_betas,
        }


def _blank(*shape: int) -> Float32Array:
    return np.zeros(shape, np.float32)


NO_ANNOTATION = HandAnnotation(
    np.zeros(2), np.zeros(2), 1.0, _blank(21, 3), _blank(21, 4), _blank(48), _blank(10), 0.0, 0.0
)
"""Stands in the rows of hands whose annotation could not be read."""


def read_annotation(hand: Mapping[str, Any]) -> HandAnnotation:
    """One dictionary of a HaMeR tar. Every field must be there, finite, and of its shape."""
    return HandAnnotation(
        center=_numbers(hand, "center", (2,), np.float64),
        scale=_numbers(hand, "scale", (2,), np.float64),
        right=_flag(hand, "right"),
        keypoints_2d=_numbers(hand, "keypoints_2d", (21, 3), np.float32),
        keypoints_3d=_numbers(hand, "keypoints_3d", (21, 4), np.float32),
        hand_pose=_numbers(hand, "hand_pose", (48,), np.float32),
        betas=_numbers(hand, "betas", (10,), np.float32),
        has_hand_pose=_flag(hand, "has_hand_pose"),
        has_betas=_flag(hand, "has_betas"),
        reprojection_loss=_reprojection_loss(hand.get("extra_info")),
    )


def clean(annotation: HandAnnotation, rules: FilteringConfig) -> HandAnnotation:
    """HaMeR's cleaning, in its order: labels not trusted are taken away, hands that fail a rule are left out."""
    keypoints_2d = annotation.keypoints_2d.copy()
    keypoints_2d[keypoints_2d[:, 2] < rules.suppress_keypoint_confidence, 2] = 0
    has_pose, has_betas = annotation.has_hand_pose, annotation.has_betas
    if rules.suppress_betas is not None and np.abs(annotation.betas).max() > rules.suppress_betas:
        has_betas = 0.0
    if rules.poses_betas_simultaneous:
        has_pose = has_betas = float(has_pose > 0 and has_betas > 0)
    cleaned = replace(annotation, keypoints_2d=keypoints_2d, has_hand_pose=has_pose, has_betas=has_betas)
    _keep(cleaned, rules)
    if rules.betas_regularisation and not has_betas:
        cleaned = replace(cleaned, betas=np.zeros(10, np.float32), has_betas=1.0)
    return cleaned


def _keep(annotation: HandAnnotation, rules: FilteringConfig) -> None:
    """Raise for a hand that a rule leaves out."""
    if rules.drop_without_pose and annotation.has_hand_pose <= 0:
        raise UnusableError("filtered: drop_without_pose: its pose is unknown")
    seen = int((annotation.keypoints_2d[:, 2] > 0).sum())
    if rules.min_keypoints is not None and seen <= rules.min_keypoints:
        raise UnusableError(f"filtered: min_keypoints: {seen} keypoints, wanted more than {rules.min_keypoints}")
    loss = annotation.reprojection_loss
    if rules.max_reprojection_loss is not None and loss is not None and not loss < rules.max_reprojection_loss:
        raise UnusableError(f"filtered: max_reprojection_loss: {loss:g}, wanted below {rules.max_reprojection_loss:g}")
    shorter_px = float(annotation.scale.min()) * 200
    if rules.min_box_px is not None and shorter_px <= rules.min_box_px:
        raise UnusableError(f"filtered: min_box_px: {shorter_px:g} px, wanted more than {rules.min_box_px:g}")


def check_box(annotation: HandAnnotation, width: int, height: int) -> None:
    """Raise for a box that cuts nothing out of a picture of this size (px)."""
    box_width, box_height = annotation.scale * 200
    if min(box_width, box_height) <= 0:
        raise UnusableError(f"no-box: its box has no size ({box_width:g} x {box_height:g} px)")
    side = STUDENT_BOX.side_px(annotation.scale)
    if side > LARGEST_BOX * max(width, height):
        raise UnusableError(f"no-box: a box of {side:g} px around a hand in a picture of {width} x {height}")
    x, y = annotation.center
    if not (-side / 2 < x < width + side / 2 and -side / 2 < y < height + side / 2):
        raise UnusableError(f"outside: its box around ({x:g}, {y:g}) lies outside the picture of {width} x {height}")


def _numbers(hand: Mapping[str, Any], name: str, shape: tuple[int, ...], kind: type[Any]) -> npt.NDArray[Any]:
    if name not in hand:
        raise UnusableError(f"bad-label: it has no {name}")
    value = _array_of(hand[name], name)
    if value.dtype.kind not in "biuf":
        raise UnusableError(f"bad-label: {name} holds {value.dtype.name}, wanted numbers")
    if value.shape != shape:
        raise UnusableError(f"bad-label: {name} has shape {value.shape}, wanted {shape}")
    with np.errstate(over="ignore"):  # becomes inf, which is refused below
        converted = value.astype(kind)
    if not np.isfinite(converted).all():
        raise UnusableError(f"bad-label: {name} holds values that are not finite")
    return converted


def _array_of(value: Any, name: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:  # lists of unequal length
        raise UnusableError(f"bad-label: {name} is no array") from error


def _flag(hand: Mapping[str, Any], name: str) -> float:
    """0 or 1, stored as a number, or as an array of one."""
    flat = {name: _array_of(hand[name], name).reshape(-1)} if name in hand else {}
    value = float(_numbers(flat, name, (1,), np.float32)[0])
    if value not in (0.0, 1.0):
        raise UnusableError(f"bad-label: {name} is {value:g}, wanted 0 or 1")
    return value


def _reprojection_loss(extra_info: Any) -> float | None:
    """`fitting_loss` is a dictionary, or a zero-dimensional array that holds one; it and its loss may be missing."""
    fitting = extra_info.get("fitting_loss") if isinstance(extra_info, dict) else None
    if isinstance(fitting, np.ndarray) and fitting.ndim == 0:
        fitting = fitting.item()
    loss = fitting.get("reprojection_loss") if isinstance(fitting, dict) else None
    if loss is None:
        return None
    flat = {"reprojection_loss": _array_of(loss, "reprojection_loss").reshape(-1)}
    return float(_numbers(flat, "reprojection_loss", (1,), np.float64)[0])
