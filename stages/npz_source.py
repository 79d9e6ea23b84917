"""The hands in one of HaMeR's evaluation npz files, their pictures in a folder, their 3D truth in JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.annotations import Float32Array, HandAnnotation, UnusableError, read_annotation
from stages.config import HamerNpzDataset
from stages.pictures import Picture, look_at
from stages.sources import FoundHand, SourceScan, path_from, relative_to_base
from storage.durable import sha256_file
from storage.errors import InputError
from storage.inputs import bring_all
from storage.npz import read_npz

Rows = npt.NDArray[Any]

_OPTIONAL: dict[str, tuple[str, tuple[int, ...], float]] = {
    "right": ("right", (), 1.0),
    "hand_pose": ("hand_pose", (48,), 0.0),
    "betas": ("betas", (10,), 0.0),
    "has_hand_pose": ("has_hand_pose", (), 0.0),
    "has_betas": ("has_betas", (), 0.0),
    "hand_keypoints_2d": ("keypoints_2d", (21, 3), 0.0),
    "hand_keypoints_3d": ("keypoints_3d", (21, 4), 0.0),
}
"""npz name -> (a tar's name for it, shape of a row, the value of every row where it is missing)."""


@dataclass(frozen=True)
class _Columns:
    """The npz's arrays by a tar's names, a row a hand."""

    names: list[str]
    labels: dict[str, Rows]
    extra_info: Rows | None

    def annotation(self, row: int) -> HandAnnotation | str:
        hand = {name: column[row] for name, column in self.labels.items()}
        if self.extra_info is not None:
            hand["extra_info"] = self.extra_info[row]
        try:
            return read_annotation(hand)
        except UnusableError as error:
            return str(error)


class _NpzHands:
    def __init__(self, config: HamerNpzDataset, source: Path, base: Path) -> None:
        self._config, self._source, self._base = config, source, base
        self.sha256 = sha256_file(source)

    def hands(self) -> Iterator[FoundHand]:
        columns = _read_columns(self._source)
        size = len(columns.names)
        xyz = _read_truth(self._config.truth_xyz, "truth_xyz", self._base, size)
        vertices = _read_truth(self._config.truth_verts, "truth_verts", self._base, size)
        pictures = self._pictures(columns.names)
        for row, name in enumerate(columns.names):
            truth_xyz, truth_vertices = (None if truth is None else truth[row] for truth in (xyz, vertices))
            annotation = columns.annotation(row)
            if not all(truth is None or np.isfinite(truth).all() for truth in (truth_xyz, truth_vertices)):
                annotation, truth_xyz, truth_vertices = (
                    "bad-truth: its 3D truth holds values that are not finite",
                    None,
                    None,
                )
            yield FoundHand(_printable(name), row, pictures[name], annotation, truth_xyz, truth_vertices)

    def _pictures(self, names: list[str]) -> dict[str, Picture]:
        folder = path_from(self._config.image_dir, self._base)
        bring_all((folder / name for name in dict.fromkeys(names) if _is_usable(name)), optional=True)
        if not folder.is_dir():
            raise InputError(
                f"image_dir {folder} is no folder. Wanted: the folder that the names in {self._source} start at."
            )
        pictures = {name: self._picture(folder, name) for name in dict.fromkeys(names)}
        if pictures and all(picture.problem for picture in pictures.values()):
            first = next(iter(pictures.values()))
            raise InputError(
                f"{self._source}: none of its {len(pictures)} pictures can be used under image_dir {folder} "
                f"({first.problem}). Wanted: the folder that its names start at."
            )
        return pictures

    def _picture(self, folder: Path, name: str) -> Picture:
        if not _is_usable(name):
            shown = _printable(name)
            return Picture(shown, problem=f"no-picture: its name {shown} leads out of image_dir or cannot be printed")
        path = folder / name
        try:
            content = path.read_bytes()
        except OSError as error:
            return Picture(name, problem=f"no-picture: {name} cannot be read ({error.strerror})")
        return look_at(content, name, path=relative_to_base(path, self._base))


def npz_hands(config: HamerNpzDataset, source: Path, base: Path) -> SourceScan:
    """A scan of one npz, its pictures and its truth."""
    return _NpzHands(config, source, base)


def _is_usable(name: str) -> bool:
    return name.isprintable() and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)[1:-1]


def _read_columns(path: Path) -> _Columns:
    arrays = read_npz(path, ["imgname", "center", "scale", "extra_info", *_OPTIONAL])
    for name in ("imgname", "center", "scale"):
        if name not in arrays:
            raise InputError(f"{path}: has no array {name!r}. Wanted: one of HaMeR's evaluation npz files.")
    names = [
        name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in arrays["imgname"].ravel()
    ]
    size = len(names)
    labels = {
        "center": _column(arrays["center"], (size, 2), "center", path),
        "scale": _scale(arrays["scale"], size, path),
    }
    for name, (label, shape, missing) in _OPTIONAL.items():
        column = arrays.get(name)
        full = (size, *shape)
        labels[label] = np.full(full, missing, np.float32) if column is None else _column(column, full, name, path)
    extra_info = arrays.get("extra_info")
    return _Columns(names, labels, None if extra_info is None else _column(extra_info, (size,), "extra_info", path))


def _column(array: Rows, shape: tuple[int, ...], name: str, path: Path) -> Rows:
    if array.size != np.prod(shape) or (array.ndim and len(array) != shape[0]):
        raise InputError(f"{path}: array {name!r} has shape {array.shape}, wanted {shape}.")
    return array.reshape(shape)


def _scale(array: Rows, size: int, path: Path) -> Rows:
    """(N, 2) widths and heights / 200 of boxes that the npz has in pixels, as pairs or as one number for both."""
    if array.dtype.kind not in "iuf":
        raise InputError(f"{path}: array 'scale' holds {array.dtype.name}, wanted numbers.")
    single = array.size == size
    column = _column(array, (size, 1) if single else (size, 2), "scale", path)
    return np.broadcast_to(column.astype(np.float64) / 200, (size, 2))


def _read_truth(configured: str | None, key: str, base: Path, size: int) -> Float32Array | None:
    """(N, points * 3) of a JSON file as FreiHAND and HO3D publish their evaluation truth, metres."""
    if configured is None:
        return None
    path = path_from(configured, base)
    try:
        with np.errstate(over="ignore"):  # becomes inf, and its hand is left out
            truth = np.asarray(json.loads(path.read_bytes()), np.float32)
    except OSError as error:
        raise InputError(f"{key}: {path} cannot be read ({error.strerror}).") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{key}: {path} is no JSON list of equal lists of points ({str(error)[:120]}).") from error
    points = "21 x 3" if key == "truth_xyz" else "V x 3"
    if truth.ndim != 3 or truth.shape[2] != 3 or (key == "truth_xyz" and truth.shape[1] != 21) or len(truth) != size:
        raise InputError(
            f"{key}: {path} has shape {truth.shape}, wanted {size} x {points}: one entry a row of the npz."
        )
    return truth.reshape(size, -1)
