"""Procedural pictures to put behind hands: walls, clutter, foliage-like texture, and things of skin's colour.

Nothing is photographed, so nothing is licensed. What matters is that a network cannot find the hand by its being the
only edge, the only texture or the only skin in the picture.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]
"""(h, w, 3) sRGB in [0, 1]"""

_SKIN_LIKE = np.array(
    [[0.93, 0.78, 0.70], [0.80, 0.62, 0.50], [0.62, 0.44, 0.34], [0.36, 0.24, 0.19]], dtype=np.float32
)


def draw_background(rng: np.random.Generator, width_px: int, height_px: int) -> Picture:
    """A random scene: a base, then clutter, then (often) distance blur."""
    bases: tuple[Callable[[np.random.Generator, int, int], Picture], ...] = (_wall, _room, _texture, _plain)
    picture = bases[rng.choice(4, p=[0.2, 0.35, 0.3, 0.15])](rng, width_px, height_px)
    for _ in range(rng.integers(0, 14)):
        _object(rng, picture)
    if rng.random() < 0.35:
        _skin_like_shape(rng, picture)
    if rng.random() < 0.6:
        picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.5, 4.0)), dtype=np.float32)
    return np.clip(picture, 0, 1)


def _colour(rng: np.random.Generator) -> NDArray[np.float32]:
    """A colour, mostly a dull one, as surroundings are."""
    grey = rng.beta(1.4, 1.4)
    return np.clip(grey + rng.normal(0, rng.choice([0.02, 0.07, 0.2], p=[0.4, 0.4, 0.2]), 3), 0, 1).astype(np.float32)


def _plain(rng: np.random.Generator, width: int, height: int) -> Picture:
    return np.tile(_colour(rng), (height, width, 1))


def _wall(rng: np.random.Generator, width: int, height: int) -> Picture:
    """A wall under a lamp: a gradient with faint stains."""
    x, y = np.meshgrid(np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32))
    slope = rng.normal(0, 0.18, 2)
    shade = (1 + slope[0] * x + slope[1] * y)[..., None]
    stains = 1 + 0.12 * (_noise(rng, width, height, octaves=(3, 6, 12)) - 0.5)
    return np.asarray(_colour(rng) * shade * stains, dtype=np.float32)


def _room(rng: np.random.Generator, width: int, height: int) -> Picture:
    """Planes that meet in straight edges: walls, floor, window, shelf."""
    picture = _wall(rng, width, height)
    for _ in range(rng.integers(2, 7)):
        corner = rng.uniform(-0.2, 1.0, 2) * [width, height]
        size = rng.uniform(0.2, 1.2, 2) * [width, height]
        skew = rng.normal(0, 0.08, (4, 2)) * [width, height]
        square = corner + np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size + skew
        _fill(picture, square, _colour(rng))
        if rng.random() < 0.5:
            cv2.polylines(picture, [_fixed(square)], True, _colour(rng).tolist(), 1, cv2.LINE_AA, 4)
    return picture


def _texture(rng: np.random.Generator, width: int, height: int) -> Picture:
    """Leaves, grass, gravel, carpet, from afar: noise that blends three colours."""
    octaves = [(4, 9, 20, 45), (8, 20, 50, 110), (3, 6)][rng.integers(3)]
    share = _noise(rng, width, height, octaves)
    colours = np.stack([_colour(rng) for _ in range(3)])
    position = np.clip((share[..., 0] - 0.5) * rng.uniform(1.5, 4) + 0.5, 0, 1)
    mixed = [np.interp(position, [0, 0.5, 1], colours[:, channel]) for channel in range(3)]
    return np.stack(mixed, axis=-1).astype(np.float32)


def _noise(rng: np.random.Generator, width: int, height: int, octaves: tuple[int, ...]) -> Picture:
    """(h, w, 1) smooth noise around 0.5; each octave is a coarse grid of that many cells, enlarged."""
    total = np.zeros((height, width), dtype=np.float32)
    weights = 0.0
    for cells in octaves:
        grid = rng.random((cells, cells), dtype=np.float32)
        weight = cells**-0.5
        total += weight * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        weights += weight
    return (total / weights)[..., None]


def _object(rng: np.random.Generator, picture: Picture) -> None:
    """One thing: a box, a disc, a rod or a stripe pattern."""
    height, width = picture.shape[:2]
    centre = rng.uniform(0, 1, 2) * [width, height]
    size = rng.gamma(2.0, 0.07, 2) * width + 2
    turn = rng.uniform(0, np.pi)
    kind = rng.integers(4)
    if kind == 0:
        _fill(picture, _turned_box(centre, size, turn), _colour(rng))
    elif kind == 1:
        axes = (max(1, int(size[0])), max(1, int(size[1])))
        colour = _colour(rng).tolist()
        at = (int(centre[0]), int(centre[1]))
        cv2.ellipse(picture, at, axes, np.degrees(turn), 0, 360, colour, -1, cv2.LINE_AA)
    elif kind == 2:
        _fill(picture, _turned_box(centre, np.array([width, rng.uniform(1, 9)]), turn), _colour(rng))
    else:
        dark, light = _colour(rng), _colour(rng)
        for stripe in range(7):
            offset = (stripe - 3) * size[1] / 3.5 * np.array([-np.sin(turn), np.cos(turn)])
            box = _turned_box(centre + offset, np.array([size[0], size[1] / 3.5]), turn)
            _fill(picture, box, dark if stripe % 2 else light)


def _skin_like_shape(rng: np.random.Generator, picture: Picture) -> None:
    """A rod or disc of skin's colour with a soft shade: another limb, a face."""
    height, width = picture.shape[:2]
    tone = _SKIN_LIKE[rng.integers(len(_SKIN_LIKE))] * rng.uniform(0.7, 1.1)
    mask = np.zeros((height, width), dtype=np.float32)
    centre = rng.uniform(0, 1, 2) * [width, height]
    if rng.random() < 0.5:
        box = _turned_box(centre, np.array([width, rng.uniform(0.08, 0.22) * width]), rng.uniform(0, np.pi))
        cv2.fillConvexPoly(mask, _fixed(box), 1.0, cv2.LINE_AA, 4)
    else:
        axes = (int(rng.uniform(0.12, 0.25) * width), int(rng.uniform(0.15, 0.32) * width))
        at = (int(centre[0]), int(centre[1]))
        cv2.ellipse(mask, at, axes, rng.uniform(0, 360), 0, 360, 1.0, -1, cv2.LINE_AA)
    shade = 0.6 + 0.8 * _noise(rng, width, height, octaves=(3, 5))
    picture += mask[..., None] * (tone * shade - picture)


def _turned_box(centre: NDArray[np.float64], size: NDArray[np.float64], turn: float) -> NDArray[np.float64]:
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) * size
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return np.asarray(centre + corners @ rotation)


def _fill(picture: Picture, polygon: NDArray[np.float64], colour: NDArray[np.float32]) -> None:
    cv2.fillPoly(picture, [_fixed(polygon)], colour.tolist(), cv2.LINE_AA, 4)


def _fixed(points: NDArray[np.float64]) -> NDArray[np.int32]:
    """OpenCV's fixed-point coordinates, with 4 fractional bits (the `shift` of its drawing calls)."""
    return np.rint(points * 16).astype(np.int32)
