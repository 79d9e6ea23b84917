"""Hands from photographs with an exported student: numpy, Pillow and onnxruntime, and nothing else.

This one file travels with every export of handstill and imports nothing of it; put it where Python finds it.

    from handstill_numpy import Box, Hands

    hands = Hands("EXPORT")  # finds the hand model in the folder or beside it, as EXPORT.hand_model.npz
    for hand in hands.in_photo("photo.jpg", [Box(x=210, y=80, width=250, height=270, right=True)]):
        print(hand.keypoints_2d, hand.keypoints_3d, hand.vertices)

Frames and letters used here:

    photo px    pixels of the photograph as decoded, x right, y down, pixel centres at whole numbers
    crop px     pixels of the square crop that the network sees, likewise
    crop units  crop px / its side - 0.5: inside the crop -0.5..0.5
    camera      x right, y down, z forward, metres
    B batch, V vertices, F faces, J = 16 joints in MANO's order, 21 keypoints in OpenPose's order

A crop shows a right hand always: left hands are mirrored on the way in, and what is said of them on the way out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image, ImageOps

Array = NDArray[Any]

DESCRIPTION = "preprocessing.json"
HAND_MODEL = "hand_model.npz"

FINGERTIP_VERTICES = (744, 320, 443, 554, 671)
"""Thumb, index, middle, ring, pinky."""
OPENPOSE_ORDER = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)
"""Rows of [16 joints, 5 fingertips]: wrist, then thumb, index, middle, ring, pinky, each from its base to its tip."""

MIN_SIDE_PX = 4.0
"""Of a box's longer side. A hand of fewer pixels shows nothing."""
LARGEST_SQUARE = 8.0
"""The square that is cut out may be this many times as large as the photograph's longer side: in a larger one the hand
would be a dot, and smoothing the photograph for it would take minutes."""

_SUBPIXELS = 32
_FINE = 1024
"""OpenCV's warpAffine: places are computed to 1/1024 px, then rounded to 1/32 px. With the same rounding a crop here is
the crop that the network was trained on, bit by bit, but for single columns and rows whose place is a tie: those
may lie 1/32 px off (in noise up to 8 levels)."""


# ---- crops ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crop:
    """A square cut out of a photograph, and how it was cut."""

    picture: NDArray[np.uint8]
    """(S,S,3) RGB."""
    affine: Array
    """(2,3) from photo px to crop px, mirroring included."""
    center: Array
    """(2,) photo px, before mirroring."""
    box_px: float
    """Side of the square in the photograph."""
    mirrored: bool


def crop(
    photo: NDArray[np.uint8], center: Any, box_px: float, right: bool, *, antialias: bool = True, side_px: int = 256
) -> Crop:
    """Cut the square of side `box_px` around `center` (photo px) out of an RGB photograph (H,W,3); outside is black.

    Left hands are mirrored. `antialias`: blur before shrinking by more than 2.2, as HaMeR's demo does; its training
    and evaluation do not.
    """
    height, width = photo.shape[:2]
    middle = np.asarray(center, np.float64)
    source = photo if right else photo[:, ::-1]
    x, y = (middle[0] if right else width - 1 - middle[0]), middle[1]
    placed = np.array([_line(x, box_px, side_px), _line(y, box_px, side_px)])  # scale and shift of x and of y
    (scale_x, shift_x), (scale_y, shift_y) = placed.tolist()
    columns, rows = _columns(scale_x, shift_x, side_px), _rows(scale_y, shift_y, side_px)
    sigma = (box_px / side_px / 2 - 1) / 2
    if not antialias or sigma <= 0.05:
        picture = _bilinear(source, columns, rows, 0, 0, exact=antialias)
    else:
        radius = int(4 * sigma + 0.5)
        (left, end), (top, bottom) = (_needed(at, size, radius) for at, size in ((columns, width), (rows, height)))
        picture = _bilinear(_blurred(source[top:bottom, left:end], sigma, radius), columns, rows, left, top, exact=True)
    if not right:
        scale_x, shift_x = -scale_x, shift_x + scale_x * (width - 1)
    affine = np.array([[scale_x, 0.0, shift_x], [0.0, scale_y, shift_y]])
    return Crop(picture, affine, middle, float(box_px), not right)


def _line(middle: float, box_px: float, side_px: int) -> tuple[float, float]:
    """Scale and shift that take the box's middle to the crop's and its edge to the crop's edge, in one direction.

    From float32 corners, as HaMeR has them.
    """
    at = np.float64(np.float32(middle))
    edge = np.float64(np.float32(middle + np.float64(np.float32(box_px * 0.5))))
    scale = side_px / 2 / (edge - at)
    return float(scale), float(side_px / 2 - scale * at)


def _columns(scale: float, shift: float, side_px: int) -> NDArray[np.int64]:
    """Where each column of the crop lies in the source, in 1/32 px: (S,). Step and start are rounded each."""
    back = scale * (1 / (scale * scale))
    steps = np.rint(back * np.arange(side_px) * _FINE).astype(np.int64)
    places: NDArray[np.int64] = (int(np.rint(-back * shift * _FINE)) + steps + _FINE // _SUBPIXELS // 2) >> 5
    return places


def _rows(scale: float, shift: float, side_px: int) -> NDArray[np.int64]:
    """Where each row lies: there the sum is rounded."""
    back = scale * (1 / (scale * scale))
    fine = np.rint((back * np.arange(side_px) - back * shift) * _FINE).astype(np.int64)
    places: NDArray[np.int64] = (fine + _FINE // _SUBPIXELS // 2) >> 5
    return places


def _bilinear(
    source: Array, columns: NDArray[np.int64], rows: NDArray[np.int64], left: int, top: int, *, exact: bool
) -> Array:
    """(S,S,3) uint8 of `source`, a part of the photograph whose first pixel is (left, top); black elsewhere.

    `exact`: halves of a level are rounded to even, as of OpenCV's floats; else upwards, as of its integers.
    """
    number: type[np.float32] | type[np.int32] = np.float32 if exact else np.int32
    total: Array = np.zeros((len(rows), len(columns), 3), number)
    for down in (0, 1):
        at_y, weight_y = _neighbour(rows, down, top, source.shape[0])
        for across in (0, 1):
            at_x, weight_x = _neighbour(columns, across, left, source.shape[1])
            weights = (weight_y[:, None] * weight_x[None, :]).astype(number)
            total += source[at_y[:, None], at_x[None, :]] * weights[..., None]
    total = np.rint(np.clip(total / _FINE, 0, 255)) if exact else (total + _FINE // 2) // _FINE
    return np.asarray(total, np.uint8)


def _neighbour(places: NDArray[np.int64], offset: int, first: int, size: int) -> tuple[Array, Array]:
    """Index (S,) of the pixel at or after each place, and its weight in 1/32, 0 where there is no such pixel."""
    weight = places & (_SUBPIXELS - 1)
    index = (places >> 5) + offset - first
    weight = np.where((index >= 0) & (index < size), weight if offset else _SUBPIXELS - weight, 0)
    return index.clip(0, size - 1), weight


def _needed(places: NDArray[np.int64], size: int, radius: int) -> tuple[int, int]:
    """The part of the photograph that a blurred crop depends on; one pixel at least."""
    first = min(max(int(places.min() >> 5) - radius, 0), size - 1)
    return first, max(min(int(places.max() >> 5) + radius + 2, size), first + 1)


def _blurred(part: Array, sigma: float, radius: int) -> NDArray[np.float32]:
    """A Gaussian cut at four sigma, edges continued."""
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).astype(np.float32)
    blurred = part.astype(np.float32)
    for axis in (1, 0):
        padding = [(radius, radius) if side == axis else (0, 0) for side in range(3)]
        padded = np.pad(blurred, padding, mode="edge")
        length = blurred.shape[axis]
        total = np.zeros_like(blurred)
        for weight, start in zip(kernel, range(len(kernel)), strict=True):
            total += weight * (padded[:, start : start + length] if axis else padded[start : start + length])
        blurred = total
    return blurred


# ---- the hand -------------------------------------------------------------------------------------------------------


class HandLayer:
    """A hand model in MANO's layout: rotations and shape in, mesh and keypoints out."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        """`arrays`: v_template (V,3), shapedirs (V,3,10), posedirs (V,3,135), j_regressor (J,V), parents (J,),
        weights (V,J), faces (F,3)."""
        self.arrays = dict(arrays)
        self.faces: NDArray[np.int64] = self.arrays["faces"]
        self._parents: list[int] = self.arrays["parents"].tolist()
        # Flat and in double precision: L shape components, P pose terms. The larger products are einsums, which stay in
        # this thread: for a few hands BLAS's threads cost more than they do, where onnxruntime's are spinning.
        self._shape_L3V = _flat(self.arrays["shapedirs"])
        self._pose_P3V = _flat(self.arrays["posedirs"])
        self._regressor_JV = self.arrays["j_regressor"].astype(np.float64)
        self._weights_VJ = self.arrays["weights"].astype(np.float64)

    @classmethod
    def load(cls, path: str | Path) -> HandLayer:
        """From the hand_model.npz that an export names; plain arrays only."""
        with np.load(path, allow_pickle=False) as archive:
            return cls({name: archive[name] for name in archive.files})

    def __call__(self, global_orient: Array, hand_pose: Array, betas: Array) -> tuple[Array, Array]:
        """(B,1,3,3), (B,15,3,3), (B,10) to vertices (B,V,3) and keypoints (B,21,3), metres, in double precision."""
        turns_BJ33 = np.concatenate([global_orient, hand_pose], axis=1).astype(np.float64)
        batch, vertices = len(turns_BJ33), self.arrays["v_template"].shape[0]
        shaped_BV3 = self.arrays["v_template"] + (betas.astype(np.float64) @ self._shape_L3V).reshape(-1, vertices, 3)
        rest_BJ3 = self._regressor_JV @ shaped_BV3
        bend_BP = (turns_BJ33[:, 1:] - np.eye(3)).reshape(batch, -1)
        unposed_BV3 = shaped_BV3 + np.einsum("bp,pn->bn", bend_BP, self._pose_P3V).reshape(batch, vertices, 3)
        world_BJ33, joints_BJ3 = self._chain(turns_BJ33, rest_BJ3)
        shift_BJ31 = joints_BJ3[..., None] - world_BJ33 @ rest_BJ3[..., None]
        columns_BJ12 = np.concatenate([world_BJ33, shift_BJ31], axis=3).reshape(batch, len(self._parents), 12)
        blended_BV34 = np.einsum("vj,bjn->bvn", self._weights_VJ, columns_BJ12).reshape(batch, vertices, 3, 4)
        vertices_BV3 = np.einsum("bvac,bvc->bva", blended_BV34[..., :3], unposed_BV3) + blended_BV34[..., 3]
        points = np.concatenate([joints_BJ3, vertices_BV3[:, FINGERTIP_VERTICES]], axis=1)
        return vertices_BV3, points[:, OPENPOSE_ORDER]

    def _chain(self, turns_BJ33: Array, rest_BJ3: Array) -> tuple[Array, Array]:
        """Each joint's rotation and place in the camera's frame."""
        world_BJ33, joints_BJ3 = turns_BJ33.copy(), rest_BJ3.copy()
        for joint, parent in enumerate(self._parents[1:], start=1):
            bone_B31 = (rest_BJ3[:, joint] - rest_BJ3[:, parent])[..., None]
            joints_BJ3[:, joint] = joints_BJ3[:, parent] + (world_BJ33[:, parent] @ bone_B31)[..., 0]
            world_BJ33[:, joint] = world_BJ33[:, parent] @ turns_BJ33[:, joint]
        return world_BJ33, joints_BJ3


def _flat(directions_V3N: Array) -> NDArray[np.float64]:
    return np.ascontiguousarray(directions_V3N.reshape(-1, directions_V3N.shape[-1]).T, np.float64)


# ---- the network ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A tight box around a hand, photo px, and which hand it is: the numbers of `handstill predict --box`."""

    x: float
    """of its left edge"""
    y: float
    """of its upper edge"""
    width: float
    height: float
    right: bool
    """A right hand."""

    def check(self, width_px: int, height_px: int, square_px: float) -> None:
        """Raise ValueError for a box that cuts no hand out of a photograph of this size. `square_px`: what a network
        sees of it."""
        if not np.isfinite([self.x, self.y, self.width, self.height]).all():
            raise ValueError(f"{self}: found numbers that are not finite; want x, y, width and height in pixels")
        if min(self.width, self.height) <= 0 or max(self.width, self.height) < MIN_SIDE_PX:
            raise ValueError(f"{self}: no room for a hand; want a width and a height of {MIN_SIDE_PX:g} px and more")
        if not (self.x < width_px and self.y < height_px and self.x + self.width > 0 and self.y + self.height > 0):
            raise ValueError(
                f"{self}: lies outside the photograph of {width_px} x {height_px} px; want x and y of the upper left "
                "corner, in the photograph as it is shown upright"
            )
        largest = LARGEST_SQUARE * max(width_px, height_px)
        if square_px > largest:
            raise ValueError(
                f"{self}: too large: asks for a square of {square_px:g} px of a photograph of {width_px} x {height_px} "
                f"px; want one of {largest:g} px at most"
            )


@dataclass(frozen=True)
class Hand:
    """One hand of a photograph; left hands are mirrored back."""

    box: Box
    cut: Crop
    keypoints_2d: Array
    """(21,2) photo px."""
    keypoints_3d: Array
    """(21,3) metres, camera axes, the hand's own origin: add `translation` to place it before the camera."""
    vertices: Array
    """(V,3), as keypoints_3d."""
    faces: NDArray[np.int64]
    """(F,3), seen from outside counter-clockwise for both hands."""
    translation: Array
    """(3,) metres, camera frame; the camera's principal point is the photograph's middle."""
    focal_px: float
    """HaMeR's assumption, not the photograph's own: depths are only as right as it is."""
    parameters: dict[str, Array]
    """global_orient (1,3,3), hand_pose (15,3,3), betas (10,), cam (3,): of the right hand that the crop shows."""


class Hands:
    """An exported network with its preprocessing and, where one is given, a hand model."""

    def __init__(
        self,
        export: str | Path,
        hand_model: str | Path | None = None,
        *,
        network: str | None = None,
        threads: int = 0,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        """`hand_model`: hand_model.npz; None: the one inside the export's folder or beside it, if there is one.
        `network`: another file of the folder than preprocessing.json names.
        `threads`: 0 is as many as there are cores."""
        folder = Path(export).absolute()  # "." has no name to look beside
        if not (folder / DESCRIPTION).is_file():
            raise FileNotFoundError(
                f"{folder}: no {DESCRIPTION} is in it; want the folder that `handstill export` wrote"
            )
        self.description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        file = str(folder / (network or self.description["network"]))
        self.session = onnxruntime.InferenceSession(file, options, providers=list(providers))
        places = (folder / HAND_MODEL, folder.with_name(f"{folder.name}.{HAND_MODEL}"))
        found = hand_model or next((place for place in places if place.is_file()), None)
        self.layer = None if found is None else HandLayer.load(found)
        self._places = places

    def __call__(self, pictures: NDArray[np.uint8]) -> dict[str, Array]:
        """Crops (B,256,256,3) uint8 RGB to `global_orient`, `hand_pose`, `betas`, `cam`, and with a hand model
        `keypoints_3d` (B,21,3), `vertices` (B,V,3), `keypoints_2d` (B,21,2) crop units, `cam_t` (B,3)."""
        names = [output.name for output in self.session.get_outputs()]
        inputs = {self.description["input"]["name"]: self.normalise(pictures)}
        said: dict[str, Array] = dict(zip(names, self.session.run(names, inputs), strict=True))
        if "vertices" not in said and self.layer is not None:
            pose = (said["global_orient"], said["hand_pose"], said["betas"])
            said["vertices"], said["keypoints_3d"] = self.layer(*pose)
        if "keypoints_3d" in said:
            said["keypoints_2d"], said["cam_t"] = self.project(said["keypoints_3d"], said["cam"])
        return said

    def normalise(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B,S,S,3) levels to what the network takes, (B,3,S,S)."""
        mean, std = (np.array(self.description["input"][name], np.float32) * 255 for name in ("mean", "std"))
        return np.ascontiguousarray(((pictures.astype(np.float32) - mean) / std).transpose(0, 3, 1, 2))

    def project(self, keypoints_3d: Array, cam: Array) -> tuple[Array, Array]:
        """Points (B,N,3) in crop units (B,N,2), and the camera's translation (B,3). cam (B,3) = (s, tx, ty)."""
        side_px, focal_px = self.description["crop"]["side_px"], self.description["camera"]["focal_px"]
        depth = 2 * focal_px / (side_px * cam[:, 0] + 1e-9)
        cam_t = np.stack([cam[:, 1], cam[:, 2], depth], axis=-1)
        placed = keypoints_3d + cam_t[:, None]
        return focal_px / side_px * placed[..., :2] / placed[..., 2:], cam_t

    def in_photo(self, photo: str | Path | NDArray[np.uint8], boxes: Sequence[Box]) -> list[Hand]:
        """The hands in the boxes of a photograph: a file, turned upright as its EXIF says, or RGB (H,W,3)."""
        pixels = _decoded(photo) if isinstance(photo, str | Path) else photo
        if not boxes:
            return []
        for box in boxes:
            if not isinstance(box, Box):
                raise TypeError(f"{box!r} is no box; want Box(x, y, width, height, right), in pixels of the photograph")
            box.check(pixels.shape[1], pixels.shape[0], self._square_px(box))
        cuts = [self._cut(pixels, box) for box in boxes]
        said = self(np.stack([cut.picture for cut in cuts]))
        if "vertices" not in said or self.layer is None:
            looked = " or ".join(map(str, self._places))
            raise FileNotFoundError(
                f"no hand model: joints and meshes need one. Put it at {looked}, or name it: Hands(export, 'FILE.npz')"
            )
        each = ({name: values[i] for name, values in said.items()} for i in range(len(boxes)))
        return [self._in_photo(*found, pixels.shape) for found in zip(boxes, cuts, each, strict=True)]

    def _square_px(self, box: Box) -> float:
        """Side of the square around the box that the network sees, photo px."""
        rule = self.description["crop"]
        longer = max(box.width, box.height)
        if rule["widen_to"] is not None:
            longer = max(longer, box.width * rule["widen_to"][1] / rule["widen_to"][0])
        return float(rule["of_tight_box"] * longer)

    def _cut(self, photo: NDArray[np.uint8], box: Box) -> Crop:
        center = (box.x + box.width / 2, box.y + box.height / 2)
        return crop(photo, center, self._square_px(box), box.right, side_px=self.description["crop"]["side_px"])

    def _in_photo(self, box: Box, cut: Crop, said: dict[str, Array], shape: tuple[int, ...]) -> Hand:
        assert self.layer is not None
        side = np.array([-1.0 if cut.mirrored else 1.0, 1, 1])
        crop_px = (said["keypoints_2d"] + 0.5) * len(cut.picture)
        translation, focal_px = camera_in_photo(
            said["cam"], cut, shape[1], shape[0], self.description["camera"]["focal_px"]
        )
        return Hand(
            box=box,
            cut=cut,
            keypoints_2d=(crop_px - cut.affine[:, 2]) / cut.affine[[0, 1], [0, 1]],
            keypoints_3d=said["keypoints_3d"] * side,
            vertices=said["vertices"] * side,
            faces=self.layer.faces[:, ::-1] if cut.mirrored else self.layer.faces,
            translation=translation,
            focal_px=focal_px,
            parameters={name: said[name] for name in ("global_orient", "hand_pose", "betas", "cam")},
        )


def camera_in_photo(
    cam: Array, cut: Crop, width_px: int, height_px: int, crop_focal_px: float = 5000.0
) -> tuple[Array, float]:
    """Where a hand stands before the photograph's camera: its translation (3,) in metres, and the focal length in px.

    The focal length is the crop's, for a photograph whose longer side is the crop's; the principal point is the
    photograph's middle. A mirrored hand's tx is turned back.
    """
    scale, x, y = np.asarray(cam, np.float64)
    focal_px = crop_focal_px / len(cut.picture) * max(width_px, height_px)
    hand_px = cut.box_px * scale + 1e-9
    offset = 2 * (cut.center - np.array([width_px, height_px]) / 2) / hand_px
    translation = [(-x if cut.mirrored else x) + offset[0], y + offset[1], 2 * focal_px / hand_px]
    return np.array(translation), float(focal_px)


def _decoded(path: str | Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: cannot be read as a picture ({error}); want a JPEG, a PNG or the like") from error
