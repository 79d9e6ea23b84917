"""What stands in a shard: one line an array, with its type, dimensions, unit and frame. docs/format.md explains it.

Dimensions: `sample` and `view` lead; the others are named in the table. Every array is right-hand-like (left hands are
mirrored before anything else), in the camera frame of the view: x right, y down, z forward.
"""

from __future__ import annotations

from dataclasses import dataclass

FORMAT_VERSION = 1
"""Of the bytes described in docs/format.md. Readers refuse any other."""

FRAME = "camera of the view, right-hand-like: x right, y down, z forward"
"""Written into every array's attributes."""

FEATURES = "teacher/features"
FEATURES_SCALE = "teacher/features_scale"
SAMPLE_ID = "sample_id"
PICTURE_BYTES = "pictures/bytes"
PICTURE_OFFSET = "pictures/offset"
PICTURE_LENGTH = "pictures/length"
PICTURE_CRC32C = "pictures/crc32c"


@dataclass(frozen=True)
class Entry:
    """One array of a shard."""

    path: str
    dtypes: tuple[str, ...]
    dimensions: tuple[str, ...]
    unit: str
    about: str
    optional: bool = False


_SAMPLE = ("sample",)
_VIEW = ("sample", "view")
_F4 = ("float32",)
_F8 = ("float64",)

ENTRIES: tuple[Entry, ...] = (
    Entry(
        FEATURES,
        ("float16", "int8", "uint8"),
        (*_VIEW, "row", "column", "channel"),
        "1",
        "backbone features on the stored grid, before the head, in the cache's encoding",
    ),
    Entry(FEATURES_SCALE, _F4, (*_VIEW, "row", "column"), "1", "int8: scale of each token", optional=True),
    Entry("teacher/global_orient", _F4, (*_VIEW, "one", "matrix_row", "matrix_column"), "1", "rotation of the wrist"),
    Entry("teacher/hand_pose", _F4, (*_VIEW, "joint_15", "matrix_row", "matrix_column"), "1", "rotations, MANO order"),
    Entry("teacher/betas", _F4, (*_VIEW, "shape"), "1", "MANO shape components"),
    Entry("teacher/cam", _F4, (*_VIEW, "s_tx_ty"), "1", "weak-perspective camera of the crop"),
    Entry("teacher/keypoints_2d", _F4, (*_VIEW, "joint_21", "xy"), "crop", "OpenPose order, -0.5..0.5 in the crop"),
    Entry("teacher/keypoints_3d", _F4, (*_VIEW, "joint_21", "xyz"), "m", "OpenPose order, not root-centred"),
    Entry("labels/keypoints_2d", _F4, (*_VIEW, "joint_21", "xy_confidence"), "crop", "moved into the view"),
    Entry("labels/keypoints_3d", _F4, (*_VIEW, "joint_21", "xyz_confidence"), "m", "moved into the view"),
    Entry("labels/global_orient", _F4, (*_VIEW, "axis_angle"), "rad", "moved into the view"),
    Entry("labels/hand_pose", _F4, (*_VIEW, "axis_angle_45"), "rad", "15 joints, absolute (mean pose included)"),
    Entry("labels/betas", _F4, (*_VIEW, "shape"), "1", "MANO shape components"),
    Entry("labels/has_hand_pose", _F4, _SAMPLE, "1", "1: pose labels are to be trusted"),
    Entry("labels/has_betas", _F4, _SAMPLE, "1", "1: shape labels are to be trusted"),
    Entry("labels/right", _F4, _SAMPLE, "1", "1 right hand, 0 left hand (mirrored in all views)"),
    Entry("labels/box_size", _F8, (*_SAMPLE, "width_height"), "px", "annotated box in the source picture"),
    Entry("labels/image_size", ("int64",), (*_SAMPLE, "width_height"), "px", "of the source picture"),
    Entry(
        "labels/truth_xyz",
        _F4,
        (*_SAMPLE, "joint_21", "xyz"),
        "m",
        "authors' joints, as in their file (order and axes of the protocol, not mirrored)",
        optional=True,
    ),
    Entry("labels/truth_vertices", _F4, (*_SAMPLE, "vertex", "xyz"), "m", "authors' mesh, as is", optional=True),
    Entry("labels/has_truth", _F4, _SAMPLE, "1", "1: truth_* of this sample is given", optional=True),
    Entry("views/scale", _F8, _VIEW, "1", "the box was enlarged by this factor"),
    Entry("views/rotation_deg", _F8, _VIEW, "deg", "the box was turned by this angle (x towards y)"),
    Entry("views/translation", _F8, (*_VIEW, "xy"), "box", "the box was moved by this share of its unscaled side"),
    Entry("views/colour", _F8, (*_VIEW, "rgb"), "1", "factor of each channel"),
    Entry("views/flip", ("bool",), _VIEW, "1", "the picture was mirrored (always, for a left hand)"),
    Entry("views/center", _F8, (*_VIEW, "xy"), "px", "of the box in the source picture, before translation"),
    Entry("views/box_px", _F8, _VIEW, "px", "side of the square box, before scale"),
    Entry("views/affine", _F8, (*_VIEW, "xy", "x_y_one"), "px", "source pixels -> picture pixels, mirroring included"),
    Entry(SAMPLE_ID, ("uint8",), (*_SAMPLE, "byte"), "", "<data set>:<key>#<hand>, UTF-8, zeros after the end"),
    Entry(PICTURE_BYTES, ("uint8",), ("byte",), "", "encoded 256x256 RGB pictures, one after the other"),
    Entry(PICTURE_OFFSET, ("int64",), _VIEW, "byte", "where a picture starts in pictures/bytes"),
    Entry(PICTURE_LENGTH, ("int64",), _VIEW, "byte", "length of a picture"),
    Entry(PICTURE_CRC32C, ("uint32",), _VIEW, "", "crc32c of a picture's bytes"),
)

BY_PATH: dict[str, Entry] = {entry.path: entry for entry in ENTRIES}
GROUPS: tuple[str, ...] = ("labels", "pictures", "teacher", "views")
WRITERS_OWN: frozenset[str] = frozenset({SAMPLE_ID, PICTURE_BYTES, PICTURE_OFFSET, PICTURE_LENGTH, PICTURE_CRC32C})
"""Filled by the shard writer itself, from the sample's id and its encoded pictures."""


def per_view(path: str) -> bool:
    """Whether the array has one entry a view (else one a sample)."""
    return BY_PATH[path].dimensions[:2] == _VIEW
