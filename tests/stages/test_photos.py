from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from stages.photos import find_photos, look_at_video, read_photo, video_frames
from storage.errors import InputError


def write_picture(path: Path, size: tuple[int, int] = (20, 10), orientation: int | None = None) -> Path:
    """Red on its left third, black elsewhere, as stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 3, 0] = 255
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def write_video(path: Path, frames: int = 3, size: tuple[int, int] = (64, 48)) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), 10.0, size)
    for number in range(frames):
        writer.write(np.full((size[1], size[0], 3), 60 * number, np.uint8))
    writer.release()
    return path


def test_files_and_folders_in_order(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpg", "b/.hidden/3.jpg", "b/1.jpg.hands/overlay.jpg", "a.jpeg"):
        write_picture(tmp_path / name)
    (tmp_path / "b/clip.mp4").write_bytes(b"looked at later")
    (tmp_path / "b/notes.txt").write_text("no picture")
    found = find_photos([tmp_path / "a.jpeg", tmp_path / "b", tmp_path / "a.jpeg"])
    assert [photo.name for photo in found] == ["a.jpeg", "1.jpg", "2.PNG", "clip.mp4"]
    assert [photo.is_video for photo in found] == [False, False, False, True]
    assert [photo.name for photo in find_photos([tmp_path])] == ["a.jpeg", "b/1.jpg", "b/2.PNG", "b/clip.mp4"]


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    write_picture(tmp_path / "one/x.jpg")
    write_picture(tmp_path / "two/x.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no picture or video"):
        find_photos([tmp_path / "empty"])
    with pytest.raises(InputError, match=r"nowhere\.jpg is not there"):
        find_photos([tmp_path / "one", tmp_path / "nowhere.jpg"])
    with pytest.raises(InputError, match=r"to one place \(x.jpg\)"):
        find_photos([tmp_path / "one", tmp_path / "two/x.jpg"])


@pytest.mark.parametrize(("orientation", "red"), [(None, "left"), (6, "top"), (8, "bottom"), (3, "right")])
def test_a_photo_is_upright(tmp_path: Path, orientation: int | None, red: str) -> None:
    """As a viewer shows it: telephones store pictures lying on their side, with a tag that says so."""
    pixels = read_photo(write_picture(tmp_path / "photo.png", (30, 12), orientation))
    assert pixels.shape == ((30, 12, 3) if red in ("top", "bottom") else (12, 30, 3))
    sides = {"left": pixels[:, 0], "right": pixels[:, -1], "top": pixels[0], "bottom": pixels[-1]}
    assert [name for name, pixel in sides.items() if (pixel == [255, 0, 0]).all()] == [red]


def test_pictures_of_other_kinds_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (9, 7)).save(path)
        assert read_photo(path).shape == (7, 9, 3), mode


def test_what_is_no_picture_is_told(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)).save(whole, "PNG")
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + whole.getvalue()[24:29]
    bomb = whole.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole.getvalue()[33:]
    bad = {
        "empty.jpg": (b"", "is empty"),
        "text.jpg": (b"hello", "no picture that can be read"),
        "cut.png": (whole.getvalue()[:3000], "cannot be decoded to its end"),
        "bomb.png": (bomb, r"too large \(30000 x 30000\)|DecompressionBomb"),
        "vector.jpg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no picture"),
    }
    for name, (content, told) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=told) as caught:
            read_photo(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_photo(tmp_path / "nowhere.jpg")


def test_a_video_comes_frame_by_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4")
    facts = look_at_video(path)
    assert (facts.width, facts.height, facts.frames_per_second, facts.frames) == (64, 48, 10.0, 3)
    means = [float(frame.mean()) for frame in video_frames(path)]
    assert means == pytest.approx([0, 60, 120], abs=6)
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(InputError, match="no video that can be read"):
        look_at_video(tmp_path / "bad.mp4")
