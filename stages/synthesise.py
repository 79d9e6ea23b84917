"""Data sets of a rendered open hand, written where the `datasets` section expects them, in HaMeR's own formats.

A unit is one file of a set: a tar, or an evaluation npz with its pictures and truth files. Beside it stands a record
(`<file>.synthesised.json`) of what it was made from and what was written; the same settings find it and do nothing.
A file without such a record is somebody's data and is never overwritten.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.hand_model import OPEN_HAND, HandModel, hand_model_digest, load_hand_model
from stages.config import DatasetConfig, HamerNpzDataset, HamerTarDataset, SynthesiseConfig
from stages.ingest import expand_braces
from stages.sources import path_from
from storage.durable import canonical_json, partial_path, sha256_file, write_bytes_atomic
from storage.errors import InputError

if TYPE_CHECKING:
    from stages.hand_scenes import HandPicture

ALGORITHM_VERSION = 2
"""Raised when the same seed gives other pictures: everything synthesised before is then made anew."""


@dataclass(frozen=True)
class SynthesiseUnit:
    """One file to make, with all that its bytes depend on."""

    path: Path
    """The tar or npz."""
    dataset: str
    seed: int
    first: int
    """Number of the first hand, within the set."""
    hands: int
    hand_model: str
    """A file, or open-hand."""
    hand_model_sha256: str
    image_dir: Path | None = None
    """Of an npz: where its pictures go."""
    truth_xyz: Path | None = None
    truth_verts: Path | None = None

    @property
    def record(self) -> Path:
        """The file that says what was made."""
        return self.path.with_name(f"{self.path.name}.synthesised.json")

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the bytes, as far as we do: libraries (embree, libjpeg) may move last bits."""
        return {
            "algorithm_version": ALGORITHM_VERSION,
            "dataset": self.dataset,
            "first": self.first,
            "hand_model_sha256": self.hand_model_sha256,
            "hands": self.hands,
            "seed": self.seed,
        }


def synthesise_units(
    config: SynthesiseConfig, datasets: Mapping[str, DatasetConfig], base: Path
) -> list[SynthesiseUnit]:
    """The files that the configuration asks for. `base`: the folder that relative paths start at.

    Raises InputError for a set that `datasets` does not name, and for files there that were not synthesised.
    """
    hand_model = OPEN_HAND if config.hand_model == OPEN_HAND else str(path_from(config.hand_model, base))
    digest = hand_model_digest(load_hand_model(hand_model))
    units: list[SynthesiseUnit] = []
    for name, wanted in config.sets.items():
        if name not in datasets:
            known = ", ".join(sorted(datasets)) or "none"
            raise InputError(f"synthesise.sets.{name}: no data set of this name; datasets has {known}.")
        dataset = datasets[name]
        paths = _files_of(dataset, base)
        counts = [len(share) for share in np.array_split(np.arange(wanted.hands), len(paths))]
        starts = np.cumsum([0, *counts[:-1]]).tolist()
        places = _npz_places(dataset, base) if isinstance(dataset, HamerNpzDataset) else {}
        for path, first, hands in zip(paths, starts, counts, strict=True):
            units.append(SynthesiseUnit(path, name, wanted.seed, first, hands, hand_model, digest, **places))
    for unit in units:
        _refuse_foreign_files(unit)
    return units


def unit_done(unit: SynthesiseUnit) -> bool:
    """Whether the unit's files are there, of the recorded sizes, and made from the same settings.

    Sizes only: a plan must not read terabytes. What was changed since in place is found by ingest, which hashes.
    """
    record = _read_record(unit)
    if record.get("identity") != unit.identity or not record.get("files"):
        return False
    places = (unit.image_dir, unit.truth_xyz, unit.truth_verts)  # as `datasets` names them now
    if not all(place is None or place.exists() for place in places):
        return False
    return all(_has_size(unit.path.parent / name, file["bytes"]) for name, file in record["files"].items())


def run_unit(unit: SynthesiseUnit) -> None:
    """Make the unit's files; when it returns they are whole and recorded."""
    unit.path.parent.mkdir(parents=True, exist_ok=True)
    # First a record without files: should this process die, the next one knows that what it finds is ours.
    write_bytes_atomic(unit.record, canonical_json({"identity": unit.identity, "files": {}}))
    written = _write_npz_set(unit) if unit.image_dir is not None else _write_tar(unit)
    files = {_relative(path, unit.path.parent): _digest(path) for path in written}
    write_bytes_atomic(unit.record, canonical_json({"identity": unit.identity, "files": files}))


def draw_pictures(hand: HandModel, seed: int, numbers: Sequence[int] | range) -> Iterator[HandPicture]:
    """The pictures of a set that have these numbers; each depends on the set's seed and its own number alone."""
    from stages.hand_scenes import Studio  # the renderer is not needed to plan

    studio = Studio(hand)
    for number in numbers:
        yield studio.take(scene_rng(seed, number))


def scene_rng(seed: int, number: int) -> np.random.Generator:
    """The generator of one scene: the same whatever else is drawn."""
    digest = hashlib.sha256(f"scene\n{seed}\n{number}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _write_tar(unit: SynthesiseUnit) -> list[Path]:
    from stages.hamer_files import write_tar

    numbers = range(unit.first, unit.first + unit.hands)
    keys = (f"{unit.dataset}/{number:08d}" for number in numbers)
    partial = partial_path(unit.path)
    write_tar(partial, zip(keys, _pictures(unit), strict=True))
    partial.replace(unit.path)
    return [unit.path]


def _write_npz_set(unit: SynthesiseUnit) -> list[Path]:
    from stages.hamer_files import evaluation_arrays, truth_json

    assert unit.image_dir is not None
    unit.image_dir.mkdir(parents=True, exist_ok=True)
    names = [f"{number:08d}.jpg" for number in range(unit.hands)]
    written = [unit.image_dir / name for name in names]
    pictures: list[HandPicture] = []  # without their bytes: a set's labels fit in memory, its pictures need not
    for path, picture in zip(written, _pictures(unit), strict=True):
        path.write_bytes(picture.jpeg)
        pictures.append(replace(picture, jpeg=b""))
    truths = [
        (unit.truth_xyz, [picture.keypoints_3d for picture in pictures]),
        (unit.truth_verts, [picture.vertices for picture in pictures]),
    ]
    for truth_path, points in truths:
        if truth_path is not None:
            truth_path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(truth_path, truth_json(points))
            written.append(truth_path)
    archive = io.BytesIO()
    np.savez(archive, **evaluation_arrays(names, pictures))  # type: ignore[arg-type]  # numpy types its keyword only
    write_bytes_atomic(unit.path, archive.getvalue())
    return [*written, unit.path]


def _pictures(unit: SynthesiseUnit) -> Iterator[HandPicture]:
    hand = load_hand_model(unit.hand_model)
    return draw_pictures(hand, unit.seed, range(unit.first, unit.first + unit.hands))


def _files_of(dataset: DatasetConfig, base: Path) -> list[Path]:
    if isinstance(dataset, HamerTarDataset):
        patterns = [dataset.path] if isinstance(dataset.path, str) else dataset.path
        return [path_from(path, base) for pattern in patterns for path in expand_braces(pattern)]
    return [path_from(dataset.path, base)]


def _npz_places(dataset: HamerNpzDataset, base: Path) -> dict[str, Path | None]:
    return {
        "image_dir": path_from(dataset.image_dir, base),
        "truth_xyz": path_from(dataset.truth_xyz, base) if dataset.truth_xyz else None,
        "truth_verts": path_from(dataset.truth_verts, base) if dataset.truth_verts else None,
    }


def _refuse_foreign_files(unit: SynthesiseUnit) -> None:
    if unit.record.exists():
        return
    theirs = [path for path in (unit.path, unit.truth_xyz, unit.truth_verts) if path is not None and path.exists()]
    if unit.image_dir is not None and unit.image_dir.is_dir() and any(unit.image_dir.iterdir()):
        theirs.append(unit.image_dir)
    if theirs:
        raise InputError(
            f"synthesise.sets.{unit.dataset} would overwrite {theirs[0]}, which was not synthesised: no"
            f" {unit.record.name} beside it. Give the data set another path, or take it out of synthesise.sets."
        )


def _read_record(unit: SynthesiseUnit) -> dict[str, Any]:
    """What the record says; nothing, when there is none or it cannot be read: the unit is then made again."""
    try:
        found = json.loads(unit.record.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _has_size(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _relative(path: Path, folder: Path) -> str:
    """The path from `folder`, so that a record moves with its data."""
    import os.path

    return Path(os.path.relpath(path, folder)).as_posix()
