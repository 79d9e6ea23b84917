"""One random picture of one hand, and the labels that HaMeR's formats carry for it.

A scene is drawn from a generator alone: pose, shape, view, skin, arm, light, background, camera. Left hands are the
mirror image of a scene with a right hand, as HaMeR takes them to be, so that mirroring a picture and its labels back
gives exactly the right hand that was posed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.transform import Rotation

from models.hand_model import HandModel
from stages.backgrounds import draw_background
from stages.hand_contact import Capsules, draw_plausible_pose
from stages.hand_looks import Arm, HandLooks, Skin
from stages.hand_poses import pose_rotations, rest_axes
from stages.photographs import jpeg_bytes, photograph
from stages.props import held_thing, room_beside, thing_before
from stages.rendering import Camera, Floats, Floats32, Lighting, Mesh, joined, render
from stages.skinning import pose_hand

PICTURE_PX = 256
"""Width and height."""
_BOX_CONTEXT = 2.0
"""HaMeR's boxes are about twice the tight box of the keypoints."""
_HAND_PX = (66.0, 138.0)
"""Longer side of the keypoints' tight box, mostly: the box then is about the picture."""
_SMALL_HAND_PX = (28.0, 66.0)
"""The same of one hand in eight: a hand far away, enlarged by the crop."""
_FACING_VIEWER = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
"""Turns the rest pose so that the fingers point up and the palm faces the camera."""
_MIRROR = np.array([-1.0, 1.0, 1.0])
_SECOND_HAND, _HELD, _BEFORE, _GLOVE, _WALL = 0.2, 0.25, 0.14, 0.04, 0.4
"""Shares of the pictures with a second hand, a thing in the hand, a thing before it, a glove, a wall near behind."""


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
        self.capsules = Capsules(hand)

    def take(self, rng: np.random.Generator) -> HandPicture:
        """The picture that the generator decides on."""
        rotations = self._draw_rotations(rng)
        betas = np.clip(rng.normal(0, 1, 10), -2.5, 2.5)
        own_vertices, own_joints = pose_hand(self.hand, rotations, betas)
        turn = _draw_view(rng)
        camera, shift = _place(rng, (own_joints - own_joints[0]) @ turn.T)
        placed_at = shift - turn @ own_joints[0]
        joints, vertices = own_joints @ turn.T + placed_at, own_vertices @ turn.T + placed_at

        skin = _draw_skin(rng)
        meshes = [_moved(mesh, turn, placed_at) for mesh in self._own_meshes(rng, skin, own_vertices, own_joints)]
        meshes += self._other_things(rng, skin, betas, vertices, joints)
        picture = _taken(rng, joined(meshes), camera, float(vertices[:, 2].max()))

        pose = Rotation.from_matrix(np.concatenate([turn[None], rotations[1:]])).as_rotvec()
        points = camera.project(joints)
        right = bool(rng.random() < 0.5)
        if not right:
            picture = picture[:, ::-1]
            points = points * [-1, 1] + [camera.width_px - 1, 0]
            joints, vertices, pose = joints * _MIRROR, vertices * _MIRROR, pose * [1, -1, -1]
        center, box_px = _draw_box(rng, points)
        return HandPicture(
            jpeg_bytes(rng, picture), right, points, joints, vertices, pose.reshape(48), betas, center, box_px
        )

    def _draw_rotations(self, rng: np.random.Generator) -> Floats:
        """(16, 3, 3) of a plausible pose, the hand as a whole unturned."""
        angles, _ = draw_plausible_pose(rng, self.axes, self.capsules)
        return np.concatenate([np.eye(3)[None], pose_rotations(angles, self.axes)])

    def _own_meshes(self, rng: np.random.Generator, skin: Skin, vertices: Floats, joints: Floats) -> list[Mesh]:
        """The hand with its arm and what it holds, in its own frame."""
        meshes = [self.looks.hand_mesh(vertices, skin), *self.looks.arm_meshes(vertices, skin, _draw_arm(rng))]
        if rng.random() < _HELD:
            thing = held_thing(rng, vertices, joints, palm_normal=np.array([0.0, -1.0, 0.0]))
            meshes += [thing] if thing is not None else []
        return meshes

    def _other_things(
        self, rng: np.random.Generator, skin: Skin, betas: Floats, vertices: Floats, joints: Floats
    ) -> list[Mesh]:
        """What is about a hand that stands before the camera: the person's other hand, a thing in the way."""
        meshes: list[Mesh] = []
        if rng.random() < _SECOND_HAND:
            meshes += self._second_hand(rng, skin, betas, vertices)
        if rng.random() < _BEFORE:
            meshes.append(thing_before(rng, joints, float(vertices[:, 2].min())))
        return meshes

    def _second_hand(self, rng: np.random.Generator, skin: Skin, betas: Floats, first: Floats) -> list[Mesh]:
        """The same person's other hand, from touching the first one to a little way off; not labelled. A plane between
        them keeps them apart, and its arm leaves away from the first hand."""
        vertices, _ = pose_hand(self.hand, self._draw_rotations(rng), betas)
        parts = [self.looks.hand_mesh(vertices, skin), *self.looks.arm_meshes(vertices, skin, _draw_arm(rng))]
        towards = rng.normal(0, [1, 1, 0.7])
        towards /= np.linalg.norm(towards)
        turn = _draw_view(rng)
        if -turn[:, 0] @ towards < 0:  # the arm leaves along +x, of a mirrored hand along -x
            turn = Rotation.from_rotvec(np.pi * _across(towards)).as_matrix() @ turn
        placed = [_moved(_mirrored(part), turn, np.zeros(3)) for part in parts]
        gap = room_beside(first, placed[0].vertices, towards) + rng.gamma(1.0, 0.01)
        aside = first.mean(axis=0) - placed[0].vertices.mean(axis=0)
        aside -= (aside @ towards) * towards
        return [_moved(part, np.eye(3), aside + gap * towards) for part in placed]


def _across(towards: Floats) -> Floats:
    """A unit vector at right angles to the unit vector `towards`."""
    helper = np.array([0.0, 0.0, 1.0]) if abs(towards[2]) < 0.8 else np.array([1.0, 0.0, 0.0])
    across = np.cross(towards, helper)
    return np.asarray(across / np.linalg.norm(across))


def _moved(mesh: Mesh, turn: Floats, shift: Floats) -> Mesh:
    return replace(mesh, vertices=mesh.vertices @ turn.T + shift, normals=mesh.normals @ turn.T)


def _mirrored(mesh: Mesh) -> Mesh:
    return replace(mesh, vertices=mesh.vertices * _MIRROR, normals=mesh.normals * _MIRROR)


def _draw_skin(rng: np.random.Generator) -> Skin:
    glove = np.clip(rng.beta(0.7, 1.5) * 0.8 + rng.normal(0, 0.1, 3), 0.01, 0.9) if rng.random() < _GLOVE else None
    return Skin(
        tone=float(rng.beta(0.9, 1.3)),
        redness=float(rng.uniform(0, 1)),
        gloss=float(rng.gamma(2, 0.025)),
        roughness=float(rng.gamma(3, 0.014)),
        seed=int(rng.integers(2**31)),
        glove=glove,
    )


def _draw_arm(rng: np.random.Generator) -> Arm:
    return Arm(
        flexion_rad=float(np.clip(rng.normal(0, 0.4), -1.0, 1.0)),
        deviation_rad=float(np.clip(rng.normal(0, 0.2), -0.4, 0.5)),
        cuff_m=float(rng.uniform(0.015, 0.45)),
        sleeve=np.clip(rng.beta(0.8, 1.6) * 0.7 + rng.normal(0, 0.08, 3), 0.01, 0.9),
        sleeve_width=float(rng.uniform(1.12, 1.5)),
    )


def _taken(rng: np.random.Generator, mesh: Mesh, camera: Camera, farthest_m: float) -> Floats32:
    """sRGB (h, w, 3): the scene lit, rendered and photographed; the hand reaches back to `farthest_m`."""
    lighting = _draw_lighting(rng)
    wall_m = farthest_m + float(rng.gamma(1.5, 0.03)) if rng.random() < _WALL else None
    layers = render(mesh, camera, lighting, wall_m)
    background = draw_background(rng, camera.width_px, camera.height_px)
    light = float(np.mean(lighting.lamp) / np.mean(lighting.lamp + lighting.sky))
    return photograph(rng, layers, background, shade=0.8 * light)


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
    wanted = rng.uniform(*(_SMALL_HAND_PX if rng.random() < 0.125 else _HAND_PX))
    depth = max(camera.focal_px * extent / wanted, 0.18)
    middle = (joints.max(axis=0) + joints.min(axis=0)) / 2
    wanted_px = camera.centre_px + rng.normal(0, 0.09, 2) * PICTURE_PX
    across = (wanted_px - camera.centre_px) / camera.focal_px * depth
    return camera, np.array([*(across - middle[:2]), depth - middle[2]])


def _draw_box(rng: np.random.Generator, points: Floats) -> tuple[Floats, Floats]:
    """The annotated box around keypoints (21, 2): twice their tight box, as loosely placed as annotators do."""
    low, high = points.min(axis=0), points.max(axis=0)
    loose = rng.normal(0, 0.03, 2) * (high - low).max()
    return (low + high) / 2 + loose, (high - low) * _BOX_CONTEXT * rng.uniform(0.92, 1.12)


def _draw_lighting(rng: np.random.Generator) -> Lighting:
    """A lamp from above or before the hand, warm or cold, and what the room gives back."""
    towards = rng.normal([0, -0.9, -0.9], 1)
    warmth = rng.normal(0, 0.12)
    lamp = np.array([1 + warmth, 1.0, 1 - 1.3 * warmth]) * rng.uniform(0.15, 1.25)
    sky = np.clip(np.array([1 - warmth, 1.0, 1 + warmth]) * rng.uniform(0.15, 0.65), 0.05, 2)
    ground = sky * np.clip(rng.normal([0.55, 0.5, 0.45], 0.12), 0.1, 1)
    return Lighting(towards / np.linalg.norm(towards), lamp, sky, ground)
