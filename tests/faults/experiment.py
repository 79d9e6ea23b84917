"""An experiment whose shards take several batches each, workdirs beside one another, and what must be equal in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.faults.driver import workdir_of
from tests.tiny_experiment import configure, make_experiment, tar_path, write_hands

SHARDS = 7
"""Three of each tar of the training set, one of the evaluation set."""
STEPS = 6
CHANGES: dict[str, Any] = {
    "workdir": "calm",
    "cache.samples_per_shard": 8,
    "teacher.batch_size": 2,  # more batches a shard than are decoded ahead of a teacher that stands still
    "students.plain!": None,
    "students.hybrid.on": ["alpha"],
    "train.on": ["alpha"],
    "datasets.beta!": None,
    "train.steps": STEPS,
}


def prepare(folder: Path) -> Path:
    """Tars, teacher and `calm.yaml`: six shards of eight batches to train on, one student."""
    config = make_experiment(folder, CHANGES).rename(folder / "calm.yaml")
    for index in (0, 1):
        write_hands(tar_path(folder, "alpha", index), "alpha", index, count=24)
    return config


def beside(calm: Path, name: str, changes: Mapping[str, Any] | None = None) -> Path:
    """The same experiment in another workdir."""
    config = calm.with_name(f"{name}.yaml")
    config.write_text(calm.read_text())
    return configure(config, {"workdir": name} | dict(changes or {}))


def results(config: Path) -> dict[str, str]:
    """What must not depend on what was killed: digests by path. Of caches every file and folder, of others no times."""
    root = workdir_of(config)
    found = [*_below(root / "cache"), *_below(root / "manifests")]
    found += [*root.glob("students/*/*/*/student/*"), *root.glob("students/*/*/*/pictures.png")]
    found += [*root.glob("students/*/*/*/identity.json"), *root.glob("evaluations/*/*/*/samples.parquet")]
    return {path.relative_to(root).as_posix(): _digest(path) for path in found}


def cache_of(config: Path) -> dict[str, str]:
    """The part of `results` that the teach stage makes."""
    return {name: digest for name, digest in results(config).items() if name.startswith("cache/")}


def leftovers(config: Path) -> list[Path]:
    """Files that were being written."""
    return [path for path in workdir_of(config).rglob("*") if ".partial" in path.name]


def _below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
