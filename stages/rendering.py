"""Ray-cast pictures of meshes: light, shadow and occlusion at each vertex, smooth normals and highlights at each pixel.

The camera stands at the origin and looks along +z, x to the right and y down, metres; its principal point is the middle
of the picture, ((width - 1) / 2, (height - 1) / 2), as pixel centres lie at whole numbers. Colours are linear light,
red, green and blue, until `to_srgb`. One thread, no GPU, no display.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]

_WITHIN_PIXEL = [(-0.125, -0.375), (0.375, -0.125), (0.125, 0.375), (-0.375, 0.125)]
"""Where four more rays go in a pixel that lies on an edge: a turned square, so that no edge meets two at once."""
_EDGE = 0.12
"""Difference of neighbouring colours or coverages, of 1, that makes an edge."""
_NEIGHBOURS = np.ones((3, 3), dtype=np.uint8)
_OCCLUSION_RAYS = 8
_OCCLUSION_REACH_M = 0.06
_SKIN_OFFSET_M = 5e-4
"""Shadow rays start this far off the surface, or they would hit the triangle they start from."""


@dataclass(frozen=True)
class Camera:
    """A pinhole at the origin."""

    focal_px: float
    width_px: int
    height_px: int

    @property
    def centre_px(self) -> Floats:
        """(2,) x, y of the principal point."""
        return np.array([(self.width_px - 1) / 2, (self.height_px - 1) / 2])

    def project(self, points: NDArray[np.floating]) -> Floats:
        """Points (..., 3) in metres -> pixels (..., 2)."""
        return np.asarray(points[..., :2] / points[..., 2:] * self.focal_px + self.centre_px, dtype=np.float64)


@dataclass(frozen=True)
class Mesh:
    """A surface in the camera's frame, seen from both sides."""

    vertices: Floats
    """(n, 3) metres"""
    normals: Floats
    """(n, 3) unit, outwards"""
    faces: NDArray[np.int32]
    """(m, 3)"""
    albedo: Floats
    """(n, 3) linear reflectance"""
    gloss: Floats
    """(n,) strength of the highlight"""
    softness: Floats
    """(n,) how far light creeps round the terminator: 1 for skin, where red creeps farthest, 0 for cloth"""


@dataclass(frozen=True)
class Lighting:
    """One lamp, and what comes from all around; linear light."""

    towards_lamp: Floats
    """(3,) unit vector"""
    lamp: Floats
    """(3,) radiance of the lamp, a directional light that throws shadows"""
    sky: Floats
    """(3,) light from above (-y)"""
    ground: Floats
    """(3,) light from below"""


def joined(meshes: list[Mesh]) -> Mesh:
    """Several meshes as one."""
    starts = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes[:-1]])
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.normals for mesh in meshes]),
        np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts, strict=True)]).astype(np.int32),
        np.concatenate([mesh.albedo for mesh in meshes]),
        np.concatenate([mesh.gloss for mesh in meshes]),
        np.concatenate([mesh.softness for mesh in meshes]),
    )


def render(mesh: Mesh, camera: Camera, lighting: Lighting) -> tuple[Floats32, Floats32]:
    """The mesh seen by the camera: sRGB (h, w, 3) in [0, 1], multiplied by its coverage of each pixel (h, w, 1)."""
    scene = EmbreeScene()
    TriangleMesh(scene, mesh.vertices.astype(np.float32), mesh.faces)
    layers = np.zeros((camera.height_px, camera.width_px, 4), dtype=np.float32)
    left, top, right, bottom = _window(mesh, camera)
    if left < right and top < bottom:
        surface = _Surface(scene, mesh, _light_at_vertices(scene, mesh, lighting), lighting)
        rows, columns = (grid.reshape(-1) for grid in np.mgrid[top:bottom, left:right])
        window = surface.seen(_rays(camera, columns, rows)).reshape(bottom - top, right - left, 4)
        rough = np.flatnonzero(_edges(window))
        finer = [surface.seen(_rays(camera, columns[rough] + x, rows[rough] + y)) for x, y in _WITHIN_PIXEL]
        window.reshape(-1, 4)[rough] = np.mean(finer, axis=0)
        layers[top:bottom, left:right] = window
    return layers[..., :3], layers[..., 3:]


def to_srgb(linear: NDArray[np.floating]) -> Floats32:
    """Linear light to what a picture stores, both in [0, 1]; a 2.2 power stands for the exact curve."""
    return np.asarray(np.clip(linear, 0, 1).astype(np.float32) ** np.float32(1 / 2.2))


@dataclass(frozen=True)
class _VertexLight:
    diffuse: Floats32
    """(n, 3) light that leaves each vertex in all directions"""
    lamp_share: Floats32
    """(n,) share of the lamp that reaches it; highlights scale with it"""


def _light_at_vertices(scene: EmbreeScene, mesh: Mesh, lighting: Lighting) -> _VertexLight:
    towards = lighting.towards_lamp
    facing = mesh.normals @ towards
    origins = (mesh.vertices + _SKIN_OFFSET_M * mesh.normals).astype(np.float32)
    shadowed = scene.run(origins, np.tile(towards.astype(np.float32), (len(origins), 1)), query="OCCLUDED") >= 0
    lit = np.where((facing > 0) & shadowed, 0.0, 1.0)
    openness = _openness(scene, mesh, origins)[:, None]
    # Light scatters under skin: it wraps round the terminator, red most.
    wrap = mesh.softness[:, None] * np.array([0.32, 0.14, 0.10])
    lamp = np.clip((facing[:, None] + wrap) / (1 + wrap), 0, None) * lit[:, None] * lighting.lamp
    up = (1 - mesh.normals[:, 1:2]) / 2
    around = (up * lighting.sky + (1 - up) * lighting.ground) * openness ** (1.3 - 0.5 * wrap)
    return _VertexLight((mesh.albedo * (lamp + around)).astype(np.float32), lit.astype(np.float32))


def _openness(scene: EmbreeScene, mesh: Mesh, origins: Floats32) -> Floats:
    """(n,) share of each vertex's hemisphere that is free of nearby surface: creases are dark, knuckles are not."""
    order = np.arange(_OCCLUSION_RAYS) + 0.5
    height = np.sqrt(1 - order / _OCCLUSION_RAYS)  # cosine-weighted
    angle = np.pi * (1 + 5**0.5) * order
    ring = np.sqrt(1 - height**2)
    local = np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=1)
    helper = np.where(np.abs(mesh.normals[:, :1]) > 0.9, [[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]])
    tangent = np.cross(mesh.normals, helper)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    frames = np.stack([tangent, np.cross(mesh.normals, tangent), mesh.normals], axis=1)
    directions = np.einsum("rk,nkx->nrx", local, frames).reshape(-1, 3).astype(np.float32)
    starts = np.repeat(origins, _OCCLUSION_RAYS, axis=0)
    distances = scene.run(starts, directions, query="DISTANCE").reshape(-1, _OCCLUSION_RAYS)
    return np.asarray(np.clip(distances / _OCCLUSION_REACH_M, 0, 1).mean(axis=1), dtype=np.float64)


def _window(mesh: Mesh, camera: Camera) -> tuple[int, int, int, int]:
    """Left, top, right, bottom (exclusive) of the pixels that the mesh can touch."""
    front = mesh.vertices[mesh.vertices[:, 2] > 0.02]
    if len(front) < len(mesh.vertices):  # something reaches behind the camera: no bound is safe
        return 0, 0, camera.width_px, camera.height_px
    low, high = camera.project(front).min(axis=0), camera.project(front).max(axis=0)
    left, top = np.clip(np.floor(low).astype(int), 0, [camera.width_px, camera.height_px])
    right, bottom = np.clip(np.ceil(high).astype(int) + 2, 0, [camera.width_px, camera.height_px])
    return int(left), int(top), int(right), int(bottom)


def _rays(camera: Camera, columns: NDArray[Any], rows: NDArray[Any]) -> Floats32:
    """(r, 3) directions, z = 1, through the points of the picture at these columns and rows (r,)."""
    x, y = camera.centre_px
    directions = np.ones((len(columns), 3), dtype=np.float32)
    directions[:, 0] = (columns - x) / camera.focal_px
    directions[:, 1] = (rows - y) / camera.focal_px
    return directions


def _edges(window: Floats32) -> NDArray[np.bool_]:
    """(h, w) where a pixel's neighbours differ so much that one ray does not tell what the pixel is."""
    brightest = cv2.dilate(window, _NEIGHBOURS)
    darkest = cv2.erode(window, _NEIGHBOURS)
    return np.asarray((brightest - darkest).max(axis=2) > _EDGE)


class _Surface:
    """A lit mesh that rays from the camera can be asked about."""

    def __init__(self, scene: EmbreeScene, mesh: Mesh, light: _VertexLight, lighting: Lighting) -> None:
        self._scene, self._faces = scene, mesh.faces
        self._towards_lamp, self._lamp = lighting.towards_lamp.astype(np.float32), lighting.lamp.astype(np.float32)
        shine = (mesh.gloss * light.lamp_share)[:, None]
        self._per_vertex = np.concatenate([light.diffuse, mesh.normals, shine], axis=1, dtype=np.float32)

    def seen(self, directions: Floats32) -> Floats32:
        """(r, 4): the sRGB colour that each ray (r, 3) meets, and 1; zeros where it meets nothing."""
        found = self._scene.run(np.zeros_like(directions), directions, output=True)
        hit = np.flatnonzero(found["primID"] >= 0)
        corners = self._per_vertex[self._faces[found["primID"][hit]]]
        u, v = found["u"][hit, None], found["v"][hit, None]
        mixed = corners[:, 0] * (1 - u - v) + corners[:, 1] * u + corners[:, 2] * v
        shine = _highlight(mixed[:, 3:6], directions[hit], self._towards_lamp) * mixed[:, 6]
        seen = np.zeros((len(directions), 4), dtype=np.float32)
        seen[hit, :3] = to_srgb(mixed[:, :3] + shine[:, None] * self._lamp)
        seen[hit, 3] = 1
        return seen


def _highlight(normals: Floats32, directions: Floats32, towards_lamp: Floats32) -> Floats32:
    """Blinn-Phong's lobe: a broad one, as skin's is."""
    half = towards_lamp - directions / np.sqrt(np.einsum("rk,rk->r", directions, directions))[:, None]
    squares = np.einsum("rk,rk->r", normals, normals) * np.einsum("rk,rk->r", half, half)
    cosine = np.einsum("rk,rk->r", normals, half) / np.sqrt(squares + 1e-9)
    return np.asarray(np.clip(cosine, 0, 1) ** 24, dtype=np.float32)
