"""Predicted hands drawn over their photograph: each mesh where the photograph's camera sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from models.drawing import draw_hand
from models.photo_hands import PredictedHand
from stages.rendering import Camera, Floats, Lighting, Mesh, Texture, joined, render

LARGEST_PX = 2048
"""Longer side of an overlay: one ray a pixel is cast, and larger ones show no more."""
_COLOURS = {"right": (0.36, 0.52, 0.78), "left": (0.80, 0.50, 0.22)}
"""Linear reflectances: right hands are blue, left ones orange."""
_LINES = {"right": (60, 130, 255), "left": (255, 150, 40)}
_OPACITY = 0.85
_LIGHT = Lighting(
    towards_lamp=np.array([-0.35, -0.5, -0.79]) / np.linalg.norm([-0.35, -0.5, -0.79]),
    lamp=np.full(3, 0.85),
    sky=np.full(3, 0.5),
    ground=np.full(3, 0.3),
)


def draw_hands(picture: NDArray[np.uint8], hands: Sequence[PredictedHand]) -> NDArray[np.uint8]:
    """The photograph (H, W, 3) RGB with the hands in it, at most 2048 px long.

    A hand that no camera can see (an untrained network says such things) is drawn as the bones of its 2D joints.
    """
    scale = min(1.0, LARGEST_PX / max(picture.shape[:2]))
    if scale < 1:
        picture = np.asarray(cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
    shown = picture
    visible = [hand for hand in hands if hand.in_front]
    if visible:
        shown = _rendered(picture, visible, scale)
    page = Image.fromarray(shown)
    draw = ImageDraw.Draw(page)
    width = max(1, round(max(picture.shape[:2]) / 400))
    for hand in hands:
        if not hand.in_front:
            draw_hand(draw, hand.joints_2d_px * scale, _LINES[hand.box.side], width)
    return np.asarray(page)


def _rendered(picture: NDArray[np.uint8], hands: Sequence[PredictedHand], scale: float) -> NDArray[np.uint8]:
    """All meshes in one scene, so that the nearer hides the farther; only the part of the picture that they touch."""
    height, width = picture.shape[:2]
    focal_px, (x, y) = hands[0].focal_px * scale, hands[0].principal_point_px * scale
    corners = np.concatenate([hand.project(hand.vertices_m) * scale for hand in hands])
    left, top = np.clip(np.floor(corners.min(axis=0)).astype(int) - 1, 0, [width, height])
    right, bottom = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 2, 0, [width, height])
    if left >= right or top >= bottom:
        return picture
    camera = Camera(focal_px, int(right - left), int(bottom - top))
    # The renderer's principal point is the middle of its picture: the scene is sheared, so that ours is where it was.
    shear = (np.array([x - left, y - top]) - camera.centre_px) / focal_px
    colours, cover, _ = render(joined([_mesh(hand, shear) for hand in hands]), camera, _LIGHT)
    window = picture[top:bottom, left:right] / np.float32(255)
    mixed = window * (1 - _OPACITY * cover) + _OPACITY * colours
    shown = picture.copy()
    shown[top:bottom, left:right] = np.rint(np.clip(mixed, 0, 1) * 255).astype(np.uint8)
    return shown


def _mesh(hand: PredictedHand, shear: NDArray[Any]) -> Mesh:
    vertices = hand.vertices_m.copy()
    vertices[:, :2] += vertices[:, 2:] * shear
    count = len(vertices)
    return Mesh(
        vertices=vertices,
        normals=vertex_normals(hand.vertices_m, hand.faces),
        faces=hand.faces.astype(np.int32),
        albedo=np.tile(_COLOURS[hand.box.side], (count, 1)),
        gloss=np.full(count, 0.15),
        softness=np.full(count, 0.5),
        texture=Texture.plain(vertices, grain=0.0),
    )


def vertex_normals(vertices: Floats, faces: NDArray[Any]) -> Floats:
    """(V, 3) unit normals: the mean of the faces round a vertex, by area; a vertex of no face looks at the camera."""
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    across = np.cross(b - a, c - a)
    normals = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(normals, faces[:, corner], across)
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.asarray(np.where(lengths > 0, normals / np.maximum(lengths, 1e-30), [[0.0, 0.0, -1.0]]))
