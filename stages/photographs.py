"""What a camera does to a scene: focus, shake, few pixels, exposure, white balance, noise, greyness, JPEG."""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image

from stages.rendering import Floats32, Layers


def photograph(rng: np.random.Generator, layers: Layers, background: Floats32, shade: float) -> Floats32:
    """sRGB (h, w, 3) in [0, 1]: the layers before a background whose lamp-lit share of light is `shade`, through an
    imperfect camera."""
    hand, coverage = layers.colour, layers.coverage
    behind = background * (1 - np.float32(shade) * (1 - layers.lamp_on_wall))
    focus = rng.choice([0.0, 0.6, 1.0, 1.8], p=[0.5, 0.27, 0.17, 0.06])
    if focus > 0:
        soft = cv2.GaussianBlur(np.dstack([hand, coverage]), (0, 0), float(focus)).astype(np.float32)
        hand, coverage = soft[..., :3], soft[..., 3:]
    picture = hand + (1 - coverage) * behind
    if rng.random() < 0.15:
        picture = _shaken(rng, picture)
    if rng.random() < 0.15:
        picture = _few_pixels(rng, picture)
    picture = _developed(rng, picture)
    return np.asarray(np.clip(_noisy(rng, picture), 0, 1), dtype=np.float32)


def jpeg_bytes(rng: np.random.Generator, picture: Floats32) -> bytes:
    """The picture as a camera, or a web site after it, keeps it."""
    stored = io.BytesIO()
    quality = int(rng.integers(35, 70)) if rng.random() < 0.2 else int(rng.integers(70, 97))
    Image.fromarray((picture * 255 + 0.5).astype(np.uint8)).save(stored, format="JPEG", quality=quality)
    return stored.getvalue()


def _developed(rng: np.random.Generator, picture: Floats32) -> Floats32:
    """Exposure, contrast, white balance, saturation; one in twelve without colour."""
    cast = (1 + rng.normal(0, rng.choice([0.03, 0.12], p=[0.75, 0.25]), 3)).astype(np.float32)
    contrast, exposure = rng.uniform(0.8, 1.25), rng.lognormal(0, 0.16)
    grey = picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    saturation = 0.0 if rng.random() < 0.08 else rng.uniform(0.75, 1.5)
    picture = grey[..., None] + np.float32(saturation) * (picture - grey[..., None])
    return np.asarray(
        (picture - np.float32(0.45)) * np.float32(contrast * exposure) * cast + np.float32(0.45 * exposure)
    )


def _noisy(rng: np.random.Generator, picture: Floats32) -> Floats32:
    """Noise of a sensor: of brightness in single pixels, of colour in larger specks."""
    height, width = picture.shape[:2]
    strength = np.float32(rng.gamma(1.5, 0.009))
    fine = rng.standard_normal((height, width, 1), dtype=np.float32)
    specks = rng.standard_normal((height // 2, width // 2, 3), dtype=np.float32)
    picture = picture + strength * fine
    return picture + np.float32(0.6) * strength * np.asarray(cv2.resize(specks, (width, height)), dtype=np.float32)


def _shaken(rng: np.random.Generator, picture: Floats32) -> Floats32:
    """Motion blur along a random line of 3 to 11 pixels."""
    length = int(rng.integers(3, 12))
    kernel = np.zeros((length, length), dtype=np.float32)
    slope = rng.uniform(-1, 1)
    columns = np.arange(length)
    rows = np.rint((length - 1) / 2 + slope * (columns - (length - 1) / 2)).astype(int)
    kernel[rows, columns] = 1 / length
    return np.asarray(cv2.filter2D(picture, -1, kernel if rng.random() < 0.5 else kernel.T), dtype=np.float32)


def _few_pixels(rng: np.random.Generator, picture: Floats32) -> Floats32:
    """As if cut out of a larger picture of few pixels: down by 1.5 to 5, and up again."""
    height, width = picture.shape[:2]
    factor = rng.uniform(1.5, 5)
    small = cv2.resize(picture, (int(width / factor), int(height / factor)), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), dtype=np.float32)
