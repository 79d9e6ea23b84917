"""Ray-cast pictures of meshes: light, shadow and occlusion at each vertex, smooth normals and highlights at each pixel.

The camera stands at the origin and looks along +z, x to the right and y down, metres; its principal point is the middle
of the picture, ((width - 1) / 2, (height - 1) / 2), as pixel centres lie at whole numbers. Colours are linear light,
red, green and blue, until `to_srgb`. One thread, no GPU, no display.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

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
_OCCLUSION_RAYS = 6
_OCCLUSION_REACH_M = 0.06
_LAMP_GRID_PX = 4
"""A wall's shadows are soft: one ray for a square of so many pixels."""
_GRAIN_CELLS = 64
_GRAIN_CELL_M = 0.0013
_LINE_M = 8e-4
"""Half the width of a crease of the skin."""
_TURNED_AWAY = 0.4
"""Cosine of normal and line of sight above which a vertex is no corner of anything seen: it gets no rays."""
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
    texture: Texture


@dataclass(frozen=True)
class Texture:
    """What is finer than a mesh's triangles, drawn at each pixel."""

    place: Floats
    """(n, 3) metres: the point of the grain that each vertex shows; moves with the surface"""
    grain: Floats
    """(n,) deviation of the grain, of the albedo"""
    lines: Floats
    """(n, 4) metres: signed distance from each of four creases"""
    depth: Floats
    """(n, 4) how dark each crease is, of 1"""

    @staticmethod
    def plain(place: Floats, grain: float) -> Texture:
        """A surface with the same grain everywhere and no creases."""
        count = len(place)
        return Texture(place, np.full(count, grain), np.ones((count, 4)), np.zeros((count, 4)))

    def columns(self) -> Floats:
        """(n, 12) all of it side by side."""
        return np.concatenate([self.place, self.grain[:, None], self.lines, self.depth], axis=1)

    @staticmethod
    def of_columns(columns: Floats) -> Texture:
        """The inverse of `columns`."""
        return Texture(columns[:, :3], columns[:, 3], columns[:, 4:8], columns[:, 8:12])


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
        Texture.of_columns(np.concatenate([mesh.texture.columns() for mesh in meshes])),
    )


class Layers(NamedTuple):
    """What a camera sees, to be laid over a background."""

    colour: Floats32
    """(h, w, 3) sRGB in [0, 1], multiplied by the coverage"""
    coverage: Floats32
    """(h, w, 1) share of each pixel that the mesh covers"""
    lamp_on_wall: Floats32
    """(h, w, 1) share of the lamp's light that reaches what stands behind; 1 where there is nothing near"""


def render(mesh: Mesh, camera: Camera, lighting: Lighting, wall_m: float | None = None) -> Layers:
    """The mesh seen by the camera. `wall_m`: how far away a wall is that the mesh throws shadows on, if any."""
    scene = EmbreeScene()
    TriangleMesh(scene, mesh.vertices.astype(np.float32), mesh.faces)
    layers = np.zeros((camera.height_px, camera.width_px, 4), dtype=np.float32)
    left, top, right, bottom = _window(mesh, camera)
    if left < right and top < bottom:
        surface = _Surface(scene, mesh, _light_at_vertices(scene, mesh, lighting), lighting)
        rows, columns = (grid.reshape(-1) for grid in np.mgrid[top:bottom, left:right])
        window = surface.seen(_rays(camera, columns, rows)).reshape(bottom - top, right - left, 4)
        rough = np.flatnonzero(_edges(window))
        across, down = np.array(_WITHIN_PIXEL).T[:, :, None]
        finer = surface.seen(_rays(camera, (columns[rough] + across).reshape(-1), (rows[rough] + down).reshape(-1)))
        window.reshape(-1, 4)[rough] = finer.reshape(len(_WITHIN_PIXEL), -1, 4).mean(axis=0)
        layers[top:bottom, left:right] = window
    return Layers(layers[..., :3], layers[..., 3:], _lamp_on_wall(scene, camera, lighting, wall_m))


def _lamp_on_wall(scene: EmbreeScene, camera: Camera, lighting: Lighting, wall_m: float | None) -> Floats32:
    """(h, w, 1): see `Layers`. A wall that the lamp is behind gets no shadow."""
    shape = (camera.height_px, camera.width_px)
    if wall_m is None or lighting.towards_lamp[2] > -0.1:
        return np.ones((*shape, 1), dtype=np.float32)
    rows, columns = (grid.reshape(-1) for grid in np.mgrid[0 : shape[0] : _LAMP_GRID_PX, 0 : shape[1] : _LAMP_GRID_PX])
    starts = _rays(camera, columns, rows) * np.float32(wall_m)
    towards = np.tile(lighting.towards_lamp.astype(np.float32), (len(starts), 1))
    free = (scene.run(starts, towards, query="OCCLUDED") < 0).astype(np.float32)
    coarse = free.reshape(-(-shape[0] // _LAMP_GRID_PX), -1)
    return np.asarray(cv2.resize(cv2.GaussianBlur(coarse, (0, 0), 0.8), shape[::-1])[..., None])


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
    normals, towards = mesh.normals.astype(np.float32), lighting.towards_lamp.astype(np.float32)
    origins = mesh.vertices.astype(np.float32) + np.float32(_SKIN_OFFSET_M) * normals
    facing = normals @ towards
    seen = np.einsum("nk,nk->n", normals, origins) < _TURNED_AWAY * np.linalg.norm(origins, axis=1)
    lit = seen.astype(np.float32)
    asked = np.flatnonzero(seen & (facing > 0))  # what looks away from the lamp is dark without asking
    blocked = scene.run(origins[asked], np.tile(towards, (len(asked), 1)), query="OCCLUDED") >= 0
    lit[asked[blocked]] = 0
    openness = np.full((len(normals), 1), 0.5, dtype=np.float32)
    openness[seen, 0] = _openness(scene, normals[seen], origins[seen])
    # Light scatters under skin: it wraps round the terminator, red most.
    wrap = mesh.softness.astype(np.float32)[:, None] * np.array([0.32, 0.14, 0.10], dtype=np.float32)
    lamp = np.maximum((facing[:, None] + wrap) / (1 + wrap), 0) * lit[:, None] * lighting.lamp.astype(np.float32)
    up = (1 - normals[:, 1:2]) / 2
    sky, ground = lighting.sky.astype(np.float32), lighting.ground.astype(np.float32)
    around = (up * sky + (1 - up) * ground) * openness ** (np.float32(1.3) - np.float32(0.5) * wrap)
    return _VertexLight((mesh.albedo.astype(np.float32) * (lamp + around)), lit)


def _openness(scene: EmbreeScene, normals: Floats32, origins: Floats32) -> Floats32:
    """(n,) share of each point's hemisphere that is free of nearby surface: creases are dark, knuckles are not."""
    x, y, z = normals.T
    # A tangent frame without branches (Duff et al. 2017): the sign keeps it away from its singularity.
    sign = np.where(z >= 0, np.float32(1), np.float32(-1))
    slope, mixed = -1 / (sign + z), -x * y / (sign + z)
    tangent = np.stack([1 + sign * x * x * slope, sign * mixed, -sign * x], axis=1)
    other = np.stack([mixed, sign + y * y * slope, -y], axis=1)
    local = _hemisphere()
    directions = (
        tangent[:, None] * local[:, :1] + other[:, None] * local[:, 1:2] + normals[:, None] * local[:, 2:]
    ).reshape(-1, 3)
    starts = np.repeat(origins, _OCCLUSION_RAYS, axis=0)
    distances = scene.run(starts, directions, query="DISTANCE").reshape(-1, _OCCLUSION_RAYS)
    return np.asarray(np.minimum(distances / np.float32(_OCCLUSION_REACH_M), 1).mean(axis=1), dtype=np.float32)


@lru_cache(maxsize=1)
def _hemisphere() -> Floats32:
    """(_OCCLUSION_RAYS, 3) unit vectors about +z, denser towards it by the cosine."""
    order = np.arange(_OCCLUSION_RAYS) + 0.5
    height = np.sqrt(1 - order / _OCCLUSION_RAYS)
    angle = np.pi * (1 + 5**0.5) * order
    ring = np.sqrt(1 - height**2)
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=1).astype(np.float32)


@lru_cache(maxsize=1)
def _grain() -> Floats32:
    """(cells, cells, cells) noise around 0, deviation 1, that tiles space: from freckles down to pores."""
    draw = np.random.default_rng(0)
    total = np.zeros((_GRAIN_CELLS,) * 3, dtype=np.float32)
    for coarse in (1, 2, 4, 8):
        octave = draw.standard_normal((_GRAIN_CELLS // coarse,) * 3, dtype=np.float32)
        total += octave.repeat(coarse, 0).repeat(coarse, 1).repeat(coarse, 2)
    return total / np.float32(2)


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
    levels = (window * 255).astype(np.uint8)  # bytes: a tenth of the time
    contrast = cv2.subtract(cv2.dilate(levels, _NEIGHBOURS), cv2.erode(levels, _NEIGHBOURS))
    return np.asarray(contrast.max(axis=2) > _EDGE * 255)


class _Surface:
    """A lit mesh that rays from the camera can be asked about."""

    def __init__(self, scene: EmbreeScene, mesh: Mesh, light: _VertexLight, lighting: Lighting) -> None:
        self._scene, self._faces = scene, mesh.faces.astype(np.int64)
        self._towards_lamp, self._lamp = lighting.towards_lamp.astype(np.float32), lighting.lamp.astype(np.float32)
        shine = (mesh.gloss * light.lamp_share)[:, None]
        self._per_vertex = np.concatenate(
            [light.diffuse, mesh.normals, shine, mesh.texture.columns()], axis=1, dtype=np.float32
        )

    def seen(self, directions: Floats32) -> Floats32:
        """(r, 4): the sRGB colour that each ray (r, 3) meets, and 1; zeros where it meets nothing."""
        found = self._scene.run(np.zeros_like(directions), directions, output=True)
        hit = np.flatnonzero(found["primID"] >= 0)
        corners = np.take(self._faces, found["primID"][hit], axis=0)
        u, v = found["u"][hit, None], found["v"][hit, None]
        mixed = np.take(self._per_vertex, corners[:, 0], axis=0)
        mixed *= 1 - u - v
        for corner, share in ((1, u), (2, v)):
            other = np.take(self._per_vertex, corners[:, corner], axis=0)
            other *= share
            mixed += other
        shine = _highlight(mixed[:, 3:6], directions[hit], self._towards_lamp) * mixed[:, 6]
        seen = np.zeros((len(directions), 4), dtype=np.float32)
        seen[hit, :3] = to_srgb(mixed[:, :3] * _fine_albedo(mixed[:, 7:])[:, None] + shine[:, None] * self._lamp)
        seen[hit, 3] = 1
        return seen


def _fine_albedo(texture: Floats32) -> Floats32:
    """(r,) what grain and creases, given as `Texture.columns` (r, 12), make of the albedo."""
    cell = (texture[:, :3] * np.float32(1 / _GRAIN_CELL_M)).astype(np.int32) & (_GRAIN_CELLS - 1)
    noise = np.take(_grain(), (cell[:, 0] * _GRAIN_CELLS + cell[:, 1]) * _GRAIN_CELLS + cell[:, 2])
    lines = np.square(texture[:, 4:8] * np.float32(1 / _LINE_M) + 0.4 * noise[:, None])
    creases = (texture[:, 8:12] / (1 + lines)).sum(axis=1)
    return np.asarray(np.clip(1 + texture[:, 3] * noise, 0.3, 1.7) * (1 - np.minimum(creases, 0.7)))


def _highlight(normals: Floats32, directions: Floats32, towards_lamp: Floats32) -> Floats32:
    """Blinn-Phong's lobe: a broad one, as skin's is."""
    half = towards_lamp - directions / np.sqrt(np.einsum("rk,rk->r", directions, directions))[:, None]
    squares = np.einsum("rk,rk->r", normals, normals) * np.einsum("rk,rk->r", half, half)
    cosine = np.einsum("rk,rk->r", normals, half) / np.sqrt(squares + 1e-9)
    return np.asarray(np.square(np.square(np.square(cosine.clip(0, 1) ** 3))), dtype=np.float32)
