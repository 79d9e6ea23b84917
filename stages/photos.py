"""The photographs and videos that `predict` is given: found in folders, read strictly, videos frame by frame."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from stages.pictures import MAX_PIXELS, decode_upright, look_at
from storage.errors import InputError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
RESULT_SUFFIX = ".hands"
"""Of the folders that `predict` writes: what is in them is no input."""
LARGEST_FILE = 1 << 29
"""Bytes of a picture's file: it is read whole."""


@dataclass(frozen=True)
class Photo:
    """One input: a picture or a video."""

    path: Path
    name: str
    """Relative to the folder that was named; of a file that was named itself, its name."""

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEOS


def find_photos(paths: Sequence[Path]) -> list[Photo]:
    """The files among `paths`, and all pictures and videos in the folders among them, in the order of their names.

    Raises InputError for a path that is not there, a folder without any, and two that would be written to one place.
    """
    found: list[Photo] = []
    for path in paths:
        if path.is_dir():
            inside = _inside(path)
            if not inside:
                wanted = ", ".join(suffix[1:] for suffix in (*PICTURES, *VIDEOS))
                raise InputError(f"predict: {path} holds no picture or video (a file of type {wanted})")
            found += inside
        elif path.is_file():
            found.append(Photo(path, path.name))
        else:
            raise InputError(f"predict: {path} is not there; want pictures, videos or folders of them")
    seen: dict[str, Path] = {}
    for photo in found:
        other = seen.setdefault(photo.name, photo.path)
        if other != photo.path:
            raise InputError(
                f"predict: {other} and {photo.path} would be written to one place ({photo.name}); "
                "name their common folder, or predict them one after the other with an --out of their own"
            )
    return list({photo.path: photo for photo in found}.values())


def _inside(folder: Path) -> list[Photo]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (*PICTURES, *VIDEOS) and path.is_file())
    relative = [(path, path.relative_to(folder)) for path in files]
    return [
        Photo(path, name.as_posix())
        for path, name in relative
        if not any(part.startswith(".") or part.endswith(RESULT_SUFFIX) for part in name.parts)
    ]


def read_photo(path: Path) -> NDArray[np.uint8]:
    """The RGB pixels (H, W, 3) of a picture, upright as its orientation tag says; InputError when there are none."""
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise InputError(f"{path}: a file of {size:,} bytes; want a picture of {LARGEST_FILE:,} at most")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    facts = look_at(content, path.name)
    if facts.problem is not None:
        raise InputError(f"{path}: {facts.problem.removeprefix('bad-picture: ')}; want a whole JPEG, PNG, WebP or BMP")
    picture = decode_upright(content)
    if picture is None:
        raise InputError(f"{path}: cannot be decoded to its end; want a whole JPEG, PNG, WebP or BMP")
    return picture


@dataclass(frozen=True)
class Video:
    """A video's facts, from its header."""

    path: Path
    width: int
    height: int
    frames_per_second: float
    frames: int
    """As the header has it: often, not always, as many as there are."""


def look_at_video(path: Path) -> Video:
    """InputError when OpenCV cannot read it, or its frames are too large."""
    capture = _opened(path)
    try:
        sizes = [capture.get(what) for what in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
        width, height = (int(size) for size in sizes)
        rate, frames = capture.get(cv2.CAP_PROP_FPS), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    finally:
        capture.release()
    if not 0 < width * height <= MAX_PIXELS:
        raise InputError(f"{path}: frames of {width} x {height} px cannot be read")
    return Video(path, width, height, rate if 0 < rate <= 1000 else 25.0, max(frames, 0))


def video_frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Each frame as RGB (H, W, 3), one in memory at a time."""
    capture = _opened(path)
    try:
        while True:
            there, frame = capture.read()
            if not there:
                return
            yield np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)
    finally:
        capture.release()


def _opened(path: Path) -> cv2.VideoCapture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        capture = cv2.VideoCapture(str(path.absolute()), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        capture.release()
        raise InputError(f"{path}: no video that can be read; want one of {', '.join(suffix[1:] for suffix in VIDEOS)}")
    return capture
