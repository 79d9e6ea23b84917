"""Procedural pictures to put behind hands: rooms, foliage, streets, studios, clothed people, things of skin's colour.

Nothing is photographed, so nothing is licensed. What matters is that a network cannot find the hand by its being the
only edge, the only texture or the only skin in the picture. Patches of a few related colours cover each other (dead
leaves: the model whose sizes and edges are a photograph's), and each has its own texture, pattern and shade.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]
"""(h, w, 3) sRGB in [0, 1]"""

_SKIN_LIKE = np.array(
    [[0.93, 0.78, 0.70], [0.80, 0.62, 0.50], [0.62, 0.44, 0.34], [0.36, 0.24, 0.19]], dtype=np.float32
)
_MOST_PATCHES = 250
"""A patch's number is a byte."""


@dataclass
class _Patches:
    """Which patch each pixel shows, and what the patches look like."""

    number: NDArray[np.uint8]
    """(h, w)"""
    colours: list[NDArray[np.float64]] = field(default_factory=list)
    """(3,) sRGB"""
    textures: list[tuple[float, ...]] = field(default_factory=list)
    """[shade across, shade down, coarse noise, fine noise, pattern strength, its cycles across, its cycles down]"""

    @property
    def full(self) -> bool:
        """Whether no further patch can be told apart."""
        return len(self.colours) >= _MOST_PATCHES

    def add(self, rng: np.random.Generator, colour: NDArray[np.float64]) -> int:
        """The number of a new patch of this colour, with a texture drawn for it."""
        noise = rng.gamma(1.1, 0.05, 2)
        pattern = rng.uniform(0.05, 0.35) if rng.random() < 0.09 else 0.0
        cycles = rng.uniform(4, 45) * np.array([np.cos(turn := rng.uniform(0, np.pi)), np.sin(turn)])
        self.colours.append(colour)
        self.textures.append((*rng.normal(0, 0.22, 2), *noise, pattern, *cycles))
        return len(self.colours) - 1


def draw_background(rng: np.random.Generator, width_px: int, height_px: int) -> Picture:
    """A random scene: its layout, clutter before it, often a person; light, distance blur."""
    palette = [_colour(rng) for _ in range(rng.integers(2, 6))]
    patches = _Patches(np.zeros((height_px, width_px), dtype=np.uint8))
    patches.add(rng, palette[0])
    kind = rng.choice(5, p=[0.32, 0.26, 0.2, 0.1, 0.12])
    if kind == 0:
        _room(rng, patches, palette)
    elif kind == 1:
        _leaves(rng, patches, palette, count=int(rng.integers(60, 200)))
    elif kind == 2:
        _outdoors(rng, patches, palette)
    elif kind == 3:
        patches.colours[0] = rng.uniform(0.0, 0.12) * np.ones(3)  # a studio: dark, with lamps in view
    if rng.random() < 0.35:
        _person(rng, patches)
    _leaves(rng, patches, palette, count=int(rng.integers(0, 25)))
    if rng.random() < 0.3:
        _skin_like_shape(rng, patches)
    picture = _painted(rng, patches)
    if kind == 3 or rng.random() < 0.06:
        _lamps(rng, picture)
    blur = rng.uniform(0.8, 5.0) if rng.random() < 0.5 else rng.uniform(0.45, 0.8)  # never a drawing's hard edges
    return np.clip(np.asarray(cv2.GaussianBlur(picture, (0, 0), blur), dtype=np.float32), 0, 1)


def _colour(rng: np.random.Generator) -> NDArray[np.float64]:
    """A colour, mostly a dull one, as surroundings are; warm ones are commoner than cold."""
    grey = rng.beta(1.2, 1.7)
    warmth = rng.normal(0.02, 0.05)
    tint = rng.normal(0, rng.choice([0.015, 0.05, 0.17], p=[0.45, 0.37, 0.18]), 3)
    return np.asarray(np.clip(grey + tint + [warmth, 0, -warmth], 0, 1))


def _related(rng: np.random.Generator, palette: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """One of the scene's colours, lighter or darker."""
    chosen = palette[rng.integers(len(palette))]
    return np.asarray(np.clip(chosen * rng.lognormal(0, 0.35) + rng.normal(0, 0.03, 3), 0, 1))


def _painted(rng: np.random.Generator, patches: _Patches) -> Picture:
    """The patches with their shades, textures and patterns."""
    height, width = patches.number.shape
    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    look = np.array(patches.textures, dtype=np.float32)
    shade_x, shade_y, coarse, fine, strength, across, down = (column[patches.number] for column in look.T)
    light = 0.9 + shade_x * x + shade_y * y
    light += coarse * _noise(rng, width, height, octaves=(4, 9, 21))
    light += fine * _noise(rng, width, height, octaves=(50, 110))
    if look[:, 4].any():
        light += strength * np.sign(np.sin(np.pi * (across * x + down * y))) * (strength > 0)
    colours = np.array(patches.colours, dtype=np.float32)
    return np.asarray(colours[patches.number] * np.maximum(light, 0.05)[..., None])


def _noise(rng: np.random.Generator, width: int, height: int, octaves: tuple[int, ...]) -> NDArray[np.float32]:
    """(h, w) smooth noise around 0, deviation about 1; each octave is a coarse grid of that many cells, enlarged."""
    total = np.zeros((height, width), dtype=np.float32)
    for cells in octaves:
        grid = rng.random((cells, cells), dtype=np.float32) - np.float32(0.5)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)
    return total * np.float32(4.5 / len(octaves) ** 0.5)


def _room(rng: np.random.Generator, patches: _Patches, palette: list[NDArray[np.float64]]) -> None:
    """Planes that meet in straight edges: walls, floor, window, shelves, a desk."""
    height, width = patches.number.shape
    for _ in range(rng.integers(3, 16)):
        corner = rng.uniform(-0.3, 1.0, 2) * [width, height]
        size = rng.uniform(0.08, 1.2, 2) ** 1.3 * [width, height]
        skew = rng.normal(0, 0.06, (4, 2)) * [width, height]
        square = corner + np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size + skew
        _fill(patches, square, patches.add(rng, _related(rng, palette)))


def _outdoors(rng: np.random.Generator, patches: _Patches, palette: list[NDArray[np.float64]]) -> None:
    """A light sky, a horizon, ground; leaves about the horizon."""
    height, width = patches.number.shape
    patches.colours[0] = np.clip(rng.normal([0.75, 0.82, 0.92], 0.12), 0, 1)
    line = rng.uniform(-0.1, 0.8) * height + rng.normal(0, 0.05, 9).cumsum() * height
    ground = np.stack([np.linspace(0, width, 9), line], axis=1)
    outline = np.concatenate([ground, [[width, height], [0, height]]])
    _fill(patches, outline, patches.add(rng, _related(rng, palette)))
    if rng.random() < 0.7:
        green = np.clip(rng.normal([0.3, 0.38, 0.2], 0.1), 0, 1)
        _leaves(rng, patches, [green, *palette[:1]], int(rng.integers(30, 120)), around=float(line.mean() / height))


def _leaves(
    rng: np.random.Generator,
    patches: _Patches,
    palette: list[NDArray[np.float64]],
    count: int,
    around: float | None = None,
) -> None:
    """Patches of all sizes, few large and many small, one before the other. `around`: at this height, of 1."""
    height, width = patches.number.shape
    for _ in range(count):
        if patches.full:
            return
        centre = rng.random(2) * [width, height]
        if around is not None:
            centre[1] = (around + rng.normal(0, 0.12)) * height
        reach = width * min(0.02 * (1 - rng.random()) ** -0.8, 0.4)
        shape = rng.choice(4, p=[0.3, 0.3, 0.3, 0.1])
        if shape < 2:  # a blob
            angles = np.linspace(0, 2 * np.pi, 11)[:-1]
            radii = reach * rng.uniform(0.5, 1.3, 10)
            outline = centre + np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1) * rng.uniform(0.4, 1)
        else:  # a box, or something long
            long = np.array([reach, reach * rng.uniform(0.3, 1)] if shape == 2 else [4 * reach, 0.3 * reach + 1])
            outline = _turned_box(centre, 2 * long, rng.choice([0, np.pi / 2]) + rng.normal(0, 0.4))
        _fill(patches, outline, patches.add(rng, _related(rng, palette)))


def _person(rng: np.random.Generator, patches: _Patches) -> None:
    """A clothed trunk with a neck and a head, and an arm: what is mostly behind a hand."""
    height, width = patches.number.shape
    scale, middle = rng.uniform(0.35, 1.0) * width, rng.uniform(0, 1) * width
    top = rng.uniform(-0.2, 0.8) * height
    skin = np.clip(_SKIN_LIKE[rng.integers(4)] * rng.uniform(0.6, 1.1), 0, 1)
    trunk = np.array([[-0.5, 0.1], [-0.15, 0], [0.15, 0], [0.5, 0.1], [0.6, 2.5], [-0.6, 2.5]])
    head = patches.add(rng, skin)
    at = (int(middle), int(top - 0.22 * scale))
    cv2.ellipse(patches.number, at, (int(0.2 * scale), int(0.28 * scale)), 0, 0, 360, head, -1)
    _fill(patches, np.array([[-0.1, -0.2], [0.1, -0.2], [0.1, 0.1], [-0.1, 0.1]]) * scale + [middle, top], head)
    hair = patches.add(rng, rng.uniform(0.03, 0.4) * np.array([1.0, 0.8, 0.6]))
    cv2.ellipse(patches.number, at, (int(0.21 * scale), int(0.3 * scale)), 0, 190, 350, hair, -1)
    _fill(patches, trunk * scale + [middle, top], patches.add(rng, _colour(rng)))
    arm = _turned_box(np.array([middle, top + 0.5 * scale]), np.array([1.2, 0.2]) * scale, rng.uniform(0, np.pi))
    _fill(patches, arm, patches.add(rng, skin if rng.random() < 0.5 else _colour(rng)))


def _skin_like_shape(rng: np.random.Generator, patches: _Patches) -> None:
    """A rod or disc of skin's colour: another limb, a face, wood."""
    height, width = patches.number.shape
    number = patches.add(rng, np.clip(_SKIN_LIKE[rng.integers(4)] * rng.uniform(0.6, 1.1), 0, 1))
    centre = rng.uniform(0, 1, 2) * [width, height]
    if rng.random() < 0.6:
        box = _turned_box(centre, np.array([width, rng.uniform(0.06, 0.22) * width]), rng.uniform(0, np.pi))
        _fill(patches, box, number)
    else:
        axes = (int(rng.uniform(0.08, 0.25) * width), int(rng.uniform(0.1, 0.32) * width))
        at = (int(centre[0]), int(centre[1]))
        cv2.ellipse(patches.number, at, axes, rng.uniform(0, 360), 0, 360, number, -1)


def _lamps(rng: np.random.Generator, picture: Picture) -> None:
    """Small bright lights with a glow."""
    height, width = picture.shape[:2]
    glow = np.zeros((height, width), dtype=np.float32)
    for _ in range(rng.integers(1, 10)):
        at = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.circle(glow, at, int(rng.integers(1, 6)), 1.5, -1)
    picture += cv2.GaussianBlur(glow, (0, 0), rng.uniform(0.8, 3))[..., None]


def _turned_box(centre: NDArray[np.float64], size: NDArray[np.float64], turn: float) -> NDArray[np.float64]:
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) * size
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return np.asarray(centre + corners @ rotation)


def _fill(patches: _Patches, polygon: NDArray[np.float64], number: int) -> None:
    cv2.fillPoly(patches.number, [np.rint(polygon).astype(np.int32)], number)
