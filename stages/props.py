"""Things in a picture that are not the hand: what it holds, what stands before it, a second hand's place.

Metres. Nothing here passes through the hand: a held thing is as large as the space in the hand, and what stands beside
a hand stands on the other side of a plane.
"""

from __future__ import annotations

import numpy as np

from stages.rendering import Mesh, Texture
from stages.skinning import Floats

_AROUND, _ALONG = 20, 9
"""Facets of a solid: enough for light and shadow, which are known at its vertices only."""
_ROUNDED = 0.35
"""How round the corners of a box are: the power of the superellipse that its section is."""
_HELD_M = (0.004, 0.032)
"""Half the thickness of what a hand holds."""


def solid(
    rng: np.random.Generator, centre: Floats, axes: Floats, half_m: tuple[float, float, float], kind: str
) -> Mesh:
    """A rod, a ball, a box or a cone about `centre` with its length along the first of `axes` (3, 3, rows)."""
    turn = np.linspace(0, 2 * np.pi, _AROUND, endpoint=False)
    along = np.linspace(-1, 1, _ALONG)
    section = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if kind == "box":
        section = np.sign(section) * np.abs(section) ** _ROUNDED
    radius = {
        "ball": np.sqrt(np.clip(1 - along**2, 0, 1)),
        "cone": 0.55 + 0.45 * along,
        "rod": np.ones(_ALONG),
        "box": np.ones(_ALONG),
    }[kind]
    if kind != "ball":  # closed ends
        radius, along = np.pad(radius, 1), np.concatenate([[-1.0], along, [1.0]])
    own = np.zeros((len(along), _AROUND, 3))
    own[..., 0] = along[:, None]
    own[..., 1:] = radius[:, None, None] * section
    rings = own * half_m
    points = rings.reshape(-1, 3) @ axes + centre
    outwards = (own * [0.2 if kind != "ball" else 1.0, 1, 1]).reshape(-1, 3) / half_m
    normals = outwards @ axes
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    size = len(points)
    grain = Texture.plain(rings.reshape(-1, 3) + 1.0, float(rng.gamma(1.2, 0.05)))
    gloss = np.full(size, rng.choice([0.01, 0.1, 0.4]))
    return Mesh(points, normals, _ring_faces(len(along)), _colours(rng, along), gloss, np.zeros(size), grain)


def held_thing(rng: np.random.Generator, vertices: Floats, joints: Floats, palm_normal: Floats) -> Mesh | None:
    """A rod, box or ball that fills the space between palm and fingers of a posed hand; None where there is none.

    `vertices` (V, 3), `joints` (21, 3) in OpenPose's order, `palm_normal` (3,) unit, out of the palm: all in one frame.
    """
    knuckles = joints[[5, 9, 13, 17]]
    across = knuckles[0] - knuckles[-1]
    across /= np.linalg.norm(across)
    out = palm_normal - (palm_normal @ across) * across
    out /= np.linalg.norm(out)
    forward = np.cross(out, across)
    kind = str(rng.choice(["rod", "rod", "box", "ball"]))
    tilt = rng.normal(0, 0.25)
    axis = np.cos(tilt) * across + np.sin(tilt) * forward
    frame = np.stack([axis, np.cross(out, axis), out])
    middle = 0.75 * knuckles.mean(axis=0) + 0.25 * joints[0]
    away, ahead = (grid.reshape(-1, 1) for grid in np.mgrid[0.012:0.07:8j, -0.03:0.04:6j])
    centres = middle + away * out + ahead * forward
    offsets = vertices[None] - centres[:, None]
    if kind != "ball":
        offsets = offsets - (offsets @ axis)[..., None] * axis
    room = np.linalg.norm(offsets, axis=2).min(axis=1)
    best = int(np.argmax(np.minimum(room, _HELD_M[1]) - 0.3 * away[:, 0]))
    radius = min(float(room[best]) * 0.97, _HELD_M[1])
    if radius < _HELD_M[0]:
        return None
    length = radius if kind == "ball" else float(rng.uniform(0.04, 0.12))
    thick = radius / np.sqrt(2) if kind == "box" else radius  # its corners touch, too
    slide = (0.0 if kind == "ball" else rng.uniform(-0.5, 0.5)) * length
    return solid(rng, centres[best] + slide * axis, frame, (length, thick, thick), kind)


def thing_before(rng: np.random.Generator, joints: Floats, nearest_m: float) -> Mesh:
    """Something between camera and hand that hides a part of it.

    `joints`: (21, 3) in the camera's frame; the hand's nearest point is at depth `nearest_m`.
    """
    depth = nearest_m * rng.uniform(0.6, 0.9)
    flat = joints[:, :2] / joints[:, 2:] * depth
    reach = float(np.ptp(flat, axis=0).max())
    at, turn = flat[rng.integers(21)], rng.uniform(0, np.pi)
    axis, beside = np.array([np.cos(turn), np.sin(turn), 0.0]), np.array([-np.sin(turn), np.cos(turn), 0.0])
    kind = str(rng.choice(["rod", "box", "ball", "cone"]))
    width = reach * (rng.uniform(0.03, 0.1) if kind == "rod" else rng.uniform(0.08, 0.25))
    length = reach * rng.uniform(0.8, 2.0) if kind in ("rod", "cone") else width * rng.uniform(1, 1.5)
    # No more than a good third of the hand's joints behind it: it is moved aside until that is so.
    for _ in range(8):
        apart = flat - at
        hidden = (np.abs(apart @ axis[:2]) < length) & (np.abs(apart @ beside[:2]) < width)
        if hidden.sum() <= 8:
            break
        at = at + beside[:2] * width * rng.choice([-1, 1])
    else:
        width *= 0.3
    thick = min(width, 0.4 * (nearest_m - depth) + 1e-3)
    frame = np.stack([axis, beside, [0.0, 0.0, 1.0]])
    return solid(rng, np.array([*at, depth]), frame, (length, width, thick), kind)


def room_beside(first: Floats, second: Floats, towards: Floats) -> float:
    """How far `second` (n, 3) must move along the unit vector `towards` (3,) to stand wholly beyond `first` (m, 3)."""
    return float((first @ towards).max() - (second @ towards).min())


def _ring_faces(rings: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    number = np.arange(rings * _AROUND).reshape(rings, _AROUND)
    beside = np.roll(number, -1, axis=1)
    faces = [
        np.stack([number[:-1], number[1:], beside[:-1]], axis=-1).reshape(-1, 3),
        np.stack([beside[:-1], number[1:], beside[1:]], axis=-1).reshape(-1, 3),
    ]
    return np.concatenate(faces).astype(np.int32)


def _colours(rng: np.random.Generator, along: Floats) -> Floats:
    """(rings * around, 3) one linear colour, often with bands of a second."""
    first, second = (np.clip(rng.beta(0.8, 1.6) * 0.8 + rng.normal(0, 0.12, 3), 0.01, 0.9) for _ in range(2))
    bands = (np.arange(len(along)) // int(rng.integers(1, 5)) % 2) * (rng.random() < 0.4)
    return np.repeat(np.where(bands[:, None] == 1, second, first), _AROUND, axis=0)
