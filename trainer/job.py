"""What a training run is given and what it gives back: by value, and light to import for those who only plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from storage.errors import DamageError, InputError
from storage.objects import is_url
from trainer.config import StudentRecipe

CHECKPOINT = "checkpoint.pt"
"""The last checkpoint while a run is going on; gone when it is done."""
STUDENT = "student"
"""The best student, when the run is done (`models.student.Student.load`)."""
PICTURES_PNG = "pictures.png"
"""Its answers on validation samples, over their labels."""
RESULT = "result.json"
"""Written last: the run is done."""


def student_folder(path: Path) -> Path:
    """The student at a path that a person names: the folder itself, or the only one called STUDENT in it, which may be
    a training's folder, a seed's, a name's or that of all students.

    Raises InputError where several are there.
    """
    if _is_student(path):
        return path
    found = [
        inner
        for above in ("", "*/", "*/*/", "*/*/*/")
        for inner in sorted(path.glob(above + STUDENT))
        if _is_student(inner)
    ]
    if len(found) > 1:
        raise InputError(f"{path}: {len(found)} students are in it; name one of them: {', '.join(map(str, found))}")
    return found[0] if found else path


def _is_student(folder: Path) -> bool:
    return (folder / "student.json").is_file()  # models.student, which would bring torch along, writes it


PinnedSet = tuple[str, Path | str, str, float]
"""A data set of the mix at one snapshot: its name, the cache's folder or its URL on an object store, the snapshot's
digest, its weight."""


@dataclass(frozen=True)
class TrainJob:
    """One student and one seed; everything by value, so that it can be sent to another process."""

    name: str
    seed: int
    recipe: StudentRecipe
    snapshots: tuple[PinnedSet, ...]
    hand_model: Path | None
    """None: the one that is attached to the first cache."""
    out_dir: Path
    identity: str
    """Digest of what decides the weights; a checkpoint or result of another identity is not continued."""
    weights: Path | None = None
    """Pretrained backbone weights, already found."""
    mocap: Path | None = None
    """Real hands for the pose prior, already found."""
    device: str = "auto"
    """auto: the GPU if there is one."""
    disk_cache: Path | None = None
    """Where shards of remote caches are kept, `disk_cache_gb` of them; None: in the user's cache folder."""

    @property
    def remote(self) -> bool:
        """Whether a cache of the mix lies on an object store."""
        return any(is_url(cache) for _, cache, _, _ in self.snapshots)


@dataclass(frozen=True)
class TrainResult:
    """What result.json says."""

    name: str
    seed: int
    identity: str
    steps: int
    best_step: int
    validation: dict[str, float]
    """Of the best step: loss, pa_mpjpe_mm, ...; empty when nothing was held out."""
    params_m: float
    seconds: float
    """Of the process that finished it."""
    student: Path
    """The folder of the best student."""


class Callbacks(Protocol):
    """Who wants to know (MLflow, a progress bar, a log); the loop knows none of them."""

    def on_start(self, params: Mapping[str, Any]) -> None: ...
    def on_progress(self, step: int) -> None: ...  # after every step, so it must cost nothing
    def on_step(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def on_validation(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def on_pictures(self, step: int, path: Path) -> None: ...
    def on_end(self, result: TrainResult) -> None: ...


class Silent:
    """Callbacks that do nothing; a base for those that want only some."""

    def on_start(self, params: Mapping[str, Any]) -> None: ...
    def on_progress(self, step: int) -> None: ...
    def on_step(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def on_validation(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def on_pictures(self, step: int, path: Path) -> None: ...
    def on_end(self, result: TrainResult) -> None: ...


def read_result(out_dir: Path) -> TrainResult | None:
    """The result of a finished run, or None; DamageError if result.json is not what `train` writes."""
    path = out_dir / RESULT
    if not path.is_file():
        return None
    try:
        return TrainResult(**json.loads(path.read_bytes()), student=out_dir / STUDENT)
    except (ValueError, TypeError) as error:
        raise DamageError(f"{path} is damaged ({error}); delete it and run `handstill run train`") from error


def params_of(job: TrainJob) -> dict[str, Any]:
    """The recipe, flat: distill.outputs, loss.betas, ..., with the seed and the strategy's name."""
    flat: dict[str, Any] = {"seed": job.seed, "strategy": job.recipe.distill.strategy}
    for key, value in job.recipe.model_dump(mode="json").items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat
