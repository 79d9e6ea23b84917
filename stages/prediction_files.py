"""What `predict` writes of a photograph: hands.json, an overlay, a mesh a hand; whole or not at all.

`<out>/<name>.hands/` holds them all, and is replaced as a whole, so that numbers, meshes and pictures always belong
together. docs/conventions.md explains frames and units, which hands.json states too.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from models.photo_hands import PredictedHand
from storage.durable import canonical_json, partial_path, publish_directory, remove_tree
from storage.errors import InputError, WorkError

MeshFormat = Literal["obj", "ply", "glb"]
MESH_FORMATS: tuple[MeshFormat, ...] = ("obj", "ply", "glb")
HANDS, FRAMES, OVERLAY, OVERLAY_VIDEO = "hands.json", "frames.jsonl", "overlay.jpg", "overlay.mp4"
FORMAT_VERSION = 1

CONVENTIONS = {
    "photo_px": "pixels of the picture, upright as its orientation tag says: x right, y down, centres at whole numbers",
    "camera": "the photograph's camera at the origin: x right, y down, z forward; metres. Pixel = focal_px * (x, y) / z"
    " + principal_point_px. Depth is a convention unless the focal length is the camera's own",
    "joints": "21, OpenPose order: wrist, then thumb, index, middle, ring, pinky, each from the base to the tip",
    "mano": "axis-angle (radians) of MANO's right hand, absolute, no mean pose to be added; of a left hand's mirror"
    " image (x negated): negate y and z of each triple for the left hand itself",
    "mesh_files": "the camera's frame turned half round x, as viewers want it: x right, y up, z to the viewer; metres",
    "span": "the longer side that joints_2d_px take over the square's; is_dot: so little of it that the network did not"
    " see the hand",
    "box": "x, y of the upper left corner, width, height; photo_px. square: middle x, y and side that the network saw",
}


def hand_document(hand: PredictedHand, mesh: str | None = None) -> dict[str, Any]:
    """One hand for hands.json; `mesh`: its file's name."""
    return {
        "side": hand.box.side,
        "side_from": hand.box.side_from,
        "score": _rounded(hand.box.score),
        "box": _rounded(hand.box.as_list(), 2),
        "square": _rounded(list(hand.square_px), 2),
        "joints_2d_px": _rounded(hand.joints_2d_px, 2),
        "joints_3d_m": _rounded(hand.joints_3d_m),
        "mano": {
            "global_orient": _rounded(_axis_angles(hand.global_orient[None])[0]),
            "hand_pose": _rounded(_axis_angles(hand.hand_pose).reshape(-1)),
            "betas": _rounded(hand.betas),
            "mirrored": not hand.box.right,
        },
        "camera": {
            "focal_px": _rounded(hand.focal_px, 3),
            "principal_point_px": _rounded(hand.principal_point_px, 2),
            "translation_m": _rounded(hand.translation_m),
            "crop_s_tx_ty": _rounded(hand.cam),
        },
        "in_front": hand.in_front,
        "disagreement_px": _rounded(hand.disagreement_px, 3),
        "span": _rounded(hand.span, 4),
        "is_dot": hand.is_dot,
        "mesh": mesh,
    }


def _rounded(values: Any, digits: int = 6) -> Any:
    """Plain numbers, a micrometre at the finest; JSON has no word for what is not finite, so that becomes null."""
    if values is None:
        return None
    rounded = np.round(np.asarray(values, np.float64), digits)
    plain = np.array(rounded, dtype=object)
    plain[~np.isfinite(rounded)] = None
    return plain.tolist()


def _axis_angles(matrices: NDArray[Any]) -> NDArray[np.float64]:
    """(n, 3, 3) to (n, 3) radians."""
    return np.stack([cv2.Rodrigues(np.asarray(matrix, np.float64))[0].reshape(3) for matrix in matrices])


def mesh_bytes(hand: PredictedHand, file_format: MeshFormat) -> bytes:
    """The hand's mesh as a file, at its place before the camera; y up, z towards the viewer."""
    vertices = hand.vertices_m * [1.0, -1.0, -1.0]
    mesh = trimesh.Trimesh(vertices, hand.faces, process=False, validate=False)
    extra = (
        {"header": f"{hand.box.side} hand; metres; x right, y up, z towards the viewer"} if file_format == "obj" else {}
    )
    data = mesh.export(file_type=file_format, **extra)
    return data.encode() if isinstance(data, str) else bytes(data)


def write_photo(
    folder: Path, facts: Mapping[str, Any], hands: Sequence[PredictedHand], overlay: NDArray[np.uint8], mesh: MeshFormat
) -> dict[str, Any]:
    """Write a picture's folder; hands.json as a document. `facts`: of the picture and of the network."""
    names = [f"hand-{index}-{hand.box.side}.{mesh}" for index, hand in enumerate(hands)]
    documents = [hand_document(hand, name) for hand, name in zip(hands, names, strict=True)]
    document = {"format_version": FORMAT_VERSION, **facts, "conventions": CONVENTIONS, "hands": documents}
    with result_folder(folder) as partial:
        for name, hand in zip(names, hands, strict=True):
            (partial / name).write_bytes(mesh_bytes(hand, mesh))
        (partial / OVERLAY).write_bytes(_jpeg(overlay))
        (partial / HANDS).write_bytes(canonical_json(document))
    return document


@contextmanager
def result_folder(final: Path) -> Iterator[Path]:
    """A folder to write into that becomes `final` when all went well, in place of what an earlier call left there.

    Raises InputError when something else stands there.
    """
    check_replaceable(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(final)
    partial.mkdir()
    try:
        yield partial
        if final.exists():
            remove_tree(final)
        if not publish_directory(partial, final):
            raise WorkError(f"{final}: another `handstill predict` wrote it at the same time; run this one again")
    except BaseException:
        if partial.exists():
            remove_tree(partial)
        raise


def check_replaceable(folder: Path) -> None:
    """Raise InputError where a folder's name is taken by something that `predict` did not write."""
    if folder.exists() and not (folder / HANDS).is_file():
        raise InputError(f"{folder} is there and holds no {HANDS}: it is not replaced; give another --out")


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="JPEG", quality=92)
    return data.getvalue()


class VideoFiles:
    """A video's results as they come: a line of frames.jsonl and a frame of overlay.mp4 each; nothing is kept."""

    def __init__(self, folder: Path, frames_per_second: float) -> None:
        self._folder, self._rate = folder, frames_per_second
        self._lines = (folder / FRAMES).open("w", encoding="utf-8")
        self._overlay: cv2.VideoWriter | None = None
        self.frames = self.frames_with_hands = self.hands = self.dots = 0

    def add(self, hands: Sequence[PredictedHand], overlay: NDArray[np.uint8]) -> None:
        """The next frame."""
        if self._overlay is None:
            size = overlay.shape[1], overlay.shape[0]
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            path = str((self._folder / OVERLAY_VIDEO).absolute())
            self._overlay = cv2.VideoWriter(path, cv2.CAP_FFMPEG, codec, self._rate, size)
            if not self._overlay.isOpened():
                raise WorkError(f"{OVERLAY_VIDEO}: OpenCV cannot write a video of {size[0]} x {size[1]} px here")
        self._overlay.write(cv2.cvtColor(overlay, cv2.COLOR_RGB2BGR))
        line = {
            "frame": self.frames,
            "seconds": round(self.frames / self._rate, 6),
            "hands": [hand_document(hand) for hand in hands],
        }
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self.frames += 1
        self.frames_with_hands += bool(hands)
        self.hands += len(hands)
        self.dots += sum(hand.is_dot for hand in hands)

    def close(self) -> None:
        """Finish both files."""
        self._lines.close()
        if self._overlay is not None:
            self._overlay.release()

    def finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write hands.json, which tells what the other files are; its document."""
        self.close()
        document = {
            "format_version": FORMAT_VERSION,
            **facts,
            "conventions": CONVENTIONS,
            "frames": self.frames,
            "frames_with_hands": self.frames_with_hands,
            "hands_total": self.hands,
            "dots_total": self.dots,
            "frames_file": FRAMES,
        }
        (self._folder / HANDS).write_bytes(canonical_json(document))
        return document
