"""The grids that features are stored on, and how pictures become bytes and come back; tokens: storage/codecs.py.

Shapes: B views, C channels, H x W the teacher's token grid (16x12), h x w the stored grid. Plain elementwise numpy
throughout: no matrix product, so the same input gives the same bytes on any processor and thread count.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from storage.config import FeatureGrid
from storage.errors import DamageError

Floats = NDArray[np.float32]

PICTURE_SIZE_PX = 256
"""Side of the square picture that teacher and students see (HaMeR MODEL.IMAGE_SIZE)."""

JPEG_SUBSAMPLING = "420"
"""Colour at half resolution, like the photographs in the source data sets themselves."""

PAPER_SIZE = 8
"""Fast-HaMeR resizes the teacher's map to its students' 8x8."""


def grid_shape(grid: FeatureGrid, teacher_shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns stored for a teacher's map of `teacher_shape`."""
    if grid == "full":
        return teacher_shape
    if grid == "8x8-paper":
        return PAPER_SIZE, PAPER_SIZE
    return teacher_shape[0] // 2, teacher_shape[1] // 2


def to_grid(features_BHWC: Floats, grid: FeatureGrid) -> Floats:
    """The teacher's map on the stored grid: (B,h,w,C) float32. Channels last, so that all sums run along memory.

    full: unchanged. 8x8-paper: bilinear without antialias, as torch's `interpolate(scale_factor=(8/H, 8/W),
    align_corners=False)` does it in Fast-HaMeR. 8x6-geometric: means of 2x2 tokens, which cover the same part of the
    picture as the inner six columns of a student's 8x8 map.
    """
    if grid == "full":
        return features_BHWC
    if grid == "8x8-paper":
        return _resize(_resize(features_BHWC, 1, PAPER_SIZE), 2, PAPER_SIZE)
    rows = features_BHWC[:, 0::2] + features_BHWC[:, 1::2]
    means: Floats = rows[:, :, 0::2] + rows[:, :, 1::2]
    means *= np.float32(0.25)
    return means


def _resize(values: Floats, axis: int, size: int) -> Floats:
    low, high, share = bilinear_taps(values.shape[axis], size)
    along_axis = [1] * values.ndim
    along_axis[axis] = size
    share = share.reshape(along_axis)
    resized: Floats = np.take(values, low, axis)
    resized *= np.float32(1) - share
    above = np.take(values, high, axis)
    above *= share
    resized += above
    return resized


def bilinear_taps(length: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Which two neighbours each of `size` outputs lies between, and the share of the second.

    Half-pixel centres, edges clamped.
    """
    source = np.maximum((np.arange(size) + 0.5) * (length / size) - 0.5, 0.0)
    low = np.minimum(source.astype(np.int64), length - 1)
    return low, np.minimum(low + 1, length - 1), (source - low).astype(np.float32)


def encode_picture(picture: NDArray[np.uint8], codec: str, quality: int) -> bytes:
    """A picture (256,256,3) RGB as a JPEG (baseline, 4:2:0) or PNG file."""
    if codec == "jpeg":
        return bytes(
            simplejpeg.encode_jpeg(
                np.ascontiguousarray(picture),
                quality=quality,
                colorspace="RGB",
                colorsubsampling=JPEG_SUBSAMPLING,
                fastdct=False,
            )
        )
    assert codec == "png", codec
    buffer = io.BytesIO()
    Image.fromarray(picture, "RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def decode_picture(data: bytes) -> NDArray[np.uint8]:
    """The (256,256,3) uint8 RGB pixels of a stored picture; DamageError when the bytes are no such picture."""
    wanted = (PICTURE_SIZE_PX, PICTURE_SIZE_PX)
    try:
        if data[:2] == b"\xff\xd8":
            found = simplejpeg.decode_jpeg_header(data)[:2]
            image = None
        else:
            image = Image.open(io.BytesIO(data), formats=["PNG"])
            found = image.size
        if found != wanted:  # before it is decoded: a few bytes may stand for gigabytes of pixels
            raise DamageError(f"a stored picture has {found} pixels, not {wanted}; run `handstill verify`")
        if image is not None:
            return np.asarray(image.convert("RGB"))
        picture: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False)
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DamageError(f"a stored picture cannot be decoded ({error}); run `handstill verify`") from error
    return picture
