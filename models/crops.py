"""From a photograph and a hand's box to the 256x256 picture that networks see, and its labels into that picture.

HaMeR's preprocessing, reproduced to the pixel (tests/golden/test_crops.py). Frames used here:

    photo px    pixels of the photograph as decoded, x right, y down, pixel centres at whole numbers
    crop px     pixels of the 256x256 crop, likewise
    crop units  crop px / 256 - 0.5: what networks predict, [-0.5, 0.5] inside the crop
    camera      x right, y down, z forward, metres

Left hands are mirrored on the way in, so that everything inside a crop is a right hand. numpy and OpenCV only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

CROP_PX = 256
PREPROCESSING_VERSION = 1
"""Raised when a crop's or a moved label's bytes change: it is part of every cache's identity."""

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Augmentation:
    """What is done to a crop beside cutting it out. The default does nothing."""

    scale: float = 1.0
    """The box's side is multiplied by this."""
    rotation_deg: float = 0.0
    """The box is turned by this in the photograph (x towards y), so its content turns the other way."""
    translation: tuple[float, float] = (0.0, 0.0)
    """The box moves by this share of its unscaled side, in the photograph, before any mirroring."""
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factors of red, green and blue."""
    flip: bool = False
    """Mirror the picture. A left hand is mirrored either way: never twice."""


IDENTITY = Augmentation()


@dataclass(frozen=True)
class BoxRule:
    """How an annotated box becomes the square that is cut out."""

    aspect: tuple[int, int] | None = None
    """(width, height) that the box is widened to before its longer side is taken; None: as it is."""
    rescale: float = 1.0

    def side_px(self, scale: npt.ArrayLike) -> float:
        """The square's side in photo px. `scale`: (2,) the box's width and height / 200, or one number for both."""
        return self.rescale * square_box_px(scale, self.aspect)


STUDENT_BOX = BoxRule()
"""Training, by any network, and evaluation of students: the longer side."""
TEACHER_BOX = BoxRule(aspect=(192, 256))
"""Evaluation of the ViT teacher, which sees the inner 192 columns of 256: max(height, 4/3 width)."""
HINT_BOX = BoxRule(rescale=2.0)
"""HInt's tight boxes, for every network."""
DEMO_BOX = BoxRule(aspect=(192, 256), rescale=2.0)
"""Tight boxes around detected hands, for the ViT teacher; HaMeR's demo cuts them out with `antialias`.
Students, who know no wider box, take `HINT_BOX` there."""


@dataclass(frozen=True)
class HandLabels:
    """The labels of one hand, in the photograph or in a crop of it. Absent ones are zeros, with their flags down."""

    keypoints_2d: Float32Array
    """(21, 3): x, y, confidence, OpenPose order; photo px, or crop units once moved."""
    keypoints_3d: Float32Array
    """(21, 4): X, Y, Z in metres, confidence."""
    global_orient: Float32Array
    """(3,) axis-angle, camera frame."""
    hand_pose: Float32Array
    """(45,) axis-angle of the 15 joints in MANO's order, absolute (flat hand = zeros)."""
    betas: Float32Array
    """(10,)"""


@dataclass(frozen=True)
class Crop:
    """A cut-out picture and how it was cut."""

    picture: Picture
    """(256, 256, 3) RGB, colour factors applied."""
    affine: FloatArray
    """(2, 3) from photo px to crop px, mirroring included: its determinant is negative where that was done."""
    center: FloatArray
    """(2,) of the box as annotated, photo px: before mirroring and translation."""
    box_px: float
    """Side of the square box before the augmentation's scale."""
    mirrored: bool


def square_box_px(scale: npt.ArrayLike, aspect: tuple[int, int] | None = None) -> float:
    """Side in photo px of the square around a box of `scale` * 200 px, widened to `aspect` (width, height) first."""
    width, height = np.broadcast_to(np.asarray(scale, np.float64) * 200, (2,))
    if aspect is not None:
        target_width, target_height = aspect
        width, height = (
            max(width, height * target_width / target_height),
            max(height, width * target_height / target_width),
        )
    return float(max(width, height))


def boxes_for(protocol: Literal["freihand", "ho3d", "hint"] | None) -> tuple[BoxRule, BoxRule]:
    """The students' and the teacher's box of an evaluation set."""
    return (HINT_BOX, HINT_BOX) if protocol == "hint" else (STUDENT_BOX, TEACHER_BOX)


def view_rng(seed: int, sample_id: str, view: int) -> np.random.Generator:
    """The generator of one sample's view: the same wherever and in whatever order views are made."""
    digest = hashlib.sha256(f"{seed}\n{view}\n{sample_id}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def draw_augmentation(rng: np.random.Generator) -> Augmentation:
    """Draw within the ranges HaMeR trains with (its experiment/default.yaml); it never flips at random."""
    x, y, size = np.clip(rng.standard_normal(3), -1, 1)
    turn = np.clip(rng.standard_normal(), -2, 2) * 30 if rng.random() < 0.6 else 0.0
    red, green, blue = rng.uniform(0.8, 1.2, 3)
    return Augmentation(
        scale=float(1 + 0.3 * size),
        rotation_deg=float(turn),
        translation=(float(0.02 * x), float(0.02 * y)),
        colour=(float(red), float(green), float(blue)),
    )


def crop(
    image: Picture,
    center: npt.ArrayLike,
    box_px: float,
    right: bool | float,
    augmentation: Augmentation = IDENTITY,
    *,
    antialias: bool = False,
) -> Crop:
    """Cut the square box of side `box_px` around `center` (photo px) out of an RGB image (H, W, 3) uint8.

    What lies outside the photograph is black. `antialias` blurs before shrinking by more than 2.2, as HaMeR's demo does
    and its training and evaluation do not.
    """
    mirrored = augmentation.flip or not right
    center_px = np.asarray(center, np.float64)
    source: npt.NDArray[Any] = cv2.flip(image, 1) if mirrored else image
    mirror = _mirror(image.shape[1] if mirrored else None)
    middle = center_px + box_px * np.array(augmentation.translation)
    placed = _placed(_moved(mirror, middle), box_px, augmentation)
    if antialias:
        source = _blurred(source, box_px, placed)
    patch = cv2.warpAffine(source, placed, (CROP_PX, CROP_PX), flags=cv2.INTER_LINEAR)
    return Crop(_coloured(patch, augmentation.colour), placed @ mirror, center_px, float(box_px), mirrored)


def move_labels(labels: HandLabels, cut: Crop, augmentation: Augmentation = IDENTITY) -> HandLabels:
    """The labels in the crop's frame: 2D in crop units, 3D mirrored and turned with the picture. Confidences stay."""
    turn = _turn_about_z(-augmentation.rotation_deg)
    keypoints_2d = labels.keypoints_2d.copy()
    keypoints_2d[:, :2] = to_crop(labels.keypoints_2d[:, :2], cut.affine)
    keypoints_3d = labels.keypoints_3d.copy()
    keypoints_3d[:, :3] = (labels.keypoints_3d[:, :3] * ([-1, 1, 1] if cut.mirrored else 1)) @ turn.T
    global_orient, hand_pose = labels.global_orient, labels.hand_pose
    if cut.mirrored:
        global_orient, hand_pose = mirror_axis_angles(global_orient), mirror_axis_angles(hand_pose)
    return HandLabels(keypoints_2d, keypoints_3d, _turned(global_orient, turn), hand_pose, labels.betas)


def mirror_axis_angles(rotations: Float32Array) -> Float32Array:
    """Rotations (3 * n,) of the mirrored hand: under x -> -x a rotation's axis keeps x and negates y and z."""
    return (rotations.reshape(-1, 3) * np.array([1, -1, -1], np.float32)).reshape(rotations.shape)


def to_crop(points_px: npt.ArrayLike, affine: npt.ArrayLike) -> FloatArray:
    """Points (..., 2) of the photograph in crop units, -0.5..0.5 inside. `affine`: (2, 3)."""
    return _moved(np.asarray(affine, np.float64), np.asarray(points_px, np.float64)) / CROP_PX - 0.5


def to_photo_px(points: npt.ArrayLike, affine: npt.ArrayLike) -> FloatArray:
    """Where points in crop units (..., 2) lie in the photograph; undoes the mirroring as well. `affine`: (2, 3)."""
    to_crop = np.asarray(affine, np.float64)
    crop_px = (np.asarray(points, np.float64) + 0.5) * CROP_PX
    return (crop_px - to_crop[:, 2]) @ np.linalg.inv(to_crop[:, :2]).T


def camera_in_photo(
    cam: npt.ArrayLike, cut: Crop, photo_width_px: int, photo_height_px: int, focal_px: float | None = None
) -> tuple[FloatArray, float]:
    """Where a predicted hand stands before the photograph's camera: (translation (3,) in metres, focal length in px).

    `cam`: (s, tx, ty) as networks give it, for the crop's right hand. A mirrored hand's tx is turned back here; negate
    its joints' and vertices' x too. The principal point is the photograph's middle. The focal length, where none is
    given, is HaMeR's assumption, 5000 px for a photograph whose longer side is 256 px: depths are only as right as it.
    """
    scale, x, y = np.asarray(cam, np.float64)
    if focal_px is None:
        focal_px = 5000 / CROP_PX * max(photo_width_px, photo_height_px)
    hand_px = cut.box_px * scale + 1e-9  # HaMeR's guard against a scale of zero
    offset = 2 * (cut.center - np.array([photo_width_px, photo_height_px]) / 2) / hand_px
    translation = [(-x if cut.mirrored else x) + offset[0], y + offset[1], 2 * focal_px / hand_px]
    return np.array(translation), focal_px


def _placed(middle: FloatArray, box_px: float, augmentation: Augmentation) -> FloatArray:
    """(2, 3) from (mirrored) photo px to crop px, through three corners as HaMeR has it.

    The corners are rounded to float32 like HaMeR's: OpenCV interpolates in 1/32 px, so the last bits decide pixels.
    """
    half = np.float32(box_px * augmentation.scale * 0.5)
    turn = np.deg2rad(augmentation.rotation_deg)
    across = np.array([np.cos(turn), np.sin(turn)]) * half
    down = np.array([-np.sin(turn), np.cos(turn)]) * half
    corners = np.stack([middle, middle + down.astype(np.float32), middle + across.astype(np.float32)])
    middle_px = CROP_PX / 2
    targets = np.array([[middle_px, middle_px], [middle_px, CROP_PX], [CROP_PX, middle_px]], np.float32)
    return np.asarray(cv2.getAffineTransform(corners.astype(np.float32), targets), np.float64)


def _mirror(width_px: int | None) -> FloatArray:
    """(3, 3) from photo px to those of the mirrored photograph of this width; None: not mirrored."""
    if width_px is None:
        return np.eye(3)
    return np.array([[-1.0, 0.0, width_px - 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def _moved(affine: FloatArray, points: npt.NDArray[Any]) -> FloatArray:
    """Points (..., 2) through a (2 or 3, 3) affine."""
    return np.asarray(points @ affine[:2, :2].T + affine[:2, 2], np.float64)


def _blurred(image: npt.NDArray[Any], box_px: float, placed: FloatArray) -> Float32Array:
    """HaMeR's demo blur: a Gaussian cut at four sigma, edges continued, over the photograph in its own pixels.

    `placed` (2, 3): from those pixels to the crop's; what the crop does not read stays black, and takes no time.
    """
    shrink = box_px / CROP_PX / 2
    sigma = (shrink - 1) / 2
    radius = int(4 * sigma + 0.5) if shrink > 1.1 else 0
    rows, columns = _read_by(placed, image.shape, radius + 2)
    window = image[rows, columns].astype(np.float32)
    if radius and window.size:
        size = 2 * radius + 1
        window = np.asarray(cv2.GaussianBlur(window, (size, size), sigma, borderType=cv2.BORDER_REPLICATE), np.float32)
    whole = np.zeros(image.shape, np.float32)
    whole[rows, columns] = window
    return whole


def _read_by(placed: FloatArray, shape: tuple[int, ...], margin: int) -> tuple[slice, slice]:
    """The rows and columns of an image of this shape that a crop reads, and `margin` more on every side."""
    corners = np.array([[0, 0], [CROP_PX, 0], [0, CROP_PX], [CROP_PX, CROP_PX]], np.float64)
    inside = (corners - placed[:, 2]) @ np.linalg.inv(placed[:, :2]).T
    low = np.clip(np.floor(inside.min(axis=0)) - margin, 0, [shape[1], shape[0]]).astype(int)
    high = np.clip(np.ceil(inside.max(axis=0)) + margin + 1, low, [shape[1], shape[0]]).astype(int)
    return slice(int(low[1]), int(high[1])), slice(int(low[0]), int(high[0]))


def _coloured(patch: npt.NDArray[Any], colour: tuple[float, float, float]) -> Picture:
    if patch.dtype == np.uint8 and colour == IDENTITY.colour:
        return patch
    if patch.dtype == np.uint8:  # by table: the same numbers, ten times as fast
        levels = np.rint(np.clip(np.arange(256)[:, None] * np.array(colour), 0, 255))
        return np.asarray(cv2.LUT(patch, levels.astype(np.uint8).reshape(1, 256, 3)), np.uint8)
    return np.asarray(np.rint(np.clip(patch * np.array(colour), 0, 255)), np.uint8)


def _turn_about_z(angle_deg: float) -> FloatArray:
    cosine, sine = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def _turned(rotation: Float32Array, turn: FloatArray) -> Float32Array:
    """The axis-angle `rotation` (3,) followed by the matrix `turn`; its angle at most pi, as HaMeR's."""
    matrix = cv2.Rodrigues(rotation.astype(np.float64))[0]
    return np.asarray(cv2.Rodrigues(turn @ matrix)[0], np.float32).reshape(3)
