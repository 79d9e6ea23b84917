"""What ingest must know of an encoded picture: its digest and its size, from its header.

A full decode of millions of pictures would cost more than all the rest of ingest; a picture whose header is whole and
whose body is not is found, and left out, when it is decoded for the teacher.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_MAX_SIDE_PX = 32766
"""OpenCV's warp takes pictures below 2^15 a side."""
MAX_PIXELS = 1 << 27
_MALFORMED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    KeyError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Picture:
    """An encoded picture and where its bytes are."""

    name: str
    """Tar member, or the npz's imgname."""
    path: str | None = None
    """Where it is a file of its own."""
    offset: int = -1
    length: int = 0
    sha256: str = ""
    width: int = 0
    height: int = 0
    problem: str | None = None
    """Why it cannot be used."""

    def columns(self) -> dict[str, str | int | None]:
        """The manifest's columns."""
        return {
            "image_name": self.name,
            "image_path": self.path,
            "image_offset": self.offset,
            "image_length": self.length,
            "image_sha256": self.sha256,
            "width": self.width,
            "height": self.height,
        }


def look_at(content: bytes, name: str, *, path: str | None = None, offset: int = -1) -> Picture:
    """The facts of one encoded picture. Orientation tags are ignored, as HaMeR does: labels are in stored pixels."""
    sha256 = hashlib.sha256(content).hexdigest()
    width, height, problem = _size(content)
    named = f"bad-picture: {name} {problem}" if problem else None
    return Picture(name, path, offset, len(content), sha256, width, height, named)


def _size(content: bytes) -> tuple[int, int, str | None]:
    if not content:
        return 0, 0, "is empty"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and odd tags; the size is checked below
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                width, height = image.size
    except _MALFORMED as error:
        return 0, 0, f"is no picture that can be read ({type(error).__name__})"
    if max(width, height) > _MAX_SIDE_PX or width * height > MAX_PIXELS:
        return width, height, f"is too large ({width} x {height})"
    return width, height, None


def decode(content: bytes) -> NDArray[np.uint8] | None:
    """RGB pixels (H,W,3) as stored, orientation tags ignored; None when the picture cannot be decoded to its end."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in `look_at`, which saw the size
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                return np.asarray(image.convert("RGB"))
    except _MALFORMED:
        return None


def decode_upright(content: bytes) -> NDArray[np.uint8] | None:
    """The same, turned as its orientation tag says: for photographs as cameras and telephones write them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except _MALFORMED:
        return None
