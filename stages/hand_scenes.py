"""One random picture of one hand, and the labels that HaMeR's formats carry for it.

A scene is drawn from a generator alone: pose, shape, view, skin, arm, light, background, camera. Left hands are the
mirror image of a scene with a right hand, as HaMeR takes them to be, so that mirroring a picture and its labels back
gives exactly the right hand that was posed.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation

from models.hand_model import HandModel
from stages.backgrounds import draw_background
from stages.hand_looks import Arm, HandLooks, Skin
from stages.hand_poses import draw_pose, pose_rotations, rest_axes
from stages.rendering import Camera, Floats, Floats32, Lighting, Mesh, joined, render
from stages.skinning import pose_hand

PICTURE_PX = 224
"""Width and height, as FreiHAND's."""
_BOX_CONTEXT = 2.0
"""HaMeR's boxes are about twice the tight box of the keypoints."""
_HAND_PX = (62.0, 118.0)
"""Longer side of the keypoints' tight box."""
_FACING_VIEWER = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
"""Turns the rest pose so that the fingers point up and the palm faces the camera."""


@dataclass(frozen=True)
class HandPicture:
    """A picture and what is known about the hand in it. The frame is the picture's: a left hand's labels are a left
    hand's."""

    jpeg: bytes
    right: bool
    keypoints_2d: Floats
    """(21, 2) pixels, OpenPose order; pixel centres at whole numbers"""
    keypoints_3d: Floats
    """(21, 3) metres, camera frame"""
    vertices: Floats
    """(V, 3) metres, camera frame"""
    pose: Floats
    """(48,) axis-angle: global orientation in the camera's frame, then the 15 joints, absolute"""
    betas: Floats
    """(10,)"""
    center: Floats
    """(2,) of the box, pixels"""
    box_px: Floats
    """(2,) width and height of the box"""


class Studio:
    """Makes pictures of one hand model."""

    def __init__(self, hand: HandModel) -> None:
        self.hand = hand
        self.looks = HandLooks(hand)
        self.axes = rest_axes(hand)

    def take(self, rng: np.random.Generator) -> HandPicture:
        """The picture that the generator decides on."""
        rotations = np.concatenate([np.eye(3)[None], pose_rotations(draw_pose(rng), self.axes)])
        betas = np.clip(rng.normal(0, 1, 10), -2.5, 2.5)
        own_vertices, own_joints = pose_hand(self.hand, rotations, betas)
        turn = _draw_view(rng)
        camera, shift = _place(rng, (own_joints - own_joints[0]) @ turn.T)
        placed_at = shift - turn @ own_joints[0]

        mesh = self._mesh(rng, own_vertices, turn, placed_at)
        picture = _photograph(rng, mesh, camera)
        joints, vertices = own_joints @ turn.T + placed_at, own_vertices @ turn.T + placed_at
        pose = Rotation.from_matrix(np.concatenate([turn[None], rotations[1:]])).as_rotvec()
        points = camera.project(joints)
        right = bool(rng.random() < 0.5)
        if not right:
            picture = picture[:, ::-1]
            points = points * [-1, 1] + [camera.width_px - 1, 0]
            joints, vertices, pose = joints * [-1, 1, 1], vertices * [-1, 1, 1], pose * [1, -1, -1]
        center, box_px = _draw_box(rng, points)
        return HandPicture(
            _jpeg(rng, picture), right, points, joints, vertices, pose.reshape(48), betas, center, box_px
        )

    def _mesh(self, rng: np.random.Generator, vertices: Floats, turn: Floats, shift: Floats) -> Mesh:
        skin = Skin(
            float(rng.beta(1.2, 1.4)), float(rng.uniform(0, 1)), float(rng.gamma(2, 0.025)), int(rng.integers(2**31))
        )
        arm = Arm(
            flexion_rad=float(np.clip(rng.normal(0, 0.4), -1.0, 1.0)),
            deviation_rad=float(np.clip(rng.normal(0, 0.2), -0.4, 0.5)),
            cuff_m=float(rng.uniform(0.015, 0.45)),
            sleeve=rng.beta(1, 1.6, 3) * 0.7 + 0.02,
            sleeve_width=float(rng.uniform(1.12, 1.5)),
        )
        own = joined([self.looks.hand_mesh(vertices, skin), *self.looks.arm_meshes(vertices, skin, arm)])
        return Mesh(own.vertices @ turn.T + shift, own.normals @ turn.T, own.faces, own.albedo, own.gloss, own.softness)


def _draw_view(rng: np.random.Generator) -> Floats:
    """(3, 3) the hand's orientation before the camera: a quarter anywhere, the rest showing palm, back or side with the
    fingers more up than down, as people hold their hands."""
    if rng.random() < 0.25:
        return np.asarray(Rotation.random(random_state=rng).as_matrix())
    about_fingers = rng.choice([0.0, np.pi, np.pi / 2, -np.pi / 2], p=[0.35, 0.35, 0.15, 0.15]) + rng.normal(0, 0.45)
    tilt = rng.normal(0, 0.5)
    in_picture = rng.normal(0, 0.9)
    turned = Rotation.from_euler("yxz", [about_fingers, tilt, in_picture]).as_matrix()
    return np.asarray(turned @ _FACING_VIEWER)


def _place(rng: np.random.Generator, joints: Floats) -> tuple[Camera, Floats]:
    """A camera, and where the wrist stands before it, so that the hand has a drawn size and place in the picture.

    `joints`: (21, 3) relative to the wrist, turned.
    """
    field_of_view = rng.uniform(np.radians(22), np.radians(65))
    camera = Camera(PICTURE_PX / 2 / float(np.tan(field_of_view / 2)), PICTURE_PX, PICTURE_PX)
    extent = np.ptp(joints[:, :2], axis=0).max()
    depth = max(camera.focal_px * extent / rng.uniform(*_HAND_PX), 0.18)
    middle = (joints.max(axis=0) + joints.min(axis=0)) / 2
    wanted_px = camera.centre_px + rng.normal(0, 0.09, 2) * PICTURE_PX
    across = (wanted_px - camera.centre_px) / camera.focal_px * depth
    return camera, np.array([*(across - middle[:2]), depth - middle[2]])


def _draw_box(rng: np.random.Generator, points: Floats) -> tuple[Floats, Floats]:
    """The annotated box around keypoints (21, 2): twice their tight box, as loosely placed as annotators do."""
    low, high = points.min(axis=0), points.max(axis=0)
    loose = rng.normal(0, 0.03, 2) * (high - low).max()
    return (low + high) / 2 + loose, (high - low) * _BOX_CONTEXT * rng.uniform(0.92, 1.12)


def _photograph(rng: np.random.Generator, mesh: Mesh, camera: Camera) -> Floats32:
    """sRGB (h, w, 3) in [0, 1]: the mesh before a background, through an imperfect camera."""
    hand, coverage = render(mesh, camera, _draw_lighting(rng))
    background = draw_background(rng, camera.width_px, camera.height_px)
    focus = rng.choice([0.0, 0.6, 1.0, 1.8], p=[0.55, 0.25, 0.15, 0.05])
    if focus > 0:
        layers = cv2.GaussianBlur(np.dstack([hand, coverage]), (0, 0), float(focus)).astype(np.float32)
        hand, coverage = layers[..., :3], layers[..., 3:]
    picture = hand + (1 - coverage) * background
    if rng.random() < 0.12:
        picture = _shaken(rng, picture)
    cast = 1 + rng.normal(0, 0.05, 3)
    contrast, noise = rng.uniform(0.85, 1.15), rng.gamma(1.5, 0.008)
    picture = ((picture - 0.45) * contrast + 0.45) * cast * rng.uniform(0.85, 1.12)
    picture = picture.astype(np.float32) + np.float32(noise) * rng.standard_normal(picture.shape, dtype=np.float32)
    if rng.random() < 0.06:
        picture = picture.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return np.clip(picture, 0, 1).astype(np.float32)


def _draw_lighting(rng: np.random.Generator) -> Lighting:
    """A lamp from above or before the hand, warm or cold, and what the room gives back."""
    towards = rng.normal([0, -0.9, -0.9], 1)
    warmth = rng.normal(0, 0.12)
    lamp = np.array([1 + warmth, 1.0, 1 - 1.3 * warmth]) * rng.uniform(0.2, 1.0)
    sky = np.clip(np.array([1 - warmth, 1.0, 1 + warmth]) * rng.uniform(0.15, 0.65), 0.05, 2)
    ground = sky * np.clip(rng.normal([0.55, 0.5, 0.45], 0.12), 0.1, 1)
    return Lighting(towards / np.linalg.norm(towards), lamp, sky, ground)


def _shaken(rng: np.random.Generator, picture: Floats32) -> Floats32:
    """Motion blur along a random line of 3 to 9 pixels."""
    length = int(rng.integers(3, 10))
    kernel = np.zeros((length, length), dtype=np.float32)
    slope = rng.uniform(-1, 1)
    columns = np.arange(length)
    rows = np.rint((length - 1) / 2 + slope * (columns - (length - 1) / 2)).astype(int)
    kernel[rows, columns] = 1 / length
    return np.asarray(cv2.filter2D(picture, -1, kernel if rng.random() < 0.5 else kernel.T), dtype=np.float32)


def _jpeg(rng: np.random.Generator, picture: NDArray[np.float32]) -> bytes:
    stored = io.BytesIO()
    pixels = np.rint(picture * 255).astype(np.uint8)
    Image.fromarray(pixels).save(stored, format="JPEG", quality=int(rng.integers(72, 97)))
    return stored.getvalue()
