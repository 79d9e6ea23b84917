"""pipeline.yaml as one typed, frozen value, with the sections that only the pipeline reads."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from stages.config import DatasetConfig, SynthesiseConfig, TeacherConfig
from storage.config import CacheConfig, Section
from trainer.config import CompareConfig, EvaluateConfig, StudentConfig, TrainConfig, grid_problem

Role = Literal["train", "evaluate"]


class TrackingConfig(Section):
    """Where MLflow keeps the runs."""

    uri: str | None = None
    """null: a SQLite file in the workdir; the environment's MLFLOW_TRACKING_URI wins over both."""
    experiment: str = Field(default="handstill", min_length=1)


class ClusterConfig(Section):
    """Where the work runs, and how much of it may."""

    address: str = Field(default="local", pattern=r"^(local|auto|ray://.+)$")
    """local: a Ray of our own on this machine, loopback only. auto: the cluster we are on. ray://…: that cluster."""
    max_retries: int = Field(default=3, ge=0)
    """How often a unit of work whose worker died is given to another."""
    max_gpu_hours: float | None = Field(default=None, gt=0)
    """A run whose plan costs more stops before it starts."""


class PipelineConfig(Section):
    """The whole experiment; sections in the order in which they run."""

    schema_version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    workdir: str = Field(min_length=1)
    """All outputs go here. A relative path starts at this file's folder."""
    seed: int = Field(default=0, ge=0)
    synthesise: SynthesiseConfig | None = None
    datasets: dict[str, DatasetConfig]
    teacher: TeacherConfig
    cache: CacheConfig = CacheConfig()
    train: TrainConfig
    students: dict[str, StudentConfig]
    evaluate: EvaluateConfig
    compare: CompareConfig = CompareConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _names_refer_to_datasets(self) -> PipelineConfig:
        wrong = [*self._unknown_dataset_names(), *self._unserved_students()]
        if not self.students:
            wrong.append("students: names no student; want at least one")
        if wrong:
            raise PydanticCustomError("references", "{problems}", {"problems": "\n".join(wrong)})
        return self

    def _unknown_dataset_names(self) -> Iterable[str]:
        places: list[tuple[str, Iterable[str]]] = [("train.on", self.train.on), ("evaluate.on", self.evaluate.on)]
        places += [(f"students.{name}.on", student.resolve(self.train).on) for name, student in self.students.items()]
        if self.synthesise is not None:
            places.append(("synthesise.sets", self.synthesise.sets))
        for place, names in places:
            for name in names:
                if name not in self.datasets:
                    yield f"{place}: no data set is named {name!r}{did_you_mean(name, self.datasets)}"

    def _unserved_students(self) -> Iterable[str]:
        for name, student in self.students.items():
            problem = grid_problem(student.distill, self.cache.features.grid)
            if problem is not None:
                yield f"students.{name}: {problem}"

    def datasets_of(self, role: Role) -> list[str]:
        """The data sets that some student trains on, or that are evaluated on, in the file's order."""
        if role == "evaluate":
            used = set(self.evaluate.on)
        else:
            used = {name for student in self.students.values() for name in student.resolve(self.train).on}
        return [name for name in self.datasets if name in used]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or what there is to choose from."""
    known = [str(item) for item in known]
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def resolve_path(path: str, base: Path) -> Path:
    """A path of the file: ~ expands, relative ones start at the folder of the configuration file."""
    return (base / Path(path).expanduser()).absolute()
